"""Training by a schedule: the same losses and weights, slices that are sums, and a trace."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import Run, losses, make_text, make_trainer, run, tiny

from gatewise.moe.parallelize import apply_schedule
from gatewise.moe.stages import FORWARD, Schedule, backward_graph
from gatewise.parallel.reducer import GradientReducer, SliceSum
from gatewise.parallel.schedule.cost import Cost, Interference
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import staged_plan
from gatewise.parallel.schedule.profiles import (
    OPERATIONS,
    Layout,
    Profile,
    read_profile,
    write_profile,
)
from gatewise.training.config import TrainConfig
from gatewise.training.data import PreparedData, open_prepared
from gatewise.training.schedule_config import ScheduleConfig
from gatewise.training.trainer import Trainer
from ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS = 3
MOVING = ("all_to_all", "all_reduce")
MODEL = {"hidden": 64, "layers": 3}  # large enough that matrices are worth a slice


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("scheduled"))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write costs with which chunks and windows pay."""
    costs = {name: Cost(0.001, 1e-6) for name in OPERATIONS}
    costs["all_to_all"] = costs["all_reduce"] = Cost(0.001, 1e-5)
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    write_profile(Profile(Layout(2, 1, expert=2), costs, Interference.none(), "made up"), path)
    return path


def settings(schedule: ScheduleConfig, micro: int | None = None) -> TrainConfig:
    nodes = {"node": 1}
    return tiny(
        STEPS, ranks=2, expert=2, micro=micro, model=MODEL, schedule=schedule, parallel=nodes
    )


def assert_same(one: Run, other: Run) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    tensors = other.tensors()
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-5)


def test_a_schedule_changes_neither_losses_nor_weights(
    data: PreparedData, profile: Path, tmp_path: Path
) -> None:
    serial = run(settings(ScheduleConfig()), data, tmp_path / "serial")
    stated = ScheduleConfig(policy="fsmoe", chunks_forward=3, chunks_backward=2)
    assert_same(run(settings(stated), data, tmp_path / "stated"), serial)
    planned = ScheduleConfig(policy="fsmoe", profile=str(profile), trace=2)
    planned_run = run(settings(planned), data, tmp_path / "planned")
    assert_same(planned_run, serial)
    for exposed_ms in planned_run.column("schedule/exposed_communication_ms"):
        assert exposed_ms > 0
    for rank in range(2):
        trace = json.loads(
            (tmp_path / "planned" / "trace" / f"step_2_rank_{rank}.json").read_text()
        )
        events = trace["traceEvents"]
        tracks = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
        assert tracks == {"measured": 0, "predicted": 1}
        measured = {e["name"].partition(":")[0] for e in events if e["ph"] == "X" and e["pid"] == 0}
        assert {"0.dispatch", "2.experts_data", "0.order_grad", "reduce"} <= measured
        assert "exchange_counts" in measured
        assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
        assert any(e["pid"] == 1 and e["name"] == "collect:0" for e in events if e["ph"] == "X")


def test_wrong_costs_are_measured_again_on_the_running_groups(
    data: PreparedData, profile: Path, tmp_path: Path
) -> None:
    wrong = ScheduleConfig(policy="fsmoe", profile=str(profile), refit=2)
    measured = run(settings(wrong), data, tmp_path / "refit")
    found = read_profile(tmp_path / "refit" / "profile_step_2.json")
    assert found.layout == Layout(2, 1, expert=2)
    assert found.source == "measured at step 2 of a run by its 2 ranks"
    assert all(cost.ms(1e6) > 0 for name, cost in found.costs.items() if name in MOVING)
    assert measured.column("schedule/refits") == [0.0, 0.0, 1.0]
    assert measured.column("schedule/prediction_error")[0] < -0.5  # predicted far too short
    assert_same(measured, run(settings(ScheduleConfig()), data, tmp_path / "serial"))


def test_costs_can_be_measured_before_the_first_step(data: PreparedData, tmp_path: Path) -> None:
    asked = ScheduleConfig(policy="auto", profile="measure", refit=None)
    measured = run(settings(asked), data, tmp_path / "measured")
    assert_same(measured, run(settings(ScheduleConfig()), data, tmp_path / "serial"))
    found = read_profile(tmp_path / "measured" / "profile.json")
    assert found.layout == Layout(2, 1, expert=2)
    assert found.costs["experts_weights"].ms(1e9) > 0


def note_slices(reducer: GradientReducer, sent: list[int]) -> None:
    """Let a reducer write down the turns in which slices travel."""
    send = reducer.send_slice

    def noted(turn: int, index: int) -> SliceSum | None:
        handle = send(turn, index)
        if handle is not None:
            sent.append(turn)
        return handle

    reducer.send_slice = noted  # type: ignore[method-assign]


def place_windows(trainer: Trainer) -> None:
    """Give every layer a plan with two slices of gradients in its backward pass."""
    graph = backward_graph(reduce=(0.25, 0.75))
    schedule = Schedule(staged_plan(FORWARD, 2), staged_plan(graph, 3), FORWARD, graph)
    apply_schedule(trainer.model, schedule, Execution(ThreadLanes(), trainer.lanes.recorder))
    trainer.engine.place_slices(trainer.model, 50e3)


def _slices_are_sums(rank: int, world: int, data: str, folder: str) -> None:
    gradients = {}
    for name in ("plain", "slices"):
        trainer, _ = make_trainer(
            settings(ScheduleConfig(), micro=2), open_prepared(data), Path(folder) / name, rank
        )
        reducer = trainer.engine.reducer
        sent: list[int] = []
        if name == "slices":
            place_windows(trainer)
            turns = reducer._turns
            assert [len(turn.window) for turn in turns] == [2] * MODEL["layers"]
            assert any(turn.window[0] for turn in turns)
            assert any(turn.beside for turn in turns)
            note_slices(reducer, sent)
        clear = reducer.clear
        reducer.clear = lambda: None  # type: ignore[method-assign]
        trainer.run_step()
        gradients[name] = {
            slot.spec.name: slot.gradient.clone()
            for bucket in reducer.buckets
            for slot in bucket.slots
        }
        clear()
        assert name == "plain" or sent == [0, 0, 1, 1, 2, 2]  # of the last micro-batch alone
        trainer.close()
    for name, gradient in gradients["plain"].items():
        torch.testing.assert_close(gradients["slices"][name], gradient, rtol=1e-5, atol=1e-7)
        if ".experts." not in name:
            every = [torch.zeros_like(gradient) for _ in range(world)]
            dist.all_gather(every, gradients["slices"][name])
            assert torch.equal(every[0], every[1]), name


def test_gradients_sent_in_slices_are_those_of_the_plain_sum(
    data: PreparedData, tmp_path: Path
) -> None:
    run_ranks(_slices_are_sums, 2, (str(data.folder), str(tmp_path)))
