"""What every implementation of `AheadRouter` shares: the version, and how a plan is made.

Read `plan.py` first.

Shapes:  B sequences   S positions   T = B * S tokens   L decisions   K experts per token
         E experts, all ranks
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gatewise.routers.ahead.config import AheadConfig
from gatewise.routers.ahead.plan import RoutePlan
from gatewise.routers.ahead.trunk import PrefixCache
from gatewise.routers.shapes import Weight
from gatewise.routers.weights import RouterWeights

__all__ = ["DecidesAhead"]


class DecidesAhead(RouterWeights, ABC):
    """Chooses the experts of all layers from token ids.

    Args:
        weights: parameters.
        config: settings.
        layers: MoE layers of the model.
        num_experts: E.
        top_k: K.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        config: AheadConfig,
        *,
        layers: int,
        num_experts: int,
        top_k: int,
    ) -> None:
        super().__init__(weights)
        self.config = config
        self.layers, self.num_experts, self.top_k = layers, num_experts, top_k
        self.version = 0  # grows with every change of what decides

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DecidesAhead":
        super()._apply(fn, recurse)
        self.advance()
        return self

    def advance(self) -> None:
        """Note a change: plans made before are stale."""
        self.version += 1

    @abstractmethod
    def choose(self, token_BS: Tensor, cache: PrefixCache | None) -> tuple[Tensor, Tensor | None]:
        """Return the experts (L, T, K), and the logits (L, T, E) where there are any."""

    def plan(
        self,
        token_BS: Tensor,
        *,
        padding_T: Tensor | None = None,
        cache: PrefixCache | None = None,
    ) -> RoutePlan:
        """Choose the experts of every layer; a choice depends on no later token.

        Args:
            token_BS: int64 token ids.
            padding_T: True where a token is padding; it gets no expert.
            cache: of the tokens before, extended in place.
        """
        expert_LTK, logits_LTE = self.choose(token_BS, cache)
        if padding_T is not None:
            expert_LTK = torch.where(padding_T.view(1, -1, 1), -1, expert_LTK)
        return RoutePlan(
            expert_LTK,
            self.num_experts,
            self.layers,
            logits_LTE,
            logits_LTE is not None and self.config.weighs,
            self.version,
        )
