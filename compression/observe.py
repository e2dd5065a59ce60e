"""What the calibration tokens show of one block: inputs of its matrices, routing, Hessians.

Hessians are X^T X over the inputs X of a matrix, summed in fp64. An expert that few tokens reached
gets a mix of its own Hessian and that of all tokens, weighted by how few (`blend`), so that there
is no cliff between many tokens and none.

Shapes:  T tokens   R rows of one expert   D model width   K experts per token, or columns
         E experts   F expert width
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gatewise.compression.stream import BlockStream
from gatewise.moe.attention import Attention
from gatewise.moe.config import Activation
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block
from gatewise.moe.ops.activate import activate
from gatewise.parallel.errors import DataError
from gatewise.routers.api import Routing, RoutingContext

__all__ = [
    "ExpertRows",
    "Seen",
    "attention_hessians",
    "blend",
    "check_finite",
    "expert_rows",
    "gram",
    "inner_activations",
    "see_feed_forward",
]

_ROWS = 4096  # of one product


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs and routing of one feed-forward layer over all calibration tokens."""

    x_TD: Tensor
    batch_ends: tuple[int, ...]  # of the batches, in tokens
    expert_TK: Tensor | None = None  # None in a dense layer
    weight_TK: Tensor | None = None
    logits_TE: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The tokens of one expert, in order, and their combine weights."""

    token_R: Tensor
    weight_R: Tensor


def see_feed_forward(stream: BlockStream, block: Block) -> Seen:
    """Run the batches through a block and keep what its feed-forward layer sees.

    Its experts do not run.

    Raises:
        DataError: if an input is not finite.
    """
    inputs: list[Tensor] = []
    routings: list[Routing] = []

    def before(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].detach().flatten(0, -2).float())

    hook = block.feed_forward.register_forward_pre_hook(before)
    try:
        with _without_experts(block, routings):
            for _, routing, _ in stream.run(block):
                if routing is not None and routing.slots is not None:
                    routings.append(routing)
    finally:
        hook.remove()
    x_TD = torch.cat(inputs)
    check_finite(x_TD, block.layer, "feed-forward")
    ends = torch.tensor([len(rows) for rows in inputs]).cumsum(0).tolist()
    if not routings:
        return Seen(x_TD, tuple(ends))
    logits = [routing.logits_TE for routing in routings]
    return Seen(
        x_TD,
        tuple(ends),
        torch.cat([routing.expert_TK for routing in routings]),
        torch.cat([routing.weight_TK for routing in routings]).double(),
        torch.cat([part for part in logits if part is not None]) if logits[0] is not None else None,
    )


def attention_hessians(stream: BlockStream, block: Block) -> dict[str, Tensor]:
    """Return the Hessian of each matrix of the block's attention, by the parameter's name.

    Raises:
        DataError: if an input is not finite.
    """
    module = block.attention
    assert isinstance(module, Attention)
    sums = {
        name: torch.zeros(p.shape[1], p.shape[1], dtype=torch.float64, device=p.device)
        for name, p in module.named_parameters(recurse=False)
    }

    def add(name: str, x: Tensor) -> None:
        x_TK = x.flatten(0, -2)
        check_finite(x_TK, block.layer, "attention")
        sums[name] += gram(x_TK)

    weights = dict(module.named_parameters(recurse=False))
    with _linear_inputs(weights, add), _without_experts(block, []):
        for _ in stream.run(block):
            pass
    return sums


def expert_rows(seen: Seen, num_experts: int) -> list[ExpertRows]:
    """Return the rows of each expert."""
    assert seen.expert_TK is not None
    assert seen.weight_TK is not None
    rows = []
    for expert in range(num_experts):
        token_R, choice_R = torch.nonzero(seen.expert_TK == expert, as_tuple=True)
        rows.append(ExpertRows(token_R, seen.weight_TK[token_R, choice_R]))
    return rows


def gram(x_RK: Tensor) -> Tensor:
    """Return X^T X (K, K) in fp64, of products in the input's type."""
    total_KK = torch.zeros(x_RK.shape[1], x_RK.shape[1], dtype=torch.float64, device=x_RK.device)
    for part_RK in x_RK.split(_ROWS):
        total_KK += (part_RK.t() @ part_RK).double()
    return total_KK


def blend(own_KK: Tensor, rows: int, prior_KK: Tensor, prior_rows: int) -> tuple[Tensor, float]:
    """Mix an expert's Hessian with one of more tokens, both taken per row.

    Args:
        own_KK: of the expert's own rows.
        rows: their number, 0 too.
        prior_KK: of the other inputs.
        prior_rows: their number.

    Returns:
        `(1 - rho) own / rows + rho prior / prior_rows * (ratio of the traces)`, and
        rho = K / (K + rows), for K columns.
    """
    rho = own_KK.shape[0] / (own_KK.shape[0] + rows)
    prior_KK = prior_KK / max(prior_rows, 1)
    if not rows:
        return prior_KK, 1.0
    own_KK = own_KK / rows
    own_trace, prior_trace = float(own_KK.trace()), float(prior_KK.trace())
    if own_trace > 0 and prior_trace > 0:
        prior_KK = prior_KK * (own_trace / prior_trace)
    return (1 - rho) * own_KK + rho * prior_KK, rho


def inner_activations(x_RD: Tensor, w_in_GD: Tensor, activation: Activation) -> Tensor:
    """Return the inputs (R, F) of an expert's second matrix."""
    return activate(F.linear(x_RD, w_in_GD), activation)


@contextmanager
def _without_experts(block: Block, routings: list[Routing]) -> Iterator[None]:
    """Keep each routing as it was decided, and send no token to an expert."""
    layer = block.feed_forward
    if not isinstance(layer, MoELayer):
        yield
        return

    def drop(_x_TD: Tensor, routing: Routing, _context: RoutingContext) -> Routing:
        routings.append(routing)
        nobody_TK = torch.full_like(routing.expert_TK, -1)
        return replace(routing, expert_TK=nobody_TK, variable=True)

    before, layer.prune = layer.prune, drop
    try:
        yield
    finally:
        layer.prune = before


@contextmanager
def _linear_inputs(
    weights: dict[str, nn.Parameter], add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `add` with the input of each `F.linear` whose weight is one of these."""
    names = {id(weight): name for name, weight in weights.items()}

    class Mode(TorchFunctionMode):
        def __torch_function__(  # torch gives this name
            self,
            func: Callable[..., Any],  # any function of torch
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            del types
            if func is F.linear and len(args) > 1 and id(args[1]) in names:
                add(names[id(args[1])], args[0])
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


def check_finite(x_TD: Tensor, layer: int, where: str) -> None:
    """Raise `DataError` if an input of a layer's matrices is not finite."""
    bad = int((~torch.isfinite(x_TD)).any(-1).sum())
    if bad:
        raise DataError(
            f"layer {layer}: the inputs of its {where} matrices are not finite for {bad} of "
            f"{x_TD.shape[0]} calibration tokens; the checkpoint has diverged: take an earlier one"
        )
