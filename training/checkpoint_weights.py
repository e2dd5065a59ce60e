"""Checkpoints of weights alone, written and read a tensor at a time.

A model that comes from elsewhere has no optimizer state and need not be in memory as a whole. What
is written is an ordinary checkpoint (`checkpoint_folder.py`) with `weights_only` in its meta data;
a run that starts from it starts its optimizer anew.
"""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_folder import (
    FORMAT,
    META,
    DurableFile,
    commit,
    partial_path,
    rank_state_name,
    read_meta,
    step_path,
    write_durable,
)
from gatewise.training.checkpoint_format import (
    FlatRange,
    dtype_name,
    encode_header,
    parse_dtype,
)
from gatewise.training.checkpoint_peers import explain
from gatewise.training.state import OPTIMIZER

__all__ = ["WeightReader", "write_weights"]

_BLOCK = re.compile(r"[^/]+/(blocks\.\d+\.)")


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    make: Callable[[str], Tensor],
    *,
    meta: Mapping[str, Any],
    step: int = 0,
) -> Path:
    """Write a checkpoint whose tensors are made one after another.

    Args:
        folder: of the run's checkpoints; made if missing.
        shapes: name to shape and type of every tensor, in the order of the file.
        make: returns a tensor of a name; it is asked once for each, in that order.
        meta: what JSON can hold; `weights_only` is added.
        step: of the checkpoint.

    Returns:
        The finished checkpoint; if anything fails, nothing is left of it.

    Raises:
        CheckpointError: if it cannot be written.
    """
    token = secrets.token_hex(4)
    partial = partial_path(folder, step, token)
    try:
        partial.mkdir(parents=True)
        files, index = {}, {}
        entries = [(name, dtype, (_numel(shape),)) for name, (shape, dtype) in shapes.items()]
        offset, data = 0, "shard_00000.safetensors"
        with DurableFile(partial / data) as file:
            file.write(encode_header(entries, content="flat ranges"))
            for name, dtype, (numel,) in entries:
                tensor = make(name)
                assert tuple(tensor.shape) == shapes[name][0], name
                assert tensor.dtype == dtype, name
                _write_blocks(file, tensor)
                index[name] = [[0, numel, 0, offset]]
                offset += numel * dtype.itemsize
        files[data] = file.record
        described = {
            "format": FORMAT,
            "step": step,
            "world_size": 1,
            "meta": {**meta, "weights_only": True},
            "tensors": {
                name: {"shape": list(shape), "dtype": dtype_name(dtype)}
                for name, (shape, dtype) in shapes.items()
            },
        }
        for name, content in (
            ("index.json", json.dumps(index).encode()),
            (rank_state_name(0), b""),
            (META, json.dumps(described).encode()),
        ):
            files[name] = write_durable(partial / name, content)
        commit(partial, step, files, token)
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be written: {explain(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return step_path(folder, step)


class WeightReader:
    """Reads a checkpoint's tensors by name; those of one block are in memory at a time.

    Args:
        path: of a finished checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tuple(spec["shape"]), parse_dtype(spec["dtype"]))
            for name, spec in read_meta(path)["tensors"].items()
            if not name.startswith(OPTIMIZER)
        }
        self._near: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor; it is good until another block is asked for.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if name not in self._near:
            from gatewise.training.checkpoint_storage import load_ranges

            self._near = {
                near: torch.empty(self.specs[near][0], dtype=self.specs[near][1])
                for near in self._neighbours(name)
            }
            ranges = {near: FlatRange.whole(tensor) for near, tensor in self._near.items()}
            load_ranges(ranges, self._path, task=f"reading {self._path}")
        return self._near[name]

    def _neighbours(self, name: str) -> Iterator[str]:
        """Yield the tensors of a tensor's block, or itself where it is of none."""
        block = _BLOCK.match(name)
        for other in self.specs:
            found = _BLOCK.match(other)
            if other == name or (block and found and found[1] == block[1]):
                yield other


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _write_blocks(file: DurableFile, tensor: Tensor) -> None:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()  # Any: untyped buffers
    file.write(memoryview(array))
