"""Run the tasks of a plan, on lanes that work at the same time where there are any.

Read `plan.py` first. `run(task)` does a task's work and returns a `Handle` where the work goes on
in the background; a task has ended when its handle has been waited for. It need not be the work of
a layer: a benchmark may let tasks sleep.

Without lanes everything is issued by the calling thread: before each computation all communication
whose inputs exist, and whoever needs a result waits for it. With lanes (`lanes.py` on CPUs,
`parallel/streams.py` on GPUs) each communication lane works off its tasks in the plan's order, one
at a time, while the calling thread computes. Either way the order in which collectives are issued
follows from the plan alone, never from timing, so it is the same on every rank. Communication that
stands in the compute lane is waited for at once; a plan with nothing else needs no lanes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from gatewise.parallel.schedule.plan import LANES, Lane, Plan, StageGraph, Task
from gatewise.parallel.schedule.recorder import Mark, Recorder

__all__ = ["Execution", "Handle", "Issue", "LaneError", "Lanes", "PlanRunner", "Run", "run_plan"]

_COMMUNICATION: tuple[Lane, ...] = ("inter", "intra")


class Handle(Protocol):
    """Communication under way."""

    def wait(self) -> object:
        """Return when the result may be read."""
        ...


Run = Callable[[Task], Handle | None]
Issue = Callable[[], Handle | None]


class LaneError(RuntimeError):
    """Communication failed; the message names the rank, the lane and the task."""

    @staticmethod
    def of(task: Task, lane: Lane, error: BaseException) -> "LaneError":
        """Describe what went wrong in a task."""
        import torch.distributed as dist  # here, so that plans can be checked without torch

        rank = dist.get_rank() if dist.is_initialized() else 0
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return LaneError(f"rank {rank}, lane {lane}, task {task}: {reason}")


class Lanes(Protocol):
    """Runs communication beside computation."""

    def run(self, runner: "PlanRunner", run: Run, recorder: Recorder | None) -> None:
        """Run every task of a plan; return when all have ended."""
        ...

    def start(self, lane: Lane, issue: Issue, after: Handle | None) -> Handle:
        """Put communication outside of a plan at the end of a lane; return at once.

        Args:
            lane: which carries it.
            issue: starts it.
            after: what must have ended before; None: what the calling thread has computed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Execution:
    """Where plans run, and who notes when."""

    lanes: Lanes | None = None  # None: the calling thread issues everything
    recorder: Recorder | None = None

    def communication(self, name: str) -> AbstractContextManager[None]:
        """Let the recorder, if there is one, see what this thread communicates outside of plans."""
        return nullcontext() if self.recorder is None else self.recorder.communication(name)


class PlanRunner:
    """A plan made ready to be run many times.

    Args:
        graph: the stages and what each needs.
        plan: the order in each lane; it is checked.

    Raises:
        ValueError: if the plan is of another graph, or contradicts the dependencies.
    """

    def __init__(self, graph: StageGraph, plan: Plan) -> None:
        plan.check(graph)
        self.tasks: list[Task] = []  # in the order in which one thread issues them
        self.needs: list[list[int]] = []  # what must have ended before each task, by place
        self.lanes: list[Lane] = []  # where each is listed
        self.resources: list[Lane] = []  # what each occupies
        queues = {lane: list(reversed(plan.lanes.get(lane, ()))) for lane in LANES}
        place: dict[Task, int] = {}

        def take(lane: Lane) -> bool:
            task = queues[lane][-1] if queues[lane] else None
            needs = graph.needs(task, plan.chunks) if task else []
            if task is None or not all(other in place for other in needs):
                return False
            queues[lane].pop()
            place[task] = len(self.tasks)
            self.tasks.append(task)
            self.needs.append([place[other] for other in needs])
            self.lanes.append(lane)
            self.resources.append(graph.stage(task.stage).lane)
            return True

        while any(queues.values()):
            progress = False
            for lane in _COMMUNICATION:
                while take(lane):
                    progress = True
            if not take("compute") and not progress:
                heads = [str(queue[-1]) for queue in queues.values() if queue]
                raise ValueError(f"plan cannot go on: {heads} wait for tasks listed behind them")
        self.by_lane = {
            lane: [i for i, own in enumerate(self.lanes) if own == lane] for lane in LANES
        }

    def run(
        self, run: Run, *, lanes: Lanes | None = None, recorder: Recorder | None = None
    ) -> None:
        """Run every task once; see `run_plan`."""
        if lanes is None or not any(self.by_lane[lane] for lane in _COMMUNICATION):
            self._run_here(run, recorder)
        else:
            lanes.run(self, run, recorder)

    def perform(self, index: int, run: Run, recorder: Recorder | None) -> None:
        """Run one task to its end on the calling thread.

        Raises:
            LaneError: if it is communication and fails.
        """
        task = self.tasks[index]
        started = recorder.mark() if recorder else None
        try:
            handle = run(task)
            if handle is not None:
                handle.wait()
        except Exception as error:
            if self.resources[index] == "compute":
                raise
            raise LaneError.of(task, self.lanes[index], error) from error
        self.record(index, started, recorder)

    def record(self, index: int, started: Mark | None, recorder: Recorder | None) -> None:
        """Note that a task has ended now."""
        if recorder is not None and started is not None:
            where = (self.tasks[index], self.lanes[index], self.resources[index])
            recorder.add(*where, started, recorder.mark())

    def _run_here(self, run: Run, recorder: Recorder | None) -> None:
        under_way: dict[int, tuple[Handle, Mark | None]] = {}

        def finish(index: int) -> None:
            if index not in under_way:
                return
            handle, started = under_way.pop(index)
            try:
                handle.wait()
            except Exception as error:
                raise LaneError.of(self.tasks[index], self.lanes[index], error) from error
            self.record(index, started, recorder)

        for index, task in enumerate(self.tasks):
            for needed in self.needs[index]:
                finish(needed)
            if self.lanes[index] == "compute":
                self.perform(index, run, recorder)
                continue
            started = recorder.mark() if recorder else None
            try:
                handle = run(task)
            except Exception as error:
                raise LaneError.of(task, self.lanes[index], error) from error
            if handle is None:
                self.record(index, started, recorder)
            else:
                under_way[index] = handle, started
        for index in list(under_way):
            finish(index)


def run_plan(
    graph: StageGraph,
    plan: Plan,
    run: Run,
    *,
    lanes: Lanes | None = None,
    recorder: Recorder | None = None,
) -> None:
    """Run every task of `plan` once, and return when all have ended.

    Args:
        graph: the stages and what each needs.
        plan: the order in each lane.
        run: does a task's work; with `ThreadLanes` it is called on the lane's own thread, and may
            block there instead of returning a handle.
        lanes: where communication runs; None: it is issued by the calling thread.
        recorder: gets when each task ran.

    Raises:
        ValueError: if the plan is of another graph, or its lane orders contradict the dependencies.
        LaneError: if communication fails, as when another rank dies.
    """
    PlanRunner(graph, plan).run(run, lanes=lanes, recorder=recorder)
