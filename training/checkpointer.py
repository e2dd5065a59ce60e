"""Save and load the state of a run: atomically, in the background, into any layout.

    checkpointer = Checkpointer(folder, keep_last=2, asynchronous=True)
    checkpointer.save(step, ranges, meta={...}, rank_state=...)   # blocks for one copy
    checkpointer.close()                                          # until it is on the disk

    path = find_latest_together(folder, group=None)
    load(path, ranges)

A save copies this rank's ranges, then a thread writes them into a hidden folder, agrees with the
other ranks that all went well, and renames the folder. So a checkpoint has its name only when it
is complete and on the disk. Folders: `checkpoint_folder.py`; bytes: `checkpoint_storage.py`.
"""

import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_folder import (
    FORMAT,
    META,
    FileRecord,
    check_files,
    commit,
    find_latest,
    find_latest_together,
    partial_path,
    prune,
    rank_state_name,
    read_meta,
    read_rank_state,
    remove_leftovers,
    step_path,
    sync_folder,
    verify,
    write_durable,
)
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.checkpoint_load import load
from gatewise.training.checkpoint_peers import Peers, explain

__all__ = [
    "Checkpointer",
    "find_latest",
    "find_latest_together",
    "load",
    "read_meta",
    "read_rank_state",
    "verify",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    """One save after its copy was made; nothing in it changes while training goes on."""

    step: int
    token: str
    partial: Path
    ranges: Mapping[str, FlatRange]
    meta: str
    rank_state: bytes

    @property
    def task(self) -> str:
        return f"saving the checkpoint of step {self.step} to {self.partial.parent}"


class Checkpointer:
    """Saves checkpoints into one folder; every rank has one and calls it alike.

    Args:
        folder: of this run's checkpoints, shared by all ranks; made if missing.
        keep_last: how many good checkpoints stay, at least 1.
        asynchronous: write in a thread; else `save` returns when the checkpoint is durable.
        group: gloo group that nothing else uses while a save is under way; None makes one (a
            collective over the default group), or stays alone where no process group was started.
        timeout_seconds: of that group; after it, a rank that does not answer is an error.
        verify_saves: read what was written back before older checkpoints are deleted.
        disturb: called with the step and this rank's files before the ranks agree that all went
            well; a drill lets them be damaged.

    Raises:
        CheckpointError: on all ranks, if a rank cannot write to the folder or does not see it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool,
        group: dist.ProcessGroup | None = None,
        timeout_seconds: float = 300.0,
        verify_saves: bool = False,
        disturb: Callable[[int, Iterable[Path]], None] | None = None,
    ) -> None:
        from gatewise.training.checkpoint_plan import RangeSavePlanner

        self._folder = folder
        self._keep_last = keep_last
        self._verify_saves = verify_saves
        self._disturb = disturb
        self._own_group: dist.ProcessGroup | None = None
        if group is None and dist.is_available() and dist.is_initialized():
            group = self._own_group = dist.new_group(
                backend="gloo", timeout=timedelta(seconds=timeout_seconds)
            )
        self._peers = Peers(group)
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._planner = RangeSavePlanner()
        self._layout: dict[str, tuple[Any, ...]] | None = None  # of the plan that is in force
        self._staged: dict[str, FlatRange] = {}
        self._verdicts: dict[str, bool] = {}
        self._newest: Path | None = None
        try:
            self._open_folder()
        except CheckpointError:
            self.close()
            raise

    @property
    def newest(self) -> Path | None:
        """The last checkpoint that this object has made durable; the same on all ranks."""
        return self._newest

    def save(
        self,
        step: int,
        tensors: Mapping[str, FlatRange],
        *,
        meta: Mapping[str, Any],
        rank_state: bytes = b"",
    ) -> None:
        """Save the checkpoint of a step; it may replace an earlier one of the same step.

        The tensors may be changed as soon as this returns. At most one save is under way: this
        one waits for the former.

        Args:
            step: optimizer steps done, equal on all ranks.
            tensors: this rank's ranges; a caller whose tensors stay in place may build them once.
            meta: what JSON can hold, such as the configuration and the data cursor; rank 0's is
                kept, and `read_meta(path)["meta"]` returns it.
            rank_state: this rank's own state, such as its random generators.

        Raises:
            CheckpointError: on all ranks, if this save (when not asynchronous) or the former
                failed; older checkpoints are untouched.
        """
        self.wait()
        described = json.dumps(meta)
        layout = {n: (r.places, r.data.dtype, r.shape) for n, r in tensors.items()}
        votes = self._peers.gather((step, layout == self._layout, secrets.token_hex(4)))
        if any(vote[0] != step for vote in votes):
            raise CheckpointError(
                f"ranks save different steps: {[vote[0] for vote in votes]}; save on all alike"
            )
        if not all(vote[1] for vote in votes):
            self._planner.forget()
            self._layout = layout
        token = votes[0][2]
        partial = partial_path(self._folder, step, token)
        job = _Job(step, token, partial, self._stage(tensors), described, rank_state)
        if self._thread is None:
            self._run(job)
        else:
            self._pending = self._thread.submit(self._run, job)

    def wait(self) -> None:
        """Return when the last save is on the disk.

        Raises:
            CheckpointError: if it failed; it is raised once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last save and free what this object holds; may be called again.

        Raises:
            CheckpointError: if the last save failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._own_group is not None:
                dist.destroy_process_group(self._own_group)
                self._own_group = None
            self._staged = {}

    def _open_folder(self) -> None:
        """Make the folder, clean it, and check that every rank sees it and can write to it."""
        task = f"preparing {self._folder} for checkpoints"
        probe = self._folder / f".probe-{secrets.token_hex(4)}"
        error: OSError | CheckpointError | None = None
        if self._peers.rank == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._folder)
                probe.touch()
            except OSError as problem:
                error = problem
        self._peers.agree(task, error)
        seen = self._folder / self._peers.gather(probe.name)[0]
        if self._peers.rank != 0:
            try:
                probe.touch()
                probe.unlink()
                if not seen.exists():
                    error = CheckpointError(
                        f"{self._folder} is not the folder that rank 0 sees; put run.dir on a "
                        "file system that all nodes share"
                    )
            except OSError as problem:
                error = problem
        try:
            self._peers.agree(task, error)
        finally:
            if self._peers.rank == 0:
                probe.unlink(missing_ok=True)

    def _stage(self, tensors: Mapping[str, FlatRange]) -> dict[str, FlatRange]:
        """Copy what this rank will write into buffers that are kept for the next save.

        Before the first plan that is everything; afterwards replicas that another rank writes
        are left out, and their buffers freed.
        """
        names = self._planner.names
        if names is None:
            self._staged = {
                name: replace(part, data=torch.empty_like(part.data, device="cpu"))
                for name, part in tensors.items()
            }
        elif len(names) != len(self._staged):
            self._staged = {name: self._staged[name] for name in names}
        if self._staged:  # one call for all: a call for each takes longer than the copy
            torch._foreach_copy_(
                [part.data for part in self._staged.values()],
                [tensors[name].data.detach() for name in self._staged],
            )
        return self._staged

    def _run(self, job: _Job) -> None:
        """Write one checkpoint; every rank succeeds or every rank raises."""
        begin = time.perf_counter()
        try:
            files = self._write_own_files(job)
            final = self._publish(job, files)
        except BaseException:
            self._planner.forget()
            self._layout = None  # all ranks plan anew
            if self._peers.rank == 0:
                shutil.rmtree(job.partial, ignore_errors=True)
            raise
        self._newest = final
        if self._peers.rank == 0:
            size = sum(record.size for record in files.values())
            seconds = time.perf_counter() - begin
            _logger.info("saved %s: %.1f MB on rank 0, %.2f s", final, size / 1e6, seconds)
            self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Delete old checkpoints; that it cannot is no reason to end a run."""
        try:
            prune(self._folder, keep_last=self._keep_last, newest=newest, verdicts=self._verdicts)
        except OSError as error:
            _logger.warning("old checkpoints were not deleted: %s", explain(error))

    def _write_own_files(self, job: _Job) -> dict[str, FileRecord]:
        """Write this rank's ranges and state; return what it wrote."""
        from gatewise.training.checkpoint_storage import RangeWriter, save_ranges

        rank = self._peers.rank
        writer = RangeWriter(job.partial, rank)

        save_ranges(job.ranges, writer, planner=self._planner, peers=self._peers, task=job.task)
        error: Exception | None = None
        try:
            name = rank_state_name(rank)
            writer.files[name] = write_durable(job.partial / name, job.rank_state)
            sync_folder(job.partial)
            if self._disturb is not None:
                self._disturb(job.step, [job.partial / name for name in writer.files])
        except Exception as problem:  # told to all ranks, which would wait for this one
            error = problem
        self._peers.agree(job.task, error)
        return writer.files

    def _publish(self, job: _Job, files: dict[str, FileRecord]) -> Path:
        """Describe, checksum and rename on rank 0; return the final path."""
        gathered = self._peers.gather(files)
        error: Exception | None = None
        if self._peers.rank == 0:
            try:
                everything = {n: record for part in gathered for n, record in part.items()}
                everything[META] = write_durable(job.partial / META, self._describe(job))
                check_files(job.partial, everything, hashes=self._verify_saves)
                commit(job.partial, job.step, everything, job.token)
            except Exception as problem:  # told to all ranks, which would wait for this one
                error = problem
        self._peers.agree(job.task, error)
        return step_path(self._folder, job.step)

    def _describe(self, job: _Job) -> bytes:
        described = {
            "format": FORMAT,
            "step": job.step,
            "world_size": self._peers.world,
            "meta": json.loads(job.meta),
            "tensors": self._planner.tensors,
        }
        return json.dumps(described).encode()
