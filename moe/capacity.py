"""Capacity: which pairs an over-demanded expert keeps.

Dropping looks at this rank's tokens only, so with a capacity the results depend on how tokens are
spread over ranks; without one (the default) they do not.

Shapes:  T tokens on this rank   K experts per token   E experts, all ranks   N = T * K pairs
Source:  arXiv:2006.16668 (capacity factor), arXiv:2101.03961; random order: DeepSpeed's random
         token selection.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from gatewise.moe.config import CapacityConfig, CapacityOrder
from gatewise.routers.api import Routing, RoutingContext

__all__ = ["apply_capacity", "keep_within_capacity"]


def apply_capacity(
    routing: Routing,
    config: CapacityConfig,
    context: RoutingContext,
    *,
    num_experts: int,
    layer: int,
    top_k: int | None = None,
) -> Routing:
    """Return `routing` with the pairs over capacity set to expert -1.

    Weights of the pairs that are kept stay as they are (no renormalisation, as in Megatron).

    Args:
        routing: any decision; `load` keeps counting demand.
        config: factor (not None) and order.
        context: noise, for the random order.
        num_experts: E.
        layer: keys the noise.
        top_k: experts per token that the capacity is reckoned with, where they vary; None: K.
    """
    assert config.factor is not None
    num_tokens, choices = routing.expert_TK.shape
    capacity = math.ceil(config.factor * (top_k or choices) * num_tokens / num_experts)
    if config.order is CapacityOrder.probs:
        priority_TK = routing.weight_TK.detach()
    elif config.order is CapacityOrder.position:
        priority_TK = torch.zeros_like(routing.weight_TK, requires_grad=False)
    elif config.order is CapacityOrder.choice:
        place_K = torch.arange(choices, device=routing.weight_TK.device)
        priority_TK = -place_K.to(routing.weight_TK.dtype).expand(num_tokens, choices) / choices
    elif context.noise is None:
        priority_TK = torch.rand_like(routing.weight_TK, requires_grad=False)
    else:
        # another stream than the router's jitter: layers count from 0, so ~layer is free
        priority_TK = context.noise.uniform(
            (num_tokens, choices), layer=~layer, device=routing.weight_TK.device
        )
    # neither a NaN nor padding takes a place from a token that can use it
    priority_TK = torch.nan_to_num(priority_TK, nan=-1.0)
    if context.padding_T is not None:
        priority_TK = priority_TK.masked_fill(context.padding_T.unsqueeze(1), -2.0)
    if routing.variable:  # empty places compete for an expert that does not exist
        asked_TK = torch.where(routing.expert_TK < 0, num_experts, routing.expert_TK)
        keep_TK = keep_within_capacity(
            asked_TK, priority_TK, num_experts=num_experts + 1, capacity=capacity
        )
    else:
        keep_TK = keep_within_capacity(
            routing.expert_TK, priority_TK, num_experts=num_experts, capacity=capacity
        )
    return replace(routing, expert_TK=torch.where(keep_TK, routing.expert_TK, -1))


def keep_within_capacity(
    expert_TK: Tensor, priority_TK: Tensor, *, num_experts: int, capacity: int
) -> Tensor:
    """Tell which pairs are among the `capacity` first of their expert.

    Args:
        expert_TK: int64 in [0, E).
        priority_TK: larger is kept first, no NaN; ties go to the lower token, then the lower
            choice.
        num_experts: E.
        capacity: pairs that each expert keeps, at least 0.

    Returns:
        bool (T, K); exactly min(demand, capacity) pairs of each expert are True.
    """
    expert_N = expert_TK.flatten()
    by_priority_N = torch.sort(priority_TK.flatten(), descending=True, stable=True).indices
    by_expert_N = torch.sort(expert_N[by_priority_N], stable=True).indices
    order_N = by_priority_N[by_expert_N]
    count_E = torch.bincount(expert_N, minlength=num_experts)
    start_E = count_E.cumsum(0) - count_E
    place_N = torch.arange(expert_N.shape[0], device=expert_N.device) - start_E[expert_N[order_N]]
    keep_N = torch.empty_like(expert_N, dtype=torch.bool)
    keep_N[order_N] = place_N < capacity
    return keep_N.view_as(expert_TK)
