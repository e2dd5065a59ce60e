"""Comparisons by interleaved trials: the order of the candidates, and what their times say.

All candidates run within every trial, forth and back by turns (A B C, C B A, ...), so that a
machine that becomes slower, slows all of them. Ratios are of pairs from one trial.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["median_interval", "paired_speedup", "trial_orders"]

_RESAMPLES = 2000


def trial_orders(candidates: int, trials: int) -> list[list[int]]:
    """Return the order of the candidates in each trial: forth, back, forth, ..."""
    forth = list(range(candidates))
    return [forth if trial % 2 == 0 else forth[::-1] for trial in range(trials)]


def median_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval.

    Args:
        values: one for each trial; at least one.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.choice(np.asarray(values, float), (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def paired_speedup(
    baseline: Sequence[float], values: Sequence[float]
) -> tuple[float, float, float]:
    """Return the median over trials of baseline / value, and its 95 % interval.

    Args:
        baseline: times of the baseline, trial by trial.
        values: times in the same trials.
    """
    return median_interval([one / other for one, other in zip(baseline, values, strict=True)])
