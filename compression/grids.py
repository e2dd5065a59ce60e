"""The grid of a group of weights: value = scale * (code - zero), and how it is searched.

All arithmetic is fp64; scale and zero are rounded to what is stored (fp16, or uint8 for integer
zeros) before a code is chosen, so that decoding gives exactly what the search saw.

A matrix is asymmetric from 2 bits on. Ternary codes 0, 1, 2 stand for -s, 0, s (zero 1). The codes
0, 1 of one bit stand for -s/2, s/2 (zero 0.5), with s/2 the weighted mean of |w|, which is best in
least squares.

Shapes:  E matrices of one batch   N rows   g columns of one group
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.compression.formats import TERNARY, ZeroPoint, largest_code

__all__ = ["GridSearch", "decode", "encode", "fit_grid", "fit_grid_reference"]

_SMALLEST_SCALE = 2.0**-14  # the smallest normal number of fp16
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class GridSearch:
    """Which grids are tried, and by which error.

    The error of a group is `sum_k h_k |w_k - value_k| ^ norm`, with h the diagonal of the Hessian
    where `weighted`, else 1.
    """

    zero: ZeroPoint = ZeroPoint.float
    shares: tuple[float, ...] = (1.0,)  # of the group's range
    refine: int = 0  # least-squares steps
    norm: float = 2.0
    weighted: bool = True

    @staticmethod
    def wide(*, low: float, high: float, steps: int, refine: int, zero: ZeroPoint) -> "GridSearch":
        """Search `steps` shares of the range from `low` to `high`, and the whole range."""
        shares = [1.0]
        if steps > 1:
            shares += [low + (high - low) * step / (steps - 1) for step in range(steps)]
        return GridSearch(zero=zero, shares=tuple(shares), refine=refine)

    @staticmethod
    def mcmoe() -> "GridSearch":
        """Search as the release of MC-MoE does: from 0.9 to 1.1, by the power 2.4."""
        steps = [step / 50 * 0.1 for step in range(50)]
        shares = (1.0, *(1 + step for step in steps[1:]), *(1 - step for step in steps[1:]))
        return GridSearch(shares=shares, norm=2.4, weighted=False)


def encode(w: Tensor, scale: Tensor, zero: Tensor, top: Tensor | int) -> Tensor:
    """Return the nearest codes as floats; a value between two takes the upper one."""
    code = torch.floor(w / scale + (zero + 0.5))
    return torch.minimum(code.clamp(min=0), torch.as_tensor(top, dtype=w.dtype, device=w.device))


def decode(code: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the values of codes."""
    return scale * (code - zero)


def fit_grid(
    w_ENg: Tensor, importance_Eg: Tensor, bits: float, search: GridSearch
) -> tuple[Tensor, Tensor]:
    """Find scale and zero of each row of a group.

    Args:
        w_ENg: float64 weights of one group, all of one width.
        importance_Eg: float64, at least 0; a group without any counts evenly.
        bits: one of `WIDTHS`.
        search: what is tried.

    Returns:
        Scale and zero (E, N), float64 values that their storage holds exactly.
    """
    h_E1g = _importance(importance_Eg, search).unsqueeze(1)
    if bits == 1:
        scale_EN = 2 * (h_E1g * w_ENg.abs()).sum(2) / h_E1g.sum(2)
        return _store_scale(scale_EN), torch.full_like(scale_EN, 0.5)
    top = largest_code(bits)
    if bits == TERNARY:
        range_EN = 2 * w_ENg.abs().amax(2)
        zero_EN = torch.ones_like(range_EN)
    else:
        low_EN, high_EN = w_ENg.amin(2).clamp(max=0), w_ENg.amax(2).clamp(min=0)
        range_EN = high_EN - low_EN
        zero_EN = -low_EN * top / range_EN.clamp(min=1e-300)
        zero_EN = _store_zero(zero_EN, top, search.zero)
    best_EN = torch.full_like(range_EN, float("inf"))
    scale_EN = torch.ones_like(range_EN)
    for share in search.shares:
        trial_EN = _store_scale(range_EN * (share / top))
        error_EN = _error(w_ENg, h_E1g, trial_EN, zero_EN, top, search.norm)
        better_EN = error_EN < best_EN
        best_EN = torch.where(better_EN, error_EN, best_EN)
        scale_EN = torch.where(better_EN, trial_EN, scale_EN)
    for _ in range(search.refine):
        trial_EN, moved_EN = _least_squares(w_ENg, h_E1g, scale_EN, zero_EN, bits, search.zero)
        error_EN = _error(w_ENg, h_E1g, trial_EN, moved_EN, top, search.norm)
        better_EN = error_EN < best_EN
        best_EN = torch.where(better_EN, error_EN, best_EN)
        scale_EN = torch.where(better_EN, trial_EN, scale_EN)
        zero_EN = torch.where(better_EN, moved_EN, zero_EN)
    return scale_EN, zero_EN


