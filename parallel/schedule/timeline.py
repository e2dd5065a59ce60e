"""Predicted timelines: a plan with the time of each task, played out lane by lane.

Read `plan.py` and `cost.py` first. A task starts when the task before it in its lane and all that
it needs have ended. With interference the lanes are fluids: while several are busy, each goes
slower by what the matrix says, so a task lasts as long as its work takes at its changing speed.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gatewise.parallel.schedule.cost import Interference
from gatewise.parallel.schedule.plan import LANES, Lane, Plan, StageGraph, Task

__all__ = ["Interval", "Program", "Timeline", "chrome_events", "joined", "play"]

_ENDED = 1e-12  # work below this, in ms, is done: what subtraction leaves over


@dataclass(frozen=True, slots=True)
class Interval:
    """When one task ran."""

    task: Task
    lane: Lane  # where it was listed
    resource: Lane  # what it occupied
    start_ms: float
    end_ms: float
    work_ms: float  # how long it takes with nothing beside it


@dataclass(frozen=True, slots=True)
class Timeline:
    """All tasks of a pass in time, in the order in which they started."""

    intervals: tuple[Interval, ...]

    @property
    def total_ms(self) -> float:
        """Time from the start to the last end."""
        return max((i.end_ms for i in self.intervals), default=0.0)

    def busy_ms(self, resource: Lane) -> float:
        """Time in which a resource is occupied."""
        return sum(i.end_ms - i.start_ms for i in self.intervals if i.resource == resource)

    def exposed_ms(self) -> float:
        """Time in which something is communicated and nothing is computed."""
        marks: list[tuple[float, int, int]] = []
        for interval in self.intervals:
            computes = interval.resource == "compute"
            marks.append((interval.start_ms, int(computes), int(not computes)))
            marks.append((interval.end_ms, -int(computes), -int(not computes)))
        exposed = before = 0.0
        computing = moving = 0
        for time, compute, move in sorted(marks):
            if moving and not computing:
                exposed += time - before
            before = time
            computing += compute
            moving += move
        return exposed


def joined(lines: Sequence[Timeline]) -> Timeline:
    """Return timelines one after the other."""
    found: list[Interval] = []
    start = 0.0
    for line in lines:
        found += [
            replace(i, start_ms=i.start_ms + start, end_ms=i.end_ms + start) for i in line.intervals
        ]
        start += line.total_ms
    return Timeline(tuple(found))


class Program:
    """A plan made ready to be played many times with different times of its tasks.

    Args:
        graph: the stages.
        plan: the order in each lane; it is checked.

    Raises:
        ValueError: if the plan does not fit the graph or contradicts its dependencies.
    """

    def __init__(self, graph: StageGraph, plan: Plan) -> None:
        plan.check(graph)
        self.tasks: list[Task] = []  # in an order in which they can be worked out
        self.before: list[list[int]] = []  # what each task waits for, the lane's last one first
        self.lanes: list[Lane] = []
        self.resources: list[Lane] = []
        self.shares: list[float] = []
        number: dict[Task, int] = {}
        last: dict[Lane, int] = {}
        needs = {task: graph.needs(task, plan.chunks) for task in graph.tasks(plan.chunks)}
        queues = {lane: list(reversed(tasks)) for lane, tasks in plan.lanes.items()}
        while any(queues.values()):
            progress = False
            for lane, queue in queues.items():
                while queue and all(task in number for task in needs[queue[-1]]):
                    task = queue.pop()
                    before = [number[need] for need in needs[task]]
                    if lane in last:
                        before.insert(0, last[lane])
                    last[lane] = number[task] = len(self.tasks)
                    self.tasks.append(task)
                    self.before.append(before)
                    self.lanes.append(lane)
                    self.resources.append(graph.stage(task.stage).lane)
                    self.shares.append(plan.share(graph, task))
                    progress = True
            if not progress:
                heads = [str(queue[-1]) for queue in queues.values() if queue]
                raise ValueError(f"plan cannot go on: {heads} wait for tasks listed behind them")

    def ends(self, ms: Sequence[float]) -> list[float]:
        """Return when each task ends where lanes do not disturb each other.

        Args:
            ms: time of each of `tasks`.
        """
        end: list[float] = []
        for before, duration in zip(self.before, ms, strict=True):
            start = 0.0
            for other in before:
                start = max(start, end[other])
            end.append(start + duration)
        return end

    def total_ms(self, ms: Sequence[float], interference: Interference) -> float:
        """Return the time of the whole pass."""
        if not interference:
            return max(self.ends(ms), default=0.0)
        return self.play(ms, interference).total_ms

    def play(self, ms: Sequence[float], interference: Interference) -> Timeline:
        """Return when each task runs.

        Args:
            ms: time of each of `tasks`, alone.
            interference: how busy lanes slow each other down.
        """
        if interference:
            spans = self._fluid(ms, interference)
        else:
            spans = [(end - m, end) for end, m in zip(self.ends(ms), ms, strict=True)]
        intervals = [
            Interval(task, self.lanes[i], self.resources[i], *spans[i], ms[i])
            for i, task in enumerate(self.tasks)
        ]
        return Timeline(tuple(sorted(intervals, key=lambda i: (i.start_ms, i.end_ms))))

    def _fluid(self, ms: Sequence[float], interference: Interference) -> list[tuple[float, float]]:
        followers: list[list[int]] = [[] for _ in self.tasks]
        missing = [len(set(before)) for before in self.before]
        for index, before in enumerate(self.before):
            for other in set(before):
                followers[other].append(index)
        ready = [index for index, count in enumerate(missing) if not count]
        start = [0.0] * len(self.tasks)
        end = [0.0] * len(self.tasks)
        left: dict[int, float] = {}  # work that is not done yet, of running tasks
        rates: dict[tuple[Lane, ...], tuple[float, ...]] = {}
        now = 0.0
        while ready or left:
            while ready:
                index = heapq.heappop(ready)
                start[index] = now
                left[index] = ms[index]
            busy = tuple(self.resources[index] for index in left)
            if busy not in rates:
                rates[busy] = tuple(interference.rate(lane, busy) for lane in busy)
            speed = rates[busy]
            step = min(work / rate for work, rate in zip(left.values(), speed, strict=True))
            now += step
            for index, rate in zip(tuple(left), speed, strict=True):
                left[index] -= step * rate
                if left[index] > _ENDED:
                    continue
                del left[index]
                end[index] = now
                for follower in followers[index]:
                    missing[follower] -= 1
                    if not missing[follower]:
                        heapq.heappush(ready, follower)
        return list(zip(start, end, strict=True))


def play(
    graph: StageGraph,
    plan: Plan,
    ms: Callable[[Task, float], float],
    interference: Interference | None = None,
) -> Timeline:
    """Return the predicted timeline of a plan.

    Args:
        graph: the stages.
        plan: the order in each lane.
        ms: time of a task, given its share of the stage's work.
        interference: how busy lanes slow each other down; None: not at all.

    Raises:
        ValueError: as `Program`.
    """
    program = Program(graph, plan)
    times = [ms(task, share) for task, share in zip(program.tasks, program.shares, strict=True)]
    return program.play(times, interference or Interference.none())


def chrome_events(
    timeline: Timeline, track: str, *, process: int = 0, start_ms: float = 0.0
) -> list[dict[str, Any]]:  # JSON's own types
    """Return the events of a Chrome trace: one process with a thread for each lane.

    Args:
        timeline: what to show.
        track: name of the process, such as "predicted, forward".
        process: number of the process; tracks side by side take different ones.
        start_ms: when the timeline starts.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": track}}
    ]
    names: Mapping[Lane, int] = {lane: number for number, lane in enumerate(LANES)}
    events += [
        {"ph": "M", "pid": process, "tid": number, "name": "thread_name", "args": {"name": lane}}
        for lane, number in names.items()
    ]
    events += [
        {
            "ph": "X",
            "pid": process,
            "tid": names[interval.resource],
            "name": str(interval.task),
            "cat": interval.resource,
            "ts": round((start_ms + interval.start_ms) * 1e3, 3),
            "dur": round((interval.end_ms - interval.start_ms) * 1e3, 3),
            "args": {"alone_ms": interval.work_ms, "listed_in": interval.lane},
        }
        for interval in timeline.intervals
    ]
    return events
