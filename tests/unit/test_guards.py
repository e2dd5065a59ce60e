"""What watches a run: spikes, replicas, slow ranks, missing ranks, and the checks of faults."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewise.conf.compose import config_from_yaml, config_to_yaml, load_train_config
from gatewise.parallel.beat import Beat, is_gone, read_beat
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.stuck import find_missing
from gatewise.training.faults import FaultInjector, flip_bit
from gatewise.training.guard_config import (
    FaultConfig,
    FaultKind,
    SpikePolicy,
    SpikesConfig,
    StragglersConfig,
)
from gatewise.training.pace import find_straggler
from gatewise.training.replicas import find_differences
from gatewise.training.spikes import SpikeGuard

FOUR = ["experiment=tiny", "parallel.ranks=4"]


def test_faults_are_read_from_the_command_line_and_stored() -> None:
    config = load_train_config([*FOUR, "faults=[{step: 7, rank: 2, kind: kill}]"])
    assert config.faults == [FaultConfig(step=7, rank=2, kind=FaultKind.kill)]
    assert config_from_yaml(config_to_yaml(config)) == config


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("[{step: 7, rank: 4, kind: kill}]", "faults[0].rank is 4; parallel.ranks is 4"),
        ("[{step: 21, rank: 0, kind: kill}]", "faults[0].step is 21; the run has steps from 1"),
        ("[{step: 0, rank: 0, kind: kill}]", "faults[0].step is 0"),
        ("[{step: 7, rank: 0, kind: burn}]", "'burn', expected one of [kill, hang, nan"),
        ("[{step: 7, kind: kill}]", "missing mandatory value: rank"),
        ("[{step: 7, rank: 0, kind: kill, size: 3}]", "faults: size: Key 'size' not in"),
        ("[{step: 7, rank: 0, kind: slow, seconds: 0}]", "seconds is 0.0; it must be above 0"),
        ("kill", "faults is 'kill'; it must be a list"),
        (
            "[{step: 7, rank: 0, kind: nan}, {step: 7, rank: 0, kind: nan}]",
            "faults[1] repeats step 7, rank 0, nan",
        ),
    ],
)
def test_a_fault_that_cannot_happen_is_refused_by_name(faults: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_train_config([*FOUR, f"faults={faults}"])
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_a_single_rank() -> None:
    with pytest.raises(ConfigError, match="nobody waits for a single rank"):
        load_train_config(["experiment=tiny", "faults=[{step: 7, rank: 0, kind: hang}]"])


def test_a_fault_happens_once_in_a_run_whatever_restarts(tmp_path: Path) -> None:
    flips = [FaultConfig(step=2, rank=1, kind=FaultKind.bitflip)]
    weights = torch.ones(4)
    module = torch.nn.Identity()
    for _ in range(2):  # a run and the one that goes on
        injector = FaultInjector(flips, 1, tmp_path)
        for step in (1, 2, 2):  # it goes back by itself, too
            injector.begin(step, poisoned=module, weights=lambda: weights)
            injector.end()
    assert (weights != 1).tolist() == [True, False, False, False]
    assert [path.name for path in (tmp_path / "faults").iterdir()] == [flips[0].name]


def test_nan_lasts_as_many_steps_as_it_should(tmp_path: Path) -> None:
    fault = FaultConfig(step=2, rank=0, kind=FaultKind.nan, steps=2)
    injector = FaultInjector([fault], 0, tmp_path)
    module, seen = torch.nn.Identity(), []
    for step in range(1, 5):
        injector.begin(step, poisoned=module, weights=lambda: torch.ones(1))
        seen.append(bool(module(torch.ones(1)).isnan().any()))
        injector.end()
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flipped_bit_changes_one_number_a_little(dtype: torch.dtype) -> None:
    weights = torch.ones(3, dtype=dtype)
    flip_bit(weights)
    assert 0 < abs(weights[0].item() - 1) < 0.1
    assert weights[1:].tolist() == [1, 1]


# --- spikes


def judge(guard: SpikeGuard, losses: list[float], norm: float = 1.0) -> list[bool]:
    found = []
    for loss in losses:
        value = torch.tensor(loss)
        spiked = guard.judge(value, torch.tensor(norm), torch.isfinite(value))
        found.append(bool(spiked))
    return found


def spike_guard(policy: SpikePolicy = SpikePolicy.skip) -> SpikeGuard:
    return SpikeGuard(SpikesConfig(policy=policy, window=16, sigmas=8.0), torch.device("cpu"))


def test_a_loss_far_above_the_last_ones_is_a_spike_and_does_not_count_as_past() -> None:
    guard = spike_guard()
    noisy = [3.0 + 0.02 * math.sin(7 * step) for step in range(16)]
    assert not any(judge(guard, noisy))
    limits = guard.limits()
    assert judge(guard, [3.05, 9.0, 9.0, 9.0, 3.0]) == [False, True, True, True, False]
    assert torch.allclose(guard.limits(), limits, rtol=0.05)


def test_nothing_is_a_spike_before_there_is_a_past_and_nan_is_none() -> None:
    guard = spike_guard()
    assert judge(guard, [5.0, 50.0, 2.0, math.nan]) == [False] * 4
    assert guard.limits().isinf().all()


def test_a_gradient_norm_can_be_the_spike() -> None:
    guard = spike_guard()
    judge(guard, [3.0] * 16)
    assert judge(guard, [3.0], norm=40.0) == [True]


def test_a_falling_loss_is_no_spike() -> None:
    assert not any(judge(spike_guard(), [6.0 * 0.97**step for step in range(100)]))


# --- replicas


def rows(*hashes: tuple[int, int]) -> list[list[int]]:
    """Return rows whose dense weights have these (group, hash)."""
    return [[group, value, group, 1, 0, 0, 0, 0, 0, 0, 0, 0] for group, value in hashes]


def test_the_rank_in_the_minority_is_named() -> None:
    (difference,) = find_differences(rows((0, 5), (0, 5), (0, 9), (0, 5)))
    assert (difference.ranks, difference.others) == ((2,), (0, 1, 3))
    assert str(difference) == "rank 2: holds other dense weights than ranks 0, 1, 3"


def test_of_two_copies_both_are_named_and_groups_are_not_mixed() -> None:
    (difference,) = find_differences(rows((0, 5), (1, 7), (0, 6), (1, 7)))
    assert (difference.ranks, difference.others) == ((0, 2), ())
    assert "which of them is right is unknown" in str(difference)
    assert find_differences(rows((0, 5), (1, 7), (0, 5), (1, 7))) == []


# --- slow ranks


def test_a_rank_far_behind_the_others_is_named() -> None:
    config = StragglersConfig()
    found = find_straggler([100.0, 410.0, 120.0, 90.0], config)
    assert found is not None
    assert (found.rank, found.others_ms) == (1, 100.0)
    assert str(found).startswith("rank 1 is slow: 410 ms")
    assert find_straggler([100.0, 190.0], config) is None
    assert find_straggler([1.0, 9.0], config) is None  # not worth a warning
    assert find_straggler([100.0], config) is None
    assert find_straggler([1.0, 900.0], StragglersConfig(ratio=None)) is None


# --- missing ranks


def report(**numbers: int) -> dict[str, Any]:
    """Return a rank's report: group `ab` of ranks 0, 1, `cd` of 2, 3, `all` of all."""
    members = {"ab": [0, 1], "cd": [2, 3], "all": [0, 1, 2, 3]}
    return {
        "groups": {name: members[name] for name in numbers},
        "last": {n: {"number": k, "what": "all_reduce"} for n, k in numbers.items() if k},
        "forgot": False,
    }


