"""How much the choice of experts still moves: the same text, one evaluation after the other.

Shapes:  T tokens of this rank's first pass   K experts per token, at most
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gatewise.routers.api import Routing

__all__ = ["RouteProbe"]

_TOKENS = 1024  # of this rank's first pass: enough for a share, and little to keep
_NAME = "probed_expert_LTK"


class RouteProbe:
    """Keeps the experts of the first pass of an evaluation until the next one."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []  # (T, K) of each MoE layer

    def compare(self, routings: Sequence[Routing]) -> Tensor:
        """Return this rank's (kept, all) pairs against the look before, and remember these.

        A pair is kept where the token had the expert before too, in whatever place. Both are 0 at
        the first look, for a dense model, and where the number of choices is another one.
        """
        now = [routing.expert_TK[:_TOKENS].clone() for routing in routings]
        before, self._before = self._before, now
        sums = torch.zeros(2, dtype=torch.float64)
        if not now or [x.shape for x in now] != [x.shape for x in before]:
            return sums
        for new_TK, old_TK in zip(now, before, strict=True):
            is_pair_TK = new_TK >= 0
            same_TK = (new_TK.unsqueeze(2) == old_TK.unsqueeze(1)).any(2) & is_pair_TK
            sums += torch.stack((same_TK.sum(), is_pair_TK.sum())).cpu()
        return sums

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered by name, for a checkpoint; nothing before the first look."""
        if not self._before or len({before.shape for before in self._before}) > 1:
            return {}
        return {_NAME: torch.stack(self._before).to(torch.int32)}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Remember what a checkpoint of equally many ranks kept, so that the next look compares."""
        kept = state.get(_NAME)
        self._before = [] if kept is None else list(kept.long().to(device))
