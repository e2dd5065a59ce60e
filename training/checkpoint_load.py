"""Fill tensors from a checkpoint, after checking that it is one of the same model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_folder import read_meta
from gatewise.training.checkpoint_format import FlatRange, dtype_name, parse_dtype
from gatewise.training.checkpoint_peers import Peers

__all__ = ["load", "load_whole"]

_DIFFERENCES_SHOWN = 5


def load(
    path: Path,
    tensors: Mapping[str, FlatRange],
    *,
    group: dist.ProcessGroup | None = None,
    optional_prefixes: Sequence[str] = (),
) -> None:
    """Fill this rank's ranges from a checkpoint that was saved in any layout.

    Names, shapes and types of all ranks together must be those of the checkpoint; nothing is
    written into a tensor before that is known. Checksums are the business of `verify`.

    Args:
        path: of a finished checkpoint.
        tensors: this rank's ranges, written in place.
        group: with a CPU backend; None is the default group, or this rank alone.
        optional_prefixes: saved names that start so may be left unread, such as optimizer state
            in an evaluation.

    Raises:
        CheckpointError: on all ranks, naming the first differences, or what could not be read.
    """
    peers = Peers(group)
    task = f"loading {path}"
    saved: dict[str, Any] = {}
    error: Exception | None = None
    try:
        saved = read_meta(path)["tensors"]
    except CheckpointError as problem:
        error = problem
    peers.agree(task, error)
    _check_same(path, saved, tensors, peers=peers, optional_prefixes=tuple(optional_prefixes))

    try:
        from gatewise.training.checkpoint_storage import load_ranges

        load_ranges(tensors, path, task=task)
    except Exception as problem:  # told to all ranks, which would wait for this one
        error = problem
    peers.agree(task, error)


def load_whole(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, whole and on the CPU; errors as `load`."""
    whole = {
        name: torch.zeros(spec["shape"], dtype=parse_dtype(spec["dtype"]))
        for name, spec in read_meta(path)["tensors"].items()
    }
    load(path, {name: FlatRange.whole(tensor) for name, tensor in whole.items()})
    return whole


def _check_same(
    path: Path,
    saved: Mapping[str, Any],
    tensors: Mapping[str, FlatRange],
    *,
    peers: Peers,
    optional_prefixes: tuple[str, ...],
) -> None:
    """Compare names, shapes and types of a checkpoint with those of all ranks."""
    differing = []
    for name, part in sorted(tensors.items()):
        here = (list(part.shape), dtype_name(part.data.dtype))
        if name not in saved:
            differing.append(f"'{name}' {_spell(*here)} is not in the checkpoint")
        elif here != (there := (saved[name]["shape"], saved[name]["dtype"])):
            differing.append(
                f"'{name}' is {_spell(*there)} in the checkpoint and {_spell(*here)} here"
            )
    unread = set(saved.keys() - tensors.keys())
    reports = peers.gather((differing, unread))
    problems = sorted({text for report in reports for text in report[0]})
    for name in sorted(set.intersection(*(report[1] for report in reports))):
        if not name.startswith(optional_prefixes or "\0"):
            spec = saved[name]
            problems.append(
                f"'{name}' {_spell(spec['shape'], spec['dtype'])} is only in the checkpoint"
            )
    if problems:
        shown = "; ".join(problems[:_DIFFERENCES_SHOWN])
        more = len(problems) - _DIFFERENCES_SHOWN
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + "; use the settings it was saved with, or another run.dir"
        )


def _spell(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype}{list(shape)}"
