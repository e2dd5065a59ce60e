"""Ways to order the tasks of a pass: groups of stages, lags, and list scheduling.

Read `plan.py` first. These functions know lanes, times and dependencies, nothing else; which of
them makes a good schedule for a layer is decided above.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence

from gatewise.parallel.schedule.plan import LANES, Lane, Plan, StageGraph, Task

__all__ = ["grouped_order", "lagged_sequence", "list_plan", "nested_sequences", "reordered_plan"]


def grouped_order(graph: StageGraph, chunks: int, groups: Sequence[Sequence[str]]) -> list[Task]:
    """Return the order that takes groups of stages in turn, within a group chunk by chunk.

    Args:
        graph: the stages.
        chunks: number of chunks.
        groups: every stage once; a stage alone in its group runs over all chunks before the next.
    """
    order: list[Task] = []
    for group in groups:
        counts = {name: graph.stage(name).count(chunks) for name in group}
        order += [
            Task(name, chunk)
            for chunk in range(max(counts.values()))
            for name in group
            if chunk < counts[name]
        ]
    return order


def lagged_sequence(first: str, second: str, chunks: int, lag: int) -> list[Task]:
    """Return two stages of one lane interleaved: the second's chunk i follows the first's i + lag.

    A lag of `chunks` or more is the staged order.
    """
    sequence = [Task(first, chunk) for chunk in range(min(lag, chunks))]
    for chunk in range(chunks):
        if chunk + lag < chunks:
            sequence.append(Task(first, chunk + lag))
        sequence.append(Task(second, chunk))
    return sequence


def nested_sequences(first: str, second: str, chunks: int) -> Iterator[list[Task]]:
    """Yield every order of two stages in which a chunk's second task follows its first one.

    Chunks keep their order within a stage, so there are as many as Catalan's number.
    """

    def extend(done: list[Task], firsts: int, seconds: int) -> Iterator[list[Task]]:
        if seconds == chunks:
            yield list(done)
            return
        if firsts < chunks:
            yield from extend([*done, Task(first, firsts)], firsts + 1, seconds)
        if seconds < firsts:
            yield from extend([*done, Task(second, seconds)], firsts, seconds + 1)

    yield from extend([], 0, 0)


def reordered_plan(plan: Plan, sequences: Sequence[Sequence[Task]]) -> Plan:
    """Return the plan with some tasks of a lane put into another order among themselves.

    Args:
        plan: the plan to change.
        sequences: for each, tasks that stand in one lane; they take the places that they had
            there, in this order.
    """
    lanes = {lane: list(tasks) for lane, tasks in plan.lanes.items()}
    for sequence in sequences:
        members = set(sequence)
        for tasks in lanes.values():
            places = [place for place, task in enumerate(tasks) if task in members]
            for place, task in zip(places, sequence, strict=False):
                tasks[place] = task
    return Plan(plan.chunks, {lane: tuple(tasks) for lane, tasks in lanes.items()}, plan.shares)


def list_plan(
    graph: StageGraph,
    chunks: int,
    ms: Callable[[Task], float],
    *,
    shares: tuple[float, ...] = (),
    fillers: Sequence[str] = (),
    merge: Mapping[Lane, Lane] | None = None,
) -> Plan:
    """Return the plan of list scheduling: a free lane takes the ready task that matters most.

    What matters is the longest path from the task to the end. Fillers (weight gradients, gradient
    sums) are taken only when nothing else is ready for the lane.

    Args:
        graph: the stages.
        chunks: number of chunks.
        ms: time of each task.
        shares: part of the tokens in each chunk; empty for equal parts.
        fillers: names of stages that nobody waits for.
        merge: lanes whose tasks are listed in another lane.
    """
    tasks = graph.tasks(chunks)
    number = {task: index for index, task in enumerate(tasks)}
    needs = [[number[need] for need in graph.needs(task, chunks)] for task in tasks]
    times = [ms(task) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    for index, before in enumerate(needs):
        for other in before:
            followers[other].append(index)
    path = list(times)
    for index in range(len(tasks) - 1, -1, -1):  # followers stand behind what they need
        path[index] += max((path[after] for after in followers[index]), default=0.0)
    low = set(fillers)
    lane_of = [(merge or {}).get(lane, lane) for lane in (graph.stage(t.stage).lane for t in tasks)]
    ready: dict[Lane, list[tuple[bool, float, int]]] = {lane: [] for lane in LANES}

    def offer(index: int) -> None:
        entry = (tasks[index].stage in low, -path[index], index)
        heapq.heappush(ready[lane_of[index]], entry)

    missing = [len(before) for before in needs]
    for index, count in enumerate(missing):
        if not count:
            offer(index)
    order: dict[Lane, list[Task]] = {lane: [] for lane in LANES}
    running: list[tuple[float, int]] = []
    busy: set[Lane] = set()
    now = 0.0
    while running or any(ready.values()):
        for lane, waiting in ready.items():
            if waiting and lane not in busy:
                index = heapq.heappop(waiting)[2]
                order[lane].append(tasks[index])
                busy.add(lane)
                heapq.heappush(running, (now + times[index], index))
        now, index = heapq.heappop(running)
        busy.discard(lane_of[index])
        for after in followers[index]:
            missing[after] -= 1
            if not missing[after]:
                offer(after)
    return Plan(chunks, {lane: tuple(listed) for lane, listed in order.items()}, shares)
