"""The exact time of a five-stage pipeline, without a simulation.

A chunk passes send (inter), gather (intra), work (compute), scatter (intra) and back (inter). In
the staged order of arXiv:2501.10714 all sends come before all backs and all gathers before all
scatters; a gradient sum stands between the last send and the first back. The published method
tells four cases apart, which are exact only where a gather takes as long as a scatter; this
recurrence is exact for any times and for unequal chunks, in five operations a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Chunk", "one_lane_ms", "staged_ms", "window_ms"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Times of one chunk's five tasks, in ms."""

    send: float
    gather: float
    work: float
    scatter: float
    back: float


def staged_ms(chunks: Sequence[Chunk], reduce_ms: float = 0.0) -> float:
    """Return the time of the staged order on three lanes.

    Args:
        chunks: the times of each chunk, in order.
        reduce_ms: time of the gradient sum between the last send and the first back.
    """
    send = gather = 0.0
    gathered = []
    for chunk in chunks:
        send += chunk.send
        gather = max(gather, send) + chunk.gather
        gathered.append(gather)
    work = scatter = back = 0.0
    for chunk, ready in zip(chunks, gathered, strict=True):
        work = max(work, ready) + chunk.work
        scatter = max(scatter, work, gather) + chunk.scatter  # first in, first out on one lane
        back = max(back, scatter, send + reduce_ms) + chunk.back
    return back


def one_lane_ms(chunks: Sequence[Chunk], reduce_ms: float = 0.0) -> float:
    """Return the time where both kinds of communication share one lane.

    The lane holds send and gather of each chunk, the gradient sum, then scatter and back of each.
    """
    lane = 0.0
    ready = []
    for chunk in chunks:
        lane += chunk.send + chunk.gather
        ready.append(lane)
    lane += reduce_ms
    work = 0.0
    for chunk, gathered in zip(chunks, ready, strict=True):
        work = max(work, gathered) + chunk.work
        lane = max(lane, work) + chunk.scatter + chunk.back
    return lane


def window_ms(chunks: Sequence[Chunk]) -> float:
    """Return how long the inter lane is idle between the last send and the first back.

    All backs can wait until the end, so a gradient sum up to this long costs nothing:
    `staged_ms(chunks, t)` = max(`staged_ms(chunks)`, inter time + t).
    """
    return staged_ms(chunks) - sum(chunk.send + chunk.back for chunk in chunks)
