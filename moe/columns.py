"""Statistics of the experts' weights over all ranks, for routers that score by them.

Shapes:  e experts of this rank   E experts, all ranks   D model width   F expert width
         G = 2F with a gate (swiglu), else F   P groups with different experts, of S ranks each
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.parallel.collectives import NO_GROUP, Group, reduce_scatter_sum
from gatewise.routers.api import ExpertColumns

__all__ = ["column_statistics", "gather_columns"]


def gather_columns(
    experts: GroupedExperts, gradient_scale: float, *, group: Group = NO_GROUP, shards: int = 1
) -> ExpertColumns:
    """Return mean and variance of each column of every expert's first weight, in fp32 or fp64.

    With a gate it is the gate's rows that decide whether a unit is active, and they are taken.

    Args:
        experts: this rank's.
        gradient_scale: factor of the gradients that reach the experts' weights.
        group: whose ranks hold the other experts; all of them must call.
        shards: consecutive ranks of it that hold parts of the same experts.
    """
    local = column_statistics(experts.w_in_eGD, experts.activation)
    if group.handle is not None:
        gathered: Tensor = _Gather.apply(local, group, gradient_scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        local = gathered if shards == 1 else _join(gathered, shards, experts.num_local)
    return ExpertColumns(local[:, 0], local[:, 1])


def column_statistics(weight_eGD: Tensor, activation: Activation) -> Tensor:
    """Return mean and variance (e, 2, D) of the columns of first weights, in fp32 or fp64."""
    if activation is Activation.swiglu:
        weight_eGD = weight_eGD[:, : weight_eGD.shape[1] // 2]
    weight_eGD = weight_eGD.to(torch.promote_types(weight_eGD.dtype, torch.float32))
    return torch.stack((weight_eGD.mean(1), weight_eGD.var(1, correction=0)), 1)


def _join(gathered: Tensor, shards: int, num_local: int) -> Tensor:
    """Join statistics of equal parts of the units: (P * S * e, 2, D) to (P * e, 2, D)."""
    mean_PSeD, variance_PSeD = gathered.unflatten(0, (-1, shards, num_local)).unbind(3)
    mean_PeD = mean_PSeD.mean(1)
    apart_PSeD = mean_PSeD - mean_PeD.unsqueeze(1)
    variance_PeD = (variance_PSeD + apart_PSeD.square()).mean(1)
    return torch.stack((mean_PeD, variance_PeD), 2).flatten(0, 1)


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; the gradient is the sum over ranks of their parts for our rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group, gradient_scale: float) -> Tensor:
        ctx.group, ctx.gradient_scale = group, gradient_scale
        whole = local.new_empty((group.size * local.shape[0], *local.shape[1:]))
        group.traffic.calls += 1
        group.traffic.sent_bytes += local.numel() * local.element_size() * (group.size - 1)
        dist.all_gather_single(whole, local.contiguous(), group=group.handle)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        group: Group = ctx.group
        flat = gradient.contiguous().clone().view(-1)
        mine = reduce_scatter_sum(flat, group).wait() * ctx.gradient_scale
        return mine.view(gradient.shape[0] // group.size, *gradient.shape[1:]), None, None
