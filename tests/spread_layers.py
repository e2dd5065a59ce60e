"""Small MoE layers in float64, whole and spread over ranks, and their passes."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gatewise.moe.config import Activation
from gatewise.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.layer import MoELayer
from gatewise.parallel.dims import ExpertGroups
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig
from gatewise.routers.router import ComposedRouter

__all__ = [
    "EXPERTS",
    "HIDDEN",
    "WIDTH",
    "assert_near",
    "part_of",
    "passes",
    "spread",
    "whole_layer",
]

HIDDEN, WIDTH, EXPERTS = 8, 12, 8


def whole_layer(
    activation: Activation = Activation.swiglu, *, top_k: int = 2, skewed: bool = False
) -> MoELayer:
    """Build a layer with all experts on this rank.

    Args:
        activation: of the experts.
        top_k: experts per token.
        skewed: all tokens whose first number is 1 choose the same experts.
    """
    torch.manual_seed(3)
    layer = MoELayer(
        ComposedRouter(HIDDEN, EXPERTS, top_k, RouterConfig()),
        GroupedExperts(EXPERTS, HIDDEN, WIDTH, activation),
        LocalDispatcher(EXPERTS),
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    if skewed:
        with torch.no_grad():
            layer.router.weight[:, 0] = -40.0 * torch.arange(EXPERTS)
    return layer.double()


def spread(
    whole: MoELayer,
    groups: ExpertGroups,
    dispatcher_of: Callable[[int, ExpertGroups], AllToAllDispatcher] = AllToAllDispatcher,
) -> MoELayer:
    """Return this rank's part of a layer."""
    if groups.size == 1:
        return copy.deepcopy(whole)
    dispatcher = dispatcher_of(EXPERTS, groups)
    experts = GroupedExperts(
        dispatcher.num_local,
        HIDDEN,
        WIDTH,
        whole.experts.activation,
        first_expert=dispatcher.first_expert,
        shard=groups.shard.rank,
        shards=groups.shard.size,
    ).double()
    for name, weight in experts.named_parameters():
        weight.data.copy_(part_of(experts, name, getattr(whole.experts, name)))
    return MoELayer(copy.deepcopy(whole.router), experts, dispatcher)


def part_of(experts: GroupedExperts, name: str, whole: Tensor) -> Tensor:
    """Return a rank's part of a weight of all experts, or of its gradient."""
    mine = whole[experts.first_expert : experts.first_expert + experts.num_local]
    return experts.part_of(name, mine)


def passes(layer: MoELayer, x_TD: Tensor, mix_TD: Tensor) -> dict[str, Tensor]:
    """Return the output "y", the gradient of the tokens "x" and those of all parameters."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD, _, _ = layer(x_TD, RoutingContext(), 0)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((y_TD * mix_TD).sum(), (x_TD, *parameters))
    return dict(zip(("y", "x", *names), (y_TD.detach(), *gradients), strict=True))


def assert_near(have: Tensor, want: Tensor, what: str) -> None:
    """Hold a float64 tensor to another by 1e-10 of the largest number, at least of 1."""
    assert have.shape == want.shape, what
    if want.numel():
        error = float((have - want).abs().max()) / max(1.0, float(want.abs().max()))
        assert error < 1e-10, f"{what} is off by {error:.1e}"