def _importance(importance_Eg: Tensor, search: GridSearch) -> Tensor:
    """Return positive weights of the columns; columns without data count a little."""
    if not search.weighted:
        return torch.ones_like(importance_Eg)
    mean_E1 = importance_Eg.mean(1, keepdim=True)
    floor_Eg = torch.where(mean_E1 > 0, 1e-3 * mean_E1, 1.0).expand_as(importance_Eg)
    return torch.maximum(importance_Eg, floor_Eg)


def _error(  # noqa: PLR0917 - the operands of one formula
    w_ENg: Tensor, h_E1g: Tensor, scale_EN: Tensor, zero_EN: Tensor, top: int, norm: float
) -> Tensor:
    scale_EN1, zero_EN1 = scale_EN.unsqueeze(2), zero_EN.unsqueeze(2)
    # `encode` and `decode` in place: this line of the search takes most of its time
    value_ENg = (w_ENg / scale_EN1).add_(zero_EN1 + 0.5).floor_().clamp_(0, top)
    left_ENg = value_ENg.sub_(zero_EN1).mul_(scale_EN1).sub_(w_ENg)
    power_ENg = left_ENg.square_() if norm == 2 else left_ENg.abs_().pow_(norm)
    return power_ENg.mul_(h_E1g).sum(2)


def _least_squares(  # noqa: PLR0917 - the operands of one formula
    w_ENg: Tensor, h_E1g: Tensor, scale_EN: Tensor, zero_EN: Tensor, bits: float, kind: ZeroPoint
) -> tuple[Tensor, Tensor]:
    """Return the best scale and zero for the present codes, rounded to their storage."""
    top = largest_code(bits)
    code_ENg = encode(w_ENg, scale_EN.unsqueeze(2), zero_EN.unsqueeze(2), top)
    moved_EN = zero_EN
    if bits != TERNARY:
        total_E1 = h_E1g.sum(2)
        code_mean_EN = (h_E1g * code_ENg).sum(2) / total_E1
        w_mean_EN = (h_E1g * w_ENg).sum(2) / total_E1
        centred_ENg = code_ENg - code_mean_EN.unsqueeze(2)
        spread_EN = (h_E1g * centred_ENg.square()).sum(2)
        slope_EN = (h_E1g * centred_ENg * w_ENg).sum(2) / spread_EN.clamp(min=1e-300)
        usable_EN = (slope_EN > 0) & (spread_EN > 0)
        free_EN = code_mean_EN - w_mean_EN / torch.where(usable_EN, slope_EN, 1.0)
        moved_EN = torch.where(usable_EN, _store_zero(free_EN, top, kind), zero_EN)
    step_ENg = code_ENg - moved_EN.unsqueeze(2)
    squares_EN = (h_E1g * step_ENg.square()).sum(2)
    slope_EN = (h_E1g * step_ENg * w_ENg).sum(2) / squares_EN.clamp(min=1e-300)
    usable_EN = (slope_EN > 0) & (squares_EN > 0)
    return _store_scale(torch.where(usable_EN, slope_EN, scale_EN)), moved_EN


def _store_scale(scale: Tensor) -> Tensor:
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16).to(scale.dtype)


def _store_zero(zero: Tensor, top: int, kind: ZeroPoint) -> Tensor:
    if kind is ZeroPoint.int:
        return zero.round().clamp(0, top)
    return zero.clamp(-top, 2 * top).to(torch.float16).to(zero.dtype)


def fit_grid_reference(
    w: list[float], importance: list[float], bits: float, search: GridSearch
) -> tuple[float, float]:
    """Find scale and zero of one row's group by plain loops, without refinement.

    Source: what `fit_grid` is held to, for searches with `refine=0`.
    """
    import numpy as np

    h = list(importance) if search.weighted else [1.0] * len(w)
    mean = sum(h) / len(h)
    h = [max(value, 1e-3 * mean if mean > 0 else 1.0) for value in h]

    def half(value: float) -> float:
        return float(np.float16(min(max(value, _SMALLEST_SCALE), _LARGEST_SCALE)))

    if bits == 1:
        return half(2 * sum(a * abs(b) for a, b in zip(h, w, strict=True)) / sum(h)), 0.5
    top = largest_code(bits)
    if bits == TERNARY:
        span, zero = 2 * max(abs(value) for value in w), 1.0
    else:
        low, high = min(0.0, *w), max(0.0, *w)
        span = high - low
        zero = -low * top / max(span, 1e-300)
        zero = float(np.float16(zero)) if search.zero is ZeroPoint.float else float(round(zero))
    best, chosen = float("inf"), 1.0
    for share in search.shares:
        scale = half(span * (share / top))
        error = 0.0
        for value, weight in zip(w, h, strict=True):
            code = min(max(np.floor(value / scale + (zero + 0.5)), 0), top)
            error += weight * abs(value - scale * (code - zero)) ** search.norm
        if error < best:
            best, chosen = error, scale
    return chosen, zero
