"""Measure what operations cost on the real groups, and how much busy lanes disturb each other.

Read `cost.py`, `profiles.py` and `executor.py` first. All ranks measure at once, through the
executor and in the lane that an operation has in training, again and again without a pause: a link
that rested takes the first bytes for nothing. A series of repetitions gives one mean, because
ranks that share a link take unequal turns; the time of a size is the median of three series, of
the slowest rank.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.distributed as dist

from gatewise.parallel.collectives import Group
from gatewise.parallel.schedule.cost import Cost, Interference, fit_cost
from gatewise.parallel.schedule.executor import LaneError, Lanes, PlanRunner
from gatewise.parallel.schedule.plan import Lane, Plan, Stage, StageGraph, Task

__all__ = ["Meter", "Probe", "Run"]

Run = Callable[[], None]
_SERIES = 3
_PAIR_MS = 400.0  # how long two lanes are measured side by side, at least
_PAIR_RUNS = 4  # and so many repetitions of the slower one


@dataclass(frozen=True, slots=True)
class Probe:
    """An operation that can be measured."""

    lane: Lane
    sizes: tuple[float, ...]  # in the units of the profile
    prepare: Callable[[float], tuple[float, Run]]  # a size -> the exact one, and what does it once


@dataclass(frozen=True, slots=True)
class Meter:
    """Measures probes; every rank must call the same methods.

    `control` is all ranks, to meet and to agree; `lanes` are those of training.
    """

    control: Group
    lanes: Lanes
    repeats: int = 4  # in a series

    def cost(self, probe: Probe) -> Cost:
        """Measure an operation at all its sizes and fit its cost."""
        sizes, times = [], []
        for wanted in probe.sizes:
            size, run = probe.prepare(wanted)
            sizes.append(size)
            times.append(self._alone(probe.lane, run))
        if len(set(sizes)) < 2:  # so little work that it cannot be cut
            return Cost(0.0, times[-1] / sizes[-1])
        return fit_cost(sizes, times)

    def interference(self, probes: Mapping[Lane, Probe]) -> Interference:
        """Measure how much longer operations take while another lane is busy.

        Args:
            probes: for each lane the operation that stands for it, taken at its largest size.
        """
        runs = {lane: probe.prepare(max(probe.sizes))[1] for lane, probe in probes.items()}
        alone = {}
        for lane, run in runs.items():
            alone[lane] = max(1e-3, self._alone(lane, run))
        extra: dict[Lane, dict[Lane, float]] = {}
        for pair in combinations(runs, 2):
            longest = max(_PAIR_MS, *(_PAIR_RUNS * alone[lane] for lane in pair))
            counts = {lane: math.ceil(longest / alone[lane]) for lane in pair}
            both = self._run_lanes({lane: (runs[lane], counts[lane]) for lane in pair})
            until = min(both[lane][-1] for lane in pair)  # then one lane is alone
            for lane, other in (pair, pair[::-1]):
                beside = [end for end in both[lane] if end <= until]
                taken = _durations(beside)
                mean = statistics.fmean(taken) if taken else alone[lane]
                mean = self._over_ranks([mean], dist.ReduceOp.SUM)[0] / self.control.size
                extra.setdefault(lane, {})[other] = max(0.0, mean / alone[lane] - 1)
        return Interference(extra)

    def _alone(self, lane: Lane, run: Run) -> float:
        """Return the time of an operation with nothing beside it, in ms."""
        series = [self._run_lanes({lane: (run, self.repeats)})[lane] for _ in range(_SERIES)]
        means = [statistics.fmean(_durations(ends)) for ends in series]
        return statistics.median(self._over_ranks(means, dist.ReduceOp.MAX))

    def _run_lanes(self, jobs: Mapping[Lane, tuple[Run, int]]) -> dict[Lane, list[float]]:
        """Run operations so often, side by side; return when each repetition ended, in s.

        Each is run once more before, and the end of that one comes first.
        """
        graph = StageGraph(
            tuple(
                Stage(lane, lane, (), (1.0 / (count + 1),) * (count + 1))
                for lane, (_, count) in jobs.items()
            )
        )
        ends: dict[Lane, list[float]] = {lane: [] for lane in jobs}

        def run(task: Task) -> None:
            lane = graph.stage(task.stage).lane
            jobs[lane][0]()
            ends[lane].append(time.perf_counter())

        tasks = graph.tasks(1)
        lanes = {lane: tuple(task for task in tasks if task.stage == lane) for lane in jobs}
        runner = PlanRunner(graph, Plan(1, lanes))
        if self.control.handle is not None:
            with _meeting():
                dist.barrier(self.control.handle)
        runner.run(run, lanes=self.lanes)
        return ends

    def _over_ranks(self, values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.control.handle is None:
            return values
        together = torch.tensor(values, dtype=torch.float64)
        with _meeting():
            dist.all_reduce(together, how, group=self.control.handle)
        return [float(value) for value in together.tolist()]


@contextmanager
def _meeting() -> Iterator[None]:
    """Name the rank where ranks cannot meet."""
    try:
        yield
    except RuntimeError as error:
        raise LaneError.of(Task("meeting", 0), "inter", error) from error


def _durations(ends: list[float]) -> list[float]:
    """Return the time of each repetition but the first, in ms."""
    return [1e3 * (end - before) for before, end in pairwise(ends)]
