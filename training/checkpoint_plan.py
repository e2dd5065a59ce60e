"""Who writes which range, and which saved ranges meet which wanted ones: planners for DCP.

Importing this module imports `torch.distributed.checkpoint` (DCP), which takes a second or more;
so it is imported where it is used.

Read first: `checkpoint_format.py`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gatewise.parallel.errors import CheckpointError
from gatewise.parallel.parameters import Span, cut_spans
from gatewise.training.checkpoint_format import FlatRange, check_cover, dtype_name

__all__ = [
    "RANGES",
    "RangeLoadPlanner",
    "RangeSavePlanner",
    "chunk_of",
    "in_rows",
    "place_items",
    "type_and_numel",
]

# DCP treats every entry of a state dict by itself, at some 0.1 ms each; so the whole mapping is
# one entry, which only these planners look into.
RANGES = "ranges"


class RangeSavePlanner(DefaultSavePlanner):
    """Decides which rank writes which range; remembers the answer between saves.

    All ranks must call `forget` together when a rank's ranges change or a save failed.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._ranges: Mapping[str, FlatRange] = {}
        self._final: SavePlan | None = None
        self._index = ""
        self.tensors: dict[str, dict[str, Any]] = {}  # rank 0: name to shape and dtype

    def forget(self) -> None:
        """Make a new plan at the next save."""
        self._final = None

    @property
    def names(self) -> list[str] | None:
        """Tensors of which this rank writes a range, or None before there is a plan."""
        if self._final is None:
            return None
        return list(dict.fromkeys(item.index.fqn for item in self._final.items))

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the ranges to save (called by DCP)."""
        self._ranges = state_dict[RANGES]
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """List this rank's ranges, or nothing if there is a plan already."""
        if self._final is not None:
            return SavePlan([], usable=False)
        items = [
            _write_item(name, part, span)
            for name, part in self._ranges.items()
            if part.data.numel() or not part.numel  # an empty tensor is still a name
            for span in part.places
        ]
        return SavePlan(items, planner_data={n: part.shape for n, part in self._ranges.items()})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the ranges fit together, and give each to one rank (on rank 0)."""
        if self._final is None:
            self.tensors = _describe(all_plans)
            all_plans, _ = super().create_global_plan(all_plans)
            all_plans = [SavePlan(plan.items) for plan in all_plans]
            self._index = _build_index(all_plans)
        return all_plans, Metadata({}, planner_data=self._index)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Keep this rank's part of the plan."""
        if self._final is None:
            self._final = new_plan
        return self._final

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the bytes' owner for a planned item."""
        part, index = self._ranges[write_item.index.fqn], write_item.index
        offset = 0
        for span in part.places:
            if chunk_of(span, part.width).offsets == index.offset:
                return part.data.narrow(0, offset, span.numel)
            offset += span.numel
        raise AssertionError(f"{index.fqn} has no part at {index.offset}")


