"""A run's checkpoints: what is saved beside the tensors, and how a run goes on from them.

Read first: `checkpointer.py` (files), `state.py` (tensors).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError
from gatewise.parallel.runtime import Runtime
from gatewise.training.checkpoint_peers import AgreedError
from gatewise.training.checkpointer import (
    Checkpointer,
    find_latest_together,
    load,
    read_meta,
    read_rank_state,
)
from gatewise.training.config import TrainConfig
from gatewise.training.data import PreparedData
from gatewise.training.state import (
    OPTIMIZER,
    Updater,
    rank_state,
    restore_rank_state,
    training_ranges,
)

__all__ = ["Progress", "RunCheckpoints", "check_model", "check_tokenizer", "to_plain"]

_log = logging.getLogger(__name__)

# settings that do not change what the model computes from given weights
_FREE = ("model.init_std", "model.capacity")


@dataclass(slots=True)
class Progress:
    """Where a run stands; one set of integers, independent of the number of ranks."""

    step: int = 0  # optimizer steps, skipped ones included
    sample: int = 0  # global number of the next training sequence
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    rollbacks: int = 0


class RunCheckpoints:
    """Saves and resumes one run.

    Args:
        config: of the run; `checkpoint` says when, how many, and from where.
        runtime: this rank.
        data: its tokenizer must be the checkpoint's.
        folder: of the run.
        disturb: as `Checkpointer` takes it.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        data: PreparedData,
        folder: Path,
        disturb: Callable[[int, Iterable[Path]], None] | None = None,
    ) -> None:
        self._config, self._runtime, self._data = config, runtime, data
        self._folder = folder / "checkpoints"
        self.resumed_from: str | None = None
        self._origin: dict[str, Any] = {}  # what a model from elsewhere says of itself
        # sums of an unfinished logging window; empty after a resume on another number of ranks
        self.window: dict[str, Tensor] = {}
        self._saver = Checkpointer(
            self._folder,
            keep_last=config.checkpoint.keep_last,
            asynchronous=config.checkpoint.asynchronous,
            group=runtime.groups.checkpoint,
            timeout_seconds=config.parallel.timeout,
            verify_saves=config.checkpoint.verify,
            disturb=disturb,
        )
        self.failed = 0  # saves of this start
        self._failed_in_a_row = 0

    def resume(self, model: Decoder, updater: Updater) -> Progress:
        """Fill model and updater from the run's newest good checkpoint, if it has one.

        Else from `checkpoint.load`, else leave them as they are.

        Raises:
            CheckpointError: if the checkpoint is of another model or tokenizer.
        """
        config = self._config.checkpoint
        path = None
        if config.resume:
            path = find_latest_together(self._folder, group=self._runtime.groups.checkpoint)
        if path is None and config.load is not None:
            path = Path(config.load)
        return Progress() if path is None else self._load(path, model, updater)

    def roll_back(self, model: Decoder, updater: Updater) -> Progress | None:
        """Fill model and updater from the run's newest good checkpoint; None if there is none."""
        self._settle()
        path = self._saver.newest
        if self._config.checkpoint.resume:  # else the folder may hold another run's
            path = find_latest_together(self._folder, group=self._runtime.groups.checkpoint)
        return None if path is None else self._load(path, model, updater)

    def _load(self, path: Path, model: Decoder, updater: Updater) -> Progress:
        meta = read_meta(path)["meta"]
        check_tokenizer(path, meta, self._data)
        check_model(path, meta, self._config)
        other_data = meta["data"] not in (self._data.fingerprint, None)
        if other_data and self._runtime.rank == 0:
            _log.warning("%s was trained on other data; it goes on with the data given", path)
        ranges = training_ranges(model, updater)
        if meta.get("weights_only"):  # a model from elsewhere: the optimizer starts anew
            ranges = {n: part for n, part in ranges.items() if not n.startswith(OPTIMIZER)}
        load(path, ranges, group=self._runtime.groups.checkpoint)
        self._origin = {"hf": meta["hf"]} if "hf" in meta else {}
        updater.updates = int(meta["updates"])
        updater.publish()
        own = read_rank_state(path, self._runtime.rank, world=self._runtime.world)
        if own:
            self.window = restore_rank_state(own)
        self.resumed_from = str(path)
        return Progress(**{field.name: int(meta.get(field.name, 0)) for field in fields(Progress)})

    def save(
        self,
        model: Decoder,
        updater: Updater,
        progress: Progress,
        window: Mapping[str, Tensor],
    ) -> None:
        """Save; with `checkpoint.asynchronous` this blocks for one copy of the state only.

        A save that failed on a rank is tried again at the next one, up to
        `checkpoint.max_failures` times in a row.

        Args:
            model: on all ranks together.
            updater: of the same.
            progress: equal on all ranks.
            window: this rank's sums of the logging window that is not written yet.

        Raises:
            CheckpointError: if more saves failed than may, or a rank is gone.
        """
        self._settle()
        meta = {
            **dataclasses.asdict(progress),
            "updates": updater.updates,
            "config": to_plain(self._config),
            "vocab_size": self._config.embedding_rows(self._data.tokenizer.vocab_size),
            "tokenizer": self._data.tokenizer.fingerprint,
            "data": self._data.fingerprint,
            "torch": torch.__version__,
            "time": time.time(),
            **self._origin,
        }
        ranges = training_ranges(model, updater)
        try:
            self._saver.save(progress.step, ranges, meta=meta, rank_state=rank_state(window))
        except AgreedError as error:
            self._count_failure(error)
        else:
            if not self._config.checkpoint.asynchronous:
                self._failed_in_a_row = 0

    def _settle(self) -> None:
        """Wait for the last save, and go on where it failed and may."""
        before = self._saver.newest
        try:
            self._saver.wait()
        except AgreedError as error:
            self._count_failure(error)
        else:
            if self._saver.newest != before:
                self._failed_in_a_row = 0

    def _count_failure(self, error: AgreedError) -> None:
        self.failed += 1
        self._failed_in_a_row += 1
        allowed = self._config.checkpoint.max_failures
        if self._failed_in_a_row > allowed:
            raise error
        if self._runtime.rank == 0:
            _log.warning(
                "%s. Training goes on (failure %d of %d in a row); newest checkpoint: %s",
                error,
                self._failed_in_a_row,
                allowed,
                self.newest() or "none",
            )

    def wait(self) -> None:
        """Return when the last save is durable; raise what it raised."""
        self._saver.wait()

    def newest(self) -> Path | None:
        """Return the newest durable checkpoint of this run, or the one it went on from."""
        if self._saver.newest is not None or self.resumed_from is None:
            return self._saver.newest
        return Path(self.resumed_from)

    def close(self) -> None:
        """Finish the save that is under way."""
        self._saver.close()


