"""Which rank is slow: its own work of a step, measured up to each wait for others.

The time of a whole step says nothing, because every rank waits for the slowest: a collective ends
for all at once. So what counts is the step's time less the time in which nothing but
communication was under way.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gatewise.parallel.collectives import Group
from gatewise.training.guard_config import StragglersConfig

__all__ = ["PaceMeter", "Straggler", "find_straggler"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank whose own work takes longer than the others'."""

    rank: int
    own_ms: float
    others_ms: float  # median

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"rank {self.rank} is slow: {self.own_ms:.0f} ms of work of its own a step, the other "
            f"ranks {self.others_ms:.0f} ms; they wait for it"
        )


class PaceMeter:
    """Own work of this rank's steps since the last record.

    Args:
        config: from when on a rank is called slow.
        control: all ranks.
        device: of collectives.
    """

    def __init__(self, config: StragglersConfig, control: Group, device: torch.device) -> None:
        self._config, self._control, self._device = config, control, device
        self._own_ms: list[float] = []

    def add(self, step_ms: float, exposed_ms: float) -> None:
        """Take a step: its time, and the part in which this rank only communicated or waited."""
        self._own_ms.append(max(0.0, step_ms - exposed_ms))

    def clear(self) -> None:
        """Forget the steps since the last record."""
        self._own_ms = []

    def drain(self, step: int) -> dict[str, float]:
        """Return the means over the window, compared between ranks, and warn of a slow one."""
        own_ms, self._own_ms = self._own_ms, []
        mean = sum(own_ms) / max(len(own_ms), 1)
        table = torch.zeros(self._control.size, dtype=torch.float64, device=self._device)
        table[self._control.rank] = mean
        if self._control.handle is not None:
            dist.all_reduce(table, group=self._control.handle)
        every_ms = table.tolist()
        straggler = find_straggler(every_ms, self._config)
        if straggler is not None and self._control.rank == 0:
            _log.warning("step %d: %s", step, straggler)
        return {
            "ranks/own_ms_median": statistics.median(every_ms),
            "ranks/own_ms_max": max(every_ms),
            "ranks/slowest": float(every_ms.index(max(every_ms))),
        }


def find_straggler(every_ms: Sequence[float], config: StragglersConfig) -> Straggler | None:
    """Return the slowest rank if it is far behind the median of the others."""
    if len(every_ms) < 2 or config.ratio is None:
        return None
    slowest = every_ms.index(max(every_ms))
    others_ms = statistics.median(ms for rank, ms in enumerate(every_ms) if rank != slowest)
    own_ms = every_ms[slowest]
    if own_ms < config.ratio * others_ms or own_ms - others_ms < config.least_ms:
        return None
    return Straggler(slowest, own_ms, others_ms)