class RangeLoadPlanner(LoadPlanner):
    """Finds the saved ranges that overlap the wanted ones."""

    def __init__(self) -> None:
        self._ranges: Mapping[str, FlatRange] = {}
        self._metadata = Metadata({})
        self._targets: dict[MetadataIndex, Tensor] = {}  # by chunk: its elements, in rows

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the ranges to fill (called by DCP)."""
        assert metadata is not None
        self._ranges, self._metadata = state_dict[RANGES], metadata

    def create_local_plan(self) -> LoadPlan:
        """List what to read."""
        items: list[ReadItem] = []
        for name, part in self._ranges.items():
            saved = self._metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            if not part.data.numel():
                continue
            width = saved.size[1] if len(saved.size) > 1 else 0
            chunks, offset = [], 0
            for span in part.places:
                for box in in_rows(span, width):
                    chunk = chunk_of(box, width)
                    chunks.append(chunk)
                    target = part.data.detach().narrow(0, offset, box.numel)
                    self._targets[MetadataIndex(name, chunk.offsets)] = target.view(chunk.sizes)
                    offset += box.numel
            items += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> NoReturn:
        """Refuse: a checkpoint holds tensors only."""
        raise AssertionError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of a wanted range that an item fills."""
        target = self._targets[read_item.dest_index]
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the tensor is a view of the range."""


def place_items(items: Iterable[WriteItem]) -> list[tuple[WriteItem, int]]:
    """Return the items in the order of a file's bytes, each with its offset in the data.

    Wide types first, so that every range is aligned to its own type.
    """
    placed, offset = [], 0
    for item in sorted(items, key=lambda i: (-type_and_numel(i)[0].itemsize, i.index.fqn)):
        dtype, numel = type_and_numel(item)
        placed.append((item, offset))
        offset += numel * dtype.itemsize
    return placed


def type_and_numel(item: WriteItem) -> tuple[torch.dtype, int]:
    """Return type and number of elements of a planned range."""
    data = item.tensor_data
    assert data is not None
    return data.properties.dtype, math.prod(data.chunk.sizes)


def in_rows(span: Span, width: int) -> list[Span]:
    """Cut a span where it passes from one row of `width` elements to the next; 0 is no width.

    At most three spans come of a contiguous one.
    """
    if not width or span.stride:
        return [span]
    first = span.start % width
    whole = Span(span.start - first, -(-(first + span.run) // width), width, width)
    return cut_spans([whole], first, first + span.run)


def chunk_of(span: Span, width: int) -> ChunkStorageMetadata:
    """Return what DCP calls a span: an interval, or with a width a rectangle of rows."""
    if not width:
        return ChunkStorageMetadata(torch.Size([span.start]), torch.Size([span.run]))
    place = torch.Size([span.start // width, span.start % width])
    return ChunkStorageMetadata(place, torch.Size([span.rows, span.run]))


def _write_item(name: str, part: FlatRange, span: Span) -> WriteItem:
    properties = TensorProperties(dtype=part.data.dtype)
    dtype_name(part.data.dtype)  # refuses what a file cannot hold
    chunk, width = chunk_of(span, part.width), part.width
    whole = [part.numel // width, width] if width else [part.numel]
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(whole)),
    )


def _describe(plans: Iterable[SavePlan]) -> dict[str, dict[str, Any]]:
    """Return shape and type of every tensor, after checking that all ranks agree on them."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    held: dict[str, list[tuple[Span, int]]] = defaultdict(list)  # with the rank
    for rank, plan in enumerate(plans):
        for name, shape in plan.planner_data.items():
            if shapes.setdefault(name, shape) != shape:
                raise CheckpointError(
                    f"'{name}' has shape {shape} on rank {rank} and {shapes[name]} on another"
                )
        for item in plan.items:
            name, (dtype, numel) = item.index.fqn, type_and_numel(item)
            if numel:
                held[name].append((_span(item), rank))
            if dtypes.setdefault(name, dtype) != dtype:
                raise CheckpointError(
                    f"'{name}' is {dtype} on rank {rank} and {dtypes[name]} on another"
                )
    for name, shape in shapes.items():
        problem = _uncovered(name, math.prod(shape), held[name])
        if problem is not None:
            raise CheckpointError(problem)
    return {
        name: {"shape": list(shape), "dtype": dtype_name(dtypes[name])}
        for name, shape in sorted(shapes.items())
    }


def _uncovered(name: str, numel: int, held: list[tuple[Span, int]]) -> str | None:
    """Return what is wrong with the spans of one tensor, or None if they cover it."""
    spans = {span for span, _ in held}
    if not any(span.stride for span in spans):
        return check_cover(name, numel, [(s.start, s.start + s.run, rank) for s, rank in held])
    missing = numel - sum(span.numel for span in spans)
    if missing > 0:  # DCP itself sees to it that rectangles do not overlap
        return f"'{name}': no rank holds {missing} of its elements"
    return None


def _span(item: WriteItem) -> Span:
    """Return the span that a planned range is."""
    data = item.tensor_data
    assert data is not None
    place, sizes = data.chunk.offsets, data.chunk.sizes
    if len(place) == 1:
        return Span(place[0], 1, sizes[0])
    return Span(place[0] * data.size[1] + place[1], sizes[0], sizes[1], data.size[1])


def _build_index(plans: Iterable[SavePlan]) -> str:
    index: dict[str, list[list[int]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for item, offset in place_items(plan.items):
            span = _span(item)
            runs = [span.run, span.stride] if span.stride else []
            index[item.index.fqn].append([span.start, span.numel, rank, offset, *runs])
    return json.dumps(index, separators=(",", ":"))
