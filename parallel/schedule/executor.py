"""Run the tasks of a plan: computation inline, communication in the background.

Read `plan.py` first. A communication task returns a `Handle`; whoever needs its result waits for
it. The order in which tasks are issued follows from the plan alone, never from timing, so that
every rank issues its collectives in the same order.
"""

from collections.abc import Callable
from typing import Protocol

from gatewise.parallel.schedule.plan import Lane, Plan, StageGraph, Task

__all__ = ["Handle", "run_plan"]

_COMMUNICATION: tuple[Lane, ...] = ("inter", "intra")


class Handle(Protocol):
    """Communication under way."""

    def wait(self) -> object:
        """Return when the result may be read."""
        ...


def run_plan(graph: StageGraph, plan: Plan, run: Callable[[Task], Handle | None]) -> None:
    """Run every task of `plan` once.

    Before each computation, all communication whose inputs exist is issued; before any task, the
    communication that it needs is waited for. Communication that stands in the compute lane is
    waited for at once.

    Args:
        graph: the stages and what each needs.
        plan: the order in each lane.
        run: does a task's work; returns a handle where the work goes on in the background.

    Raises:
        ValueError: if the plan's lane orders contradict the dependencies.
    """
    needs = {task: graph.needs(task, plan.chunks) for task in graph.tasks(plan.chunks)}
    queues = {lane: list(reversed(tasks)) for lane, tasks in plan.lanes.items()}
    issued: dict[Task, Handle | None] = {}

    def ready(task: Task) -> bool:
        return all(needed in issued for needed in needs[task])

    def issue(task: Task) -> None:
        for needed in needs[task]:
            handle = issued[needed]
            if handle is not None:
                handle.wait()
                issued[needed] = None
        issued[task] = run(task)

    while any(queues.values()):
        progress = False
        for lane in _COMMUNICATION:
            queue = queues.get(lane, [])
            while queue and ready(queue[-1]):
                issue(queue.pop())
                progress = True
        compute = queues.get("compute", [])
        if compute and ready(compute[-1]):
            task = compute.pop()
            issue(task)
            blocking = issued[task]
            if blocking is not None:
                blocking.wait()
                issued[task] = None
            progress = True
        if not progress:
            heads = [str(queue[-1]) for queue in queues.values() if queue]
            raise ValueError(f"plan cannot go on: {heads} wait for tasks listed behind them")
    for handle in issued.values():
        if handle is not None:
            handle.wait()
