"""The pieces of `gatewise verify` and `gatewise drill`: what is tried, and how it is judged."""

import json
import math
import os
import random
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from gatewise.launch.drill import Shot, _differences, _shoot, _shots, _unfinished
from gatewise.launch.verify import Check, VerifyConfig, _furthest, on_one_rank, reduced
from gatewise.parallel.config import ParallelConfig
from gatewise.routers.config import BalanceScope, RouterConfig
from gatewise.training.config import BatchConfig, DataConfig, Precision, TrainConfig


def large(**settings: object) -> TrainConfig:
    config = TrainConfig(
        data=DataConfig(sequence_length=4096),
        parallel=ParallelConfig(ranks=8, expert=4, tensor=2, shard=2),
        batch=BatchConfig(sequences=64, micro=4),
        **settings,  # type: ignore[arg-type]
    )
    config.model.layers, config.model.hidden, config.model.heads = 32, 2048, 16
    config.model.expert_width, config.model.num_experts = 8192, 64
    return config


def test_what_is_tried_is_small_and_keeps_the_layout() -> None:
    local = RouterConfig(balance_scope=BalanceScope.sequence)
    small = reduced(VerifyConfig(), large(router=local))
    assert small.parallel == large().parallel
    assert small.precision is Precision.fp64
    assert (small.model.layers, small.model.num_experts, small.model.heads) == (2, 64, 16)
    assert small.data.sequence_length == 64
    assert (small.batch.sequences, small.batch.micro) == (4 * 4, 2)  # two passes of two
    one = on_one_rank(small)
    assert one.parallel.ranks == 1
    assert (one.batch.sequences, one.batch.micro) == (16, 2)  # the same micro-batches, in turn


def test_a_loss_over_the_whole_batch_is_tried_in_one_micro_batch() -> None:
    small = reduced(VerifyConfig(), large())
    assert small.router.balance_scope is BalanceScope.global_batch
    assert (small.batch.sequences, small.batch.micro) == (8, None)
    assert on_one_rank(small).batch.micro == 8


def test_the_furthest_tensor_is_named_and_nan_never_passes() -> None:
    want = {"a": torch.ones(4), "b": torch.ones(4)}
    have = {"a": torch.ones(4), "b": torch.tensor([1.0, 1.0, 1.0, 1.2])}
    difference, _, name = _furthest(have, want, 1e-8)
    assert (name, round(difference, 6)) == ("b", 0.1)
    assert not Check("x", "y", difference, 1e-8, name).passed
    broken = _furthest({"a": math.nan}, {"a": 1.0}, 1e-8)
    assert not Check("x", "y", *broken).passed
    assert not Check("x", "y", *_furthest({"a": 1.0}, {"c": 1.0}, 1e-8)).passed
    assert Check("x", "y", *_furthest(want, dict(want), 0.0)).passed


@pytest.mark.parametrize("change", ["loss", "missing", "none"])
def test_a_run_that_differs_from_the_quiet_one_is_noticed(change: str, tmp_path: Path) -> None:
    for place in ("quiet", "shot"):
        (tmp_path / place).mkdir()
        records = [{"step": n, "train/loss": 3.0 / n, "ranks/slowest": 1.0} for n in (1, 2)]
        if place == "shot":
            records[0]["ranks/slowest"] = 0.0  # of the machine
            if change == "loss":
                records[1]["train/loss"] = 1.6
            if change == "missing":
                records.pop()
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / place / "metrics.jsonl").write_text(text)
    found = _differences(tmp_path / "shot", tmp_path / "quiet")
    expected = {
        "loss": ["train/loss of step 2 is 1.6"],
        "missing": ["1 records instead of 2"],
        "none": [],
    }
    assert found == expected[change]


def test_a_shot_at_a_save_passes_over_what_the_last_start_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step_00000003.partial-aa").mkdir(parents=True)
    found: list[int] = []
    monkeypatch.setattr(os, "kill", lambda *_: found.append(len(list(folder.iterdir()))))
    shot = Shot(None, 0.0, 1, left=_unfinished(tmp_path))
    shooter = threading.Thread(target=_shoot, args=(shot, tmp_path), daemon=True)
    shooter.start()
    time.sleep(0.05)
    (folder / ".step_00000003.partial-bb").mkdir()
    shooter.join(60)
    assert found == [2]


def test_shots_hit_saves_single_ranks_and_all() -> None:
    shots = list(islice(_shots(random.Random(0), 4, 10.0), 200))
    assert {shot.rank for shot in shots} == {None, 0, 1, 2, 3}
    assert {shot.save for shot in shots} == {None, 1, 2, 3, 4}
    assert 80 < sum(shot.save is not None for shot in shots) < 180
    assert all(0 <= shot.seconds <= 10 for shot in shots)
