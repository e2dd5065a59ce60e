"""Cost models: time = alpha + beta * size for one kind of work, fitted to measurements.

Read `plan.py` first. Sizes are bytes for communication and multiply-adds for computation; a cost
does not know which. Where small and large sizes follow different lines, two segments are fitted.
`Interference` says how much slower work in one lane goes while another lane is busy.

Source: linear models by least squares, arXiv:2501.10714, section 4.1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gatewise.parallel.schedule.plan import LANES, Lane

__all__ = ["Amount", "Cost", "Interference", "cost_from_json", "fit_cost", "fit_line"]

_MIN_POINTS = 3  # of a segment
_GAIN = 10.0  # a second segment must improve the Bayesian information criterion by this much


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of one piece of work by its size; below `knee` the small segment holds."""

    alpha_ms: float  # start-up
    beta_ms: float  # per unit of size
    r2: float = 1.0  # share of the measurements' variance that the fit explains
    knee: float = 0.0  # size where the segments meet; 0: one segment
    small_alpha_ms: float = 0.0
    small_beta_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha_ms", "beta_ms", "knee", "small_alpha_ms", "small_beta_ms"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be at least 0 and finite")
        if not self.r2 <= 1:
            raise ValueError(f"r2 is {self.r2}; it must be at most 1")

    def ms(self, size: float) -> float:
        """Return the time of `size` units; nothing takes no time."""
        if size <= 0:
            return 0.0
        if size < self.knee:
            return self.small_alpha_ms + self.small_beta_ms * size
        return self.alpha_ms + self.beta_ms * size

    def inverse(self, ms: float) -> float:
        """Return the largest size that takes at most `ms`; 0 where not even the start fits."""
        if ms > self.ms(self.knee) or not self.knee:
            large = _inverse(self.alpha_ms, self.beta_ms, ms)
            if large >= self.knee:
                return large
        return min(_inverse(self.small_alpha_ms, self.small_beta_ms, ms), self.knee)

    def scaled(self, factor: float) -> "Cost":
        """Return the cost of work that takes `factor` times as long, start-up included."""
        return Cost(
            self.alpha_ms * factor,
            self.beta_ms * factor,
            self.r2,
            self.knee,
            self.small_alpha_ms * factor,
            self.small_beta_ms * factor,
        )

    def to_json(self) -> dict[str, float]:
        """Return the fields that matter as JSON."""
        value = {"alpha_ms": self.alpha_ms, "beta_ms": self.beta_ms, "r2": self.r2}
        if self.knee:
            value["knee"] = self.knee
            value["small_alpha_ms"] = self.small_alpha_ms
            value["small_beta_ms"] = self.small_beta_ms
        return value


def _inverse(alpha_ms: float, beta_ms: float, ms: float) -> float:
    if ms <= alpha_ms:
        return 0.0
    return (ms - alpha_ms) / beta_ms if beta_ms else math.inf


@dataclass(frozen=True, slots=True)
class Amount:
    """All work of one stage: a cost and the size of the whole; a chunk is a share of it."""

    cost: Cost
    size: float

    def ms(self, share: float = 1.0) -> float:
        """Return the time of a share of the work."""
        return self.cost.ms(self.size * share)

    def least_ms(self, max_chunks: int) -> float:
        """Return the least time of all the work over every number of equal chunks."""
        return min(r * self.ms(1.0 / r) for r in range(1, max_chunks + 1))


@dataclass(frozen=True, slots=True)
class Interference:
    """The slow-down matrix: `extra[lane][other]` = 0.3 is 30 % more time while `other` is busy.

    Several busy lanes add up. The empty matrix means that lanes do not disturb each other.
    """

    extra: Mapping[Lane, Mapping[Lane, float]]

    def __post_init__(self) -> None:
        for lane, row in self.extra.items():
            for other, value in row.items():
                if lane not in LANES or other not in LANES or lane == other:
                    raise ValueError(
                        f"interference names {lane}, {other}; it takes two different lanes of "
                        f"{', '.join(LANES)}"
                    )
                if not 0 <= value < math.inf:
                    raise ValueError(
                        f"interference of {other} on {lane} is {value}; it must be at least 0 "
                        "and finite: 0.3 is 30 % more time"
                    )

    @staticmethod
    def none() -> "Interference":
        """Return the matrix of lanes that do not disturb each other."""
        return Interference({})

    @staticmethod
    def mutual(pairs: Mapping[tuple[Lane, Lane], float]) -> "Interference":
        """Return the matrix in which each pair of lanes slows both down alike."""
        extra: dict[Lane, dict[Lane, float]] = {}
        for (one, other), value in pairs.items():
            extra.setdefault(one, {})[other] = value
            extra.setdefault(other, {})[one] = value
        return Interference(extra)

    def rate(self, lane: Lane, busy: Iterable[Lane]) -> float:
        """Return the speed of work in `lane`, 1 alone, while the lanes `busy` work too."""
        row = self.extra.get(lane)
        if not row:
            return 1.0
        return 1.0 / (1.0 + sum(row.get(other, 0.0) for other in busy if other != lane))

    def __bool__(self) -> bool:
        return any(value for row in self.extra.values() for value in row.values())


