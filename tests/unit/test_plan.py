"""Plans and the executor: every task once, in an order that follows from the plan alone."""

from dataclasses import replace

import pytest

from gatewise.moe.stages import BACKWARD, FORWARD, Schedule, forward_graph
from gatewise.parallel.schedule.executor import run_plan
from gatewise.parallel.schedule.plan import (
    Plan,
    Stage,
    StageGraph,
    Task,
    serial_plan,
    staged_plan,
)


class Recorder:
    """Runs tasks by writing them down; communication gets a handle that notes its wait."""

    def __init__(self, graph: StageGraph) -> None:
        self._lane = {stage.name: stage.lane for stage in graph.stages}
        self.events: list[str] = []

    def __call__(self, task: Task) -> "_Noted | None":
        name = f"{task.stage} {task.chunk}"
        self.events.append(name)
        return None if self._lane[task.stage] == "compute" else _Noted(name, self.events)

    def place(self, event: str) -> int:
        """Return when something happened; it must have happened once."""
        assert self.events.count(event) == 1, event
        return self.events.index(event)


class _Noted:
    def __init__(self, name: str, events: list[str]) -> None:
        self._name, self._events = name, events

    def wait(self) -> None:
        self._events.append(f"wait {self._name}")


@pytest.mark.parametrize("graph", [FORWARD, BACKWARD])
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("make", [serial_plan, staged_plan])
def test_every_task_runs_once_after_what_it_needs(
    graph: StageGraph, chunks: int, make: object
) -> None:
    plan = make(graph, chunks)  # type: ignore[operator]
    plan.check(graph)
    recorder = Recorder(graph)
    run_plan(graph, plan, recorder)
    lane = {stage.name: stage.lane for stage in graph.stages}
    for stage in graph.stages:
        for chunk in range(chunks):
            start = recorder.place(f"{stage.name} {chunk}")
            for needed in stage.after:
                finished = f"{needed} {chunk}" if lane[needed] == "compute" else None
                assert recorder.place(finished or f"wait {needed} {chunk}") < start
    communication = [n for n, where in lane.items() if where != "compute"]
    waits = [event for event in recorder.events if event.startswith("wait")]
    assert len(waits) == len(set(waits)) == len(communication) * chunks


def test_communication_is_issued_before_the_next_computation() -> None:
    recorder = Recorder(FORWARD)
    run_plan(FORWARD, staged_plan(FORWARD, 2), recorder)
    issued = [event for event in recorder.events if not event.startswith("wait")]
    assert issued == [
        "order 0",
        "dispatch 0",  # on its way while chunk 1 is ordered
        "order 1",
        "dispatch 1",
        "experts 0",
        "collect 0",  # on its way while chunk 1's experts work
        "experts 1",
        "collect 1",
        "combine 0",
        "combine 1",
    ]
    assert recorder.place("wait dispatch 1") > recorder.place("collect 0")


def test_weight_gradients_run_while_the_data_gradients_travel() -> None:
    recorder = Recorder(BACKWARD)
    run_plan(BACKWARD, serial_plan(BACKWARD), recorder)
    assert (
        recorder.place("dispatch_grad 0")
        < recorder.place("experts_weights 0")
        < recorder.place("wait dispatch_grad 0")
    )


def test_two_communication_lanes_go_on_independently() -> None:
    graph = StageGraph(
        (Stage("a", "compute"), Stage("near", "intra", ("a",)), Stage("far", "inter", ("a",)))
    )
    recorder = Recorder(graph)
    run_plan(graph, serial_plan(graph, 2), recorder)
    assert recorder.events[:3] in (["a 0", "far 0", "near 0"], ["a 0", "near 0", "far 0"])
    assert sorted(recorder.events[-4:]) == [
        "wait far 0",
        "wait far 1",
        "wait near 0",
        "wait near 1",
    ]


def test_a_lane_order_against_the_dependencies_is_an_error_and_no_hang() -> None:
    backwards = {
        "compute": tuple(Task(name, 0) for name in ("combine", "experts", "order")),
        "inter": (Task("dispatch", 0), Task("collect", 0)),
        "intra": (),
    }
    plan = Plan(1, backwards)  # type: ignore[arg-type]
    plan.check(FORWARD)  # every task is listed; only the order is wrong
    with pytest.raises(ValueError, match="plan cannot go on"):
        run_plan(FORWARD, plan, Recorder(FORWARD))


@pytest.mark.parametrize("fault", ["missing", "twice", "wrong lane", "unknown"])
def test_a_plan_must_list_every_task_once_in_its_lane(fault: str) -> None:
    lanes = {lane: list(tasks) for lane, tasks in serial_plan(FORWARD, 2).lanes.items()}
    if fault == "missing":
        lanes["compute"].pop()
    elif fault == "twice":
        lanes["compute"].append(lanes["compute"][0])
    elif fault == "wrong lane":
        lanes["intra"].append(lanes["inter"].pop())
    else:
        lanes["compute"].append(Task("order", 2))
    plan = Plan(2, {lane: tuple(tasks) for lane, tasks in lanes.items()})
    with pytest.raises(ValueError, match="plan of 2 chunks does not list every task once"):
        plan.check(FORWARD)
    with pytest.raises(ValueError, match="plan of 2 chunks"):
        Schedule(plan, serial_plan(BACKWARD, 2))


def test_a_plan_of_another_layer_is_refused_in_one_line() -> None:
    sharded = forward_graph(is_sharded=True)
    with pytest.raises(ValueError, match="differ in the stages gather_grad, scatter_grad"):
        Schedule(serial_plan(sharded), serial_plan(BACKWARD), sharded, BACKWARD)
    with pytest.raises(ValueError, match="plan of 1 chunks does not list every task once"):
        Schedule(serial_plan(sharded), serial_plan(BACKWARD))
    loose = StageGraph(
        tuple(replace(s, after=()) if s.name == "experts" else s for s in FORWARD.stages)
    )
    with pytest.raises(ValueError, match="lets experts start without dispatch"):
        Schedule(serial_plan(loose), serial_plan(BACKWARD), loose)
    moved = StageGraph(
        tuple(replace(s, lane="compute") if s.name == "collect" else s for s in FORWARD.stages)
    )
    with pytest.raises(ValueError, match="has collect in lane compute; it belongs to inter"):
        Schedule(serial_plan(moved), serial_plan(BACKWARD), moved)


def test_a_restricted_graph_keeps_what_must_come_before() -> None:
    sharded = forward_graph(is_sharded=True)
    whole = sharded.restrict(stage.name for stage in FORWARD.stages)
    assert whole == FORWARD
    plan = staged_plan(sharded, 3).restrict(whole)
    assert plan == staged_plan(FORWARD, 3)


def test_stages_are_listed_after_what_they_need() -> None:
    with pytest.raises(ValueError, match="stage 'b' comes before \\['a'\\]"):
        StageGraph((Stage("b", "compute", ("a",)), Stage("a", "compute")))


def test_a_staged_plan_may_be_given_another_order_of_stages() -> None:
    names = ["combine_grad", "collect_grad", "experts_data", "dispatch_grad"]
    late = staged_plan(BACKWARD, 2, [*names, "order_grad", "experts_weights"])
    late.check(BACKWARD)
    recorder = Recorder(BACKWARD)
    run_plan(BACKWARD, late, recorder)
    assert recorder.place("order_grad 1") < recorder.place("experts_weights 0")
