"""Quantise one block with the inputs that the compressed blocks before it give.

The order is that of the data: attention first; with it in place the feed-forward layer's inputs
are taken anew, and the router is fitted to them where that is asked for; an
expert's second matrix is quantised on what its quantised first one gives. When it is done the block
computes with the dequantised weights.

Read first: `observe.py`, `quantize.py`.

Shapes:  E experts   N rows   K columns   D model width   F expert width
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatewise.compression.config import CompressConfig, Method
from gatewise.compression.grids import GridSearch
from gatewise.compression.observe import (
    Seen,
    attention_hessians,
    expert_rows,
    gram,
    inner_activations,
    see_feed_forward,
)
from gatewise.compression.plan import Part, Plan
from gatewise.compression.quantize import (
    GptqSettings,
    Quantized,
    gptq,
    hessian_loss,
    round_to_nearest,
)
from gatewise.compression.repair import RouterTarget, fit_router
from gatewise.compression.statistics import (
    LayerStatistics,
    Quantiser,
    in_hessians,
    out_hessians,
    usage,
)
from gatewise.compression.stream import BlockStream
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block
from gatewise.routers.router import ComposedRouter

__all__ = ["QuantizedBlock", "grid_search", "make_quantiser", "quantize_block"]


@dataclass(slots=True)
class QuantizedBlock:
    """The codes of a block's matrices, and what there is to say of them."""

    parts: dict[str, Quantized] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)  # relative, on the inputs seen
    usage: LayerStatistics | None = None  # of a layer with experts
    repair: dict[str, float] | None = None  # what fitting the router gave


def grid_search(config: CompressConfig) -> GridSearch:
    """Return how the settings search grids."""
    if config.mcmoe_compat:
        return GridSearch.mcmoe()
    grid = config.grid
    return GridSearch.wide(
        low=grid.clip_low,
        high=grid.clip_high,
        steps=grid.clip_steps,
        refine=grid.refine,
        zero=grid.zero,
    )


def make_quantiser(config: CompressConfig, method: Method) -> Quantiser:
    """Return the function that turns weights and their Hessians into codes."""
    search, group = grid_search(config), config.grid.group
    settings = GptqSettings(damp=config.damp, mcmoe_compat=config.mcmoe_compat)

    def by_gptq(w_ENK: Tensor, hessian_EKK: Tensor, bits: Sequence[float]) -> list[Quantized]:
        return gptq(w_ENK, hessian_EKK, bits, group=group, search=search, settings=settings)

    def by_rounding(w_ENK: Tensor, hessian_EKK: Tensor, bits: Sequence[float]) -> list[Quantized]:
        importance_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
        return round_to_nearest(
            w_ENK, bits, group=group, search=search, importance_EK=importance_EK
        )

    return by_gptq if method is Method.gptq else by_rounding


@torch.no_grad()
def quantize_block(
    stream: BlockStream,
    block: Block,
    plan: Plan,
    quantiser: Quantiser,
    *,
    target: RouterTarget | None = None,
    ridge: float = 0.1,
) -> QuantizedBlock:
    """Quantise every planned matrix of a block and put the dequantised weights into it.

    Args:
        stream: its batches stand before the block.
        block: with its own weights.
        plan: widths of all its matrices.
        quantiser: from `make_quantiser`.
        target: what the router is fitted to, once attention is quantised; None leaves it.
        ridge: of that fit.

    Raises:
        DataError: if an input is not finite.
    """
    done = QuantizedBlock()
    attention = plan.of_layer(block.layer, "attention")
    if attention:
        hessians = attention_hessians(stream, block)
        for part in attention:
            attribute = part.source.rpartition(".")[2]
            weight = getattr(block.attention, attribute)
            _quantise([part], [weight.data], hessians[attribute].unsqueeze(0), quantiser, done)
    seen = see_feed_forward(stream, block)
    if isinstance(block.feed_forward, MoELayer):
        if target is not None:
            router = block.feed_forward.router
            assert isinstance(router, ComposedRouter)
            done.repair = fit_router(router, seen, target, ridge=ridge)
            if done.repair["step"] > 0:
                seen = see_feed_forward(stream, block)
        _quantise_experts(seen, block.feed_forward, plan, block.layer, quantiser, done)
        if isinstance(block.feed_forward.shared, FeedForward):
            parts = plan.of_layer(block.layer, "shared")
            _quantise_dense(seen, block.feed_forward.shared, parts, quantiser, done)
    else:
        parts = plan.of_layer(block.layer, "dense")
        _quantise_dense(seen, block.feed_forward, parts, quantiser, done)
    planned = {part.name for part in plan.of_layer(block.layer)}
    assert planned == done.parts.keys(), "a planned matrix was not quantised"
    return done


def _quantise_experts(  # noqa: PLR0917 - what one layer needs
    seen: Seen,
    layer: MoELayer,
    plan: Plan,
    index: int,
    quantiser: Quantiser,
    done: QuantizedBlock,
) -> None:
    experts = layer.experts
    rows = expert_rows(seen, experts.num_local)
    done.usage = usage(index, seen, rows)
    parts = plan.of_layer(index, "expert")
    first = [part for part in parts if part.projection == "in"]
    second = [part for part in parts if part.projection == "out"]
    hessians = in_hessians(seen, rows)
    done.usage.borrowed["in"] = list(hessians.borrowed_E)
    _quantise(first, list(experts.w_in_eGD.data), hessians.hessian_EKK, quantiser, done)
    hessians = out_hessians(seen, rows, experts)
    done.usage.borrowed["out"] = list(hessians.borrowed_E)
    _quantise(second, list(experts.w_out_eDF.data), hessians.hessian_EKK, quantiser, done)


def _quantise_dense(
    seen: Seen,
    module: nn.Module,
    parts: Sequence[Part],
    quantiser: Quantiser,
    done: QuantizedBlock,
) -> None:
    if not parts:
        return
    assert isinstance(module, FeedForward)
    by_projection = {part.projection: part for part in parts}
    hessian_DD = gram(seen.x_TD)
    _quantise(
        [by_projection["in"]], [module.w_in_GD.data], hessian_DD.unsqueeze(0), quantiser, done
    )
    hessian_FF = gram(inner_activations(seen.x_TD, module.w_in_GD.data, module.activation))
    _quantise(
        [by_projection["out"]], [module.w_out_DF.data], hessian_FF.unsqueeze(0), quantiser, done
    )


def _quantise(
    parts: Sequence[Part],
    weights: Sequence[Tensor],
    hessian_EKK: Tensor,
    quantiser: Quantiser,
    done: QuantizedBlock,
) -> None:
    """Quantise matrices of one shape together and replace their weights."""
    found = quantiser(torch.stack(list(weights)), hessian_EKK, [part.shape.bits for part in parts])
    for part, weight_NK, hessian_KK, matrix in zip(parts, weights, hessian_EKK, found, strict=True):
        value_NK = matrix.dequantise()
        whole = hessian_loss(weight_NK, torch.zeros_like(weight_NK), hessian_KK)
        done.losses[part.name] = hessian_loss(weight_NK, value_NK, hessian_KK) / max(whole, 1e-300)
        done.parts[part.name] = matrix
        weight_NK.copy_(value_NK)
