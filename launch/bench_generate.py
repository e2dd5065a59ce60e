"""`gatewise bench generate`: text from a compressed model, beside the model it was made from.

Every candidate generates the same number of tokens in a process of its own, whose peak memory is
taken; rounds go through all candidates, so that a machine that changes its speed changes it for
all.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gatewise.compression.config import Weights
from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.machine import available_cores, cpu_features, cpu_model
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.spawn import run_ranks
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import Precision, RunConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["GenerateBenchConfig", "measure_rank", "run", "usage"]

_BASE = "bf16"  # what the others are compared with


@dataclass(kw_only=True, slots=True)
class GenerateBenchConfig:
    """Settings of the benchmark."""

    checkpoint: str | None = None  # run folder of `gatewise compress`
    dense: str | None = None  # the uncompressed run; null: the one that was compressed
    prompt: str = "def "  # text to continue
    tokens: int = 64  # drawn by each candidate in each round
    rounds: int = 3  # each goes through all candidates
    threads: int = 1  # of each process
    seed: int = 0  # of the tokens that are drawn
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("rounds", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    stored: "Stored"  # with the precision it runs in
    weights: Weights


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text(
        "bench generate checkpoint=PATH",
        "Generate from a compressed model and from the one it was made from, in fp32 and in bf16:\n"
        "tokens per second, the weights' memory and each process's peak.",
        field_table(load_settings(GenerateBenchConfig, arguments)),
    )


def run(overrides: Sequence[str]) -> int:
    """Measure, print a table, store `rows` in `result.json` and return the exit code."""
    config = load_settings(GenerateBenchConfig, overrides)
    if config.checkpoint is None:
        raise ConfigError("checkpoint is not set; give checkpoint=PATH, a run of compress")
    candidates = _candidates(config, config.checkpoint)
    folder = RunFolder.choose(config.run.dir, "bench-generate")
    folder.write_environment(["bench", "generate", *overrides])
    return run_session("bench generate", folder, lambda: _measure(config, candidates, folder))


def measure_rank(
    place: Place, candidate: _Candidate, prompt: str, tokens: int, seed: int
) -> dict[str, Any]:
    """Generate in a process of its own; the text is dropped.

    Where a text ends early another one is begun, so that all candidates draw as many tokens.
    """
    from gatewise.compression.runtime import weight_bytes
    from gatewise.launch.restore import restore_model, restore_tokenizer
    from gatewise.training.generate import Sampling, Tally, stream_text

    tally = Tally()
    with join_ranks(place, ParallelConfig()) as runtime:
        model = restore_model(candidate.stored, device=runtime.device, weights=candidate.weights)
        tokenizer = restore_tokenizer(candidate.stored)
        for number in range(tokens):
            sampling = Sampling(tokens=tokens - tally.tokens, seed=seed + number)
            for _ in stream_text(model, tokenizer, prompt, sampling, tally):
                pass
            if tally.tokens >= tokens - 1:
                break
        if not tally.tokens:
            raise ConfigError(f"prompt is {prompt!r}, behind which every text ends; give another")
        return {
            "tokens_per_second": tally.tokens_per_second,
            "tokens": tally.tokens,
            "prompt_seconds": tally.prompt_seconds,
            "weights_mb": weight_bytes(model) / 2**20,
        }


def _candidates(config: GenerateBenchConfig, checkpoint: str) -> list[_Candidate]:
    import json

    from gatewise.launch.restore import open_checkpoint

    small = open_checkpoint(checkpoint)
    if not small.is_compressed:
        raise ConfigError(
            f"checkpoint is {checkpoint!r}, which is not compressed; give a run of "
            "`gatewise compress`"
        )
    report = json.loads((small.path / "report.json").read_bytes())
    whole = open_checkpoint(config.dense or report["checkpoint"])
    bits = f"{report['bits']['experts']:.3g} bits"
    return [
        _Candidate(name, replace(stored, config=replace(stored.config, precision=kind)), weights)
        for name, stored, kind, weights in (
            ("fp32", whole, Precision.fp32, Weights.dequantised),
            (_BASE, whole, Precision.bf16, Weights.dequantised),
            (f"{bits}, else fp32", small, Precision.fp32, Weights.packed),
            (f"{bits}, else bf16", small, Precision.bf16, Weights.packed),
        )
    ]


def _measure(
    config: GenerateBenchConfig, candidates: Sequence[_Candidate], folder: RunFolder
) -> Mapping[str, Any]:
    found: list[list[dict[str, Any]]] = [[] for _ in candidates]
    for number in range(config.rounds):
        for index in range(len(candidates)):
            turn = (index + number) % len(candidates)
            task = (candidates[turn], config.prompt, config.tokens, config.seed)
            (outcome,) = run_ranks(measure_rank, 1, task, threads=config.threads, logs=folder.logs)
            found[turn].append({**(outcome.result or {}), "peak_rss_mb": outcome.peak_rss_mb})
        print(f"round {number + 1}/{config.rounds}", flush=True)
    base = next(i for i, candidate in enumerate(candidates) if candidate.name == _BASE)
    rows = [
        _row(candidate, rounds, found[base])
        for candidate, rounds in zip(candidates, found, strict=True)
    ]
    _print_rows(rows)
    return {
        "rows": rows,
        "threads": config.threads,
        "cpu": cpu_model(),
        "cores": available_cores(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
    }


def _row(
    candidate: _Candidate, rounds: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    speeds = [float(one["tokens_per_second"]) for one in rounds]
    ratios = [
        speed / float(other["tokens_per_second"]) for speed, other in zip(speeds, base, strict=True)
    ]
    return {
        "candidate": candidate.name,
        "checkpoint": str(candidate.stored.path),
        "tokens": rounds[0]["tokens"],
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_rounds": speeds,
        "speedup_vs_bf16": statistics.median(ratios),
        "prompt_seconds": statistics.median(one["prompt_seconds"] for one in rounds),
        "weights_mb": rounds[0]["weights_mb"],
        "peak_rss_mb": statistics.median(one["peak_rss_mb"] for one in rounds),
    }


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'candidate':<22}{'tokens/s':>10}{'least':>8}{'most':>8}{'x bf16':>8}", end="")
    print(f"{'weights MiB':>13}{'peak MiB':>10}")
    for row in rows:
        speeds = row["tokens_per_second_rounds"]
        print(
            f"{row['candidate']:<22}{row['tokens_per_second']:>10.1f}{min(speeds):>8.1f}"
            f"{max(speeds):>8.1f}{row['speedup_vs_bf16']:>8.2f}{row['weights_mb']:>13.1f}"
            f"{row['peak_rss_mb']:>10.0f}"
        )
