"""How codes of 1 to 8 bits lie in memory while products are computed with them.

Sixteen rows make a panel, whose bytes lie together: the fp16 scales, group by group, each group's
16 rows together; the fp16 zeros in the same order, where the matrix has them; then the codes. Codes
of 3 bits are a plane of their low 2 bits, then a plane of the high bit; other widths are one plane.

A plane of p bits is cut into vectors of 64 bytes, each 32 / p columns of the 16 rows, group after
group. Byte 4 r + j of a vector belongs to row r; its bits f p to f p + p - 1 hold column 4 f + j.
So one vector, masked, is what an instruction needs that multiplies 4 neighbouring columns of 16
rows with the same 4 activations.

Rows are padded to whole panels, groups to whole vectors. Otherwise the bytes are those of the
codes: 3 bits take 3 bits.

Shapes:  N rows   K columns   G groups of a row   P panels   V vectors   F codes of a byte
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedWeight", "pack_panels", "unpack_panels"]

_PANEL_ROWS = 16
_VECTOR = 64
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix in panels: value = scale * (code - zero).

    Raises:
        ValueError: if the bytes are not those of such a matrix; kernels read them as what the
            other fields say.
    """

    data: Tensor  # uint8, panel after panel
    rows: int
    columns: int
    bits: int  # 1, 2, 3, 4 or 8
    group: int  # columns that share scale and zero; the last group may be shorter
    zero: float | None  # of all groups; None: each group has its own

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        for name in ("rows", "columns", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        size = -(-self.rows // _PANEL_ROWS) * _panel_bytes(self)
        if self.data.dtype != torch.uint8 or self.data.shape != (size,):
            raise ValueError(
                f"data is {self.data.dtype}{list(self.data.shape)}; {self.rows} x {self.columns} "
                f"codes of {self.bits} bits in groups of {self.group} are {size} bytes of uint8"
            )
        if not self.data.is_contiguous():
            raise ValueError("data is not contiguous; kernels read byte after byte")

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.group)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding too."""
        return self.data.nbytes


def pack_panels(
    code_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    *,
    bits: int,
    group: int,
    zero: float | None = None,
) -> PackedWeight:
    """Bring codes into panels.

    Args:
        code_NK: uint8, below 2 ** bits.
        scale_NG: fp16.
        zero_NG: fp16 or uint8 (exact in fp16); None where all groups have the same.
        bits: 1, 2, 3, 4 or 8.
        group: columns of a group.
        zero: of all groups, where `zero_NG` is None.

    Raises:
        ValueError: if there is not exactly one of `zero` and `zero_NG`, if scales or zeros are not
            one per group, or for another width.
    """
    _check_bits(bits)
    if (zero is None) == (zero_NG is None):
        raise ValueError("give either zero, of all groups, or zero_NG")
    rows, columns = code_NK.shape
    for name, value_NG in (("scale_NG", scale_NG), ("zero_NG", zero_NG)):
        if value_NG is not None and value_NG.shape != (rows, -(-columns // group)):
            raise ValueError(
                f"{name} is {list(value_NG.shape)}; {rows} x {columns} codes in groups of {group} "
                f"have {[rows, -(-columns // group)]}"
            )
    panels = -(-rows // _PANEL_ROWS)
    padded_NK = code_NK.new_zeros(panels * _PANEL_ROWS, columns)
    padded_NK[:rows] = code_NK
    code_PRK = padded_NK.view(panels, _PANEL_ROWS, columns)
    parts = [_pack_grid(scale_NG, panels)]
    if zero_NG is not None:
        parts.append(_pack_grid(zero_NG.to(torch.float16), panels))
    used = sum(part.shape[1] for part in parts)
    padding = _grid_bytes(scale_NG.shape[1], zero_NG is not None) - used
    parts.append(parts[0].new_zeros(panels, padding))
    shift = 0
    for plane in _PLANES[bits]:
        digit_PRK = (code_PRK >> shift) & ((1 << plane) - 1)
        for start, count, width in _runs(columns, group):
            digit_PRCW = digit_PRK[:, :, start : start + count * width].unflatten(2, (count, width))
            parts.append(_pack_plane(digit_PRCW, plane))
        shift += plane
    data = torch.cat(parts, 1).flatten()
    return PackedWeight(data, rows, columns, bits, group, zero)


def unpack_panels(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return uint8 codes (N, K), fp16 scales and zeros (N, G), as `pack_panels` got them."""
    panels = -(-weight.rows // _PANEL_ROWS)
    data_PB = weight.data.view(panels, -1)
    scale_NG = _unpack_grid(data_PB, 0, weight)
    zero_NG = None
    if weight.zero is None:
        zero_NG = _unpack_grid(data_PB, 2 * _PANEL_ROWS * weight.groups, weight)
    place = _grid_bytes(weight.groups, weight.zero is None)
    code_PRK = data_PB.new_zeros(panels, _PANEL_ROWS, weight.columns)
    shift = 0
    for plane in _PLANES[weight.bits]:
        for start, count, width in _runs(weight.columns, weight.group):
            size = _VECTOR * count * _vectors(plane, width)
            digit_PRCW = _unpack_plane(data_PB[:, place : place + size], plane, count, width)
            code_PRK[:, :, start : start + count * width] |= digit_PRCW.flatten(2) << shift
            place += size
        shift += plane
    return code_PRK.flatten(0, 1)[: weight.rows].contiguous(), scale_NG, zero_NG


def _check_bits(bits: int) -> None:
    if bits not in _PLANES:
        raise ValueError(f"bits is {bits}; it must be one of {', '.join(map(str, _PLANES))}")


def _panel_bytes(weight: PackedWeight) -> int:
    return _grid_bytes(weight.groups, weight.zero is None) + sum(
        _VECTOR * count * _vectors(plane, width)
        for plane in _PLANES[weight.bits]
        for _, count, width in _runs(weight.columns, weight.group)
    )


def _runs(columns: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Yield first column, number and width of the full groups, then of the shorter last one."""
    full, rest = divmod(columns, group)
    if full:
        yield 0, full, group
    if rest:
        yield full * group, 1, rest


def _vectors(plane: int, columns: int) -> int:
    return -(-columns * plane // 32)


def _grid_bytes(groups: int, has_zero: bool) -> int:
    size = groups * 2 * _PANEL_ROWS * (2 if has_zero else 1)
    return -(-size // _VECTOR) * _VECTOR


def _pack_grid(value_NG: Tensor, panels: int) -> Tensor:
    """Return the bytes (P, 32 G) of scales or zeros; rows that do not exist get 0."""
    rows, groups = value_NG.shape
    padded_NG = value_NG.new_zeros(panels * _PANEL_ROWS, groups)
    padded_NG[:rows] = value_NG
    value_PGR = padded_NG.view(panels, _PANEL_ROWS, groups).transpose(1, 2).contiguous()
    return value_PGR.view(panels, -1).view(torch.uint8)


def _unpack_grid(data_PB: Tensor, place: int, weight: PackedWeight) -> Tensor:
    size = 2 * _PANEL_ROWS * weight.groups
    value_PGR = data_PB[:, place : place + size].contiguous().view(torch.float16)
    value_PRG = value_PGR.view(-1, weight.groups, _PANEL_ROWS).transpose(1, 2)
    return value_PRG.flatten(0, 1)[: weight.rows].contiguous()


def _pack_plane(digit_PRCW: Tensor, plane: int) -> Tensor:
    """Return the bytes (P, 64 C V) of C groups of equal width."""
    panels, rows, count, width = digit_PRCW.shape
    fields, vectors = 8 // plane, _vectors(plane, width)
    padded = digit_PRCW.new_zeros(panels, rows, count, vectors * fields * 4)
    padded[..., :width] = digit_PRCW
    digit = padded.view(panels, rows, count, vectors, fields, 4).permute(0, 2, 3, 1, 5, 4)
    byte = digit.new_zeros(digit.shape[:-1])
    for field in range(fields):
        byte |= digit[..., field] << (plane * field)
    return byte.reshape(panels, -1)


def _unpack_plane(data_PB: Tensor, plane: int, count: int, width: int) -> Tensor:
    """Undo `_pack_plane`; return (P, 16, C, width)."""
    fields, vectors = 8 // plane, _vectors(plane, width)
    byte = data_PB.reshape(-1, count, vectors, _PANEL_ROWS, 4)
    mask = (1 << plane) - 1
    digits = [(byte >> (plane * field)) & mask for field in range(fields)]
    digit = torch.stack(digits, 4).permute(0, 3, 1, 2, 4, 5)  # (P, R, C, V, F, 4)
    return digit.flatten(3)[..., :width]
