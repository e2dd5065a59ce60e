"""Weights to codes: round to nearest, and GPTQ over a batch of matrices of mixed widths.

GPTQ goes through the columns; what rounding one column costs is given to the columns after it, as
the Hessian of the layer's squared output error says. All arithmetic is fp64. Matrices of a batch
have one shape, each its own width and Hessian, and the result for one does not depend on the
others.

Read first: `grids.py`.

Shapes:  E matrices   N rows   K columns   G groups of a row
Source:  GPTQ: arXiv:2210.17323, algorithm 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.compression.formats import MatrixFormat, ZeroPoint, largest_code
from gatewise.compression.grids import GridSearch, decode, encode, fit_grid

__all__ = [
    "GptqSettings",
    "Quantized",
    "gptq",
    "gptq_reference",
    "hessian_loss",
    "round_to_nearest",
]

_BLOCK = 32  # columns whose errors go to the rest in one product
_RETRIES = 3  # with ten times the damping each


@dataclass(frozen=True, slots=True)
class Quantized:
    """One matrix as codes; `note` says what was unusual."""

    format: MatrixFormat
    code_NK: Tensor  # uint8
    scale_NG: Tensor  # float16
    zero_NG: Tensor | None  # float16 or uint8; None where the format has no zeros
    note: str = ""

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (N, K), computed in fp32 (fp64 for fp64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shape = self.format
        scale_NK = self.scale_NG.to(wide).repeat_interleave(shape.group, 1)[:, : shape.columns]
        if self.zero_NG is None:
            zero_NK: Tensor | float = 0.5 if shape.bits == 1 else 1.0
        else:
            zero_NK = self.zero_NG.to(wide).repeat_interleave(shape.group, 1)[:, : shape.columns]
        return (scale_NK * (self.code_NK.to(wide) - zero_NK)).to(dtype)


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """How columns give their errors on."""

    damp: float = 0.01  # times the mean of the diagonal is added to it
    mcmoe_compat: bool = False  # feedback within a block only above 3 bits, dead columns to 0


def round_to_nearest(
    weight_ENK: Tensor,
    bits: Sequence[float],
    *,
    group: int,
    search: GridSearch,
    importance_EK: Tensor | None = None,
) -> list[Quantized]:
    """Round each weight to the nearest value of its group's grid.

    Args:
        weight_ENK: finite weights of any floating type.
        bits: a width for each matrix.
        group: columns that share scale and zero.
        search: how grids are found.
        importance_EK: weights of the columns in that search; None counts all alike.
    """
    w_ENK = weight_ENK.double()
    if importance_EK is None:
        importance_EK = torch.ones_like(w_ENK[:, 0])
    run = _Run(w_ENK, importance_EK.double(), bits, group, search)
    for start in range(0, w_ENK.shape[2], group):
        run.fit(start, w_ENK[:, :, start : start + group])
        for column in range(start, min(start + group, w_ENK.shape[2])):
            run.quantise(column, w_ENK[:, :, column])
    return run.result([""] * len(bits))


def gptq(
    weight_ENK: Tensor,
    hessian_EKK: Tensor,
    bits: Sequence[float],
    *,
    group: int,
    search: GridSearch,
    settings: GptqSettings | None = None,
) -> list[Quantized]:
    """Quantise with error feedback.

    A matrix whose Hessian cannot be used (not finite, all 0, or not positive even with a thousand
    times the damping) is rounded to nearest, and its note says so. Columns that never had an input
    get no feedback.

    Args:
        weight_ENK: finite weights of any floating type.
        hessian_EKK: X^T X of each matrix's inputs, any scale.
        bits: a width for each matrix.
        group: columns that share scale and zero.
        search: how grids are found.
        settings: damping, and the release's ways.
    """
    settings = settings or GptqSettings()
    w_ENK = weight_ENK.double().clone()
    hessian_EKK = hessian_EKK.double()
    importance_EK, factor_EKK, notes = _prepare(hessian_EKK, settings)
    dead_EK = importance_EK <= 0
    if settings.mcmoe_compat:
        w_ENK.masked_fill_(dead_EK.unsqueeze(1), 0.0)
    feeds_E = torch.tensor([not settings.mcmoe_compat or width > 3 for width in bits])
    feeds_E1 = feeds_E.to(w_ENK).unsqueeze(1)
    run = _Run(w_ENK, importance_EK, bits, group, search)
    columns = w_ENK.shape[2]
    block = group if settings.mcmoe_compat else math.gcd(group, _BLOCK)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if start % group == 0:  # all columns before have given their errors on
            run.fit(start, w_ENK[:, :, start : start + group])
        w_ENb = w_ENK[:, :, start:end].clone()
        error_ENb = torch.zeros_like(w_ENb)
        for column in range(start, end):
            here = column - start
            value_EN = run.quantise(column, w_ENb[:, :, here])
            pivot_E1 = factor_EKK[:, column, column].unsqueeze(1)
            error_EN = (w_ENb[:, :, here] - value_EN) / pivot_E1
            error_ENb[:, :, here] = error_EN
            row_E1b = factor_EKK[:, column, column + 1 : end].unsqueeze(1)
            w_ENb[:, :, here + 1 :] -= (feeds_E1 * error_EN).unsqueeze(2) * row_E1b
        for matrix in range(len(bits)):  # one by one, so that a batch changes no sum's order
            w_ENK[matrix, :, end:] -= error_ENb[matrix] @ factor_EKK[matrix, start:end, end:]
    return run.result(notes)


def hessian_loss(weight_NK: Tensor, value_NK: Tensor, hessian_KK: Tensor) -> float:
    """Return tr(D H D^T) of D = weight - value: the squared output error on H's inputs."""
    left_NK = weight_NK.double() - value_NK.double()
    return float(((left_NK @ hessian_KK.double()) * left_NK).sum())


class _Run:
    """Codes and grids of a batch, filled column by column."""

    def __init__(
        self,
        w_ENK: Tensor,
        importance_EK: Tensor,
        bits: Sequence[float],
        group: int,
        search: GridSearch,
    ) -> None:
        count, rows, columns = w_ENK.shape
        if len(bits) != count:
            raise ValueError(f"{len(bits)} widths for {count} matrices; give one for each")
        self._bits, self._group, self._search = bits, group, search
        self._importance_EK = importance_EK
        groups = -(-columns // group)
        self._code_ENK = torch.zeros(w_ENK.shape, dtype=torch.uint8, device=w_ENK.device)
        self._scale_ENG = w_ENK.new_ones(count, rows, groups)
        self._zero_ENG = w_ENK.new_zeros(count, rows, groups)
        self._top_E1 = w_ENK.new_tensor([largest_code(width) for width in bits]).unsqueeze(1)

    def fit(self, start: int, w_ENg: Tensor) -> None:
        """Find the grid of the group that starts at a column."""
        place = start // self._group
        importance_Eg = self._importance_EK[:, start : start + w_ENg.shape[2]]
        for matrix, width in enumerate(self._bits):  # one by one: what is tried stays in the caches
            here = slice(matrix, matrix + 1)
            scale_1N, zero_1N = fit_grid(w_ENg[here], importance_Eg[here], width, self._search)
            self._scale_ENG[here, :, place] = scale_1N
            self._zero_ENG[here, :, place] = zero_1N

    def quantise(self, column: int, w_EN: Tensor) -> Tensor:
        """Set the codes of a column and return their values."""
        scale_EN = self._scale_ENG[:, :, column // self._group]
        zero_EN = self._zero_ENG[:, :, column // self._group]
        code_EN = encode(w_EN, scale_EN, zero_EN, self._top_E1)
        self._code_ENK[:, :, column] = code_EN.to(torch.uint8)
        return decode(code_EN, scale_EN, zero_EN)

    def result(self, notes: Sequence[str]) -> list[Quantized]:
        """Return the matrices."""
        _, rows, columns = self._code_ENK.shape
        found = []
        for matrix, (bits, note) in enumerate(zip(self._bits, notes, strict=True)):
            shape = MatrixFormat(rows, columns, bits, self._group, self._search.zero)
            zero_NG = None
            if shape.has_zero:
                kind = torch.float16 if shape.zero is ZeroPoint.float else torch.uint8
                zero_NG = self._zero_ENG[matrix].to(kind)
            scale_NG = self._scale_ENG[matrix].to(torch.float16)
            found.append(Quantized(shape, self._code_ENK[matrix], scale_NG, zero_NG, note))
        return found


def _prepare(hessian_EKK: Tensor, settings: GptqSettings) -> tuple[Tensor, Tensor, list[str]]:
    """Return the columns' importance, the factors of the inverse Hessians, and notes."""
    diagonal_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
    importance_EK = torch.zeros_like(diagonal_EK)
    factors, notes = [], []
    for matrix, hessian_KK in enumerate(hessian_EKK):
        factor_KK, note = _factor(hessian_KK, settings)
        notes.append(note)
        if factor_KK is None:
            factor_KK = torch.eye(hessian_KK.shape[0], dtype=torch.float64).to(hessian_KK)
            if bool(torch.isfinite(diagonal_EK[matrix]).all()):
                importance_EK[matrix] = diagonal_EK[matrix]
            else:
                importance_EK[matrix] = 1.0
        else:
            importance_EK[matrix] = diagonal_EK[matrix]
        factors.append(factor_KK)
    return importance_EK, torch.stack(factors), notes


def _factor(hessian_KK: Tensor, settings: GptqSettings) -> tuple[Tensor | None, str]:
    """Return the upper Cholesky factor of the damped inverse, or None and the reason."""
    if not bool(torch.isfinite(hessian_KK).all()):
        return None, "its inputs are not finite: rounded to nearest"
    diagonal_K = hessian_KK.diagonal()
    dead_K = diagonal_K <= 0
    if bool(dead_K.all()):
        return None, "it has no inputs: rounded to nearest"
    hessian_KK = hessian_KK.clone()
    hessian_KK.diagonal().masked_fill_(dead_K, float(diagonal_K[~dead_K].mean()))
    damp = settings.damp * float(hessian_KK.diagonal().mean())
    for _ in range(_RETRIES + 1):
        damped_KK = hessian_KK.clone()
        damped_KK.diagonal().add_(damp)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if int(failed) == 0:
            upper_KK, failed = torch.linalg.cholesky_ex(
                torch.cholesky_inverse(lower_KK), upper=True
            )
            if int(failed) == 0 and bool(torch.isfinite(upper_KK).all()):
                return upper_KK, ""
        damp *= 10
    return None, "its Hessian is singular: rounded to nearest"


def gptq_reference(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    bits: float,
    *,
    group: int,
    search: GridSearch,
    damp: float = 0.01,
) -> Tensor:
    """Quantise one matrix by the textbook update of the inverse Hessian; return the values.

    After a column is rounded it is removed from the inverse by one step of Gaussian elimination.
    What `gptq` is held to; fp64, one row and one column at a time.
    """
    w_NK = weight_NK.double().clone()
    hessian_KK = hessian_KK.double()
    importance_K = hessian_KK.diagonal().clone()
    columns = w_NK.shape[1]
    damped_KK = hessian_KK + damp * importance_K.mean() * torch.eye(columns, dtype=torch.float64)
    inverse_KK = torch.linalg.inv(damped_KK)
    value_NK = torch.zeros_like(w_NK)
    scale_1N = zero_1N = w_NK.new_zeros(1, w_NK.shape[0])
    for column in range(columns):
        if column % group == 0:
            part = slice(column, column + group)
            scale_1N, zero_1N = fit_grid(
                w_NK[:, part].unsqueeze(0), importance_K[part].unsqueeze(0), bits, search
            )
        pivot = inverse_KK[column, column]
        for row in range(w_NK.shape[0]):
            scale, zero = scale_1N[0, row], zero_1N[0, row]
            code = encode(w_NK[row, column], scale, zero, largest_code(bits))
            value_NK[row, column] = decode(code, scale, zero)
            error = (w_NK[row, column] - value_NK[row, column]) / pivot
            w_NK[row, column + 1 :] -= error * inverse_KK[column, column + 1 :]
        inverse_KK = inverse_KK - torch.outer(inverse_KK[:, column], inverse_KK[column]) / pivot
    return value_NK
