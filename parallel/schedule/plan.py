"""Plans: the order in which the tasks of one pass run, as data.

Read first: this file, then `executor.py`, which runs plans. A stage is a kind of work with the
lane that it occupies; a task is a stage applied to one chunk of the tokens; a plan lists, for
each lane, its tasks in order. Lanes are first in, first out. Nothing here knows what an expert is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Lane", "Plan", "Stage", "StageGraph", "Task", "serial_plan", "staged_plan"]

Lane = Literal["compute", "intra", "inter"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A kind of work: its name, the lane that it occupies and the stages that it needs."""

    name: str
    lane: Lane
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One stage on one chunk."""

    stage: str
    chunk: int


@dataclass(frozen=True, slots=True)
class StageGraph:
    """The stages of one pass, in an order that respects `after`."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            missing = set(stage.after) - seen
            if missing:
                raise ValueError(
                    f"stage {stage.name!r} comes before {sorted(missing)}, which it needs; "
                    "list stages in an order that respects `after`"
                )
            seen.add(stage.name)

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of one pass: for each lane its tasks, first in, first out."""

    chunks: int
    lanes: Mapping[Lane, tuple[Task, ...]]

    def check(self, graph: StageGraph) -> None:
        """Raise `ValueError` unless every task of `graph` stands once, in its own lane."""
        wanted = {
            (stage.lane, Task(stage.name, chunk))
            for stage in graph.stages
            for chunk in range(self.chunks)
        }
        listed = [(lane, task) for lane, tasks in self.lanes.items() for task in tasks]
        if len(listed) != len(wanted) or set(listed) != wanted:
            wrong = sorted(str(item) for item in set(listed) ^ wanted)
            raise ValueError(
                f"plan of {self.chunks} chunks does not list every task once in its lane; "
                f"differing: {wrong[:4]}"
            )


def serial_plan(graph: StageGraph, chunks: int = 1) -> Plan:
    """Return the plan that finishes each chunk before the next one starts."""
    lanes: dict[Lane, list[Task]] = {"compute": [], "intra": [], "inter": []}
    for chunk in range(chunks):
        for stage in graph.stages:
            lanes[stage.lane].append(Task(stage.name, chunk))
    return Plan(chunks, {lane: tuple(tasks) for lane, tasks in lanes.items()})


def staged_plan(graph: StageGraph, chunks: int, order: Sequence[str] | None = None) -> Plan:
    """Return the plan that runs each stage over all chunks before the next stage.

    With communication lanes this keeps several chunks in flight: the pipeline of Tutel and
    PipeMoE (arXiv:2206.03382).
    """
    names = order or [stage.name for stage in graph.stages]
    lanes: dict[Lane, list[Task]] = {"compute": [], "intra": [], "inter": []}
    for name in names:
        lanes[graph.stage(name).lane] += [Task(name, chunk) for chunk in range(chunks)]
    return Plan(chunks, {lane: tuple(tasks) for lane, tasks in lanes.items()})
