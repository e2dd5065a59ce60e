"""Loss spikes: a step whose loss or gradient norm stands far above those before.

Compared with the median of the last accepted steps, in median deviations: neither is moved by
single outliers. All of it stays on the device, so that a step can be held back without the host
waiting; all ranks compute it from numbers that are equal in every bit.
"""

import torch
from torch import Tensor

from gatewise.training.guard_config import SpikePolicy, SpikesConfig

__all__ = ["SpikeGuard"]

_NORMAL = 1.4826  # median deviation of a normal distribution to its standard deviation
_LEAST_SHARE = 0.01  # of the median: below this, deviations are not told apart


class SpikeGuard:
    """The last accepted losses and gradient norms.

    Args:
        config: window and threshold.
        device: where they are kept.
    """

    def __init__(self, config: SpikesConfig, device: torch.device) -> None:
        self._config = config
        self._ring_W2 = torch.full((config.window, 2), torch.nan, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._places_W = torch.arange(config.window, device=device)

    @property
    def holds_back(self) -> bool:
        """Whether a spike changes no weights."""
        return self._config.policy in (SpikePolicy.skip, SpikePolicy.rollback)

    def judge(self, loss: Tensor, norm: Tensor, finite: Tensor) -> Tensor:
        """Tell on the device whether a step is a spike, and remember it where it is not.

        Args:
            loss: scalar, over the whole batch.
            norm: scalar, of all gradients.
            finite: scalar, whether both are; what is not finite is no spike.
        """
        now_2 = torch.stack((loss, norm)).float()
        spiked = finite & (now_2 > self.limits()).any()
        accepted = finite & ~spiked
        here_W1 = ((self._places_W == self._count % self._config.window) & accepted).unsqueeze(-1)
        self._ring_W2.copy_(torch.where(here_W1, now_2, self._ring_W2))
        self._count += accepted
        return spiked

    def limits(self) -> Tensor:
        """Return the largest ordinary loss and gradient norm; infinite until there is a past."""
        median_2 = self._ring_W2.nanmedian(0).values
        deviation_2 = (self._ring_W2 - median_2).abs().nanmedian(0).values * _NORMAL
        deviation_2 = torch.maximum(deviation_2, median_2.abs() * _LEAST_SHARE)
        limit_2 = median_2 + self._config.sigmas * deviation_2
        known = self._count >= self._config.window // 2
        return torch.where(known, limit_2, torch.inf)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps; views, to be copied or loaded into."""
        return {"spikes_W2": self._ring_W2, "spikes_count": self._count}
