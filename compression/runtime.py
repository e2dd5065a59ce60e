"""A model that computes with the codes of an artefact; dequantised weights are never all there.

Quantised matrices never become parameters: `PackedLinear` and `PackedExperts` stand in their
places. What the artefact keeps at 16 or 32 bits is loaded as in any model.

Read first: `artefact.py`, `moe/packed.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gatewise.compression.artefact import place_kept, read_tensors, take_part
from gatewise.compression.formats import TERNARY
from gatewise.compression.load import ALONE, build_planned
from gatewise.compression.plan import Part, Plan
from gatewise.compression.quantize import Quantized
from gatewise.compression.stream import give_memory
from gatewise.moe.columns import column_statistics
from gatewise.moe.config import Activation
from gatewise.moe.dispatch import AllToAllDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Decoder
from gatewise.moe.ops.packed import unpack_weight
from gatewise.moe.ops.panels import PackedWeight, pack_panels
from gatewise.moe.packed import PackedExperts, PackedLinear
from gatewise.parallel.dims import ExpertGroups
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.api import ExpertColumns
from gatewise.training.config import TrainConfig
from gatewise.training.state import model_ranges

__all__ = ["load_packed", "to_panels", "weight_bytes"]

_CPU = torch.device("cpu")


def load_packed(  # noqa: PLR0917 - as `load_compressed`
    config: TrainConfig,
    vocab_size: int,
    path: Path,
    plan: Plan,
    device: torch.device,
    groups: ExpertGroups = ALONE,
) -> Decoder:
    """Build a model from an artefact that computes with its codes.

    Args:
        config: of the run that trained it.
        vocab_size: V.
        path: folder of the artefact.
        plan: of the artefact.
        device: where the model goes; the kernels are those of a CPU, elsewhere torch computes.
        groups: the ranks over which experts are spread, whole; each keeps the codes of its own.

    Raises:
        CheckpointError: as `read_tensors`, or if plan and model differ.
    """
    model = build_planned(config, vocab_size, path, plan, groups)
    for part in plan.parts:
        _take_away(model, part)
    give_memory(model, device)
    ranges = model_ranges(model)
    for number in range(plan.layers + 1):
        tensors = read_tensors(path, plan, number)
        experts: dict[tuple[str, int], PackedWeight] = {}
        for part in plan.of_layer(number - 1) if number else ():
            weight = to_panels(take_part(tensors, part), device)
            if part.expert is None:
                owner, _, attribute = part.source.rpartition(".")
                setattr(model.get_submodule(owner), attribute, PackedLinear(weight))
            else:
                experts[part.projection, part.expert] = weight
        if experts:
            _place_experts(model, number - 1, experts, path)
        place_kept(ranges, tensors, path)
    return model.eval()


def to_panels(matrix: Quantized, device: torch.device = _CPU) -> PackedWeight:
    """Bring a matrix into the form that kernels read; ternary codes take 2 bits there."""
    shape = matrix.format
    packed = pack_panels(
        matrix.code_NK.to(device),
        matrix.scale_NG.to(device),
        None if matrix.zero_NG is None else matrix.zero_NG.to(device),
        bits=2 if shape.bits == TERNARY else int(shape.bits),
        group=shape.group,
        zero=None if shape.has_zero else {1.0: 0.5, TERNARY: 1.0}[shape.bits],
    )
    assert (packed.rows, packed.columns) == (shape.rows, shape.columns)
    return packed


def weight_bytes(model: Decoder) -> int:
    """Return the bytes of a model's weights in memory, of parameters and of codes."""
    packed = [m for m in model.modules() if isinstance(m, PackedExperts | PackedLinear)]
    return sum(p.nbytes for p in model.parameters()) + sum(module.nbytes for module in packed)


def _take_away(model: Decoder, part: Part) -> None:
    """Remove the parameter of a part before anything gets memory."""
    owner, _, attribute = part.source.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, GroupedExperts):
        delattr(module, attribute)
    elif module.num_local:
        layer = model.get_submodule(owner.rpartition(".")[0])
        assert isinstance(layer, MoELayer)
        with torch.device("meta"):
            layer.experts = GroupedExperts(
                0, model.config.hidden, model.config.expert_width, module.activation
            )


def _place_experts(
    model: Decoder, layer: int, weights: Mapping[tuple[str, int], PackedWeight], path: Path
) -> None:
    block = model.blocks[layer]
    feed_forward = block.feed_forward
    assert isinstance(feed_forward, MoELayer)
    count, dispatcher = model.config.num_experts, feed_forward.dispatcher
    mine = slice(dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local)
    try:
        first, second = (
            [weights[projection, expert] for expert in range(count)] for projection in ("in", "out")
        )
        packed = PackedExperts(first[mine], second[mine], model.config.activation)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path}: the experts of layer {layer} do not belong together: {error}"
        ) from error
    if isinstance(dispatcher, AllToAllDispatcher):
        packed.dispatcher = dispatcher
    feed_forward.packed = packed
    if feed_forward.reads_columns:
        feed_forward.columns = _Columns(first, model.config.activation)


class _Columns:
    """Statistics of dequantised first matrices, for routers that read them; computed once."""

    def __init__(self, weights: Sequence[PackedWeight], activation: Activation) -> None:
        parts_E2D = []
        for weight in weights:
            value_NK = torch.empty(weight.rows, weight.columns, device=weight.data.device)
            unpack_weight(weight, value_NK)
            parts_E2D.append(column_statistics(value_NK.unsqueeze(0), activation))
        both_E2D = torch.cat(parts_E2D)
        self._columns = ExpertColumns(both_E2D[:, 0], both_E2D[:, 1])

    def __call__(self, experts: GroupedExperts, gradient_scale: float) -> ExpertColumns:
        del experts, gradient_scale  # there are no others, and no gradients
        return self._columns
