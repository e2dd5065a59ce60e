"""Lanes: communication runs beside computation, in order, and failures end the pass at once."""

import copy
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gatewise.moe.layer import MoE
from gatewise.moe.stages import Schedule, backward_graph, forward_graph
from gatewise.parallel import streams
from gatewise.parallel.schedule.executor import Execution, LaneError, run_plan
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import (
    Stage,
    StageGraph,
    Task,
    blocking_plan,
    ordered_plan,
    serial_plan,
    staged_plan,
)
from gatewise.parallel.schedule.recorder import Recorder, split_waits
from gatewise.parallel.schedule.timeline import Interval, Timeline, chrome_events

CHAIN = StageGraph(
    (
        Stage("dispatch", "inter"),
        Stage("gather", "intra", ("dispatch",)),
        Stage("experts", "compute", ("gather",)),
        Stage("scatter", "intra", ("experts",)),
        Stage("collect", "inter", ("scatter",)),
    )
)
WAIT = 20.0  # seconds until a test that should not block gives up


class Journal:
    """Notes which thread ran what, and when each task began and ended."""

    def __init__(self) -> None:
        self.thread: dict[str, str] = {}
        self.events: list[str] = []

    def __call__(self, task: Task) -> None:
        self.thread[str(task)] = threading.current_thread().name
        self.events.append(f"begin {task}")
        time.sleep(0.001)
        self.events.append(f"end {task}")


def lane_threads() -> set[threading.Thread]:
    """Return the threads of all lanes."""
    return {thread for thread in threading.enumerate() if "gatewise lane" in thread.name}


@pytest.mark.parametrize("make", [serial_plan, staged_plan])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_every_task_runs_once_after_what_it_needs(make: Any, chunks: int) -> None:
    plan = make(CHAIN, chunks)
    journal = Journal()
    run_plan(CHAIN, plan, journal, lanes=ThreadLanes())
    for task in CHAIN.tasks(chunks):
        assert journal.events.count(f"end {task}") == 1
        begun = journal.events.index(f"begin {task}")
        for needed in CHAIN.needs(task, chunks):
            assert journal.events.index(f"end {needed}") < begun
    for tasks in plan.lanes.values():  # a lane is first in, first out, one at a time
        mine = [e for e in journal.events if e.partition(" ")[2] in set(map(str, tasks))]
        assert mine == [f"{what} {task}" for task in tasks for what in ("begin", "end")]


def test_each_communication_lane_has_a_thread_and_the_caller_computes() -> None:
    journal = Journal()
    run_plan(CHAIN, staged_plan(CHAIN, 2), journal, lanes=ThreadLanes())
    here = threading.current_thread().name
    for task, thread in journal.thread.items():
        lane = CHAIN.stage(task.partition(":")[0]).lane
        assert thread == (here if lane == "compute" else f"gatewise lane {lane}")


def test_a_plan_that_communicates_in_the_compute_lane_starts_no_thread() -> None:
    before = lane_threads()  # of other tests, which may end meanwhile
    journal = Journal()
    run_plan(CHAIN, blocking_plan(CHAIN), journal, lanes=ThreadLanes())
    assert set(journal.thread.values()) == {threading.current_thread().name}
    assert lane_threads() <= before


def test_lanes_work_at_the_same_time() -> None:
    graph = StageGraph((Stage("a", "inter"), Stage("b", "intra"), Stage("c", "compute")))
    meet = threading.Barrier(3, timeout=WAIT)

    def run(task: Task) -> None:
        meet.wait()  # returns only when all three are here

    run_plan(graph, serial_plan(graph), run, lanes=ThreadLanes())


def test_threads_are_used_again_and_end_with_the_lanes() -> None:
    others = lane_threads()
    lanes = ThreadLanes()
    seen: list[set[threading.Thread]] = []
    for _ in range(3):
        run_plan(CHAIN, staged_plan(CHAIN, 2), Journal(), lanes=lanes)
        seen.append(lane_threads() - others)
    mine = seen[0]
    assert seen == [mine] * 3
    assert len(mine) == 2
    lanes.close()
    for thread in mine:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in mine)
    run_plan(CHAIN, staged_plan(CHAIN, 2), Journal(), lanes=lanes)  # closing is not the end
    lanes.close()


def test_a_copy_of_the_lanes_has_threads_of_its_own() -> None:
    lanes = ThreadLanes()
    run_plan(CHAIN, staged_plan(CHAIN, 2), Journal(), lanes=lanes)
    other = copy.deepcopy(lanes)
    assert other is not lanes
    run_plan(CHAIN, staged_plan(CHAIN, 2), Journal(), lanes=other)
    lanes.close()
    other.close()


