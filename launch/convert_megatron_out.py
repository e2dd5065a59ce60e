"""`gatewise convert to_megatron`: a checkpoint of ours as a distributed one of Megatron's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.convert_out import hand_over
from gatewise.launch.usage import usage_text
from gatewise.training.config import RunConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["MegatronOutConfig", "run", "usage"]


@dataclass(kw_only=True, slots=True)
class MegatronOutConfig:
    """Settings of the command."""

    checkpoint: str | None = None  # a run's folder, its checkpoints folder or one step
    out: str | None = None  # the folder to make
    local: bool = False  # for --transformer-impl local, without TransformerEngine
    run: RunConfig = field(default_factory=RunConfig)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text(
        "convert to_megatron checkpoint=PATH out=FOLDER",
        "Write the weights as a torch_dist checkpoint, with megatron-core.",
        field_table(MegatronOutConfig),
    )


def run(arguments: Sequence[str]) -> int:
    """Convert as the command line says and return the exit code."""
    config = load_settings(MegatronOutConfig, arguments)
    return hand_over(
        "to_megatron",
        config.checkpoint,
        config.out,
        config.run.dir,
        lambda stored, out: _convert(stored, out, config.local),
        if_compressed="convert what it was made of",
    )


def _convert(stored: "Stored", out: Path, local: bool) -> Mapping[str, Any]:
    from gatewise.training.megatron.convert import hand_out

    model, router = stored.config.model, stored.config.router
    rows = int(stored.meta["vocab_size"])
    count = hand_out(stored.path, model, router, rows, out=out, local=local)
    print(f"{count} tensors in {out}")
    return {"checkpoint": str(stored.path), "converted": str(out), "tensors": count}