def check_tokenizer(path: Path, meta: Mapping[str, Any], data: PreparedData) -> None:
    """Raise `CheckpointError` unless the checkpoint was trained with this data's tokenizer."""
    if meta["tokenizer"] != data.tokenizer.fingerprint:
        raise CheckpointError(
            f"{path} was trained with another tokenizer (vocabulary {meta['vocab_size']}, "
            f"fingerprint {meta['tokenizer'][:12]}; the data's has {data.tokenizer.vocab_size}, "
            f"{data.tokenizer.fingerprint[:12]}); set data.tokenizer_path to the run's "
            "tokenizer.json, or use another run.dir"
        )


def check_model(path: Path, meta: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise `CheckpointError` where a setting says that the checkpoint is of another model.

    Tensors of equal shapes can still belong to another function: heads, activation, top_k, scores.
    A setting that is null on one side has a default that the shapes tell.
    """
    saved, here = meta["config"], to_plain(config)
    names = [f"model.{name}" for name in here["model"]] + ["router.kind", "router.score"]
    differing = []
    for name in names:
        section, _, field = name.partition(".")
        there, now = saved[section].get(field), here[section][field]
        if name not in _FREE and None not in (there, now) and there != now:
            differing.append(f"{name} is {there} in the checkpoint and {now} here")
    if differing:
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {'; '.join(differing)}; use the settings it "
            "was saved with, or another run.dir"
        )


def to_plain(value: Any) -> Any:  # Any: a tree of dataclasses to a tree that JSON can hold
    """Turn dataclasses and enums into dicts and names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name
    return [to_plain(item) for item in value] if isinstance(value, list) else value
