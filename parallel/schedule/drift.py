"""When a profile is out of date: predictions and measurements have parted for a while.

One slow step says nothing; a link that lost half of its bandwidth shows in every step.
"""

from dataclasses import dataclass

__all__ = ["Drift"]


@dataclass(slots=True)
class Drift:
    """Counts the steps in a row in which a measurement is far from its prediction.

    Where several ranks decide, feed all of them the same numbers, or let one decide for all.
    """

    tolerance: float = 0.10  # share of the prediction
    patience: int = 20  # steps in a row
    steps: int = 0  # so many until now

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be above 0, as 0.1 for 10 %")
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1 step")

    def observe(self, predicted_ms: float, measured_ms: float) -> bool:
        """Take note of a step; return whether it is time to measure the profile again.

        Args:
            predicted_ms: above 0.
            measured_ms: of the same step.
        """
        far = abs(measured_ms - predicted_ms) > self.tolerance * predicted_ms
        self.steps = self.steps + 1 if far else 0
        if self.steps < self.patience:
            return False
        self.steps = 0  # a new profile gets as long
        return True
