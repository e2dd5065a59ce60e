"""Read and write the files of Megatron-core's distributed checkpoints (`torch_dist`).

Reading needs torch alone: the files are those of `torch.distributed.checkpoint`, beside a
`metadata.json` of Megatron's. Writing is left to megatron-core, so that what it reads is what it
wrote; it asks for a CUDA device in two places, which are answered where there is none.

A distributed checkpoint names its files in a pickle: read only what you trust.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.parallel.runtime import answering_for_cuda

__all__ = ["MegatronFiles", "write_files"]

_LATEST = "latest_checkpointed_iteration.txt"
_INSTALL = "pip install -e '.[megatron]'"
_OLDEST = (0, 16)


class MegatronFiles:
    """The tensors of a distributed checkpoint, by name.

    Args:
        path: its folder, or the folder of a run with `latest_checkpointed_iteration.txt`.

    Raises:
        CheckpointError: if it is no such checkpoint, or files of it are missing.
    """

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.path = _resolve(path)
        kind = _kind(self.path)
        if kind != "torch_dist":
            raise CheckpointError(
                f"{self.path} has the format {kind}; only torch_dist is read: convert it with "
                "Megatron's --ckpt-convert-format torch_dist"
            )
        self._reader = FileSystemReader(self.path)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # a pickle raises anything
            raise CheckpointError(f"{self.path}/.metadata cannot be read: {error}") from error
        entries = metadata.state_dict_metadata
        self.shapes = {
            name: tuple(entry.size)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._dtypes = {
            name: entries[name].properties.dtype  # type: ignore[union-attr]  # of tensors
            for name in self.shapes
        }
        stored = {info.relative_path for info in (metadata.storage_data or {}).values()}
        lost = sorted(name for name in stored if not (self.path / name).is_file())
        if lost:
            raise CheckpointError(
                f"{self.path} lacks {lost[0]}"
                + (f" and {len(lost) - 1} more of its files" if len(lost) > 1 else "")
            )

    def read(self, name: str) -> Tensor:
        """Return a whole tensor.

        Raises:
            CheckpointError: if it cannot be read.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        wanted = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name])}
        try:
            with warnings.catch_warnings():  # that it reads alone, which is what was asked
                warnings.simplefilter("ignore", UserWarning)
                load(wanted, storage_reader=self._reader, no_dist=True)
        except Exception as error:  # whatever a damaged file makes of it
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        return wanted[name]


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], *, stacked: Mapping[str, int] | None = None
) -> None:
    """Write a distributed checkpoint that megatron-core loads; nothing is left if it fails.

    Args:
        folder: to be made.
        tensors: whole, by name.
        stacked: names of which the first dimension counts layers, and how many there are.

    Raises:
        ConfigError: if megatron-core is missing or too old, or the folder exists.
    """
    try:
        from megatron.core import __version__, dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedTensor
    except ImportError as error:
        raise ConfigError(f"megatron-core is not installed; {_INSTALL}") from error
    if tuple(int(part) for part in re.findall(r"\d+", __version__)[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(
            f"megatron-core {__version__} is installed, which is older than {oldest}; {_INSTALL}"
        )
    if folder.exists():
        raise ConfigError(f"out is {folder}, which exists already; name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layers = (stacked or {}).get(name)
        if layers is None:
            state[name] = ShardedTensor.from_rank_offsets(name, tensor.contiguous())
            continue
        for layer in range(layers):
            state[f"{name}#{layer}"] = ShardedTensor.from_rank_offsets(
                name, tensor[layer].contiguous(), (0, layer, layers), prepend_axis_num=1
            )
    try:
        with _alone(), answering_for_cuda():
            dist_checkpointing.save(state, str(partial))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Be the one rank of a process group for the time of the block, if there is none."""
    if dist.is_initialized():
        yield
        return
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, not listed
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _resolve(path: Path) -> Path:
    """Follow the note of a run's newest iteration."""
    note = path / _LATEST
    if not note.is_file():
        return path
    text = note.read_text(encoding="utf-8").strip()
    found = path / ("release" if text == "release" else f"iter_{int(text or 0):07d}")
    if not found.is_dir():
        raise CheckpointError(f"{note} names {text!r}, but there is no {found.name}")
    return found


def _kind(path: Path) -> str:
    """Return the format that a checkpoint says it has."""
    try:
        said = json.loads((path / "metadata.json").read_bytes())
    except FileNotFoundError:
        if any(path.glob("mp_rank_*")):
            return "torch (one file per rank)"
        raise CheckpointError(
            f"{path} is no distributed checkpoint of Megatron's: it has no metadata.json"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/metadata.json cannot be read: {error}") from error
    return str(said.get("sharded_backend")) if isinstance(said, dict) else "unknown"
