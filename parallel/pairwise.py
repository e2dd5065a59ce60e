"""Exchanges among the ranks of a gloo group, message by message, with the receives posted first.

Gloo's own all-to-all posts its sends first. A rank that comes later than its peer then writes all
of its data before it says, on the same connection, that it can receive: the two directions of a
link take turns, and the exchange lasts twice as long. Ranks that wait for nobody else in between
enter at the same time and do not see this; ranks of a schedule do. Here every rank says first what
it can receive. Measurements: `benchmarks/schedule.md`.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.collectives import Group

__all__ = ["PairwiseExchange"]


class PairwiseExchange:
    """Messages from and to each rank of a group under way.

    Args:
        received: contiguous tensors that take what each rank sends; nothing, where it is empty.
        sent: contiguous tensors for each rank, of the sizes that these expect; they must stay as
            they are until the end.
        group: with one rank the own message is copied.
    """

    def __init__(self, received: Sequence[Tensor], sent: Sequence[Tensor], group: Group) -> None:
        self._kept = sent  # gloo reads them until the end
        self._works: list[dist.Work | None] = []
        others = [other % group.size for other in range(group.rank + 1, group.rank + group.size)]
        if group.handle is not None:
            group.traffic.calls += 1
            group.traffic.sent_bytes += sum(sent[other].nbytes for other in others)
        for other in others:
            if received[other].numel():
                self._works.append(dist.irecv(received[other], group=group.handle, group_src=other))
        for other in others:
            if sent[other].numel():
                self._works.append(dist.isend(sent[other], group=group.handle, group_dst=other))
        received[group.rank].copy_(sent[group.rank])

    def wait(self) -> None:
        """Return when everything has been received and sent."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = []
