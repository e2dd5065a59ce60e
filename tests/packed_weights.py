"""Packed weights of made-up codes, scales and zeros."""

import torch
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops.native_packed import PackedTable
from gatewise.moe.ops.panels import PackedWeight, pack_panels

__all__ = ["codes", "made_up", "mixed_experts", "relative"]


def codes(kind: str, rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    if kind != "random":
        value = 0 if kind == "least" else (1 << bits) - 1
        return torch.full((rows, columns), value, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed + bits)
    return torch.randint(1 << bits, (rows, columns), generator=generator).byte()


def made_up(
    rows: int, columns: int, group: int, bits: int, kind: str = "random", seed: int = 0
) -> PackedWeight:
    """Return a matrix with scales and zeros of its own in each group; 1 bit has no zeros."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    scale_NG = 0.01 + torch.rand(rows, groups, generator=generator)
    zero_NG = torch.rand(rows, groups, generator=generator) * ((1 << bits) - 1)
    return pack_panels(
        codes(kind, rows, columns, bits, seed),
        scale_NG.half(),
        zero_NG.half() if bits > 1 else None,
        bits=bits,
        group=group,
        zero=None if bits > 1 else 0.5,
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def mixed_experts(
    activation: Activation, *, hidden: int = 96, width: int = 72
) -> list[PackedTable]:
    """Return five experts of mixed widths, also between their two matrices."""
    inner = 2 * width if activation is Activation.swiglu else width
    widths = ((1, 2), (2, 3), (3, 8), (4, 1), (8, 4))
    first = [made_up(inner, hidden, 32, a, seed=a) for a, _ in widths]
    second = [made_up(hidden, width, 48, b, seed=b) for _, b in widths]
    return [PackedTable(first), PackedTable(second)]
