"""Which slices of the gradient sums travel during which backward pass of an MoE layer.

Read `buckets.py` first. The gradients behind a layer are complete when its backward pass begins, so
their sum can fill the time in which the layer's rows do not occupy the link: a window. What a
window does not take is sent when the pass is over, beside the computation that follows. All of it
is decided here, once, from sizes alone: every rank sends the same slices at the same places, also
one on which some parameter got no gradient.

Source: gradient partitioning, arXiv:2501.10714, section 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gatewise.parallel.buckets import Bucket

__all__ = ["Range", "Turn", "held_buckets", "leftover_ranges", "plan_turns"]

_LEAST_BYTES = 32 * 2**10  # what is smaller waits for the end: its start would cost more than it


@dataclass(frozen=True, slots=True)
class Range:
    """Neighbouring gradients of one bucket."""

    bucket: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What is sent with one backward pass of an MoE layer."""

    window: tuple[tuple[Range, ...], ...]  # slices within the pass
    beside: tuple[Range, ...]  # as soon as the pass is over


def held_buckets(buckets: Sequence[Bucket]) -> list[int]:
    """Return the buckets that can be sent in slices: summed whole, and over all ranks.

    With sharded optimizer state a slice would need gradients from every part of a bucket at once.
    """
    return [
        index
        for index, bucket in enumerate(buckets)
        if bucket.slots[0].spec.owner == "all"
        and bucket.groups.shard.size == 1
        and bucket.groups.replicate.size > 1
    ]


def plan_turns(
    buckets: Sequence[Bucket],
    ready: Mapping[str, int],
    *,
    turns: int,
    window_bytes: float,
    shares: Sequence[float],
) -> list[Turn]:
    """Return what is sent with each backward pass, in the order of these passes.

    Args:
        buckets: of the reducer.
        ready: for the name of a parameter, the first pass before which its gradient is complete;
            parameters that are missing are sent at the end.
        turns: number of passes.
        window_bytes: what fits into one pass.
        shares: parts of it that the pass's plan places; they sum to 1.
    """
    found = []
    for turn in range(turns):
        fresh = []
        for index in held_buckets(buckets):
            fresh += _ready_ranges(buckets[index], index, ready, turn)
        window: list[tuple[Range, ...]] = []
        rest = fresh
        for share in shares:
            taken, rest = _take(rest, window_bytes * share, buckets)
            window.append(tuple(taken))
        found.append(Turn(tuple(window), tuple(rest)))
    return found


def leftover_ranges(buckets: Sequence[Bucket], turns: Sequence[Turn]) -> list[Range]:
    """Return what no turn sends, bucket by bucket."""
    sent = [r for turn in turns for part in (*turn.window, turn.beside) for r in part]
    found = []
    for index in held_buckets(buckets):
        start = 0
        for piece in sorted((r for r in sent if r.bucket == index), key=lambda r: r.start):
            if piece.start > start:
                found.append(Range(index, start, piece.start))
            start = piece.end
        if start < buckets[index].gradients.numel():
            found.append(Range(index, start, buckets[index].gradients.numel()))
    return found


def _ready_ranges(bucket: Bucket, index: int, ready: Mapping[str, int], turn: int) -> list[Range]:
    """Return the gradients that are complete at this turn and were not before."""
    joined: list[Range] = []
    for slot in bucket.slots:
        if ready.get(slot.spec.name) != turn:
            continue
        if joined and joined[-1].end == slot.offset:
            joined[-1] = Range(index, joined[-1].start, slot.end)
        else:
            joined.append(Range(index, slot.offset, slot.end))
    width = bucket.gradients.element_size()
    return [r for r in joined if (r.end - r.start) * width >= _LEAST_BYTES]


def _take(
    ranges: Sequence[Range], size: float, buckets: Sequence[Bucket]
) -> tuple[list[Range], list[Range]]:
    """Split off the first `size` bytes."""
    taken, rest = [], list(ranges)
    while rest:
        first = rest[0]
        fits = int(size // buckets[first.bucket].gradients.element_size())
        if fits <= 0:
            break
        middle = min(first.end, first.start + fits)
        taken.append(Range(first.bucket, first.start, middle))
        size -= (middle - first.start) * buckets[first.bucket].gradients.element_size()
        rest[0:1] = [Range(first.bucket, middle, first.end)] if middle < first.end else []
    return taken, rest
