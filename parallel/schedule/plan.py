"""Plans: the order in which the tasks of one pass run, as data.

Read first: this file, then `executor.py`, which runs plans, and `timeline.py`, which predicts
them. A stage is a kind of work with the lane that it occupies; a task is a stage applied to one
chunk of the tokens; a plan lists, for each lane, its tasks in order. Lanes are first in, first
out. Nothing here knows what an expert is.

Most stages are cut as the plan says. A stage with `shares` of its own is cut by these instead:
attention that runs in one piece, or a gradient sum in slices. Between two different cuts, the
first piece waits for all that comes before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from gatewise.parallel.errors import ConfigError

__all__ = [
    "LANES",
    "Lane",
    "Plan",
    "Stage",
    "StageGraph",
    "Task",
    "blocking_plan",
    "ordered_plan",
    "plan_from_json",
    "plan_to_json",
    "serial_plan",
    "staged_plan",
]

Lane = Literal["compute", "intra", "inter"]
LANES: tuple[Lane, ...] = get_args(Lane)
# Where a task may be listed: in its own lane; intra work in the inter lane, if there is but one
# lane for communication; communication in the compute lane, where it is waited for at once.
_ALLOWED: dict[Lane, tuple[Lane, ...]] = {
    "compute": ("compute",),
    "inter": ("inter", "compute"),
    "intra": ("intra", "inter", "compute"),
}
_TOLERANCE = 1e-6  # of a sum of shares


@dataclass(frozen=True, slots=True)
class Stage:
    """A kind of work: its name, the lane that it occupies and the stages that it needs."""

    name: str
    lane: Lane
    after: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()  # its own cut; empty: the plan's

    def count(self, chunks: int) -> int:
        """Return the number of its tasks in a plan of `chunks`."""
        return len(self.shares) or chunks


@dataclass(frozen=True, slots=True)
class Task:
    """One stage on one chunk."""

    stage: str
    chunk: int

    def __str__(self) -> str:
        return f"{self.stage}:{self.chunk}"


@dataclass(frozen=True, slots=True)
class StageGraph:
    """The stages of one pass, in an order that respects `after`."""

    stages: tuple[Stage, ...]
    _by_name: dict[str, Stage] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        seen: dict[str, Stage] = {}
        for stage in self.stages:
            missing = set(stage.after) - seen.keys()
            if missing:
                raise ValueError(
                    f"stage {stage.name!r} comes before {sorted(missing)}, which it needs; "
                    "list stages in an order that respects `after`"
                )
            seen[stage.name] = stage
        object.__setattr__(self, "_by_name", seen)  # frozen, and made from `stages` alone

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        return self._by_name[name]

    def ancestors(self, name: str) -> set[str]:
        """Return the names of all stages that must come before a stage."""
        found: set[str] = set()
        waiting = list(self._by_name[name].after)
        while waiting:
            other = waiting.pop()
            if other not in found:
                found.add(other)
                waiting += self._by_name[other].after
        return found

    def restrict(self, names: Iterable[str]) -> "StageGraph":
        """Return the stages of these names; what stood between two of them is left out."""
        kept = set(names)
        instead: dict[str, tuple[str, ...]] = {}  # of each stage: what stands for it
        stages = []
        for stage in self.stages:
            needs = tuple(dict.fromkeys(new for old in stage.after for new in instead[old]))
            instead[stage.name] = needs
            if stage.name in kept:
                stages.append(replace(stage, after=needs))
                instead[stage.name] = (stage.name,)
        return StageGraph(tuple(stages))

    def tasks(self, chunks: int) -> list[Task]:
        """Return every task, stage by stage."""
        return [Task(stage.name, c) for stage in self.stages for c in range(stage.count(chunks))]

    def needs(self, task: Task, chunks: int) -> list[Task]:
        """Return the tasks that must have ended before `task` starts."""
        stage = self._by_name[task.stage]
        found: list[Task] = []
        for name in stage.after:
            before = self._by_name[name]
            if before.shares == stage.shares:
                found.append(Task(name, task.chunk))
            else:
                found += [Task(name, chunk) for chunk in range(before.count(chunks))]
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of one pass: for each lane its tasks, first in, first out."""

    chunks: int
    lanes: Mapping[Lane, tuple[Task, ...]]
    shares: tuple[float, ...] = ()  # part of the tokens in each chunk; empty: equal parts

    def check(self, graph: StageGraph) -> None:
        """Raise `ValueError` unless every task of `graph` stands once, in a lane it may use."""
        listed = [(lane, task) for lane, tasks in self.lanes.items() for task in tasks]
        tasks = [task for _, task in listed]
        wanted = set(graph.tasks(self.chunks))
        wrong = set(tasks) ^ wanted
        wrong |= {t for lane, t in listed if t in wanted and lane not in _allowed(graph, t)}
        if wrong or len(tasks) != len(wanted):
            raise ValueError(
                f"plan of {self.chunks} chunks does not list every task once in its lane; "
                f"differing: {sorted(map(str, wrong))[:4]}"
            )
        if self.shares and (
            len(self.shares) != self.chunks
            or min(self.shares) <= 0
            or abs(sum(self.shares) - 1) > _TOLERANCE
        ):
            raise ValueError(
                f"plan of {self.chunks} chunks has the shares {self.shares}; there must be one "
                "above 0 for each chunk, with the sum 1"
            )

    def share(self, graph: StageGraph, task: Task) -> float:
        """Return the part of its stage's work that a task does."""
        own = graph.stage(task.stage).shares or self.shares
        return own[task.chunk] if own else 1.0 / self.chunks

    def restrict(self, graph: StageGraph) -> "Plan":
        """Return the plan without the tasks of stages that `graph` does not have."""
        names = {stage.name for stage in graph.stages}
        lanes: dict[Lane, tuple[Task, ...]] = {
            lane: tuple(task for task in tasks if task.stage in names)
            for lane, tasks in self.lanes.items()
        }
        return Plan(self.chunks, lanes, self.shares)


