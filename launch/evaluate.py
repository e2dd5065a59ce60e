"""`gatewise evaluate`: the loss of a checkpoint on the validation split of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.compression.config import Weights
from gatewise.conf.compose import override_config
from gatewise.conf.fields import field_table, split_overrides
from gatewise.launch.inference import check_ranks, run_model
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig, TrainConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["EvaluateConfig", "evaluate_rank", "run", "split_arguments", "usage"]

_SECTIONS = ("data", "evaluation", "precision", "parallel")
_SUMMARY = """Measure a checkpoint on the validation split of its own text, or of data.path.
checkpoint=PATH is a run's folder, its checkpoints folder or one step; all other fields keep what
the run was trained with (the defaults below are those of a new run), but for parallel: one process
holds all experts unless parallel.ranks and parallel.expert spread them."""


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
    alone = replace(stored.config, run=RunConfig(), parallel=ParallelConfig())
    config = override_config(alone, rest, sections=(*_SECTIONS, "run"))
    check_ranks(config.parallel, config.model)
    folder = RunFolder.choose(config.run.dir, "evaluate")
    stored = replace(stored, config=config)
    return run_session(
        "evaluate",
        folder,
        lambda: _evaluate(stored, own.weights, folder),
        world_size=config.parallel.ranks,
    )


def evaluate_rank(
    place: Place, stored: "Stored", asked: Weights | None, data_folder: Path
) -> dict[str, Any]:
    """Be one rank of an evaluation; all ranks return the same."""
    from gatewise.launch.restore import choose_weights, restore_model
    from gatewise.training.data import open_prepared
    from gatewise.training.evaluate import evaluate

    config = stored.config
    with join_ranks(place, config.parallel) as runtime:
        weights = choose_weights(stored, asked, runtime.device)
        evaluation = evaluate(
            restore_model(
                stored, device=runtime.device, weights=weights, groups=runtime.groups.experts
            ),
            open_prepared(data_folder),
            config.evaluation,
            sequence_length=config.data.sequence_length,
            control=runtime.groups.control,
            device=runtime.device,
        )
    return {
        "val_loss": evaluation.loss,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
    }


def split_arguments(arguments: Sequence[str]) -> tuple[EvaluateConfig, list[str]]:
    """Part the fields of this command from those of the run.

    Raises:
        ConfigError: if a field of this command does not take its value.
    """
    return split_overrides(EvaluateConfig, arguments)


def _evaluate(stored: "Stored", asked: Weights | None, folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.launch.restore import restore_data

    data = restore_data(stored, folder.path)
    found = run_model(evaluate_rank, stored.config.parallel, (stored, asked, data.folder), folder)
    print(
        f"step {stored.step}: {found['val_loss']:.4f} nats per token, "
        f"{found['val_bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.2f}, "
        f"{found['tokens']} tokens"
    )
    return {"checkpoint": str(stored.path), "step": stored.step, **found}
