"""`gatewise generate`: continue a prompt with a checkpoint, token by token."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gatewise.compression.config import Weights
from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.inference import check_ranks, run_model
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.spawn import peak_rss_mb
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import Precision, RunConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch
    from gatewise.parallel.runtime import Runtime
    from gatewise.training.generate import Sampling

__all__ = ["GenerateConfig", "generate_rank", "run", "usage"]


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Settings of the command."""

    checkpoint: str | None = None  # a run's folder, its checkpoints folder or one step
    prompt: str = ""  # text to continue; empty: a new document
    tokens: int = 200  # at most
    temperature: float = 0.8  # 0 takes the most likely token each time
    top_k: int = 50  # draw among so many; 0: all
    seed: int = 0  # the same seed gives the same text
    precision: Precision | None = None  # None: as the run was trained
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # experts over ranks
    weights: Weights | None = None  # of a compressed model; None: packed where kernels are
    run: RunConfig = field(default_factory=RunConfig)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text(
        "generate checkpoint=PATH prompt=TEXT",
        "Continue a prompt and print the text as it is made.",
        field_table(load_settings(GenerateConfig, arguments)),
    )


def run(arguments: Sequence[str]) -> int:
    """Generate as the command line says and return the exit code."""
    prompts = [text for text in arguments if text.startswith("prompt=")]
    config = load_settings(GenerateConfig, [text for text in arguments if text not in prompts])
    if prompts:  # as it stands: quotes and ${...} belong to the text
        config.prompt = prompts[-1].removeprefix("prompt=")
    if config.checkpoint is None:
        raise ConfigError("checkpoint is not set; give checkpoint=PATH, a run's folder or a step")
    folder = RunFolder.choose(config.run.dir, "generate")
    checkpoint = config.checkpoint
    return run_session(
        "generate",
        folder,
        lambda: _generate(config, checkpoint, folder),
        world_size=config.parallel.ranks,
    )


def _generate(config: GenerateConfig, checkpoint: str, folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.launch.restore import check_weights, open_checkpoint
    from gatewise.training.generate import Sampling

    sampling = Sampling(
        tokens=config.tokens, temperature=config.temperature, top_k=config.top_k, seed=config.seed
    )
    stored = open_checkpoint(checkpoint)
    check_weights(stored, config.weights)
    check_ranks(config.parallel, stored.config.model)
    if config.precision is not None:
        stored = replace(stored, config=replace(stored.config, precision=config.precision))
    found = run_model(generate_rank, config.parallel, (config, sampling, stored), folder)
    return {
        "checkpoint": str(stored.path),
        "step": stored.step,
        "prompt": config.prompt,
        **found,
    }


def generate_rank(
    place: Place, config: GenerateConfig, sampling: "Sampling", stored: "Stored"
) -> dict[str, Any]:
    """Be one rank of a generation: all draw the same tokens, and rank 0 prints them."""
    from gatewise.compression.runtime import weight_bytes
    from gatewise.launch.restore import choose_weights, restore_model, restore_tokenizer
    from gatewise.training.generate import Tally, stream_text

    def show(text: str, end: str = "") -> None:
        if place.rank == 0:
            print(text, end=end, flush=True)

    tokenizer = restore_tokenizer(stored)
    pieces: list[str] = []
    with join_ranks(place, config.parallel) as runtime:
        weights = choose_weights(stored, config.weights, runtime.device)
        model = restore_model(
            stored, device=runtime.device, weights=weights, groups=runtime.groups.experts
        )
        tally, began = Tally(), time.perf_counter()
        show(config.prompt)
        agree = partial(_agree, runtime)
        for piece in stream_text(model, tokenizer, config.prompt, sampling, tally, agree=agree):
            pieces.append(piece)
            show(piece)
        seconds = time.perf_counter() - began
        weights_mb = weight_bytes(model) / 2**20
    show("", end="\n")
    text = "".join(pieces)
    if tally.tokens_per_second is not None:
        here = "" if place.world_size == 1 else " of rank 0"
        show(
            f"{tally.tokens_per_second:.1f} tokens per second after {tally.prompt_seconds:.3f} s "
            f"for a prompt of {tally.prompt_tokens} tokens; weights{here} {weights_mb:.1f} MiB, "
            f"process at most {peak_rss_mb():.0f} MiB",
            end="\n",
        )
    return {
        "text": text,
        "characters_per_second": len(text) / max(seconds, 1e-9),
        "tokens_per_second": tally.tokens_per_second,
        "prompt_tokens": tally.prompt_tokens,
        "prompt_seconds": tally.prompt_seconds,
        "weights": weights.name if stored.is_compressed else "dense",
        "weights_mb": weights_mb,
    }


def _agree(runtime: "Runtime", token: int) -> int:
    """Return what rank 0 drew; products of other rows can differ in the last bit."""
    group = runtime.groups.control.handle
    if group is None:
        return token
    import torch
    import torch.distributed as dist

    told = torch.tensor(token, device=runtime.device)
    dist.broadcast(told, src=0, group=group)
    return int(told)
