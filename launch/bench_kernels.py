"""`gatewise bench kernels`: one token through packed low-bit weights, beside torch's products.

All candidates run in one process, in interleaved rounds, on their own copies of the weights. Cold:
each call takes another copy, and the copies together do not fit into the caches. Hot: one copy.

Read `bench_products.py` first: it builds the candidates.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.lists import split_list
from gatewise.launch.machine import available_cores, cpu_features, cpu_model
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.training.config import RunConfig

if TYPE_CHECKING:
    from gatewise.launch.bench_products import Candidate  # imports torch

__all__ = ["KernelBenchConfig", "run", "usage"]

_BITS = (1, 2, 3, 4, 8)


@dataclass(kw_only=True, slots=True)
class KernelBenchConfig:
    """Settings of the kernel benchmark; lists are written with commas."""

    rows: int = 5632  # of the matrix
    columns: int = 2048  # of the matrix
    bits: str = "8,4,3,2,1"  # widths of our weights
    group: int = 128  # columns that share scale and zero
    threads: str = "1,2"  # threads of one process
    rounds: int = 9  # each times every candidate
    calls: int = 20  # of a candidate in a round
    footprint_mb: int = 192  # cold: the copies of a candidate take at least so much
    layer_bits: str = "2"  # widths of our experts in the MoE layer; empty: no layer
    hidden: int = 1024  # model width of the MoE layer
    expert_width: int = 2048  # inner width of its experts
    experts: int = 16  # of the layer
    top_k: int = 2  # experts of a token
    seed: int = 0  # of weights and tokens
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "rounds", "calls", "hidden", "expert_width", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.group < 8 or self.group % 8:
            raise ValueError(f"group is {self.group}; it must be a multiple of 8")
        if self.footprint_mb < 0:
            raise ValueError(f"footprint_mb is {self.footprint_mb}; it must be at least 0")
        if self.experts < self.top_k:
            raise ValueError(f"experts is {self.experts}; it must be at least top_k ({self.top_k})")
        for name, parse in (("bits", _width), ("layer_bits", _width), ("threads", _threads)):
            found = _split(getattr(self, name), name, parse)
            if not found and name != "layer_bits":
                raise ValueError(f"{name} is empty; give at least one value")


_WIDTHS = f"some of {', '.join(map(str, _BITS))}"
_ALLOWED = {
    "bits": _WIDTHS,
    "layer_bits": f"{_WIDTHS}, or nothing",
    "threads": f"whole numbers from 1 to this machine's cores ({available_cores()})",
}


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text(
        "bench kernels",
        "Time a matrix times one token, and a whole MoE layer with one token: fp32, bf16, torch's\n"
        "int8 and int4 products, and ours at 1 to 8 bits.",
        field_table(load_settings(KernelBenchConfig, arguments)),
    )


def run(overrides: Sequence[str]) -> int:
    """Measure, print a table, store `rows` in `result.json` and return the exit code."""
    config = load_settings(KernelBenchConfig, overrides)
    folder = RunFolder.choose(config.run.dir, "bench-kernels")
    folder.write_environment(["bench", "kernels", *overrides])
    return run_session("bench kernels", folder, lambda: _measure(config))


def _split(text: str, name: str, parse: Callable[[str], int]) -> list[int]:
    return split_list(text, name, parse, allowed=_ALLOWED[name])


def _width(text: str) -> int:
    if int(text) not in _BITS:
        raise ValueError(text)
    return int(text)


def _threads(text: str) -> int:
    if not 1 <= int(text) <= available_cores():
        raise ValueError(text)
    return int(text)


def _measure(config: KernelBenchConfig) -> dict[str, Any]:
    import torch

    from gatewise.launch.bench_products import layer_candidates, matrix_candidates
    from gatewise.moe.ops.native_packed import load_packed_kernels

    kernels = load_packed_kernels()
    footprint = config.footprint_mb * 2**20
    shapes: list[tuple[str, Callable[[], list[Candidate]]]] = [
        (
            f"{config.rows}x{config.columns}",
            lambda: matrix_candidates(
                (config.rows, config.columns),
                _split(config.bits, "bits", _width),
                group=config.group,
                footprint=footprint,
                seed=config.seed,
            ),
        )
    ]
    if config.layer_bits:
        shapes.append(
            (
                f"layer {config.hidden}x{config.expert_width}, {config.experts} top-{config.top_k}",
                lambda: layer_candidates(
                    (config.hidden, config.expert_width, config.experts, config.top_k),
                    _split(config.layer_bits, "layer_bits", _width),
                    group=config.group,
                    footprint=footprint,
                    seed=config.seed,
                ),
            )
        )
    before, rows = torch.get_num_threads(), []
    try:
        for shape, build in shapes:
            candidates = build()
            for threads in _split(config.threads, "threads", _threads):
                torch.set_num_threads(threads)
                for cache in ("cold", "hot"):
                    found = _time(candidates, cache, config)
                    rows += [
                        {"shape": shape, "cache": cache, "threads": threads} | r for r in found
                    ]
                    _print_rows(rows[-len(found) :])
            del candidates
    finally:
        torch.set_num_threads(before)
    return {
        "rows": rows,
        "instructions": kernels.instructions.name if kernels else "torch",
        "cpu": cpu_model(),
        "cores": available_cores(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
    }


def _time(
    candidates: "Sequence[Candidate]", cache: str, config: KernelBenchConfig
) -> list[dict[str, Any]]:
    """Time all candidates in interleaved rounds; the first is what the others are compared with."""
    times: list[list[float]] = [[] for _ in candidates]
    place = 0
    for candidate in candidates:
        candidate.call(0)
    for number in range(config.rounds):
        for index in range(len(candidates)):
            turn = (index + number) % len(candidates)
            candidate = candidates[turn]
            calls = []
            for _ in range(config.calls):
                place += 1
                copy = place if cache == "cold" else 0
                began = time.perf_counter()
                candidate.call(copy)
                calls.append(time.perf_counter() - began)
            times[turn].append(statistics.median(calls) * 1e6)
    rows = []
    for candidate, us in zip(candidates, times, strict=True):
        middle = statistics.median(us)
        ratios = [first / other for first, other in zip(times[0], us, strict=True)]
        rows.append(
            {
                "candidate": candidate.name,
                "bits": candidate.bits,
                "us_median": round(middle, 1),
                "us_spread": round(statistics.median(abs(value - middle) for value in us), 1),
                "speedup_vs_fp32": round(statistics.median(ratios), 3),
                "relative_error": candidate.relative_error,
                "weights_mb": round(candidate.weight_bytes / 2**20, 2),
            }
        )
    return rows


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\n{first['shape']}, {first['cache']}, {first['threads']} threads")
    print(f"{'candidate':<18}{'MiB':>8}{'us':>10}{'+-':>8}{'x fp32':>8}{'error':>10}")
    for row in rows:
        print(
            f"{row['candidate']:<18}{row['weights_mb']:>8.2f}{row['us_median']:>10.1f}"
            f"{row['us_spread']:>8.1f}{row['speedup_vs_fp32']:>8.2f}{row['relative_error']:>10.1e}",
            flush=True,
        )