def test_rows_that_stay_on_their_rank_start_no_thread() -> None:
    others = lane_threads()
    moe = MoE(8, 16, 4, 2)
    graphs = forward_graph(), backward_graph()
    plans = [staged_plan(graph, 3) for graph in graphs]
    moe.layer.schedule = Schedule(*plans, *graphs)
    moe.layer.execution = Execution(ThreadLanes())
    moe(torch.randn(6, 8)).sum().backward()
    assert lane_threads() <= others


def test_lanes_do_not_record_for_autograd() -> None:
    weight = torch.ones(2, requires_grad=True)
    made: list[torch.Tensor] = []
    graph = StageGraph((Stage("a", "inter"),))
    run_plan(graph, serial_plan(graph), lambda task: made.append(weight * 2), lanes=ThreadLanes())
    assert not made[0].requires_grad


@pytest.mark.parametrize("with_lanes", [False, True])
@pytest.mark.parametrize("where", ["run", "wait"])
def test_failed_communication_names_lane_task_and_rank(where: str, with_lanes: bool) -> None:
    class Broken:
        def wait(self) -> None:
            raise RuntimeError("Connection closed by peer\nand a trace")

    def run(task: Task) -> Broken | None:
        if task != Task("scatter", 1):
            return None
        if where == "run":
            Broken().wait()
        return Broken()

    lanes = ThreadLanes() if with_lanes else None
    with pytest.raises(LaneError) as caught:
        run_plan(CHAIN, staged_plan(CHAIN, 3), run, lanes=lanes)
    assert str(caught.value) == "rank 0, lane intra, task scatter:1: Connection closed by peer"


def test_a_failure_does_not_wait_for_a_lane_that_hangs() -> None:
    graph = StageGraph((Stage("a", "inter"), Stage("b", "intra"), Stage("c", "compute")))
    free, begun = threading.Event(), threading.Event()

    def run(task: Task) -> None:
        if task.stage == "a":
            begun.set()
            free.wait(WAIT)
        elif task.stage == "c":
            assert begun.wait(WAIT)
            raise ValueError("out of memory")

    start = time.monotonic()
    with pytest.raises(ValueError, match="out of memory"):
        run_plan(graph, serial_plan(graph), run, lanes=ThreadLanes())
    assert not free.is_set()
    assert time.monotonic() - start < WAIT
    free.set()


@pytest.mark.parametrize("with_lanes", [False, True])
def test_a_recorder_gets_when_each_task_ran(with_lanes: bool) -> None:
    recorder = Recorder()
    plan = staged_plan(CHAIN, 2)
    lanes = ThreadLanes() if with_lanes else None
    run_plan(CHAIN, plan, Journal(), lanes=lanes, recorder=recorder)
    line = recorder.drain()
    ran = {interval.task: interval for interval in line.intervals}
    assert set(ran) == set(CHAIN.tasks(2))
    assert min(i.start_ms for i in line.intervals) == 0.0
    for task, interval in ran.items():
        assert interval.end_ms >= interval.start_ms + 1.0 - 1e-6  # it slept so long
        assert interval.resource == CHAIN.stage(task.stage).lane
        for needed in CHAIN.needs(task, 2):
            assert ran[needed].end_ms <= interval.start_ms + 1e-6
    assert recorder.drain().intervals == ()
    names = [e["name"] for e in chrome_events(line, "measured") if e["ph"] == "X"]
    assert sorted(names) == sorted(map(str, ran))


def test_exposed_communication_is_what_no_computation_covers() -> None:
    recorder = Recorder()
    graph = StageGraph((Stage("send", "inter"), Stage("work", "compute")))
    begun, worked = threading.Event(), threading.Event()

    def beside_each_other(task: Task) -> None:
        if task.stage == "send":
            begun.set()
            assert worked.wait(WAIT)
        else:
            assert begun.wait(WAIT)
            time.sleep(0.001)
            worked.set()

    run_plan(graph, serial_plan(graph), beside_each_other, lanes=ThreadLanes(), recorder=recorder)
    beside = recorder.drain()
    run_plan(graph, blocking_plan(graph), lambda task: time.sleep(0.001), recorder=recorder)
    alone = recorder.drain()
    assert beside.exposed_ms() < beside.busy_ms("inter")
    assert alone.exposed_ms() == pytest.approx(alone.busy_ms("inter"))


