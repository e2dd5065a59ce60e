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

__all__ = ["PairwiseExchange"]


class PairwiseExchange:
    """Messages from and to each rank of a group under way.

    Args:
        received: contiguous tensors that take what each rank sends; nothing, where it is empty.
        sent: tensors for each rank, of the sizes that these expect.
        group: of gloo.
    """

    def __init__(
        self, received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup
    ) -> None:
        rank, size = group.rank(), group.size()
        others = [other % size for other in range(rank + 1, rank + size)]
        self._kept = [part.contiguous() for part in sent]  # gloo reads them until the end
        self._works: list[dist.Work | None] = [
            group.recv([received[other]], other, 0) for other in others if received[other].numel()
        ]
        self._works += [
            group.send([self._kept[other]], other, 0) for other in others if sent[other].numel()
        ]
        received[rank].copy_(sent[rank])

    def wait(self) -> None:
        """Return when everything has been received and sent."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._works, self._kept = [], []
