"""Kill ranks at random moments while they save, and check what is left on the disk.

    python tests/distributed/checkpoint_drill.py --kills 60 --seed 3

One or two ranks save a state whose values follow from the step, as fast as they can; then all of
them get SIGKILL at once, or one of them does and the other must end by itself. After every kill
the newest checkpoint must be complete, hold the values of its step, and be at least as new as
the last one that a rank had been told is durable. The next ranks go on from it. Every few kills
the folder is emptied, so that kills also hit the first save of all.

The ranks are forked, because starting Python and torch takes longer than the saves.
"""

import argparse
import json
import logging
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.checkpointer import (
    Checkpointer,
    find_latest,
    find_latest_together,
    load,
    read_meta,
    verify,
)

SIZES = {"experts": 120_000, "moments": 77_777, "dense": 5_000, "tiny": 1}
PEER_LOST = 7  # exit code of a rank that ended in an orderly way without its peer
PATIENCE_SECONDS = 30.0
KILLS_PER_FOLDER = 5


@dataclass
class Summary:
    """What happened; `problems` must stay empty."""

    kills: int = 0
    alone: int = 0  # one of two ranks was killed
    inside_a_save: int = 0  # a partial folder was left
    without_checkpoint: int = 0  # killed before the first one
    replaced_left: int = 0
    steps: int = 0
    problems: list[str] = field(default_factory=list)


def expected(name: str, step: int) -> torch.Tensor:
    """Return the whole tensor at a step, shape (numel,)."""
    return torch.arange(SIZES[name], dtype=torch.float32) * (step % 97 + 1) + step


def ranges(step: int, rank: int, world: int) -> dict[str, FlatRange]:
    """Return a rank's part of the state: two tensors are cut in two, the others replicated."""
    parts = {}
    for name, numel in SIZES.items():
        cut = [0, numel // 3, numel] if world == 2 and numel > 10_000 else [0, numel, numel]
        index = rank if world == 2 and numel > 10_000 else 0
        data = expected(name, step)[cut[index] : cut[index + 1]].clone()
        parts[name] = FlatRange(data, cut[index], (numel,))
    return parts


def check(path: Path, rank: int, world: int) -> int:
    """Load a checkpoint, compare every value, and return its step.

    Raises:
        CheckpointError: if a value is not that of the step.
    """
    step = int(read_meta(path)["step"])
    target = ranges(-1, rank, world)
    load(path, target)
    for name, part in ranges(step, rank, world).items():
        if not torch.equal(part.data, target[name].data):
            raise CheckpointError(f"{path}: '{name}' is not that of step {step}")
    return step


def run_rank(rank: int, world: int, folder: Path, store: Path, pipe: int, again: bool) -> None:
    """Go on from the newest checkpoint and save until killed; report each durable step."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )
    path = find_latest_together(folder, group=None)
    checkpointer = Checkpointer(folder, keep_last=2, asynchronous=True)
    step = 0 if path is None else check(path, rank, world)
    os.write(pipe, b"0\n")  # about to save
    while True:
        step += 1
        checkpointer.save(step, ranges(step, rank, world), meta={"cursor": step})
        if again:  # once more over the finished one: the two renames
            checkpointer.save(step, ranges(step, rank, world), meta={"cursor": step})
        if step > 1:  # save returned, so the one before is durable
            os.write(pipe, f"{step - 1}\n".encode())


def fork_rank(rank: int, world: int, folder: Path, store: Path, pipe: int, again: bool) -> int:
    """Start a rank; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        logging.disable()
        torch.set_num_threads(1)
        run_rank(rank, world, folder, store, pipe, again)
    except (CheckpointError, dist.DistError):  # the second while the group is being made
        code = PEER_LOST
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(pipe: int, lines: int) -> bytes:
    """Read reports until there are so many lines; return what was read."""
    data = b""
    while data.count(b"\n") < lines and select.select([pipe], [], [], PATIENCE_SECONDS)[0]:
        report = os.read(pipe, 4096)
        if not report:  # all ranks ended by themselves; their exit codes tell
            break
        data += report
    return data


def reap(children: list[int], seconds: float) -> dict[int, int]:
    """Return the exit code of each child that ended in time; kill the others."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < end:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


def kill_once(folder: Path, chance: random.Random, summary: Summary) -> None:
    """Start ranks, kill them at a random moment, and check the folder."""
    world = chance.choice([1, 2])
    alone = world == 2 and chance.random() < 0.3
    before = {path.name for path in folder.iterdir()}
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory() as scratch:
        again = chance.random() < 0.3
        store = Path(scratch) / "store"
        children = [fork_rank(r, world, folder, store, write_end, again) for r in range(world)]
        os.close(write_end)
        # Ranks report that they are about to save, then each durable step. Kills come at a random
        # moment after a random number of reports; or at once, but not for one rank alone: its
        # peer would rightly wait for it until the timeout.
        reports = wait_for(read_end, chance.randrange(1 if alone else 0, 5))
        time.sleep(chance.uniform(0.0, 0.1))
        victims = [chance.choice(children)] if alone else children
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        codes = reap(children, PATIENCE_SECONDS / 2)
    for child in children:
        if child not in codes:
            summary.problems.append(f"a rank hung {time.monotonic() - begin:.0f} s after a kill")
        elif codes[child] not in {PEER_LOST, -signal.SIGKILL if child in victims else PEER_LOST}:
            summary.problems.append(f"a rank ended with {codes[child]}")
    with os.fdopen(read_end, "rb") as pipe:
        durable = [int(line) for line in (reports + pipe.read()).split(b"\n")[:-1]]
    summary.kills += 1
    summary.alone += alone
    left = {path.name for path in folder.iterdir()} - before
    summary.inside_a_save += any(".partial-" in name for name in left)
    summary.replaced_left += any(".replaced-" in name for name in left)
    judge(folder, durable, summary)


def judge(folder: Path, durable: list[int], summary: Summary) -> None:
    """Check that the newest checkpoint is complete, right, and new enough."""
    path, step = find_latest(folder), 0
    promised = max(durable, default=0)
    if path is None:
        summary.without_checkpoint += 1
    else:
        try:
            step = check(path, 0, 1)
        except CheckpointError as error:
            summary.problems.append(str(error))
    if step < promised:
        summary.problems.append(f"step {promised} was durable, but the newest is {step}")
    damaged = [
        name
        for name in sorted(os.listdir(folder))
        if name.startswith("step_") and not whole(folder / name)
    ]
    if damaged:
        summary.problems.append(f"{damaged} are not complete")
    summary.steps = max(summary.steps, step)


def whole(path: Path) -> bool:
    """Say whether a checkpoint is undamaged."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def main() -> int:
    """Run the drill; print one JSON line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    import torch.distributed.checkpoint

    logging.disable()  # interrupted saves are expected here
    torch.set_num_threads(1)
    chance, summary = random.Random(options.seed), Summary()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch) / "checkpoints"
        for kill in range(options.kills):
            if kill % KILLS_PER_FOLDER == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            kill_once(folder, chance, summary)
    print(json.dumps(vars(summary)))
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
