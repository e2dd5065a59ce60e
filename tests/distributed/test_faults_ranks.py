"""Planted faults are survived, or end the run by name; what was durable is not lost."""

from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException
from training_runs import losses, make_text, run, tiny

from gatewise.training.checkpointer import read_meta
from gatewise.training.config import CheckpointConfig, TrainConfig
from gatewise.training.data import PreparedData
from gatewise.training.guard import NonfiniteError
from gatewise.training.guard_config import (
    FaultConfig,
    FaultKind,
    NonfiniteConfig,
    NonfinitePolicy,
    ReplicaPolicy,
    ReplicasConfig,
    SpikePolicy,
    SpikesConfig,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("faults"))


def fault(kind: FaultKind, step: int, rank: int = 0, **more: float) -> FaultConfig:
    return FaultConfig(kind=kind, step=step, rank=rank, **more)  # type: ignore[arg-type]


def saving(
    steps: int, *faults: FaultConfig, every: int | None = 2, **settings: object
) -> TrainConfig:
    checkpoint = CheckpointConfig(every=every, keep_last=9, max_failures=1)
    return tiny(steps, checkpoint=checkpoint, faults=list(faults), **settings)  # type: ignore[arg-type]


@pytest.mark.dist
def test_four_ranks_outlive_flipped_bits_full_disks_and_torn_writes_bit_for_bit(
    data: PreparedData, tmp_path: Path
) -> None:
    layout = {"ranks": 4, "expert": 2}
    whole = run(saving(10, **layout), data, tmp_path / "whole")
    faults = [
        fault(FaultKind.bitflip, 3, 2),
        fault(FaultKind.enospc, 4, 1),
        fault(FaultKind.slow, 7, 3, seconds=0.4),
        fault(FaultKind.torn_write, 8, 0),
    ]
    replicas = ReplicasConfig(every=1, policy=ReplicaPolicy.rollback)
    folder = tmp_path / "run"
    first = run(saving(8, *faults, replicas=replicas, **layout), data, folder)
    assert first.output["rollbacks"] == 1
    assert first.output["failed_saves"] == 1
    assert first.column("ranks/slowest")[-2] == 3
    steps = [record["step"] for record in first.training()]
    assert steps == list(range(1, 9))  # the step that was rolled back was not recorded before
    assert losses(first) != losses(whole)[:8]  # the schedule ends at another step
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000006", "step_00000008"]

    again = run(saving(10, *faults, replicas=replicas, **layout), data, folder)
    assert again.output["resumed_from"].endswith("step_00000006")


@pytest.mark.dist
def test_a_run_that_went_back_for_a_flipped_bit_is_the_undisturbed_one(
    data: PreparedData, tmp_path: Path
) -> None:
    layout = {"ranks": 2, "replicas": ReplicasConfig(every=1, policy=ReplicaPolicy.rollback)}
    whole = run(saving(6, **layout), data, tmp_path / "whole")
    again = run(saving(6, fault(FaultKind.bitflip, 4, 1), **layout), data, tmp_path / "again")
    assert again.output["rollbacks"] == 1
    assert losses(again) == losses(whole)
    stop = saving(6, fault(FaultKind.bitflip, 3, 1), ranks=2, replicas=ReplicasConfig(every=2))
    with pytest.raises(ProcessRaisedException, match="ranks 0, 1: they hold different"):
        run(stop, data, tmp_path / "stop")


@pytest.mark.dist
def test_the_rank_whose_loss_is_nan_is_named(data: PreparedData, tmp_path: Path) -> None:
    config = saving(4, fault(FaultKind.nan, 3, 1), ranks=2)
    config.nonfinite = NonfiniteConfig(policy=NonfinitePolicy.stop)
    words = "rank 1: its loss is nan: loss or gradients were not finite in step 3.*step_00000002"
    with pytest.raises(ProcessRaisedException, match=words):
        run(config, data, tmp_path)


def test_a_run_goes_back_past_steps_that_stay_nan_and_passes_their_samples_over(
    data: PreparedData, tmp_path: Path
) -> None:
    config = saving(8, fault(FaultKind.nan, 5, steps=2))
    config.nonfinite = NonfiniteConfig(policy=NonfinitePolicy.rollback, max_consecutive=2)
    result = run(config, data, tmp_path)
    assert result.output["rollbacks"] == 1
    assert result.output["steps"] == 8
    # steps 5 and 6 were skipped, so the run is at 4 again; then 5 to 8 on samples never seen
    meta = read_meta(tmp_path / "checkpoints" / "step_00000008")["meta"]
    assert meta["sample"] == 8 * 10
    assert meta["rollbacks"] == 1


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    data: PreparedData, tmp_path: Path
) -> None:
    config = saving(8, fault(FaultKind.nan, 2, steps=2), every=None)
    config.nonfinite = NonfiniteConfig(policy=NonfinitePolicy.rollback, max_consecutive=2)
    with pytest.raises(NonfiniteError, match=r"to go back to; set checkpoint\.every"):
        run(config, data, tmp_path)


def test_a_run_goes_back_only_so_often(data: PreparedData, tmp_path: Path) -> None:
    config = saving(8, fault(FaultKind.nan, 3))
    config.nonfinite = NonfiniteConfig(policy=NonfinitePolicy.rollback, max_consecutive=1)
    config.checkpoint.max_rollbacks = 0
    with pytest.raises(NonfiniteError, match=r"checkpoint\.max_rollbacks is 0"):
        run(config, data, tmp_path)


def test_too_many_failed_saves_end_the_run(data: PreparedData, tmp_path: Path) -> None:
    config = saving(8, *(fault(FaultKind.enospc, step) for step in (2, 4)))
    with pytest.raises(Exception, match=r"saving the checkpoint of step 4 .* No space left"):
        run(config, data, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == []


def test_a_save_that_is_read_back_finds_a_torn_write_before_it_counts(
    data: PreparedData, tmp_path: Path
) -> None:
    config = saving(4, fault(FaultKind.torn_write, 2))
    config.checkpoint.verify = True
    config.checkpoint.keep_last = 1
    result = run(config, data, tmp_path)
    assert result.output["failed_saves"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


def test_a_spike_is_held_back_counted_and_does_not_stop_the_run(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gatewise.training import step as step_module

    real, calls = step_module.language_loss, iter(range(10**6))

    def loss(*arguments: object) -> object:
        return real(*arguments) * (30.0 if next(calls) == 9 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "language_loss", loss)
    config = saving(12, every=None)
    config.spikes = SpikesConfig(policy=SpikePolicy.skip, window=8)
    result = run(config, data, tmp_path)
    assert result.column("train/spikes") == [0.0] * 9 + [1.0] * 3
    assert result.output["skipped_steps"] == 1
