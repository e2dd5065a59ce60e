"""A pre-gate distilled from a trained model, the checkpoint it leaves, and runs that go on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import Records, Run, losses, make_text, run, runtime, tiny

from gatewise.conf.compose import load_settings
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.routers.ahead.config import AheadConfig, AheadKind, Exchange, HashFill
from gatewise.routers.ahead.plan import record_routes
from gatewise.routers.ahead.table import HashGate
from gatewise.routers.config import RouterConfig
from gatewise.training.config import CheckpointConfig, OptimConfig
from gatewise.training.data import PreparedData
from gatewise.training.distil import distil
from gatewise.training.distil_config import DistilConfig, PregateSection, student_config

AHEAD = AheadConfig(kind=AheadKind.gru, width=16, heads=2, state=8)
SETTINGS = DistilConfig(
    teacher="teacher",
    steps=30,
    sequences=8,
    log_every=10,
    router=PregateSection(ahead=AHEAD),
    optim=OptimConfig(lr=0.01, warmup=2),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("distil"))


@pytest.fixture(scope="module")
def teacher(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tiny(12), data, tmp_path_factory.mktemp("teacher"))


def test_a_pre_gate_learns_from_a_checkpoint_and_can_be_trained_on(
    teacher: Run, data: PreparedData, tmp_path: Path
) -> None:
    config, records = student_config(tiny(12), SETTINGS), Records()
    found = distil(
        config,
        Path(teacher.output["checkpoint"]),
        runtime=runtime(config),
        data=data,
        folder=tmp_path,
        sinks=[records],
    )
    assert found["val_loss_in_loop"] == pytest.approx(teacher.output["val_loss"], rel=1e-5)
    divergence = [record["distil/divergence"] for record in records.all]
    assert len(divergence) == 3
    assert divergence[-1] < 0.8 * divergence[0]
    assert found["recall"] > found["chance_recall"] == 0.5
    for name in ("recall_per_layer", "mass_recall_per_layer"):
        assert len(found[name]) == 2
        assert all(0 < value <= 1 for value in found[name])
    assert found["val_loss_ratio"] == found["val_loss"] / found["val_loss_in_loop"]
    assert found["val_loss_pregate_weights"] != found["val_loss"]
    before, after = teacher.tensors(), Run([], {}, tmp_path).tensors()
    for name, tensor in before.items():
        if name.startswith(("model/", "bias/")):
            assert torch.equal(after[name], tensor), name  # the teacher stays as it is
    assert any(name.startswith("model/ahead.") for name in after)

    stored = open_checkpoint(str(tmp_path))
    model = restore_model(stored, device=torch.device("cpu"))
    token_BS = torch.arange(24).view(2, 12)
    assert model.ahead is not None
    executed = record_routes(model(token_BS).routings, num_experts=4)
    assert executed.digest() == model.ahead.plan(token_BS).digest()

    load = CheckpointConfig(load=str(stored.path))
    router = RouterConfig(ahead=AHEAD)
    going_on = run(tiny(3, router=router, checkpoint=load), data, tmp_path / "on")
    fresh = run(tiny(3, router=router), data, tmp_path / "fresh")
    assert losses(going_on)[0] < losses(fresh)[0] - 0.1
    recalls = [x.column("moe/ahead_recall")[0] for x in (going_on, fresh)]
    assert recalls[0] > recalls[1]


def test_a_pregated_run_goes_on_from_its_checkpoint_in_the_same_bits(
    data: PreparedData, tmp_path: Path
) -> None:
    router = RouterConfig(ahead=replace(AHEAD, exchange=Exchange.step))
    checkpoint = CheckpointConfig(every=3, keep_last=5)
    whole = run(tiny(6, router=router, checkpoint=checkpoint), data, tmp_path / "whole")
    start = tmp_path / "whole" / "checkpoints" / "step_00000003"
    rest = run(
        tiny(6, router=router, checkpoint=CheckpointConfig(load=str(start))),
        data,
        tmp_path / "rest",
    )
    assert losses(rest) == losses(whole)[3:]


def test_hash_tables_are_balanced_saved_and_restored(data: PreparedData, tmp_path: Path) -> None:
    router = RouterConfig(ahead=AheadConfig(kind=AheadKind.hash), balance_loss=0.0)
    result = run(tiny(2, router=router), data, tmp_path / "balanced")
    other = replace(router, ahead=replace(router.ahead, fill=HashFill.random))
    random = run(tiny(2, router=other), data, tmp_path / "random")
    worst = [x.column("moe/max_violation")[-1] for x in (result, random)]
    assert worst[0] < worst[1]
    stored = open_checkpoint(str(tmp_path / "balanced"))
    model = restore_model(stored, device=torch.device("cpu"))
    assert isinstance(model.ahead, HashGate)
    assert torch.equal(model.ahead.table_LVK, result.tensors()["table/ahead"])


def test_a_pre_gate_of_another_depth_is_refused(data: PreparedData, tmp_path: Path) -> None:
    router = RouterConfig(ahead=AHEAD)
    first = run(tiny(1, router=router), data, tmp_path / "two")
    load = CheckpointConfig(load=first.output["checkpoint"])
    deeper = tiny(1, router=router, model={"layers": 3}, checkpoint=load)
    with pytest.raises(
        CheckpointError, match=r"model\.layers is 2 in the checkpoint and 3 here"
    ) as caught:
        run(deeper, data, tmp_path / "three")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps=0"], "steps is 0"),
        (["router.ahead.kind=hash"], "kind is hash, which has nothing to learn"),
        (["router.ahead.weights=pregate"], "weights is pregate, but a distilled"),
        (["router.ahead.width=0"], "router.ahead.width is 0"),
        (["router.scorer=linear"], "unknown setting 'router.scorer'"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(DistilConfig, arguments)


def test_a_teacher_without_routers_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher is teacher, a dense model"):
        student_config(tiny(model={"num_experts": 0}), SETTINGS)
    with pytest.raises(ConfigError, match="has a pre-gate already"):
        student_config(tiny(router=RouterConfig(ahead=AHEAD)), SETTINGS)
    with pytest.raises(ConfigError, match=r"cannot teach: router\.num_groups is 2"):
        student_config(tiny(router=RouterConfig(num_groups=2, top_groups=1)), SETTINGS)
    assert student_config(tiny(router=RouterConfig(bias_rate=0.1)), SETTINGS).router.bias_rate == 0
