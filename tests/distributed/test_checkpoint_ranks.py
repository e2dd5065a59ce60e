"""Saving and loading on several ranks: layouts, agreement on errors, kills.

Layout of the tests' state: experts are cut along dim 0, moments into flat shards of unequal size,
the dense weight is on all ranks, and two small tensors are on one rank each.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.checkpointer import (
    Checkpointer,
    find_latest_together,
    load,
    read_rank_state,
    verify,
)
from ranks import run_ranks

SHAPES = {"experts": (12, 5, 3), "moments": (7, 11), "dense": (4, 6), "first": (3,), "last": ()}
CUTS = {1: [0, 77], 2: [0, 30, 77], 3: [0, 30, 30, 77], 4: [0, 10, 30, 31, 77]}


def _global_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _cut(state: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, FlatRange]:
    """Return copies of one rank's ranges."""
    rows = 12 // world
    begin, end = CUTS[world][rank], CUTS[world][rank + 1]
    ranges = {
        "experts": FlatRange.rows(
            state["experts"][rank * rows : (rank + 1) * rows].clone(), first=rank * rows, total=12
        ),
        "moments": FlatRange(state["moments"].view(-1)[begin:end].clone(), begin, (7, 11)),
        "dense": FlatRange.whole(state["dense"].clone()),
    }
    if rank == 0:
        ranges["first"] = FlatRange.whole(state["first"].clone())
    if rank == world - 1:
        ranges["last"] = FlatRange.whole(state["last"].clone())
    return ranges


def _blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, -9.0) for name, tensor in state.items()}


