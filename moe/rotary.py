"""Rotary positions: tables of angles, scaled for long texts or not, and the rotation.

Shapes:  B sequences   S positions   H heads   W width that is rotated
Source:  arXiv:2104.09864; scaling: see `attention_config.py`.
"""

import math

import torch
from torch import Tensor

from gatewise.moe.attention_config import RopeConfig, RopeScaling

__all__ = ["attention_factor", "mscale", "rotary_tables", "rotate"]


def rotary_tables(
    positions: int,
    width: int,
    base: float,
    *,
    start: int = 0,
    device: torch.device,
    scaling: RopeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine tables, fp32 (positions, 1, width / 2), from position `start`.

    Those of YaRN are multiplied by its attention factor.
    """
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    factor = 1.0
    if scaling is not None and scaling.scaling is not RopeScaling.none:
        frequency = _scaled(frequency, base, scaling)
        factor = attention_factor(scaling) if scaling.scaling is RopeScaling.yarn else 1.0
    place = torch.arange(start, start + positions, device=device, dtype=torch.float32)
    angle = torch.outer(place, frequency).unsqueeze(1)
    if factor == 1.0:
        return angle.cos(), angle.sin()
    return angle.cos() * factor, angle.sin() * factor


def rotate(x_BSHW: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pair (i, i + W/2) of each head by its position's angle."""
    cosine, sine = (table.to(x_BSHW.dtype) for table in rotary)
    first, second = x_BSHW.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def attention_factor(scaling: RopeConfig) -> float:
    """Return what YaRN multiplies queries and keys with."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all:
        return mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all)
    return mscale(scaling.factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's temperature of a stretch by `factor`; 1 where nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaled(frequency: Tensor, base: float, scaling: RopeConfig) -> Tensor:
    """Return the stretched frequencies."""
    if scaling.scaling is RopeScaling.linear:
        return frequency / scaling.factor
    if scaling.scaling is RopeScaling.llama3:
        turns = frequency * scaling.original_length / (2 * math.pi)
        share = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    else:
        pairs = len(frequency)
        low, high = (
            pairs * math.log(scaling.original_length / (beta * 2 * math.pi)) / math.log(base)
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        place = torch.arange(pairs, device=frequency.device, dtype=torch.float32)
        share = 1 - (place - low) / (high - low if high != low else 0.001)
    share = share.clamp(0, 1)  # of the frequency that stays as it is
    return frequency / scaling.factor * (1 - share) + frequency * share
