"""Collectives on rows of tensors: asynchronous, counted, without autograd.

The MoE layer differentiates by hand (`moe/compute.py`): the gradient of an all-to-all is the
all-to-all with the splits swapped, which the backward plan issues itself.

All of them are all-to-alls and pass through `start_exchange`: on CPUs rows go message by message,
with the receives posted first (`pairwise.py`), on GPUs in one collective.

Shapes:  R rows received   N rows sent   D width   P ranks of a group
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from gatewise.parallel.pairwise import PairwiseExchange

__all__ = [
    "NO_GROUP",
    "Group",
    "RowExchange",
    "RowSum",
    "Rows",
    "ShardSum",
    "Traffic",
    "gather_uneven",
    "reduce_scatter_sum",
    "start_exchange",
    "start_ints",
]


@dataclass(slots=True)
class Traffic:
    """What a group has moved: calls and bytes that left this rank."""

    calls: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """A process group with this rank's place in it; `handle` None is the one-rank group."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    traffic: Traffic

    @staticmethod
    def of(handle: dist.ProcessGroup | None) -> "Group":
        """Describe `handle`; None means a group of this rank alone."""
        if handle is None:
            return Group(None, 0, 1, Traffic())
        return Group(handle, dist.get_rank(handle), dist.get_world_size(handle), Traffic())

    def __deepcopy__(self, memo: dict[int, object]) -> "Group":
        """Return the group itself: a copied module talks to the same ranks."""
        return self


NO_GROUP = Group(None, 0, 1, Traffic())


class Rows(Protocol):
    """Rows on their way."""

    def wait(self) -> Tensor:
        """Return them; a second call returns the same."""
        ...


class Exchange(Protocol):
    """An all-to-all under way."""

    def wait(self) -> object:
        """Return when everything has been received and sent."""
        ...


def start_exchange(
    received: Tensor,
    sent: Tensor,
    group: Group,
    *,
    receive: Sequence[int] | None = None,
    send: Sequence[int] | None = None,
    small: bool = False,
) -> Exchange:
    """Start an all-to-all and count it.

    Args:
        received: contiguous; takes what arrives, ordered by source rank.
        sent: ordered by destination rank; it must stay as it is until the end.
        group: of several ranks.
        receive: rows of `received` from each rank; None: its first dim is P.
        send: rows of `sent` for each rank; None: its first dim is P.
        small: so small on every rank that taking turns costs less than a message to each rank.
    """
    assert group.handle is not None
    parts = sent.unbind() if send is None else sent.split(list(send))
    group.traffic.calls += 1
    group.traffic.sent_bytes += sum(part.nbytes for part in parts) - parts[group.rank].nbytes
    if sent.device.type == "cpu" and not small:
        places = received.unbind() if receive is None else received.split(list(receive))
        return PairwiseExchange(places, parts, group.handle)
    work: dist.Work = dist.all_to_all_single(
        received,
        sent.contiguous(),
        output_split_sizes=None if receive is None else list(receive),
        input_split_sizes=None if send is None else list(send),
        group=group.handle,
        async_op=True,
    )
    return work


class RowExchange:
    """An all-to-all of rows under way; `wait` returns the received rows.

    Args:
        x_ND: rows to send, ordered by destination rank; or (P, N, D), equally many for each.
        send: rows for each rank; sums to N; None for equally many.
        receive: rows from each rank.
        group: with one rank nothing is copied: the result is `x_ND` itself.
    """

    def __init__(
        self, x_ND: Tensor, send: Sequence[int] | None, receive: Sequence[int], group: Group
    ) -> None:
        self._work: Exchange | None = None
        if group.handle is None:
            self._result_RD = x_ND
            return
        rows = x_ND.shape[1:] if send is not None else x_ND.shape[2:]
        self._sent_ND = x_ND  # kept alive until the exchange is over
        self._result_RD = x_ND.new_empty((sum(receive), *rows))
        self._work = start_exchange(self._result_RD, x_ND, group, receive=receive, send=send)

    def wait(self) -> Tensor:
        """Return the received rows, ordered by source rank."""
        if self._work is not None:
            with record_function("comm.wait"):
                self._work.wait()
            self._work = None
        return self._result_RD