def fit_line(sizes: Sequence[float], ms: Sequence[float]) -> Cost:
    """Fit alpha + beta * size by least squares, both at least 0.

    Args:
        sizes: at least two different ones.
        ms: the time of each.

    Raises:
        ValueError: for too few or unequal numbers of measurements.
    """
    if len(sizes) != len(ms) or len(set(sizes)) < 2:
        raise ValueError(
            f"{len(sizes)} sizes and {len(ms)} times: a fit takes one time for each of at least "
            "two different sizes"
        )
    n = len(sizes)
    mean_x, mean_y = sum(sizes) / n, sum(ms) / n
    spread = sum((x - mean_x) ** 2 for x in sizes)
    beta = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, ms, strict=True)) / spread
    if beta < 0:
        beta = 0.0
    alpha = mean_y - beta * mean_x
    if alpha < 0:  # through the origin
        alpha = 0.0
        squares = sum(x * x for x in sizes)
        beta = sum(x * y for x, y in zip(sizes, ms, strict=True)) / squares
    line = Cost(alpha, beta)
    return Cost(alpha, beta, _r2(line, sizes, ms))


def fit_cost(sizes: Sequence[float], ms: Sequence[float]) -> Cost:
    """Fit one line, or two where a second one explains clearly more.

    Args:
        sizes: at least two different ones; seven or more for two segments.
        ms: the time of each.

    Raises:
        ValueError: as `fit_line`.
    """
    best = fit_line(sizes, ms)
    points = sorted(zip(sizes, ms, strict=True))
    n = len(points)
    score = _bic(_squares(best, sizes, ms), n, 2) - _GAIN
    for cut in range(_MIN_POINTS, n - _MIN_POINTS + 1):
        low, high = points[:cut], points[cut:]
        if low[-1][0] == high[0][0] or len(set(low)) < 2 or len(set(high)) < 2:
            continue
        try:
            small = fit_line(*zip(*low, strict=True))
            large = fit_line(*zip(*high, strict=True))
        except ValueError:  # all sizes of one side are equal
            continue
        both = Cost(large.alpha_ms, large.beta_ms, 1.0, high[0][0], small.alpha_ms, small.beta_ms)
        candidate = _bic(_squares(both, sizes, ms), n, 5)
        if candidate < score:
            score = candidate
            best = Cost(
                both.alpha_ms,
                both.beta_ms,
                _r2(both, sizes, ms),
                both.knee,
                both.small_alpha_ms,
                both.small_beta_ms,
            )
    return best


def cost_from_json(value: Mapping[str, Any]) -> Cost:
    """Return the cost that `Cost.to_json` described; ValueError or TypeError where it cannot."""
    unknown = set(value) - set(Cost.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown {sorted(unknown)}")
    return Cost(**{name: float(number) for name, number in value.items()})


def _squares(cost: Cost, sizes: Sequence[float], ms: Sequence[float]) -> float:
    return sum((cost.ms(x) - y) ** 2 for x, y in zip(sizes, ms, strict=True))


def _r2(cost: Cost, sizes: Sequence[float], ms: Sequence[float]) -> float:
    mean = sum(ms) / len(ms)
    total = sum((y - mean) ** 2 for y in ms)
    return 1.0 - _squares(cost, sizes, ms) / total if total else 1.0


def _bic(squares: float, n: int, parameters: int) -> float:
    return n * math.log(max(squares / n, 1e-18)) + parameters * math.log(n)
