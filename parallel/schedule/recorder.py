"""Measured timelines: when each task of a pass ran, by the same type as predicted ones.

Read `timeline.py` first. A collective lasts from the moment a rank joins it; until the last member
has joined, it only waits. `split_waits` tells the two apart with the times of the other members.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gatewise.parallel.schedule.plan import Lane, Task
from gatewise.parallel.schedule.timeline import Interval, Timeline

__all__ = ["Clock", "HostClock", "Mark", "Recorder", "split_waits"]

Mark = Any  # a point in time of some clock: seconds, or an event of a GPU


class Clock(Protocol):
    """Tells the time where tasks run."""

    def mark(self) -> Mark:
        """Return now."""
        ...

    def ms(self, start: Mark, end: Mark) -> float:
        """Return the milliseconds between two marks; may wait until both are reached."""
        ...


class HostClock:
    """The host's clock; on one machine all processes read the same."""

    def mark(self) -> float:
        """Return seconds."""
        return time.perf_counter()

    def ms(self, start: float, end: float) -> float:
        """Return milliseconds."""
        return (end - start) * 1e3


@dataclass(frozen=True, slots=True)
class _Span:
    task: Task
    lane: Lane
    resource: Lane
    start: Mark
    end: Mark


class Recorder:
    """Collects when tasks ran; several threads may add at once.

    Args:
        clock: the host's, unless tasks run on a GPU.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or HostClock()
        self._spans: list[_Span] = []
        self.prefix = ""  # put before the names of stages: which layer's they are
        self.is_on = True  # off, nothing is collected

    def mark(self) -> Mark:
        """Return now."""
        return self._clock.mark()

    def add(self, task: Task, lane: Lane, resource: Lane, start: Mark, end: Mark) -> None:
        """Note when a task ran.

        Args:
            task: what ran.
            lane: where it was listed.
            resource: what it occupied.
            start: when it could start: what it needs had ended, and the lane was free.
            end: when it had ended.
        """
        if not self.is_on:
            return
        named = Task(self.prefix + task.stage, task.chunk)
        self._spans.append(_Span(named, lane, resource, start, end))

    @contextmanager
    def communication(self, name: str) -> Iterator[None]:
        """Record what the calling thread communicates outside of a plan."""
        if not self.is_on:
            yield
            return
        start = self.mark()
        yield
        self._spans.append(_Span(Task(name, 0), "compute", "inter", start, self.mark()))

    def clear(self) -> None:
        """Forget what was collected."""
        self._spans = []

    def drain(self, origin: Mark | None = None) -> Timeline:
        """Return what was collected and forget it.

        Args:
            origin: time zero; None: the first mark.
        """
        spans, self._spans = self._spans, []
        if not spans:
            return Timeline(())
        begin = spans[0].start if origin is None else origin
        intervals = []
        for span in spans:
            start, length = self._clock.ms(begin, span.start), self._clock.ms(span.start, span.end)
            end = start + length
            intervals.append(Interval(span.task, span.lane, span.resource, start, end, length))
        first = min(i.start_ms for i in intervals) if origin is None else 0.0
        moved = [
            replace(i, start_ms=i.start_ms - first, end_ms=i.end_ms - first) for i in intervals
        ]
        return Timeline(tuple(sorted(moved, key=lambda i: (i.start_ms, i.end_ms))))


def split_waits(
    own: Timeline, members: Sequence[Timeline], within: Callable[[Interval], bool]
) -> Timeline:
    """Return a timeline whose `work_ms` leaves out the waiting for other ranks.

    Args:
        own: what this rank measured.
        members: what the ranks of one group measured in the same pass, on one clock.
        within: tells which tasks this group communicates in; the others stay as they are.
    """
    joined: dict[tuple[Task, int], float] = {}
    for line in members:
        for key, interval in _numbered(line, within):
            joined[key] = max(joined.get(key, interval.start_ms), interval.start_ms)
    found = {id(interval): joined.get(key, 0.0) for key, interval in _numbered(own, within)}
    return Timeline(
        tuple(
            replace(i, work_ms=max(0.0, i.end_ms - max(i.start_ms, found[id(i)])))
            if id(i) in found
            else i
            for i in own.intervals
        )
    )


def _numbered(
    line: Timeline, within: Callable[[Interval], bool]
) -> list[tuple[tuple[Task, int], Interval]]:
    """Return chosen intervals with their task and how often it has been there before."""
    seen: dict[Task, int] = {}
    found = []
    for interval in line.intervals:
        if within(interval):
            number = seen.get(interval.task, 0)
            seen[interval.task] = number + 1
            found.append(((interval.task, number), interval))
    return found
