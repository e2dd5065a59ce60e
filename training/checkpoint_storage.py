"""The bytes of a checkpoint: writer and reader for `torch.distributed.checkpoint` (DCP).

DCP's own writer calls `torch.save` for every tensor (3 s of processor time for 3000 of them), its
reader `torch.load`, and its index is a pickle. Here a rank's file is one stream of raw ranges
behind a safetensors header, and the index is JSON:

    index.json   {name: [[start, numel, file number, offset in the file's data], ...]}

Importing this module imports DCP, which takes a second or more; so it is imported where it is
used.

Read first: `checkpoint_plan.py`.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_folder import (
    DurableFile,
    FileRecord,
    read_json,
    read_meta,
    write_durable,
)
from gatewise.training.checkpoint_format import (
    FlatRange,
    encode_header,
    parse_dtype,
    read_header_size,
)
from gatewise.training.checkpoint_peers import Peers, explain, failure, lost_peer
from gatewise.training.checkpoint_plan import (
    RANGES,
    RangeLoadPlanner,
    RangeSavePlanner,
    place_items,
    type_and_numel,
)

__all__ = ["RangeReader", "RangeWriter", "load_ranges", "save_ranges"]

INDEX = "index.json"


class RangeWriter(StorageWriter):
    """Writes one file per rank, and on rank 0 the index.

    Args:
        folder: made by rank 0, seen by all.
        rank: of this process; the number of its file.

    After the save, `files` holds name and record of each file that this rank wrote.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self.files: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: one writer serves one save."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any path."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder; the others wait for the plan, so they find it."""
        if is_coordinator:
            self._folder.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Keep the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; the index knows its layout, so no results are returned."""
        placed = [item for item, _ in place_items(plan.items)]
        if placed:
            entries = ((item.index.fqn, *type_and_numel(item)) for item in placed)
            header = encode_header(
                ((name, dtype, (numel,)) for name, dtype, numel in entries), content="flat ranges"
            )
            name = _file_name(self._rank)
            with DurableFile(self._folder / name) as file:
                file.write(header)
                for item in placed:
                    data = planner.resolve_data(item)
                    assert isinstance(data, Tensor)
                    file.write(_bytes_of(data.cpu()))
            self.files[name] = file.record
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index (on rank 0)."""
        self.files[INDEX] = write_durable(self._folder / INDEX, metadata.planner_data.encode())


class RangeReader(StorageReader):
    """Reads exactly the bytes that are wanted, into the tensors themselves where they can be.

    Any DCP planner that knows flat ranges may use it.

    Args:
        path: of a finished checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[MetadataIndex, tuple[int, int]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: one reader serves one load."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any path."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the saved tensors and ranges.

        Raises:
            CheckpointError: if the description of the checkpoint cannot be read.
        """
        tensors, index = read_meta(self._path)["tensors"], read_json(self._path, INDEX)
        saved: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[int, int]] = {}
        for name, spec in tensors.items():
            chunks = []
            for start, numel, file, offset in index[name]:
                chunks.append(ChunkStorageMetadata(torch.Size([start]), torch.Size([numel])))
                places[MetadataIndex(name, [start])] = (file, offset)
            saved[name] = TensorStorageMetadata(
                TensorProperties(dtype=parse_dtype(spec["dtype"])),
                torch.Size([sum(chunk.sizes[0] for chunk in chunks)]),
                chunks,
            )
        return Metadata(saved, storage_data=places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take the places of the ranges (called by DCP)."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the wanted tensors, file by file.

        Raises:
            CheckpointError: if a file ends too early.
        """
        per_file: dict[int, list[tuple[int, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            file, offset = self._places[item.storage_index]
            per_file[file].append((offset, item))
        for file, wanted in per_file.items():
            self._read_file(self._path / _file_name(file), wanted, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(
        self, path: Path, wanted: list[tuple[int, ReadItem]], planner: LoadPlanner
    ) -> None:
        with path.open("rb", buffering=0) as stream:
            base = read_header_size(stream.read(8))
            for offset, item in sorted(wanted, key=lambda pair: pair[0]):
                target = planner.resolve_tensor(item)
                buffer = target if target.device.type == "cpu" else target.cpu()
                skipped = item.storage_offsets[0] * target.itemsize
                _read_fully(stream.fileno(), _bytes_of(buffer), base + offset + skipped, path)
                if buffer is not target:
                    target.copy_(buffer)
                planner.commit_tensor(item, target)


def save_ranges(
    ranges: Mapping[str, FlatRange],
    writer: RangeWriter,
    *,
    planner: RangeSavePlanner,
    peers: Peers,
    task: str,
) -> None:
    """Write ranges together with all peers.

    Raises:
        CheckpointError: on all ranks, if one of them failed or is gone; starts with `task`.
    """
    _call_dcp(
        lambda: save(
            {RANGES: ranges}, storage_writer=writer, planner=planner, process_group=peers.group
        ),
        task,
    )


def load_ranges(ranges: Mapping[str, FlatRange], path: Path, *, task: str) -> None:
    """Fill ranges on this rank alone; the collectives of DCP would only pass plans around.

    Raises:
        CheckpointError: if the checkpoint cannot be read; starts with `task`.
    """
    _call_dcp(
        lambda: load(
            {RANGES: ranges},
            storage_reader=RangeReader(path),
            planner=RangeLoadPlanner(),
            no_dist=True,
        ),
        task,
    )


def _call_dcp(call: Callable[[], object], task: str) -> None:
    """Run DCP, and turn its exception, a BaseException with one cause per rank, into ours."""
    # One rank without a process group is a case of ours, not a mistake to warn of.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        call()
    except CheckpointException as error:
        causes = {rank: explain(cause) for rank, (cause, _) in error.failures.items()}
        raise failure(task, causes) from error
    except RuntimeError as error:  # from a collective: DCP wraps what ranks raise themselves
        raise lost_peer(error) from error


def _file_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def _bytes_of(data: Tensor) -> memoryview:
    """Return the memory of a flat CPU tensor."""
    array: Any = data.detach().view(torch.uint8).numpy()  # Any: arrays are buffers, untyped
    return memoryview(array)


def _read_fully(descriptor: int, target: memoryview, position: int, path: Path) -> None:
    while target:
        count = os.preadv(descriptor, [target], position)
        if not count:
            raise CheckpointError(f"{path} ends at byte {position}; the checkpoint is damaged")
        target, position = target[count:], position + count
