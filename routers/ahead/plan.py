"""A route plan: the experts of every token in every layer, as data.

A pre-gate makes one before layer 0; a recorder makes one from what the layers' routers chose. Who
runs a plan follows it to the letter, so `digest` of what was executed equals `digest` of the plan.

Read first: `routers/api.py`, `Decision`.

Shapes:  L decisions: one per MoE layer, or 1 for all of them   T tokens on this rank
         K experts per token   E experts, all ranks
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gatewise.routers.ahead.trunk import PrefixCache
from gatewise.routers.api import Decision, Routing

__all__ = ["AheadRouter", "RoutePlan", "load_routes", "record_routes", "save_routes"]


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """Decisions for the tokens of one batch, made before its layer 0.

    A token of padding, and a place that a token does not use, is -1.
    """

    expert_LTK: Tensor  # int64 in [-1, E)
    num_experts: int
    layers: int  # MoE layers that it was made for
    logits_LTE: Tensor | None = None  # a pre-gate's, float32, with gradient
    weighs: bool = False  # whether the experts' weights come from these logits too
    version: int | None = None  # of the pre-gate's parameters; None: recorded, never stale

    def layer(self, index: int) -> Decision:
        """Return the decision of MoE layer `index`, counted from 0 over MoE layers."""
        row = index if self.expert_LTK.shape[0] > 1 else 0
        return Decision(
            self.expert_LTK[row],
            None if self.logits_LTE is None else self.logits_LTE[row],
            self.weighs,
        )

    def check(self, *, layers: int, tokens: int, num_experts: int) -> None:
        """Raise `ValueError` unless the plan is for so many layers, tokens and experts."""
        have = (self.layers, self.expert_LTK.shape[1], self.num_experts)
        for name, ours, wanted in zip(
            ("MoE layers", "tokens", "experts"), have, (layers, tokens, num_experts), strict=True
        ):
            if ours != wanted:
                raise ValueError(
                    f"the route was made for {ours} {name} but this batch has {wanted}; give the "
                    "route of this very batch and model, or let the router decide"
                )

    def digest(self) -> str:
        """Return the SHA-256 of the experts in all layers, independent of device and type."""
        expert_LTK = self.expert_LTK
        if expert_LTK.shape[0] < self.layers:
            expert_LTK = expert_LTK.expand(self.layers, -1, -1)
        bytes_ = expert_LTK.cpu().numpy().astype("<i4").tobytes()
        shape = f"{tuple(expert_LTK.shape)} of {self.num_experts}".encode()
        return hashlib.sha256(shape + bytes_).hexdigest()


class AheadRouter(Protocol):
    """Decides for all layers of a batch at once, before layer 0."""

    version: int  # grows with every change of what it decides by

    def plan(
        self,
        token_BS: Tensor,
        *,
        padding_T: Tensor | None = None,
        cache: PrefixCache | None = None,
    ) -> RoutePlan:
        """Choose the experts of every layer from the token ids."""
        ...

    def advance(self) -> None:
        """Note a change: plans made before are stale."""
        ...


def record_routes(routings: Sequence[Routing], *, num_experts: int) -> RoutePlan:
    """Return what the layers chose in one forward pass, to be replayed on the same batch.

    A replay takes these experts and weighs them with current scores.

    Args:
        routings: of every MoE layer, in order; layers may differ in experts per token.
        num_experts: E.

    Raises:
        ValueError: for a routing without experts per token (a soft router).
    """
    if not routings:
        raise ValueError("there is no routing to record; the model has no MoE layer")
    widest = max(routing.expert_TK.shape[1] for routing in routings)
    rows = [
        torch.nn.functional.pad(r.expert_TK, (0, widest - r.expert_TK.shape[1]), value=-1)
        for r in routings
    ]
    return RoutePlan(torch.stack(rows), num_experts, len(rows))


def save_routes(path: Path, plan: RoutePlan) -> None:
    """Write a plan's experts to an .npz file."""
    smallest = np.int16 if plan.num_experts < 1 << 15 else np.int32
    with open(path, "wb") as stream:
        np.savez_compressed(
            stream,
            experts=plan.expert_LTK.cpu().numpy().astype(smallest),
            sizes=np.array([plan.num_experts, plan.layers]),
        )


def load_routes(path: Path, *, device: torch.device | None = None) -> RoutePlan:
    """Read what `save_routes` wrote.

    Raises:
        ValueError: if the file is no such file, or holds experts out of range.
    """
    try:
        with np.load(path) as stored:
            experts, sizes = stored["experts"], stored["sizes"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no recorded route ({error}); record one first") from None
    num_experts, layers = (int(size) for size in sizes)
    if experts.ndim != 3 or (
        experts.size and not -1 <= experts.min() <= experts.max() < num_experts
    ):
        raise ValueError(f"{path} is damaged: its experts are not all in [-1, {num_experts})")
    expert_LTK = torch.from_numpy(experts.astype(np.int64))
    return RoutePlan(expert_LTK.to(device) if device else expert_LTK, num_experts, layers)