def _expect_error(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        call()


def _save_on_four_load_on_all(rank: int, world: int, folder: str) -> None:
    state = _global_state()
    checkpointer = Checkpointer(Path(folder), keep_last=2, asynchronous=True)
    for step in (1, 2, 3):  # the later ones by the plan of the first
        ranges = _cut({name: tensor + step for name, tensor in state.items()}, rank, world)
        checkpointer.save(step, ranges, meta={}, rank_state=f"rank {rank}".encode())
        for part in ranges.values():
            part.data.zero_()
    checkpointer.close()
    path = find_latest_together(Path(folder), group=None)
    assert path == checkpointer.newest == Path(folder) / "step_00000003"
    verify(path)
    # Replicas are written once.
    size = sum(file.stat().st_size for file in path.glob("shard_*"))
    header = sum(int.from_bytes(f.read_bytes()[:8], "little") + 8 for f in path.glob("shard_*"))
    assert size - header == 4 * sum(tensor.numel() for tensor in state.values())
    for ranks in (1, 2, 3, 4):
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            target = _cut(_blank(state), rank, ranks)
            load(path, target, group=group)
            expected = _cut({name: tensor + 3 for name, tensor in state.items()}, rank, ranks)
            for name, part in target.items():
                assert torch.equal(part.data, expected[name].data), (ranks, name)
    assert read_rank_state(path, rank) == f"rank {rank}".encode()
    assert read_rank_state(path, rank, world=3) is None


@pytest.mark.dist
def test_a_save_of_four_ranks_loads_on_one_two_three_and_four(tmp_path: Path) -> None:
    run_ranks(_save_on_four_load_on_all, 4, (str(tmp_path),))


def _differences(rank: int, world: int, folder: str) -> None:
    state = _global_state()
    checkpointer = Checkpointer(Path(folder), keep_last=1, asynchronous=False)
    checkpointer.save(1, _cut(state, rank, world), meta={})
    path = Path(folder) / "step_00000001"
    # Only rank 1 asks for something else; both must refuse, and neither may be half loaded.
    target = _cut(_blank(state), rank, world)
    if rank == 1:
        target["dense"] = FlatRange.whole(torch.full((6, 4), -9.0))
    _expect_error("'dense' is float32[4, 6] in the checkpoint and", lambda: load(path, target))
    assert all((part.data == -9).all() for part in target.values())
    # A name that no rank asks for is missing; one that a single rank asks for is not.
    target = _cut(_blank(state), rank, world)
    target.pop("first", None)
    _expect_error("'first' float32[3] is only in the checkpoint", lambda: load(path, target))
    # Ranks that contradict each other while saving.
    for words, wrong in {
        "'x': rank 0 holds elements 0 to 6 and rank 1 holds 4 to 10; they overlap": FlatRange(
            torch.zeros(6), 4 * rank, (10,)
        ),
        "'x': no rank holds element 4 of 10": FlatRange(torch.zeros(4), 6 * rank, (10,)),
        "'x' has shape (5, 2) on rank 1 and (10,) on another": FlatRange(
            torch.zeros(10), 0, (5, 2) if rank else (10,)
        ),
        "'x' is torch.float64 on rank 1 and torch.float32 on another": FlatRange(
            torch.zeros(10, dtype=torch.float64 if rank else torch.float32), 0, (10,)
        ),
    }.items():
        _expect_error(words, lambda wrong=wrong: checkpointer.save(2, {"x": wrong}, meta={}))
    _expect_error(
        "ranks save different steps: [2, 3]",
        lambda: checkpointer.save(2 + rank, _cut(state, rank, world), meta={}),
    )
    # After all that, the same object saves and the older checkpoint is there.
    verify(path)
    checkpointer.save(4, _cut(state, rank, world), meta={})
    checkpointer.close()
    assert find_latest_together(Path(folder), group=None) == Path(folder) / "step_00000004"


@pytest.mark.dist
def test_all_ranks_refuse_what_one_rank_finds_wrong(tmp_path: Path) -> None:
    run_ranks(_differences, 2, (str(tmp_path),))


def _one_rank_changes(rank: int, world: int, folder: str) -> None:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
    checkpointer = Checkpointer(Path(folder), keep_last=9, asynchronous=True, group=group)
    both = {name: FlatRange.whole(torch.full((50,), 1.0)) for name in ("a", "b", "c", "d")}
    checkpointer.save(1, both, meta={})
    for part in both.values():
        part.data.fill_(2.0)
    # Rank 1 drops all it would have written; rank 0 must now write, so stage, everything.
    checkpointer.save(2, both if rank == 0 else {}, meta={})
    checkpointer.close()
    dist.barrier(group=group)  # still there: the caller made it
    target = {name: FlatRange.whole(torch.zeros(50)) for name in both}
    load(Path(folder) / "step_00000002", target)
    assert all((part.data == 2).all() for part in target.values())


@pytest.mark.dist
def test_a_plan_is_made_anew_when_only_one_rank_changes(tmp_path: Path) -> None:
    run_ranks(_one_rank_changes, 2, (str(tmp_path),))


def _other_folder(rank: int, world: int, folder: str) -> None:
    mine = Path(folder) / str(rank)
    mine.mkdir()
    _expect_error(
        "is not the folder that rank 0 sees",
        partial(Checkpointer, mine, keep_last=1, asynchronous=True),
    )
    assert not list(mine.iterdir())


@pytest.mark.dist
def test_a_folder_that_the_ranks_do_not_share_is_refused_at_the_start(tmp_path: Path) -> None:
    run_ranks(_other_folder, 2, (str(tmp_path),))


def _silent_peer(rank: int, world: int, folder: str) -> None:
    checkpointer = Checkpointer(Path(folder), keep_last=1, asynchronous=True, timeout_seconds=2)
    ranges = {"w": FlatRange.whole(torch.ones(3))}
    checkpointer.save(1, ranges, meta={})
    checkpointer.wait()
    if rank == 0:
        begin = time.monotonic()
        _expect_error(
            "another rank ended or did not answer", lambda: checkpointer.save(2, ranges, meta={})
        )
        assert time.monotonic() - begin < 20  # not the half hour of the default group
    dist.barrier()
    checkpointer.close()


@pytest.mark.dist
def test_a_rank_that_does_not_answer_ends_the_save_at_the_timeout(tmp_path: Path) -> None:
    run_ranks(_silent_peer, 2, (str(tmp_path),))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def _full_for_one(rank: int, world: int, folder: str) -> None:
    def ranges(size: int) -> dict[str, FlatRange]:
        mine = FlatRange.whole(torch.full((size if rank == 1 else 5,), float(rank)))
        return {f"of rank {rank}": mine}

    checkpointer = Checkpointer(Path(folder), keep_last=1, asynchronous=True)
    checkpointer.save(1, ranges(1000), meta={})
    checkpointer.save(2, ranges(1_000_000), meta={})
    words = "failed on rank 1: No space left on device.*; free space"
    with pytest.raises(CheckpointError, match=words):
        checkpointer.wait()
    dist.barrier()
    assert [path.name for path in Path(folder).iterdir()] == ["step_00000001"]
    dist.barrier()
    checkpointer.save(3, ranges(2000), meta={})
    checkpointer.close()
    assert find_latest_together(Path(folder), group=None) == Path(folder) / "step_00000003"


@pytest.mark.dist
def test_a_disk_that_is_full_for_one_rank_is_an_error_on_all(small_disk: Path) -> None:
    run_ranks(_full_for_one, 2, (str(small_disk),))


@pytest.mark.dist
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    drill = Path(__file__).with_name("checkpoint_drill.py")
    command = [sys.executable, str(drill), "--kills", "10", "--folder", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 10
    assert summary["problems"] == []
    assert summary["inside_a_save"] > 0