def gather_uneven(x_RD: Tensor, sizes: Sequence[int], group: Group) -> RowExchange:
    """Start an all-gather of rows of which each rank has another number.

    Args:
        x_RD: our rows.
        sizes: rows of each rank.
        group: with one rank the result is `x_RD` itself.

    Returns:
        A handle; the rows are ordered by rank.
    """
    if group.handle is None:
        return RowExchange(x_RD, sizes, sizes, group)
    # gloo gathers equal sizes only, and padding would travel; so each rank is sent ours
    x_PRD = x_RD.contiguous().unsqueeze(0).expand(group.size, *x_RD.shape)
    return RowExchange(x_PRD, None, sizes, group)


class RowSum:
    """A reduce-scatter of rows under way, the adjoint of `gather_uneven`.

    Ranks add their parts in rank order, in fp32 or wider, whatever arrives first: the result does
    not depend on timing.

    Args:
        x_RD: this rank's part of every rank's rows, ordered by rank.
        sizes: rows of each rank.
        group: with one rank the result is `x_RD` itself.

    Source: gloo's own reduce-scatter moves twice the bytes and takes equal sizes only.
    """

    def __init__(self, x_RD: Tensor, sizes: Sequence[int], group: Group) -> None:
        self._result_RD = x_RD
        self._exchange: RowExchange | None = None
        if group.handle is not None:
            ours = sizes[group.rank]
            self._shape = (group.size, ours, *x_RD.shape[1:])
            self._exchange = RowExchange(x_RD, sizes, [ours] * group.size, group)

    def wait(self) -> Tensor:
        """Return this rank's rows, summed over the ranks."""
        if self._exchange is not None:
            self._result_RD = _sum_in_order(self._exchange.wait().view(self._shape))
            self._exchange = None
        return self._result_RD


def _sum_in_order(parts_PRD: Tensor) -> Tensor:
    """Sum over the first dim from first to last, whatever the size: bits stay the same."""
    first_RD, *others = parts_PRD.unbind()
    total_RD = first_RD.to(torch.promote_types(first_RD.dtype, torch.float32), copy=True)
    for part_RD in others:
        total_RD += part_RD
    return total_RD.to(first_RD.dtype)


def start_ints(values: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start an all-to-all of equal integer slices: row r of (size, ...) goes to rank r.

    What is returned waits for the rows of the other ranks and gives them.
    """
    if group.handle is None:
        return lambda: values
    sent = values.contiguous()  # before empty_like, which keeps strides
    received = torch.empty_like(sent)
    exchange = start_exchange(received, sent, group, small=True)

    def wait() -> Tensor:
        exchange.wait()
        return received

    return wait


def reduce_scatter_sum(flat: Tensor, group: Group) -> "ShardSum":
    """Start the sum over ranks of equal slices of `flat`; `wait` leaves ours in place.

    Source: gloo's own reduce-scatter moves twice the bytes, so it is an all-to-all and a local
    sum in rank order.
    """
    return ShardSum(flat, group)


class ShardSum:
    """A reduce-scatter under way on a flat tensor whose length `group.size` divides."""

    def __init__(self, flat: Tensor, group: Group) -> None:
        assert flat.dim() == 1
        assert flat.numel() % group.size == 0
        self._group = group
        self._slices = flat.view(group.size, -1)
        if group.handle is None:
            self._work: Exchange | None = None
            return
        self._received = torch.empty_like(self._slices)
        self._work = start_exchange(self._received, self._slices, group)

    def wait(self) -> Tensor:
        """Return this rank's slice (a view of `flat`), now summed over ranks."""
        mine = self._slices[self._group.rank]
        if self._work is not None:
            self._work.wait()
            self._work = None
            torch.sum(self._received, 0, out=mine)
            del self._received
        return mine
