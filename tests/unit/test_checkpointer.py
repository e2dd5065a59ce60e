"""Saving and loading on one rank: contents, background, strictness, full and read-only disks."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewise.parallel.errors import CheckpointError
from gatewise.training import checkpointer as module
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.checkpointer import Checkpointer, find_latest, load


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(6, 7, generator=generator),
        "weight.bf16": torch.randn(5, 3, generator=generator).bfloat16(),
        "bias": torch.randn(9, generator=generator).double(),
        "step": torch.tensor(12),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
    }


def _ranges(state: dict[str, torch.Tensor]) -> dict[str, FlatRange]:
    return {name: FlatRange.whole(tensor) for name, tensor in state.items()}


def _save_and_wait(checkpointer: Checkpointer, step: int, ranges: dict[str, FlatRange]) -> None:
    checkpointer.save(step, ranges, meta={})
    checkpointer.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(folder, keep_last=1, asynchronous=True)
    checkpointer.save(20, _ranges(_state()), meta={})
    checkpointer.close()
    return folder / "step_00000020"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_every_type_and_shape_comes_back_bit_for_bit(saved: Path) -> None:
    state = _state()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(saved, _ranges(target))
    for name, tensor in state.items():
        assert torch.equal(target[name], tensor), name


def test_a_range_of_another_cut_is_read_in_place(saved: Path) -> None:
    state = _state()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    ranges = _ranges(target)
    ranges["weight"] = FlatRange(target["weight"].view(-1)[5:20], 5, (6, 7))
    ranges["bias"] = FlatRange(target["bias"][:0], 4, (9,))
    load(saved, ranges)
    expected = torch.zeros(42)
    expected[5:20] = state["weight"].view(-1)[5:20]
    assert torch.equal(target["weight"].view(-1), expected)
    assert not target["bias"].any()


def test_tensors_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    weight = torch.zeros(300_000)
    checkpointer = Checkpointer(tmp_path, keep_last=3, asynchronous=True)
    for step in (1, 2, 3):  # the second and third reuse the buffers of the one before
        weight.fill_(step)
        checkpointer.save(step, {"w": FlatRange.whole(weight)}, meta={})
        weight.fill_(-1)
    checkpointer.close()
    for step in (1, 2, 3):
        target = torch.zeros(300_000)
        load(tmp_path / f"step_0000000{step}", {"w": FlatRange.whole(target)})
        assert (target == step).all()


def test_other_tensors_at_a_later_save_are_planned_anew(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=3, asynchronous=True)
    first, second = torch.ones(4), torch.full((2, 3), 2.0, dtype=torch.float64)
    checkpointer.save(1, {"a": FlatRange.whole(first)}, meta={})
    checkpointer.save(2, {"a": FlatRange.whole(second), "b": FlatRange.whole(first)}, meta={})
    checkpointer.close()
    target = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(4)}
    load(tmp_path / "step_00000002", _ranges(target))
    assert (target["a"] == 2).all()
    assert (target["b"] == 1).all()


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in _state().items() if key != name}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (_without("bias"), r"'bias' float64\[9\] is only in the checkpoint"),
        (_state() | {"extra": torch.zeros(2)}, r"'extra' float32\[2\] is not in the checkpoint"),
        (
            _state() | {"weight": torch.zeros(7, 6)},
            r"'weight' is float32\[6, 7\] in the checkpoint and float32\[7, 6\] here",
        ),
        (
            _state() | {"weight": torch.zeros(6, 7).half()},
            r"'weight' is float32\[6, 7\] in the checkpoint and float16\[6, 7\] here",
        ),
    ],
    ids=["missing", "extra", "shape", "type"],
)
def test_a_checkpoint_of_another_model_changes_nothing_and_names_the_difference(
    saved: Path, state: dict[str, torch.Tensor], words: str
) -> None:
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match="is a checkpoint of another model: " + words):
        load(saved, _ranges(state))
    for name, tensor in state.items():
        assert torch.equal(before[name], tensor), name


def test_only_the_first_differences_are_listed(saved: Path) -> None:
    state = _state() | {f"extra{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match="; and 4 more; use the settings it was saved with"):
        load(saved, _ranges(state))


def test_names_with_an_optional_prefix_may_be_left_out(saved: Path) -> None:
    target = {name: torch.zeros_like(t) for name, t in _state().items() if "weight" not in name}
    load(saved, _ranges(target), optional_prefixes=["weight"])
    assert torch.equal(target["bias"], _state()["bias"])


def test_a_failed_save_is_told_once_by_the_next_call_and_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = _ranges(_state())
    checkpointer = Checkpointer(tmp_path, keep_last=1, asynchronous=True)
    checkpointer.save(1, ranges, meta={})
    checkpointer.wait()

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "commit", fail)
        checkpointer.save(2, ranges, meta={})
        words = "step 2 to .* failed on rank 0: Input/output error; check the disk"
        with pytest.raises(CheckpointError, match=words):
            checkpointer.save(3, ranges, meta={})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpointer.newest == tmp_path / "step_00000001"
    checkpointer.save(3, ranges, meta={})
    checkpointer.close()
    checkpointer.close()
    assert find_latest(tmp_path) == tmp_path / "step_00000003"


def test_an_error_of_the_last_save_comes_out_of_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1, asynchronous=True)
    monkeypatch.setattr(module, "commit", None)
    checkpointer.save(1, _ranges(_state()), meta={})
    with pytest.raises(CheckpointError, match="TypeError"):
        checkpointer.close()


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1, asynchronous=True)
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, _ranges(_state()), meta={"config": object()})
    checkpointer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_names_cause_and_remedy_and_damages_nothing(
    small_disk: Path, asynchronous: bool
) -> None:
    weight = torch.ones(100_000)
    checkpointer = Checkpointer(small_disk, keep_last=2, asynchronous=asynchronous)
    checkpointer.save(1, {"w": FlatRange.whole(weight)}, meta={})
    big = {"w": FlatRange.whole(torch.ones(1_000_000))}
    words = f"saving the checkpoint of step 2 to {small_disk} failed on rank 0: No space left"
    with pytest.raises(CheckpointError, match=words + ".*; free space"):
        _save_and_wait(checkpointer, 2, big)
    assert [path.name for path in small_disk.iterdir()] == ["step_00000001"]
    assert find_latest(small_disk) == small_disk / "step_00000001"
    weight.fill_(3.0)
    checkpointer.save(3, {"w": FlatRange.whole(weight)}, meta={})
    checkpointer.close()
    assert find_latest(small_disk) == small_disk / "step_00000003"


def test_a_folder_without_write_permission_is_refused_at_the_start(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = f"preparing {small_disk} for checkpoints failed on rank 0: Read-only file system"
    with pytest.raises(CheckpointError, match=words):
        Checkpointer(small_disk, keep_last=1, asynchronous=True)


def test_a_file_in_the_place_of_the_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    path.touch()
    with pytest.raises(CheckpointError, match="File exists"):
        Checkpointer(path, keep_last=1, asynchronous=True)