def test_waits_are_split_from_transfers_by_the_last_member_to_join() -> None:
    def line(*starts: float) -> Timeline:
        return Timeline(
            tuple(
                Interval(Task("send", 0), "inter", "inter", start, end, end - start)
                for start, end in zip(starts, (10.0, 30.0), strict=True)
            )
        )

    own, other = line(2.0, 24.0), line(7.0, 21.0)
    split = split_waits(own, [own, other], lambda i: i.task.stage == "send")
    assert [i.work_ms for i in split.intervals] == [3.0, 6.0]
    assert split_waits(own, [own, other], lambda i: i.task.stage == "collect") == own


def test_a_recorder_that_is_off_collects_nothing() -> None:
    recorder = Recorder()
    recorder.is_on = False
    run_plan(CHAIN, serial_plan(CHAIN), lambda task: None, recorder=recorder)
    with recorder.communication("reduce"):
        pass
    assert recorder.drain().intervals == ()
    recorder.is_on = True
    with recorder.communication("reduce"):
        pass
    assert [i.task.stage for i in recorder.drain().intervals] == ["reduce"]


class FakeCuda:
    """Stands in for torch.cuda: streams write down what they are told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = self.Stream(None, name="compute")

    def Stream(self, device: object, *, priority: int = 0, name: str = "") -> Any:
        stream = SimpleNamespace(name=name or f"side{len(self.log)}", count=0)

        def record_event() -> str:
            stream.count += 1
            return f"{stream.name}#{stream.count}"

        stream.record_event = record_event
        stream.wait_event = lambda event: self.log.append(f"{stream.name} waits for {event}")
        stream.wait_stream = lambda other: self.log.append(f"{stream.name} joins {other.name}")
        return stream

    def current_stream(self, device: object) -> Any:
        return self.now

    def stream(self, stream: Any) -> Any:
        fake = self

        class Inside:
            def __enter__(self) -> None:
                self.before, fake.now = fake.now, stream

            def __exit__(self, *_: object) -> None:
                fake.now = self.before

        return Inside()


def test_streams_wait_for_what_their_tasks_need_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(streams.torch, "cuda", fake)
    graph = StageGraph(
        (
            Stage("order", "compute"),
            Stage("send", "inter", ("order",)),
            Stage("work", "compute", ("send",)),
        )
    )
    order = [Task("order", 0), Task("order", 1), Task("send", 0), Task("send", 1)]
    order += [Task("work", 0), Task("work", 1)]

    def run(task: Task) -> None:
        fake.log.append(f"{task} on {fake.now.name}")

    lanes = streams.StreamLanes(torch.device("cpu"))
    run_plan(graph, ordered_plan(graph, 2, order), run, lanes=lanes)
    side = fake.log[0].partition(" ")[0]
    assert fake.log == [
        f"{side} waits for compute#1",
        "order:0 on compute",
        f"{side} waits for compute#2",
        f"send:0 on {side}",
        "order:1 on compute",
        f"{side} waits for compute#3",
        f"send:1 on {side}",
        f"compute waits for {side}#1",
        "work:0 on compute",
        f"compute waits for {side}#2",
        "work:1 on compute",
        f"compute joins {side}",
    ]


def test_a_stream_issues_behind_what_it_is_told_to_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(streams.torch, "cuda", fake)
    lanes = streams.StreamLanes(torch.device("cpu"))

    def issue() -> None:
        fake.log.append(f"issued on {fake.now.name}")

    first = lanes.start("inter", issue, None)
    second = lanes.start("intra", issue, first)
    second.wait()
    far, near = fake.log[0].partition(" ")[0], fake.log[2].partition(" ")[0]
    assert far != near
    assert fake.log == [
        f"{far} waits for compute#1",
        f"issued on {far}",
        f"{near} waits for {far}#1",
        f"issued on {near}",
        f"compute waits for {near}#1",
    ]


def test_a_thread_waits_for_what_its_errand_needs_and_tells_what_went_wrong() -> None:
    lanes = ThreadLanes()
    opened = threading.Event()
    seen: list[str] = []

    def slow() -> None:
        assert opened.wait(WAIT)
        seen.append("far")

    def fails() -> None:
        seen.append("near")
        raise LaneError("broken link")

    first = lanes.start("inter", slow, None)
    second = lanes.start("intra", fails, first)  # in another lane, so it has to wait itself
    third = lanes.start("intra", lambda: seen.append("next"), None)
    assert not seen
    opened.set()
    third.wait()
    assert seen == ["far", "near", "next"]
    first.wait()
    for _ in range(2):  # whoever waits
        with pytest.raises(LaneError, match="broken link"):
            second.wait()
    lanes.close()


def test_a_device_has_the_lanes_of_its_kind() -> None:
    assert isinstance(streams.lanes_for(torch.device("cpu")), ThreadLanes)
    assert isinstance(streams.lanes_for(torch.device("cuda")), streams.StreamLanes)
