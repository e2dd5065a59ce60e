"""`gatewise evaluate`: the loss of a checkpoint on the validation split of a text."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.compression.config import Weights
from gatewise.conf.compose import override_config
from gatewise.conf.fields import field_table, split_overrides
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.launch.world import threads_per_rank
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig, TrainConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["EvaluateConfig", "run", "split_arguments", "usage"]

_SECTIONS = ("data", "evaluation", "precision")
_SUMMARY = """Measure a checkpoint on the validation split of its own text, or of data.path.
checkpoint=PATH is a run's folder, its checkpoints folder or one step; all other fields keep what
the run was trained with (the defaults below are those of a new run)."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Fields of the command's own."""

    checkpoint: str | None = None  # a run's folder, its checkpoints folder or one step
    weights: Weights | None = None  # of a compressed model; null: packed where kernels are


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    table = field_table(EvaluateConfig) | {
        name: field
        for name, field in field_table(TrainConfig()).items()
        if name == "run.dir" or name.partition(".")[0] in _SECTIONS
    }
    del arguments
    return usage_text("evaluate checkpoint=PATH", _SUMMARY, table)


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the command line says and return the exit code."""
    own, rest = split_arguments(arguments)
    if own.checkpoint is None:
        raise ConfigError("checkpoint is not set; give checkpoint=PATH, a run's folder or a step")
    from gatewise.launch.restore import check_weights, open_checkpoint

    stored = open_checkpoint(own.checkpoint)
    check_weights(stored, own.weights)
    config = override_config(
        replace(stored.config, run=RunConfig()), rest, sections=(*_SECTIONS, "run")
    )
    folder = RunFolder.choose(config.run.dir, "evaluate")
    stored = replace(stored, config=config)
    return run_session("evaluate", folder, lambda: _evaluate(stored, own.weights, folder.path))


def split_arguments(arguments: Sequence[str]) -> tuple[EvaluateConfig, list[str]]:
    """Part the fields of this command from those of the run.

    Raises:
        ConfigError: if a field of this command does not take its value.
    """
    return split_overrides(EvaluateConfig, arguments)


def _evaluate(stored: "Stored", asked: Weights | None, folder: Path) -> Mapping[str, Any]:
    from gatewise.launch.restore import choose_weights, restore_data, restore_model
    from gatewise.parallel.config import ParallelConfig
    from gatewise.parallel.runtime import running
    from gatewise.training.evaluate import evaluate

    config = stored.config
    data = restore_data(stored, folder)
    threads = threads_per_rank(None, 1, os.environ)
    with running(ParallelConfig(threads=threads)) as runtime:
        weights = choose_weights(stored, asked, runtime.device)
        evaluation = evaluate(
            restore_model(stored, device=runtime.device, weights=weights),
            data,
            config.evaluation,
            sequence_length=config.data.sequence_length,
            control=runtime.groups.control,
            device=runtime.device,
        )
    print(
        f"step {stored.step}: {evaluation.loss:.4f} nats per token, "
        f"{evaluation.bits_per_byte:.4f} bits per byte, perplexity {evaluation.perplexity:.2f}, "
        f"{evaluation.tokens} tokens"
    )
    return {
        "checkpoint": str(stored.path),
        "step": stored.step,
        "val_loss": evaluation.loss,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
    }