def test_the_rank_that_joined_fewer_collectives_is_missing() -> None:
    reports = {r: report(all=17) for r in (0, 1, 3)} | {2: report(all=16)}
    found = find_missing(reports)
    assert found.missing == (2,)
    assert found.text == ("ranks 0, 1, 3 wait for it at all_reduce (number 17 of group 'all')")


def test_a_rank_that_waits_itself_is_not_the_cause() -> None:
    reports = {
        0: report(ab=9, all=5),
        1: report(ab=9, all=5),
        2: report(cd=8, all=4),  # hangs; 3 waits for it, 0 and 1 for both
        3: report(cd=9, all=4),
    }
    assert find_missing(reports).missing == (2,)


def test_a_recorder_that_forgot_accuses_nobody() -> None:
    forgetful = {**report(all=0), "forgot": True}
    assert find_missing({0: report(all=7), 1: forgetful}).missing == ()


# --- beats


def test_a_beat_is_read_after_its_process_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from gatewise.parallel.beat import Beat\n"
        "Beat(pathlib.Path(sys.argv[1]), 3).tell(41, 'save'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    beat = read_beat(tmp_path, 3)
    assert beat is not None
    assert (beat.step, beat.phase) == (41, "save")
    assert is_gone(beat)


def test_a_living_process_is_not_gone_and_no_beat_is_none(tmp_path: Path) -> None:
    Beat(tmp_path, 0)
    beat = read_beat(tmp_path, 0)
    assert beat is not None
    assert beat.pid == os.getpid()
    assert not is_gone(beat)
    assert read_beat(tmp_path, 1) is None
    (tmp_path / "rank_1.beat").write_text(json.dumps("torn"))
    assert read_beat(tmp_path, 1) is None
