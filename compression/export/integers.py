"""Quantised matrices as other programs hold them: codes of 2, 3, 4 or 8 bits and integer zeros.

Signs and ternary codes go into 2 bits, exactly: -s/2 and s/2 are the codes 1 and 3 around the zero
2 with the scale s/2; -s, 0 and s are the codes 0, 1 and 2 around the zero 1. A float zero has no
place in these formats.

Shapes:  N rows   K columns   G groups of a row   M words of a packed row
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.compression.formats import TERNARY, ZeroPoint
from gatewise.compression.plan import Plan
from gatewise.compression.quantize import Quantized
from gatewise.parallel.errors import ConfigError

__all__ = [
    "IntegerMatrix",
    "as_integers",
    "check_integer_zeros",
    "container_bits",
    "pack_words",
]


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """value = scale * (code - zero)."""

    bits: int
    group: int
    code_NK: Tensor  # uint8
    scale_NG: Tensor  # float16
    zero_NG: Tensor  # uint8


def container_bits(bits: float) -> int:
    """Return the width that holds codes of a width."""
    return 2 if bits in (1, TERNARY) else int(bits)


def check_integer_zeros(plan: Plan, name: str) -> None:
    """Refuse a plan with float zeros.

    Raises:
        ConfigError: naming the format and the remedy.
    """
    for part in plan.parts:
        if part.shape.has_zero and part.shape.zero is ZeroPoint.float:
            raise ConfigError(
                f"format is {name}, which holds integer zero points, but '{part.name}' has float "
                "ones; compress with grid.zero=int, or export format=hf"
            )


def as_integers(matrix: Quantized, rows: slice) -> IntegerMatrix:
    """Return some rows of a matrix in the narrowest width that other programs have."""
    shape = matrix.format
    code_NK, scale_NG = matrix.code_NK[rows], matrix.scale_NG[rows]
    if shape.bits == 1:
        half_NG = scale_NG / 2
        if not torch.equal(half_NG * 2, scale_NG):
            raise ConfigError(
                "a scale of one-bit codes is too small for half of it to be an fp16 number; "
                "export format=hf"
            )
        zero_NG = torch.full_like(scale_NG, 2, dtype=torch.uint8)
        return IntegerMatrix(2, shape.group, 2 * code_NK + 1, half_NG, zero_NG)
    if matrix.zero_NG is None:
        zero_NG = torch.ones_like(scale_NG, dtype=torch.uint8)
    else:
        zero_NG = matrix.zero_NG[rows].to(torch.uint8)
    return IntegerMatrix(container_bits(shape.bits), shape.group, code_NK, scale_NG, zero_NG)


def pack_words(code_NK: Tensor, bits: int) -> Tensor:
    """Pack the codes of each row into int32 words, as one stream of bits, the lowest first.

    Args:
        code_NK: from 0 to 2^bits - 1.
        bits: of a code.

    Returns:
        (N, M) with M = ceil(K * bits / 32); unused bits are 0.
    """
    rows, columns = code_NK.shape
    place_b = torch.arange(bits, device=code_NK.device)
    bit_NL = (code_NK.long().unsqueeze(2) >> place_b & 1).view(rows, columns * bits)
    words = -(-columns * bits // 32)
    padded_NL = bit_NL.new_zeros(rows, words * 32)
    padded_NL[:, : columns * bits] = bit_NL
    weight_w = 1 << torch.arange(32, device=code_NK.device)
    word_NM = (padded_NL.view(rows, words, 32) * weight_w).sum(2)
    return torch.where(word_NM >= 1 << 31, word_NM - (1 << 32), word_NM).int()
