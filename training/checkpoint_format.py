"""What a checkpoint holds: named ranges of flattened tensors, and the bytes of one data file.

Whatever the layout (experts spread over ranks along dim 0, optimizer state cut into flat shards,
replicated weights), a rank owns a contiguous range of each flattened global tensor; of a matrix cut
along its columns it owns equal runs of consecutive rows. So a checkpoint is a mapping from names to
ranges, and moving between layouts is overlap of intervals or, with runs, of rectangles.

A data file is a valid safetensors file whose tensors are the elements of those ranges in a row:
an 8-byte little-endian length, a JSON header, the bytes.

Read next: `checkpoint_plan.py` (who writes what), `checkpoint_storage.py` (the bytes),
`checkpoint_folder.py` (what is on the disk), `checkpointer.py` (when and where).
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.parallel.parameters import Span

__all__ = [
    "FlatRange",
    "check_cover",
    "dtype_name",
    "encode_header",
    "parse_dtype",
    "read_header_size",
]

_LENGTH_BYTES = 8
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}


@dataclass(frozen=True, slots=True)
class FlatRange:
    """This rank's part of one flattened global tensor: a contiguous range, or several spans.

    Ranks that hold the same range are replicas, and one of them writes it. Two different ranges
    of one tensor must not overlap. A rank without a part of the tensor holds an empty range or
    leaves the name out.

    Args:
        data: one-dimensional contiguous view, shape (n,); loading writes into it.
        start: index of its first element in the flattened tensor, in [0, numel - n].
        shape: shape of the global tensor.
        spans: where the elements of `data` lie, in order, if they are not one contiguous range.
            The strides of all spans of a tensor are equal, on all ranks.

    Raises:
        ValueError: if the range is not flat or reaches past the tensor.
    """

    data: Tensor
    start: int
    shape: tuple[int, ...]
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        if self.data.dim() != 1 or not self.data.is_contiguous():
            raise ValueError(
                f"data has shape {tuple(self.data.shape)} and strides {self.data.stride()}; "
                "a range is a contiguous one-dimensional view"
            )
        ends = max(s.start + (s.rows - 1) * s.stride + s.run for s in self.places)
        if min(s.start for s in self.places) < 0 or ends > self.numel:
            raise ValueError(
                f"a range of {self.data.numel()} elements at {self.start} is not inside a tensor "
                f"of shape {self.shape}, which has {self.numel}"
            )
        if self.spans:
            assert self.start == self.spans[0].start
            assert sum(span.numel for span in self.spans) == self.data.numel()

    @property
    def numel(self) -> int:
        """Elements of the global tensor."""
        return math.prod(self.shape)

    @property
    def places(self) -> tuple[Span, ...]:
        """Where the elements of `data` lie, in order."""
        return self.spans or (Span(self.start, 1, self.data.numel()),)

    @property
    def width(self) -> int:
        """Elements of a row, where the tensor is cut along its columns; else 0."""
        return max(span.stride for span in self.places)

    @classmethod
    def spread(cls, data: Tensor, spans: Sequence[Span], shape: tuple[int, ...]) -> "FlatRange":
        """Describe elements that lie in `spans`."""
        if not spans:  # nothing of it is here
            return cls(data=data, start=0, shape=shape)
        if len(spans) == 1 and not spans[0].stride:
            return cls(data=data, start=spans[0].start, shape=shape)
        return cls(data=data, start=spans[0].start, shape=shape, spans=tuple(spans))

    @classmethod
    def whole(cls, tensor: Tensor) -> "FlatRange":
        """Describe a tensor that this rank holds in full.

        Args:
            tensor: contiguous, any shape; it is viewed, not copied.
        """
        data = tensor.detach().view(tensor.numel())
        return cls(data=data, start=0, shape=tuple(tensor.shape))

    @classmethod
    def rows(cls, tensor: Tensor, first: int, total: int) -> "FlatRange":
        """Describe consecutive rows of a tensor that is cut along dim 0, such as local experts.

        Args:
            tensor: contiguous, shape (rows, ...); it is viewed, not copied.
            first: index of its first row in the global tensor.
            total: rows of the global tensor.
        """
        width = math.prod(tensor.shape[1:])
        data = tensor.detach().view(tensor.numel())
        return cls(data=data, start=first * width, shape=(total, *tensor.shape[1:]))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that a checkpoint uses for a type, such as `bfloat16`.

    Raises:
        ValueError: if a safetensors file cannot hold the type.
    """
    if dtype not in _CODES:
        raise ValueError(f"{dtype} cannot be saved; allowed: {', '.join(sorted(_DTYPES))}")
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """Return the type of a name from `dtype_name`.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in _DTYPES:
        raise ValueError(f"unknown type {name!r}; known: {', '.join(sorted(_DTYPES))}")
    return _DTYPES[name]


def encode_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, content: str
) -> bytes:
    """Return the head of a data file whose tensors follow one another without gaps.

    Args:
        entries: name, type and shape of each tensor, in the order of the bytes.
        content: what kind of file it is.

    Returns:
        Length and JSON header, padded so that the data starts at a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", "content": content}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header_size(head: bytes) -> int:
    """Return where the data of a file starts, in bytes, from the first 8 bytes of the file.

    Raises:
        ValueError: if there are fewer than 8 bytes.
    """
    if len(head) < _LENGTH_BYTES:
        raise ValueError(f"a data file of {len(head)} bytes has no header")
    return _LENGTH_BYTES + int.from_bytes(head[:_LENGTH_BYTES], "little")


def check_cover(name: str, numel: int, ranges: Sequence[tuple[int, int, int]]) -> str | None:
    """Return what is wrong with the ranges of one tensor, or None if they cover it exactly.

    Args:
        name: of the tensor.
        numel: elements of the global tensor.
        ranges: (start, end, rank) of each non-empty range; equal ranges are replicas.
    """
    reached, last, owner = 0, (0, 0), -1
    for start, end, rank in sorted(ranges):
        if (start, end) == last:
            continue
        if start < reached:
            return (
                f"'{name}': rank {owner} holds elements {last[0]} to {last[1]} and rank {rank} "
                f"holds {start} to {end}; they overlap"
            )
        if start > reached:
            break
        reached, last, owner = end, (start, end), rank
    if reached < numel:
        return f"'{name}': no rank holds element {reached} of {numel}"
    return None
