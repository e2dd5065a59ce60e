"""The bytes of a checkpoint: writer and reader for `torch.distributed.checkpoint` (DCP).

DCP's own writer calls `torch.save` for every tensor (3 s of processor time for 3000 of them), its
reader `torch.load`, and its index is a pickle. Here a rank's file is one stream of raw ranges
behind a safetensors header, and the index is JSON:

    index.json   {name: [[start, numel, file number, offset in the file's data], ...]}

An entry of a matrix that is cut along its columns has two numbers more: the elements of a run, and
from the start of a run to the next one's.

Importing this module imports DCP, which takes a second or more; so it is imported where it is
used.

Read first: `checkpoint_plan.py`.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
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
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from gatewise.parallel.errors import CheckpointError
from gatewise.parallel.parameters import Span
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
    chunk_of,
    in_rows,
    place_items,
    type_and_numel,
)

__all__ = ["RangeReader", "RangeWriter", "load_ranges", "save_ranges"]

INDEX = "index.json"
_BLOCK_BYTES = 16 * 2**20  # read at a time where rows are picked out of wider ones


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
            header = encode_header(_entries(placed), content="flat ranges")
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
        widths: elements of a row, of the tensors whose columns are wanted; the reader describes
            the saved ranges of these as rectangles.
    """

    def __init__(self, path: Path, widths: Mapping[str, int] | None = None) -> None:
        self._path = path
        self._widths = widths or {}
        # file, offset in bytes and elements from row to row
        self._places: dict[MetadataIndex, tuple[int, int, int]] = {}

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
        places: dict[MetadataIndex, tuple[int, int, int]] = {}
        for name, spec in tensors.items():
            entries, dtype = index[name], parse_dtype(spec["dtype"])
            width = max([self._widths.get(name, 0), *(entry[5] for entry in entries if entry[4:])])
            chunks = []
            for start, numel, file, first, *runs in entries:
                run, stride = runs or (numel, 0)
                offset = first
                span = Span(start, numel // run if runs else 1, run, stride)
                for box in in_rows(span, width):
                    chunk = chunk_of(box, width)
                    chunks.append(chunk)
                    places[MetadataIndex(name, chunk.offsets)] = (file, offset, box.run)
                    offset += box.numel * dtype.itemsize
            numel = sum(entry[1] for entry in entries)
            size = [numel // width, width] if width else [numel]
            saved[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(size), chunks
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
        per_file: dict[int, list[tuple[int, int, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            file, offset, pitch = self._places[item.storage_index]
            per_file[file].append((offset, pitch, item))
        for file, wanted in per_file.items():
            self._read_file(self._path / _file_name(file), wanted, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(
        self, path: Path, wanted: list[tuple[int, int, ReadItem]], planner: LoadPlanner
    ) -> None:
        with path.open("rb", buffering=0) as stream:
            base = read_header_size(stream.read(8))
            for offset, pitch, item in sorted(wanted, key=lambda place: place[0]):
                target = planner.resolve_tensor(item)
                skipped = item.storage_offsets[-1]
                if len(item.storage_offsets) > 1:
                    skipped += item.storage_offsets[0] * pitch
                position = base + offset + skipped * target.itemsize
                _read_rows(stream.fileno(), target, position, pitch, path)
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
    widths = {name: part.width for name, part in ranges.items() if part.width}
    _call_dcp(
        lambda: load(
            {RANGES: ranges},
            storage_reader=RangeReader(path, widths),
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


def _entries(
    placed: Iterable[WriteItem],
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name what a file holds; a second part of a tensor has its place behind the name."""
    seen: set[str] = set()
    for item in placed:
        name, place = item.index.fqn, item.index.offset
        dtype, numel = type_and_numel(item)
        if name in seen and place is not None:
            name += "@" + ".".join(map(str, place))
        seen.add(name)
        yield name, dtype, (numel,)


def _read_rows(descriptor: int, target: Tensor, position: int, pitch: int, path: Path) -> None:
    """Read a tensor whose rows lie `pitch` elements apart in the file."""
    rows = target if target.dim() > 1 else target.unsqueeze(0)
    count, width = rows.shape
    whole = rows.is_contiguous() and (count == 1 or width == pitch)
    if whole and target.device.type == "cpu":
        _read_fully(descriptor, _bytes_of(target), position, path)
        return
    block = max(1, _BLOCK_BYTES // (pitch * target.itemsize))
    for first in range(0, count, block):
        some = rows[first : first + block]
        buffer = torch.empty((len(some) - 1) * pitch + width, dtype=target.dtype)
        _read_fully(descriptor, _bytes_of(buffer), position + first * pitch * target.itemsize, path)
        some.copy_(buffer.as_strided(some.shape, (pitch, 1)))


def _bytes_of(data: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    array: Any = (
        data.detach().view(-1).view(torch.uint8).numpy()
    )  # Any: arrays are buffers, untyped
    return memoryview(array)


def _read_fully(descriptor: int, target: memoryview, position: int, path: Path) -> None:
    while target:
        count = os.preadv(descriptor, [target], position)
        if not count:
            raise CheckpointError(f"{path} ends at byte {position}; the checkpoint is damaged")
        target, position = target[count:], position + count
