"""DeepSpeed as the engine: the same training as ours, split as ZeRO says, and our checkpoints."""

import importlib.util
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import make_text, make_trainer, tiny

from gatewise.parallel.parameters import Part
from gatewise.training.config import DeepSpeedConfig, EngineKind
from gatewise.training.data import PreparedData, open_prepared
from gatewise.training.trainer import Trainer
from ranks import run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None or shutil.which("ninja") is None,
        reason="deepspeed or ninja is not installed",
    ),
]

OURS: dict[str, Any] = {"expert": 2}
STEPS, SKIPPED = 6, 2  # the third step has an infinite gradient


def zero(**settings: Any) -> dict[str, Any]:
    return {
        "expert": 2,
        "engine": EngineKind.deepspeed,
        "deepspeed": DeepSpeedConfig(**settings),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("text"), files=11, sentences=20)


def build(settings: Mapping[str, Any], data: str, folder: Path, rank: int, world: int) -> Trainer:
    config = tiny(9, ranks=world, micro=1, **settings)
    trainer, _ = make_trainer(config, open_prepared(data), folder, rank)
    return trainer


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    """Take steps and return what is decided in them, and the norms of single experts."""
    found = []
    for _ in range(count):
        result = trainer.run_step(measure=True)
        norms = {name: float(norm) for name, norm in result.norms.items()}
        norms["skipped"], norms["loss"] = float(result.skipped), float(result.loss)
        experts = trainer.meter.drain(trainer.runtime.groups.control)
        norms["expert_max"] = experts["grad/expert_norm_max"]
        found.append(norms)
    return found


def assert_same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            same = mine[name] == value or math.isclose(mine[name], value, abs_tol=1e-5)
            assert same or not math.isfinite(value), (name, mine[name], value)


def held_numbers(trainer: Trainer) -> int:
    """Count the weights that this rank keeps optimizer state of."""
    return sum(held.master.numel() for held in trainer.engine.held())


def _is_the_same_training(rank: int, world: int, data: str, folder: str) -> None:
    wanted: list[dict[str, float]] = []
    for name, settings in (
        ("ours", OURS),
        ("one", zero(stage=1)),
        ("two", zero(stage=2, bucket_mb=0.001)),  # many buckets
        ("offload", zero(stage=2, offload=True)),
    ):
        trainer = build(settings, data, Path(folder) / name, rank, world)
        gradients = iter(range(100))
        first = SKIPPED * 8 // world  # of the backward passes of that step
        trainer.model.norm_final.gain.register_hook(
            lambda gradient, count=gradients, bad=first: (
                gradient * (math.inf if next(count) == bad else 1.0)
            )
        )
        found = steps(trainer, STEPS)
        assert [step["skipped"] for step in found] == [float(i == SKIPPED) for i in range(STEPS)]
        assert trainer.engine.updates == STEPS - 1
        if name == "ours":
            wanted = found
        else:
            assert_same(found, wanted)
            # every rank keeps a part of what it holds: of the experts, those that half of all hold
            parts: list[Part] = [p for held in trainer.engine.held() for p in held.parts]
            kept = sum(part.end - part.start for part in parts if part.spec.label == "expert")
            local = sum(
                e.numel() for m in trainer.model.moe_layers() for e in m.experts.parameters()
            )
            assert abs(kept - local * 2 / world) < 64  # padding
            assert held_numbers(trainer) < local * 2 / world + trainer.counts.total / world + 64
        trainer.close()


def test_zero_trains_as_our_engine_does_also_past_a_step_that_is_skipped(
    data: PreparedData, tmp_path: Path
) -> None:
    run_ranks(_is_the_same_training, 4, (str(data.folder), str(tmp_path)))


def _goes_on_elsewhere(rank: int, world: int, data: str, folder: str) -> None:
    whole = build(OURS, data, Path(folder) / "whole", rank, world)
    wanted = steps(whole, 6)
    whole.close()
    plan = (
        ("a", OURS, 2),
        ("b", zero(stage=2), 2),
        ("c", {"expert": 1, "shard": 2}, 1),
        ("d", {**zero(stage=1, offload=True), "expert": 1}, 1),
    )
    found: list[dict[str, float]] = []
    before: Path | None = None
    for name, settings, count in plan:
        trainer = build(settings, data, Path(folder) / name, rank, world)
        if before is not None:
            trainer.config.checkpoint.load = str(before)
            trainer.progress = trainer.checkpoints.resume(trainer.model, trainer.engine)
        assert trainer.engine.updates == len(found)
        found += steps(trainer, count)
        trainer.checkpoints.save(trainer.model, trainer.engine, trainer.progress, {})
        trainer.checkpoints.wait()
        before = trainer.checkpoints.newest()
        trainer.close()
    assert_same(found, wanted)
    assert torch.isfinite(torch.tensor(found[-1]["loss"]))


def test_a_run_goes_on_from_one_engine_to_the_other_in_other_layouts(
    data: PreparedData, tmp_path: Path
) -> None:
    run_ranks(_goes_on_elsewhere, 2, (str(data.folder), str(tmp_path)))
