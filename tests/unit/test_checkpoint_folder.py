"""What is on the disk: checksums, the newest good one, retention, leftovers."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.checkpointer import (
    Checkpointer,
    find_latest,
    load,
    read_meta,
    read_rank_state,
    verify,
)

FILES = [
    "index.json",
    "manifest.json",
    "meta.json",
    "rank_00000.state",
    "shard_00000.safetensors",
]


def _ranges(step: int) -> dict[str, FlatRange]:
    return {"w": FlatRange.whole(torch.full((4, 5), float(step)))}


def _save(folder: Path, *steps: int, keep_last: int = 9) -> None:
    checkpointer = Checkpointer(folder, keep_last=keep_last, asynchronous=False)
    for step in steps:
        checkpointer.save(step, _ranges(step), meta={"cursor": step}, rank_state=b"random bits")
    checkpointer.close()


def _value(path: Path) -> float:
    target = _ranges(-1)
    load(path, target)
    assert target["w"].data.unique().numel() == 1
    return target["w"].data[0].item()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    _save(folder, 10, 20)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20 that a test may damage."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(saved, copy)
    return copy


def test_a_checkpoint_holds_the_documented_files(saved: Path) -> None:
    path = saved / "step_00000020"
    assert _names(path) == FILES
    verify(path)
    meta = read_meta(path)
    assert (meta["step"], meta["world_size"], meta["meta"]) == (20, 1, {"cursor": 20})
    assert meta["tensors"] == {"w": {"shape": [4, 5], "dtype": "float32"}}


def test_data_files_are_safetensors(saved: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(saved / "step_00000020" / "shard_00000.safetensors")
    torch.testing.assert_close(tensors["w"], torch.full((20,), 20.0))


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_found_and_the_one_before_is_used(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _flip(folder / "step_00000020" / name)
    with pytest.raises(CheckpointError, match="step_00000020 is damaged"):
        verify(folder / "step_00000020")
    path = find_latest(folder)
    assert path is not None
    assert _value(path) == 10.0
    assert "step_00000020 is damaged" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_or_lost_is_found(folder: Path, name: str) -> None:
    path = folder / "step_00000020" / name
    path.write_bytes(path.read_bytes()[:-3])
    assert find_latest(folder) == folder / "step_00000010"
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        verify(folder / "step_00000020")


def test_nothing_good_gives_none_and_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_latest(folder / "absent") is None
    for step in (10, 20):
        _flip(folder / f"step_000000{step}" / "index.json")
    assert find_latest(folder) is None
    assert caplog.text.count("is damaged") == 2


def test_what_a_killed_save_left_is_reported_then_removed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "step_00000020").rename(folder / ".step_00000030.partial-0a1b")
    (folder / ".step_00000005.deleted-0a1b").mkdir()
    (folder / "notes").mkdir()
    assert find_latest(folder) == folder / "step_00000010"
    assert ".step_00000030.partial-0a1b is incomplete" in caplog.text
    Checkpointer(folder, keep_last=1, asynchronous=False).close()
    assert _names(folder) == ["notes", "step_00000010"]
    assert "removing" in caplog.text


def test_a_folder_that_was_renamed_is_not_taken_for_another_step(folder: Path) -> None:
    (folder / "step_00000020").rename(folder / "step_00000090")
    assert find_latest(folder) == folder / "step_00000010"


def test_a_newer_format_is_refused_not_misread(folder: Path) -> None:
    path = folder / "step_00000020" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this version reads 1"):
        verify(folder / "step_00000020")


def test_the_same_step_again_replaces_the_first(folder: Path) -> None:
    checkpointer = Checkpointer(folder, keep_last=2, asynchronous=False)
    checkpointer.save(20, _ranges(21), meta={})
    checkpointer.close()
    assert _names(folder) == ["step_00000010", "step_00000020"]
    assert _value(folder / "step_00000020") == 21.0


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(folder: Path) -> None:
    shutil.rmtree(folder / "step_00000010")
    replaced = folder / ".step_00000020.replaced-0a1b"
    (folder / "step_00000020").rename(replaced)
    Checkpointer(folder, keep_last=1, asynchronous=False).close()
    assert find_latest(folder) == replaced
    assert _value(replaced) == 20.0
    _save(folder, 20, keep_last=1)
    assert _names(folder) == ["step_00000020"]


def test_a_damaged_replacement_does_not_remove_the_good_one_it_replaced(folder: Path) -> None:
    shutil.copytree(folder / "step_00000020", folder / ".step_00000020.replaced-0a1b")
    _flip(folder / "step_00000020" / "meta.json")
    Checkpointer(folder, keep_last=1, asynchronous=False).close()
    assert find_latest(folder) == folder / ".step_00000020.replaced-0a1b"


def test_keep_last_deletes_the_oldest(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert _names(tmp_path) == ["step_00000003", "step_00000004"]


def test_damaged_checkpoints_do_not_count_as_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _flip(folder / "step_00000020" / "shard_00000.safetensors")
    _save(folder, 30, keep_last=2)
    assert _names(folder) == ["step_00000010", "step_00000020", "step_00000030"]
    assert "it does not count for checkpoint.keep_last" in caplog.text
    _save(folder, 40, keep_last=2)
    assert _names(folder) == ["step_00000030", "step_00000040"]


def test_the_checkpoint_just_saved_stays_even_below_newer_ones(folder: Path) -> None:
    _save(folder, 15, keep_last=1)
    assert "step_00000015" in _names(folder)
    assert "step_00000020" in _names(folder)


def test_a_rank_gets_its_own_state_back_unless_the_number_of_ranks_changed(saved: Path) -> None:
    assert read_rank_state(saved / "step_00000020", 0) == b"random bits"
    assert read_rank_state(saved / "step_00000020", 0, world=2) is None


def test_a_folder_without_a_checkpoint_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist: no meta\.json"):
        read_meta(tmp_path / "step_00000001")
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(CheckpointError, match=r"was interrupted while it was saved"):
        verify(tmp_path / "step_00000001")


def test_what_was_saved_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _save(tmp_path, 3)
    assert "step_00000003" in caplog.text