def _allowed(graph: StageGraph, task: Task) -> tuple[Lane, ...]:
    return _ALLOWED[graph.stage(task.stage).lane]


def ordered_plan(
    graph: StageGraph,
    chunks: int,
    order: Sequence[Task],
    *,
    shares: tuple[float, ...] = (),
    merge: Mapping[Lane, Lane] | None = None,
) -> Plan:
    """Return the plan whose lanes follow one order of all tasks.

    Args:
        graph: the stages.
        chunks: number of chunks.
        order: every task once; each lane keeps the order of its own.
        shares: part of the tokens in each chunk; empty for equal parts.
        merge: lanes whose tasks are listed in another lane.
    """
    lanes: dict[Lane, list[Task]] = {lane: [] for lane in LANES}
    for task in order:
        own = graph.stage(task.stage).lane
        lanes[(merge or {}).get(own, own)].append(task)
    return Plan(chunks, {lane: tuple(tasks) for lane, tasks in lanes.items()}, shares)


def serial_plan(graph: StageGraph, chunks: int = 1) -> Plan:
    """Return the plan that finishes each chunk before the next one starts."""
    order = [
        Task(stage.name, chunk)
        for chunk in range(chunks)
        for stage in graph.stages
        if chunk < stage.count(chunks)
    ]
    return ordered_plan(graph, chunks, order)


def blocking_plan(graph: StageGraph) -> Plan:
    """Return the plan of one chunk in which nothing overlaps: everything in the compute lane."""
    return ordered_plan(graph, 1, graph.tasks(1), merge={"inter": "compute", "intra": "compute"})


def staged_plan(graph: StageGraph, chunks: int, order: Sequence[str] | None = None) -> Plan:
    """Return the plan that runs each stage over all chunks before the next stage.

    With communication lanes this keeps several chunks in flight: the pipeline of Tutel and
    PipeMoE (arXiv:2206.03382).
    """
    names = order or [stage.name for stage in graph.stages]
    tasks = [Task(name, c) for name in names for c in range(graph.stage(name).count(chunks))]
    return ordered_plan(graph, chunks, tasks)


def plan_to_json(graph: StageGraph, plan: Plan) -> dict[str, Any]:  # JSON's own types
    """Return the plan with its stages as JSON; `plan_from_json` gives both back."""
    return {
        "stages": [
            {"name": s.name, "lane": s.lane, "after": list(s.after), "shares": list(s.shares)}
            for s in graph.stages
        ],
        "chunks": plan.chunks,
        "shares": list(plan.shares),
        "lanes": {lane: [str(task) for task in tasks] for lane, tasks in plan.lanes.items()},
    }


def plan_from_json(value: Mapping[str, Any], *, source: str = "plan") -> tuple[StageGraph, Plan]:
    """Return the stages and the plan that `plan_to_json` described.

    Args:
        value: the parsed JSON.
        source: name of the file, for messages.

    Raises:
        ConfigError: if something is missing, or the lanes do not list every task once.
    """
    try:
        stages = tuple(
            Stage(s["name"], _lane(s["lane"]), tuple(s["after"]), tuple(map(float, s["shares"])))
            for s in value["stages"]
        )
        lanes = {
            _lane(lane): tuple(_task(text) for text in tasks)
            for lane, tasks in value["lanes"].items()
        }
        graph = StageGraph(stages)
        plan = Plan(int(value["chunks"]), lanes, tuple(map(float, value["shares"])))
        plan.check(graph)
    except KeyError as error:
        raise ConfigError(f"{source} has no {error.args[0]!r}; make the plan again") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{source} is not a plan: {error}; make the plan again") from error
    return graph, plan


def _lane(text: str) -> Lane:
    if text not in LANES:
        raise ValueError(f"lane {text!r} is none of {', '.join(LANES)}")
    return text


def _task(text: str) -> Task:
    stage, _, chunk = text.rpartition(":")
    return Task(stage, int(chunk))
