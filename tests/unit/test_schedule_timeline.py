"""Predicted timelines: exact recurrences against a slow simulation, and fluid interference."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Interference
from gatewise.parallel.schedule.orders import (
    grouped_order,
    lagged_sequence,
    list_plan,
    nested_sequences,
    reordered_plan,
)
from gatewise.parallel.schedule.plan import (
    Plan,
    Stage,
    StageGraph,
    Task,
    blocking_plan,
    ordered_plan,
    plan_from_json,
    plan_to_json,
    serial_plan,
    staged_plan,
)
from gatewise.parallel.schedule.recurrence import Chunk, one_lane_ms, staged_ms, window_ms
from gatewise.parallel.schedule.timeline import Program, Timeline, chrome_events, play

FIVE = StageGraph(
    (
        Stage("send", "inter"),
        Stage("gather", "intra", ("send",)),
        Stage("reduce", "inter", (), (1.0,)),
        Stage("work", "compute", ("gather",)),
        Stage("scatter", "intra", ("work",)),
        Stage("back", "inter", ("scatter",)),
    )
)
TIMES = st.floats(0.0, 9.0)
CHUNKS = st.lists(st.builds(Chunk, TIMES, TIMES, TIMES, TIMES, TIMES), min_size=1, max_size=6)


def by_hand(plan: Plan, chunks: list[Chunk], reduce_ms: float) -> float:
    """Play a plan in small steps of looking at what may start: slow and plain."""
    ends: dict[Task, float] = {}
    free = dict.fromkeys(plan.lanes, 0.0)
    queues = {lane: list(tasks) for lane, tasks in plan.lanes.items()}
    while any(queues.values()):
        for lane, queue in queues.items():
            needs = FIVE.needs(queue[0], plan.chunks) if queue else []
            if not queue or any(need not in ends for need in needs):
                continue
            task = queue.pop(0)
            start = max([free[lane], *(ends[need] for need in needs)])
            duration = reduce_ms
            if task.stage != "reduce":
                duration = getattr(chunks[task.chunk], task.stage)
            free[lane] = ends[task] = start + duration
    return max(ends.values())


def one_lane_plan(chunks: int) -> Plan:
    groups = [["send", "gather"], ["reduce"], ["work"], ["scatter", "back"]]
    order = grouped_order(FIVE, chunks, groups)
    return ordered_plan(FIVE, chunks, order, merge={"intra": "inter"})


def times(program: Program, chunks: list[Chunk], reduce_ms: float) -> list[float]:
    return [
        reduce_ms if task.stage == "reduce" else getattr(chunks[task.chunk], task.stage)
        for task in program.tasks
    ]


@given(chunks=CHUNKS, reduce_ms=TIMES)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_recurrences_program_and_slow_simulation_agree(
    chunks: list[Chunk], reduce_ms: float
) -> None:
    for plan, recurrence in (
        (staged_plan(FIVE, len(chunks)), staged_ms),
        (one_lane_plan(len(chunks)), one_lane_ms),
    ):
        slow = by_hand(plan, chunks, reduce_ms)
        program = Program(FIVE, plan)
        ms = times(program, chunks, reduce_ms)
        assert max(program.ends(ms)) == pytest.approx(slow)
        assert program.play(ms, Interference.none()).total_ms == pytest.approx(slow)
        assert program._fluid(ms, Interference.none())
        assert max(e for _, e in program._fluid(ms, Interference.none())) == pytest.approx(slow)
        assert recurrence(chunks, reduce_ms) == pytest.approx(slow)


@given(chunks=CHUNKS, reduce_ms=TIMES)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_a_gradient_sum_in_the_window_is_free(chunks: list[Chunk], reduce_ms: float) -> None:
    inter = sum(chunk.send + chunk.back for chunk in chunks)
    expected = max(staged_ms(chunks), inter + reduce_ms)
    assert staged_ms(chunks, reduce_ms) == pytest.approx(expected)
    assert staged_ms(chunks, window_ms(chunks)) == pytest.approx(staged_ms(chunks))


def published_case_ms(r: int, a: float, g: float, e: float) -> float:
    """Return the closed form for gather = scatter, from the four cases of the publication."""
    if a > g:
        work_bound = r * e > 2 * (r - 1) * a
        return 2 * a + 2 * g + r * e if work_bound else 2 * r * a + 2 * g
    work_bound = r * e > (r - 1) * 2 * g
    return 2 * a + 2 * g + r * e if work_bound else 2 * a + 2 * r * g


@pytest.mark.parametrize("r", [1, 2, 3, 4, 6, 8])
def test_where_gather_equals_scatter_the_published_cases_hold(r: int) -> None:
    draw = random.Random(r)
    for _ in range(100):
        a, g, e = (draw.uniform(0.1, 5) for _ in range(3))
        chunks = [Chunk(a, g, e, g, a)] * r
        assert staged_ms(chunks) == pytest.approx(published_case_ms(r, a, g, e))


def test_two_busy_lanes_share_time_as_fluids() -> None:
    graph = StageGraph((Stage("far", "inter"), Stage("near", "intra")))
    half = Interference.mutual({("inter", "intra"): 1.0})  # each at half speed
    line = play(graph, serial_plan(graph), lambda t, _: {"far": 6.0, "near": 2.0}[t.stage], half)
    ends = {interval.task.stage: interval.end_ms for interval in line.intervals}
    assert ends == {"near": pytest.approx(4.0), "far": pytest.approx(8.0)}


@given(chunks=CHUNKS, extra=st.floats(0.0, 2.0))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_interference_never_shortens_and_keeps_order(chunks: list[Chunk], extra: float) -> None:
    program = Program(FIVE, staged_plan(FIVE, len(chunks)))
    ms = times(program, chunks, 1.0)
    alone = program.play(ms, Interference.none())
    beside = program.play(ms, Interference.mutual({("inter", "intra"): extra}))
    assert beside.total_ms >= alone.total_ms - 1e-9
    assert beside.total_ms <= sum(ms) * (1 + extra) + 1e-9
    check_order(FIVE, staged_plan(FIVE, len(chunks)), beside)


def check_order(graph: StageGraph, plan: Plan, line: Timeline) -> None:
    """Every task starts after what it needs and after the one before it in its lane."""
    spans = {interval.task: interval for interval in line.intervals}
    for tasks in plan.lanes.values():
        for before, after in pairwise(tasks):
            assert spans[before].end_ms <= spans[after].start_ms + 1e-9
    for task, span in spans.items():
        for need in graph.needs(task, plan.chunks):
            assert spans[need].end_ms <= span.start_ms + 1e-9


def test_exposed_communication_is_what_no_computation_covers() -> None:
    graph = StageGraph(
        (
            Stage("far", "inter"),
            Stage("near", "intra"),
            Stage("work", "compute", ("near",)),
            Stage("back", "inter", ("work",)),
        )
    )
    ms = {"far": 5.0, "near": 2.0, "work": 2.0, "back": 1.0}
    line = play(graph, serial_plan(graph), lambda task, _: ms[task.stage])
    assert line.total_ms == 6
    assert line.exposed_ms() == 4  # 0 to 2 and 4 to 6
    assert line.busy_ms("inter") == 6
    blocked = play(graph, blocking_plan(graph), lambda task, _: ms[task.stage])
    assert blocked.total_ms == 10
    assert blocked.exposed_ms() == 8


def test_stages_with_another_cut_wait_for_all_pieces() -> None:
    graph = StageGraph(
        (
            Stage("attend", "compute", (), (1.0,)),
            Stage("send", "inter", ("attend",)),
            Stage("work", "compute", ("send",)),
            Stage("reduce", "inter", ("work",), (0.25, 0.75)),
        )
    )
    assert graph.needs(Task("send", 2), 3) == [Task("attend", 0)]
    assert graph.needs(Task("work", 2), 3) == [Task("send", 2)]
    assert graph.needs(Task("reduce", 1), 3) == [Task("work", chunk) for chunk in range(3)]
    plan = staged_plan(graph, 3)
    plan.check(graph)
    assert plan.share(graph, Task("reduce", 1)) == 0.75
    assert plan.share(graph, Task("work", 1)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("shares", [(0.5, 0.6), (0.5,), (1.5, -0.5)])
def test_shares_must_be_a_cut_of_the_whole(shares: tuple[float, ...]) -> None:
    plan = staged_plan(FIVE, 2)
    with pytest.raises(ValueError, match="one above 0 for each chunk"):
        Plan(2, plan.lanes, shares).check(FIVE)


def test_a_plan_comes_back_from_json() -> None:
    plan = Plan(2, staged_plan(FIVE, 2).lanes, (0.25, 0.75))
    text = json.dumps(plan_to_json(FIVE, plan))
    assert plan_from_json(json.loads(text)) == (FIVE, plan)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lanes", None, "has no 'lanes'"),
        ("lanes", {"nvlink": []}, "lane 'nvlink' is none of"),
        ("lanes", {"inter": ["send:0"]}, "does not list every task once"),
        ("lanes", {"inter": ["send:first"]}, "is not a plan"),
        ("chunks", "two", "is not a plan"),
    ],
)
def test_a_wrong_plan_file_is_one_clear_line(field: str, value: object, message: str) -> None:
    stored = plan_to_json(FIVE, staged_plan(FIVE, 2))
    if value is None:
        del stored[field]
    else:
        stored[field] = value
    with pytest.raises(ConfigError, match=message) as mistake:
        plan_from_json(stored, source="plan.json")
    assert str(mistake.value).startswith("plan.json ")


def test_nested_sequences_are_catalans() -> None:
    counts = [len(list(nested_sequences("gather", "scatter", n))) for n in range(1, 6)]
    assert counts == [1, 2, 5, 14, 42]
    assert [str(t) for t in lagged_sequence("gather", "scatter", 3, 1)] == [
        "gather:0",
        "gather:1",
        "scatter:0",
        "gather:2",
        "scatter:1",
        "scatter:2",
    ]


@given(chunks=CHUNKS, lag=st.integers(1, 6))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_reordered_and_listed_plans_run_every_task_in_order(chunks: list[Chunk], lag: int) -> None:
    r = len(chunks)
    plan = reordered_plan(
        staged_plan(FIVE, r),
        [lagged_sequence("gather", "scatter", r, lag), lagged_sequence("send", "back", r, lag)],
    )

    def ms(task: Task) -> float:
        return 1.0 if task.stage == "reduce" else float(getattr(chunks[task.chunk], task.stage))

    listed = list_plan(FIVE, r, ms, fillers=["reduce"])
    for candidate in (plan, listed):
        check_order(FIVE, candidate, play(FIVE, candidate, lambda task, _: ms(task)))


def test_fillers_wait_for_nothing_better_to_do() -> None:
    listed = list_plan(FIVE, 2, lambda _: 1.0, fillers=["reduce"])
    assert [str(task) for task in listed.lanes["inter"]][:3] == ["send:0", "send:1", "reduce:0"]


def test_a_trace_has_a_track_with_a_thread_for_each_lane() -> None:
    line = play(FIVE, staged_plan(FIVE, 2), lambda *_: 1.0)
    events = chrome_events(line, "predicted", process=3, start_ms=10)
    assert {event["pid"] for event in events} == {3}
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {"compute", "intra", "inter"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 11
    assert min(event["ts"] for event in spans) == 10_000
    json.dumps(events)
