"""What a quantised matrix takes: widths, groups and exact sizes, without any tensor.

A matrix of N rows (output channels) and K columns is stored as codes, row after row, and for each
row and group of columns an fp16 scale and, from 2 bits on, a zero point. The codes of a row are
planes of 1, 2, 4 or 8 bits, each padded to whole bytes; 3 bits are a plane of 2 and a plane of 1,
so they take exactly 3.0 bits. Ternary codes are packed five to a byte (1.6 bits).
"""

import math
from dataclasses import dataclass
from enum import Enum

from gatewise.parallel.errors import ConfigError

__all__ = [
    "TERNARY",
    "WIDTHS",
    "MatrixFormat",
    "ZeroPoint",
    "largest_code",
    "parse_widths",
    "planes",
    "row_bytes",
    "stored_bits",
]

TERNARY = 1.58  # log2(3): how the width of ternary codes is written
WIDTHS = (1.0, TERNARY, 2.0, 3.0, 4.0, 8.0)
_PLANES = {1.0: (1,), 2.0: (2,), 3.0: (2, 1), 4.0: (4,), 8.0: (8,)}
_TRITS_PER_BYTE = 5
_SCALE_BYTES = 2


class ZeroPoint(Enum):
    """The code, or place between codes, that stands for 0."""

    float = "float"  # fp16
    int = "int"  # one of the codes, uint8


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """How one matrix is stored."""

    rows: int
    columns: int
    bits: float
    group: int
    zero: ZeroPoint

    @property
    def elements(self) -> int:
        """Weights of the matrix."""
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """Groups of a row; the last may be shorter."""
        return math.ceil(self.columns / self.group)

    @property
    def has_zero(self) -> bool:
        """Tell whether zero points are stored; signs and ternary codes are symmetric."""
        return self.bits >= 2

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return self.rows * row_bytes(self.bits, self.columns)

    @property
    def metadata_bytes(self) -> int:
        """Bytes of scales and zero points."""
        zero_bytes = (2 if self.zero is ZeroPoint.float else 1) if self.has_zero else 0
        return self.rows * self.groups * (_SCALE_BYTES + zero_bytes)

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self.code_bytes + self.metadata_bytes


def largest_code(bits: float) -> int:
    """Return the largest code of a width; the smallest is 0."""
    return 2 if bits == TERNARY else (1 << int(bits)) - 1


def planes(bits: float) -> tuple[int, ...]:
    """Return the widths of a code's planes, the low bits first; ternary codes have none."""
    return _PLANES[bits]


def row_bytes(bits: float, columns: int) -> int:
    """Return the bytes that the codes of one row take."""
    if bits == TERNARY:
        return math.ceil(columns / _TRITS_PER_BYTE)
    return sum(math.ceil(columns * plane / 8) for plane in _PLANES[bits])


def stored_bits(bits: float) -> float:
    """Return the bits that a code takes in a long row: 1.6 for ternary codes."""
    return 8 / _TRITS_PER_BYTE if bits == TERNARY else bits


def parse_widths(text: str) -> tuple[float, ...]:
    """Return the widths that a comma-separated text names, ascending.

    Raises:
        ConfigError: for a width that does not exist, one named twice, or none.
    """
    known = ", ".join(f"{width:g}" for width in WIDTHS)
    found = []
    for word in text.split(","):
        try:
            width = float(word)
        except ValueError:
            width = math.nan
        if width not in WIDTHS:
            raise ConfigError(f"widths is {text!r}; it must be some of {known}, as in 1,2,3")
        found.append(width)
    if len(set(found)) < len(found):
        raise ConfigError(f"widths is {text!r}, which names a width twice")
    return tuple(sorted(found))
