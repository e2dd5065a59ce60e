"""From settings to the layers' plans: what is refused, and what the plans look like."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gatewise.launch.cli import main
from gatewise.moe.config import ModelConfig
from gatewise.moe.planning.stated import STATED_POLICIES, stated_schedule
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Cost, Interference
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.schedule.profiles import OPERATIONS, Layout, Profile, write_profile
from gatewise.routers.config import BalanceScope, RouterConfig, Selector
from gatewise.training.config import BatchConfig, TrainConfig
from gatewise.training.schedule import TrainingSchedule, known_profile
from gatewise.training.schedule import plan_schedule as plan_with
from gatewise.training.schedule_config import POLICIES, ScheduleConfig


def profile(path: Path, *, expert: int = 2, computes: bool = True) -> str:
    """Write a profile in which moving costs about as much as computing, or computing nothing."""
    moved = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
    costs = {name: Cost(0.01, 1e-7) if computes else Cost(0.0, 0.0) for name in OPERATIONS}
    costs |= {name: Cost(0.01, 1e-5) for name in moved}
    layout = Layout(2, 1, expert=expert)  # two nodes
    write_profile(Profile(layout, costs, Interference.none(), "made up"), path)
    return str(path)


def config(**schedule: Any) -> TrainConfig:
    return TrainConfig(
        parallel=ParallelConfig(ranks=2, expert=2, node=1), schedule=ScheduleConfig(**schedule)
    )


def plan_schedule(settings: TrainConfig) -> TrainingSchedule:
    return plan_with(settings, known_profile(settings))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "fastest"}, "schedule.policy is 'fastest'; it must be one of auto, serial"),
        ({"policy": "paired"}, "schedule.policy is 'paired'; it must be one of"),
        ({"policy": "whole_block"}, "whole_block but neither schedule.profile nor the parts"),
        ({"policy": "whole_block", "chunks_forward": 1}, "schedule.chunks_forward to 2 or more"),
        (
            {"policy": "whole_block", "profile": "p.json", "chunks_forward": 2},
            "schedule.profile and schedule.chunks_forward or chunks_backward are both set",
        ),
        (
            {"policy": "whole_block", "chunks_forward": 2, "chunks_backward": 4},
            "schedule.chunks_backward is 4 and chunks_forward 2; with schedule.policy=whole_block",
        ),
        ({"policy": "fsmoe"}, "neither schedule.profile nor schedule.chunks_forward is set"),
        ({"policy": "auto"}, "schedule.policy is auto, which chooses by costs; give"),
        ({"policy": "search", "chunks_forward": 2}, "is search, which chooses by costs"),
        ({"chunks_forward": 2}, "schedule.policy is serial, which has 1 chunk"),
        ({"policy": "fsmoe", "chunks_forward": 0}, "schedule.chunks_forward is 0; it must be"),
        ({"trace": 0}, "schedule.trace is 0; it must be at least 1 or null"),
        ({"refit": 0}, "schedule.refit is 0; it must be at least 1 or null"),
        ({"max_chunks": 0}, "schedule.max_chunks is 0; it must be at least 1$"),
        (
            {"policy": "fsmoe", "profile": "p.json", "chunks_forward": 2},
            "schedule.profile and schedule.chunks_forward or chunks_backward are both set",
        ),
        (
            {"policy": "tutel", "chunks_forward": 2, "chunks_backward": 3},
            "schedule.chunks_backward is 3 and chunks_forward 2; schedule.policy=tutel has one",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**fields)


def test_more_chunks_than_tokens_are_refused() -> None:
    schedule = ScheduleConfig(policy="fsmoe", chunks_forward=4, chunks_backward=4097)
    with pytest.raises(ConfigError) as caught:
        TrainConfig(schedule=schedule)
    assert str(caught.value) == (
        "schedule.chunks_backward is 4097, more than the 4096 tokens of a rank's micro-batch; "
        "choose from 1 to 4096"
    )
    TrainConfig(schedule=dataclasses.replace(schedule, chunks_backward=4096))


WHOLE = ScheduleConfig(policy="whole_block", chunks_forward=2)
SOFT = RouterConfig(selector=Selector.soft, allow_noncausal=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": BatchConfig(sequences=3)}, "is 2, which does not divide the 3 sequences of a"),
        (
            {
                "batch": BatchConfig(sequences=4, micro=1),
                "schedule": ScheduleConfig(policy="whole_block", profile="p.json"),
            },
            "cuts between sequences, and a rank's micro-batch has 1; raise batch.sequences",
        ),
        ({"recompute": True}, "whole_block, which cannot have recompute; leave that out"),
        ({"router": SOFT}, "cannot have router.selector=soft"),
    ],
)
def test_what_cannot_travel_side_by_side_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"schedule": WHOLE, **settings})


def test_whole_blocks_run_parts_and_one_chunk_in_a_layer() -> None:
    plan = plan_schedule(TrainConfig(schedule=WHOLE))
    assert (plan.parts, plan.schedule.forward.chunks) == (2, 1)
    assert str(plan) == "whole_block, 2 parts of a micro-batch side by side"


def test_a_dense_model_has_nothing_to_schedule() -> None:
    schedule = ScheduleConfig(policy="fsmoe", chunks_forward=2)
    with pytest.raises(ConfigError, match=r"schedule\.policy is fsmoe but the model has no MoE"):
        TrainConfig(model=ModelConfig(num_experts=0), schedule=schedule)
    schedule = ScheduleConfig(profile="measure")
    with pytest.raises(ConfigError, match=r"schedule\.profile is measure but the model has no MoE"):
        TrainConfig(model=ModelConfig(num_experts=0), schedule=schedule)


@pytest.mark.parametrize("policy", STATED_POLICIES)
def test_stated_numbers_are_those_of_the_plans(policy: str) -> None:
    schedule = stated_schedule(policy, 3, 2)
    assert (schedule.forward.chunks, schedule.backward.chunks) == (3, 2)
    one_lane = policy in ("tutel", "pipemoe_lina", "fsmoe_no_iio")
    sharded = stated_schedule(policy, 3, 2, is_sharded=True)
    listed = {lane for lane, tasks in sharded.forward.lanes.items() if tasks}
    assert listed == ({"compute", "inter"} if one_lane else {"compute", "inter", "intra"})


def test_interleaved_plans_scatter_between_gathers() -> None:
    lane = stated_schedule("interleaved", 3, 3, is_sharded=True).forward.lanes["intra"]
    assert lane == tuple(
        Task(name, chunk)
        for name, chunk in [
            ("gather", 0),
            ("gather", 1),
            ("scatter", 0),
            ("gather", 2),
            ("scatter", 1),
            ("scatter", 2),
        ]
    )


@pytest.mark.parametrize(
    "policy", [name for name in POLICIES if name not in ("auto", "whole_block")]
)
def test_every_policy_of_one_layer_plans_from_a_profile(policy: str, tmp_path: Path) -> None:
    plan = plan_schedule(config(policy=policy, profile=profile(tmp_path / "p.json")))
    assert set(plan.predicted) == {"forward", "backward"}
    assert plan.policy == policy
    if policy != "serial":
        assert max(plan.schedule.forward.chunks, plan.schedule.backward.chunks) > 1
    names = {interval.task.stage for interval in plan.predicted["forward"].intervals}
    assert names == {"order", "dispatch", "experts", "collect", "combine"}


def test_auto_weighs_whole_blocks_where_they_change_no_number(tmp_path: Path) -> None:
    path = profile(tmp_path / "p.json")
    wide = config(policy="auto", profile=path)
    plan = plan_schedule(wide)
    # all of attention covers rows as well, which no schedule of one layer can do
    assert (plan.policy, dict(plan.predicted)) == ("whole_block", {})
    assert plan.parts > 1
    assert "side by side (1." in str(plan)
    assert plan.schedule.forward.chunks == 1
    asked = plan_schedule(config(policy="whole_block", profile=path))
    assert asked.parts == plan.parts
    for other in (
        {"recompute": True},
        {"batch": BatchConfig(sequences=8, micro=1)},
        {"router": RouterConfig(balance_scope=BalanceScope.micro_batch)},
        {"router": RouterConfig(importance_loss=0.1, balance_scope=BalanceScope.sequence)},
        {"router": RouterConfig(selector=Selector.expert_choice, allow_noncausal=True)},
    ):
        plan = plan_schedule(dataclasses.replace(wide, **other))
        assert (plan.policy, plan.parts) == ("search", 1)


def test_a_window_is_as_large_as_the_plan_says(tmp_path: Path) -> None:
    plan = plan_schedule(config(policy="fsmoe", profile=profile(tmp_path / "p.json")))
    in_plan = [t for tasks in plan.schedule.backward.lanes.values() for t in tasks]
    windows = [task for task in in_plan if task.stage == "reduce_window"]
    assert bool(windows) == (plan.window_bytes > 0)


def test_auto_falls_back_to_serial_where_there_is_nothing_to_hide_behind(tmp_path: Path) -> None:
    quick = profile(tmp_path / "p.json", computes=False)
    plan = plan_schedule(config(policy="auto", profile=quick))
    assert plan.policy == "serial"
    assert "overlap would not pay here" in str(plan)


def test_a_profile_of_another_layout_is_refused(tmp_path: Path) -> None:
    other = profile(tmp_path / "p.json", expert=1)
    with pytest.raises(ConfigError, match=r"p.json is of another layout: its expert is 1, this"):
        plan_schedule(config(policy="fsmoe", profile=other))
    with pytest.raises(ConfigError, match=r"profile .*none.json cannot be read"):
        plan_schedule(config(policy="fsmoe", profile=str(tmp_path / "none.json")))


def test_a_profile_of_other_nodes_is_refused(tmp_path: Path) -> None:
    path = profile(tmp_path / "p.json")
    settings = dataclasses.replace(
        config(policy="fsmoe", profile=path), parallel=ParallelConfig(ranks=2, expert=2)
    )
    with pytest.raises(ConfigError) as caught:
        plan_schedule(settings)
    assert str(caught.value) == (
        f"schedule.profile {path} is of nodes of 1 ranks, this run has nodes of 2; set "
        "parallel.node to the ranks of a node, or schedule.profile=measure"
    )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"ranks": 3, "ranks_per_node": 2}, "ranks is 3, which is no multiple of the 2 ranks"),
        ({"ranks": 2, "ranks_per_node": 0}, "ranks_per_node is 0; it must be at least 1"),
        ({"ranks": 2, "ranks_per_node": 2, "shard": 3}, "shard is 3, which does not divide"),
        ({"ranks": 2, "ranks_per_node": 1, "expert": 4}, "4, which does not divide the 2 ranks"),
        ({"ranks": 2, "ranks_per_node": 1, "experts": 2}, "unexpected keyword argument"),
    ],
)
def test_a_profile_whose_layout_cannot_be_is_refused_by_its_name(
    layout: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = Path(profile(tmp_path / "p.json"))
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"layout": layout}))
    with pytest.raises(ConfigError, match=rf"profile .*p\.json cannot be used: .*{message}"):
        plan_schedule(config(policy="fsmoe", profile=str(path)))


def test_a_bad_profile_ends_the_command_before_ranks_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = profile(tmp_path / "p.json", expert=1)
    arguments = ["parallel.ranks=2", "parallel.expert=2", "parallel.node=1"]
    arguments += ["schedule.policy=fsmoe", f"schedule.profile={other}", f"run.dir={tmp_path}/run"]
    assert main(["train", "experiment=tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert "p.json is of another layout: its expert is 1, this job's is 2" in error
    assert not (tmp_path / "run").exists()


def test_micro_batches_bound_what_is_planned(tmp_path: Path) -> None:
    small = dataclasses.replace(
        config(policy="fsmoe", profile=profile(tmp_path / "p.json"), max_chunks=2),
        batch=BatchConfig(sequences=4, micro=1),
    )
    plan = plan_schedule(small)
    assert max(plan.schedule.forward.chunks, plan.schedule.backward.chunks) <= 2
