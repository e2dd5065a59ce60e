"""Sequences cut over the ranks of a tensor group: each rank has a run of positions of each.

Two differentiable collectives change between a part of the positions and all of them; each is the
other's gradient. They wait: what follows needs their result.

Shapes:  B sequences   P positions of a part   S positions   D width   T parts
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from gatewise.parallel.collectives import NO_GROUP, Group, RowSum

__all__ = ["WHOLE_SEQUENCES", "SequenceSplit"]

_Change = Callable[[Tensor, Group], Tensor]


class SequenceSplit:
    """How the positions of a sequence lie on ranks.

    Args:
        group: rank t has the t-th part of the positions of every sequence.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.parts, self.part = group.size, group.rank

    def own(self, x_BS: Tensor) -> Tensor:
        """Return our positions (dim 1) of a tensor that all ranks of the group hold alike.

        Raises:
            ValueError: if the parts do not divide the positions.
        """
        if self.parts == 1:
            return x_BS
        positions = x_BS.shape[1]
        if positions % self.parts:
            raise ValueError(
                f"sequences have {positions} positions, which the {self.parts} ranks of a tensor "
                "group do not divide; choose a multiple"
            )
        length = positions // self.parts
        return x_BS.narrow(1, self.part * length, length)

    def whole(self, x_BPD: Tensor) -> Tensor:
        """All-gather the positions; the gradient is summed over the ranks."""
        if self.parts == 1:
            return x_BPD
        return self._changed(x_BPD, _gather, _sum)

    def summed(self, x_BSD: Tensor) -> Tensor:
        """Add up what the ranks hold and return our positions; the gradient is gathered."""
        if self.parts == 1:
            return x_BSD
        return self._changed(x_BSD, _sum, _gather)

    def _changed(self, x_BPD: Tensor, there: _Change, back: _Change) -> Tensor:
        result: Tensor = _Collective.apply(x_BPD, self.group, there, back)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return result


WHOLE_SEQUENCES = SequenceSplit(NO_GROUP)


class _Collective(torch.autograd.Function):
    """Applies one collective forwards, and the one that is its adjoint backwards."""

    @staticmethod
    def forward(ctx: Any, x_BPD: Tensor, group: Group, there: _Change, back: _Change) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x_BPD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BPD: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(dy_BPD, ctx.group), None, None, None


def _gather(x_BPD: Tensor, group: Group) -> Tensor:
    whole_TBPD = x_BPD.new_empty((group.size, *x_BPD.shape))
    group.traffic.calls += 1
    group.traffic.sent_bytes += x_BPD.numel() * x_BPD.element_size() * (group.size - 1)
    with record_function("comm.wait"):
        dist.all_gather_single(whole_TBPD.flatten(0, 1), x_BPD.contiguous(), group=group.handle)
    return whole_TBPD.transpose(0, 1).flatten(1, 2)


def _sum(x_BSD: Tensor, group: Group) -> Tensor:
    batch, positions = x_BSD.shape[:2]
    length = positions // group.size
    parts_TBPD = x_BSD.unflatten(1, (group.size, length)).transpose(0, 1)
    rows = parts_TBPD.flatten(0, 2)
    mine = RowSum(rows, [batch * length] * group.size, group).wait()
    return mine.view(batch, length, *x_BSD.shape[2:])
