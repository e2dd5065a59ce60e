"""Build a run's model, and fill it from a checkpoint or from an artefact.

Read first: `plan.py`, `artefact.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gatewise.compression.artefact import fill_model
from gatewise.compression.plan import Plan
from gatewise.compression.stream import check_names, give_memory
from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import apply_expert_parallel
from gatewise.parallel.collectives import NO_GROUP
from gatewise.parallel.dims import ExpertGroups
from gatewise.training.checkpoint_folder import read_meta
from gatewise.training.checkpoint_load import load
from gatewise.training.config import TrainConfig
from gatewise.training.state import model_ranges

__all__ = [
    "ALONE",
    "build_empty",
    "build_planned",
    "fill_ranges",
    "load_compressed",
    "load_whole",
    "planned_shapes",
]

ALONE = ExpertGroups.of(NO_GROUP)  # all experts on this rank


def build_empty(config: TrainConfig, vocab_size: int) -> Decoder:
    """Build a run's model on the meta device."""
    with torch.device("meta"):
        return Decoder(config.model, config.router, vocab_size)


def load_whole(config: TrainConfig, vocab_size: int, path: Path, device: torch.device) -> Decoder:
    """Build a model from a training checkpoint whose names were checked, in fp32."""
    model = build_empty(config, vocab_size)
    give_memory(model, device)
    fill_ranges(path, model_ranges(model))
    return model.eval()


def fill_ranges(path: Path, ranges: Mapping[str, Any]) -> None:
    """Read some tensors of a training checkpoint whose names were checked as a whole."""
    others = tuple(name for name in read_meta(path)["tensors"] if name not in ranges)
    load(path, ranges, optional_prefixes=others)


def build_planned(
    config: TrainConfig, vocab_size: int, path: Path, plan: Plan, groups: ExpertGroups
) -> Decoder:
    """Build the model of an artefact without memory, its experts spread; check all names."""
    model = build_empty(config, vocab_size)
    check_names(model, planned_shapes(plan), source=str(path))
    apply_expert_parallel(model, groups)
    return model


def load_compressed(  # noqa: PLR0917 - as `load_packed`
    config: TrainConfig,
    vocab_size: int,
    path: Path,
    plan: Plan,
    device: torch.device,
    groups: ExpertGroups = ALONE,
) -> Decoder:
    """Build a model from an artefact, with its weights dequantised to fp32.

    Args:
        config: of the run that trained it.
        vocab_size: V.
        path: folder of the artefact.
        plan: of the artefact.
        device: where the model goes.
        groups: the ranks over which experts are spread, whole.
    """
    model = build_planned(config, vocab_size, path, plan, groups)
    give_memory(model, device)
    fill_model(model, path, plan, range(plan.layers + 1))
    return model.eval()


def planned_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a plan's parts and kept tensors make, by name."""
    shapes = {item.name: item.shape for item in plan.kept}
    slices: dict[str, int] = {}
    for part in plan.parts:
        slices[part.source] = slices.get(part.source, 0) + 1
    for part in plan.parts:
        shape = (part.shape.rows, part.shape.columns)
        is_slice = part.expert is not None
        shapes[f"model/{part.source}"] = (slices[part.source], *shape) if is_slice else shape
    return shapes
