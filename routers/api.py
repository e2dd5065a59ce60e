"""What a router decides, and what it is told: the types that every other folder passes along.

Read first: this file; then `router.py` (how a router is put together).

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token, at most
         D model width   B sequences on this rank (T = B * positions, sequence-major)
         H width of a router's state   L MoE layers   M bins of a histogram   S slots
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Decision",
    "Demand",
    "ExpertColumns",
    "Load",
    "NoiseKey",
    "Router",
    "Routing",
    "RoutingContext",
    "SlotMix",
]


@dataclass(frozen=True, slots=True)
class Load:
    """One layer's contribution to counters that ranks and micro-batches share.

    `count_E` is demand: pairs chosen before any capacity drop, padding left out.
    """

    count_E: Tensor  # float32, no gradient
    score_E: Tensor  # sum over tokens of scores that sum to 1 per token; carries the gradient
    tokens: Tensor  # float32 scalar: tokens that are not padding
    margin_EM: Tensor | None = None  # float32 histogram, where a quantile moves the bias


@dataclass(frozen=True, slots=True)
class Demand:
    """What one optimizer step asked of the experts of every layer, over all ranks."""

    count_LE: Tensor  # float32
    tokens: Tensor  # float32 scalar
    margin_LEM: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SlotMix:
    """Soft routing: what the experts get, and how tokens are put together from what they give.

    Slots are rows with a fixed expert each; both mixings stay within a sequence.
    """

    gather_BSP: Tensor  # weights of a sequence's P positions in each slot; rows sum to 1
    scatter_BPS: Tensor  # weights of the slots in each position; rows sum to 1
    expert_S: Tensor  # int64, the expert of each slot of one sequence


@dataclass(frozen=True, slots=True)
class ExpertColumns:
    """Statistics of the columns of each expert's first weight, over its units."""

    mean_ED: Tensor
    variance_ED: Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The decision of one layer for this rank's tokens."""

    expert_TK: Tensor  # int64 in [0, E); -1: no expert here, or a pair that was dropped
    weight_TK: Tensor  # combine weights, float32; cast when combining
    logits_TE: Tensor | None = None  # float32, for calibration and plots
    losses: Mapping[str, Tensor] = field(default_factory=dict)  # weighted scalars
    load: Load | None = None
    health: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars to report
    variable: bool = False  # whether the router itself left places empty (-1)
    slots: SlotMix | None = None  # soft routing; `expert_TK` then has no columns


@dataclass(frozen=True, slots=True)
class Decision:
    """The experts of one layer, chosen before layer 0 by a pre-gate or by a recorded run."""

    expert_TK: Tensor  # int64 in [0, E); -1: no expert here
    logits_TE: Tensor | None = None  # of the pre-gate, float32, with gradient
    weighs: bool = False  # whether the weights come from `logits_TE`, not from the layer's router


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """Where random draws come from, so that they depend on the sample and not on the layout.

    Each sequence draws from a generator seeded by (seed, step, its global index, layer): any
    number of ranks, any micro-batch and any recomputation draw the same numbers.
    """

    seed: int
    step: int
    sequences: tuple[int, ...]  # global sample index of each of this rank's B sequences
    part: int = 0  # which part of the positions of each sequence is here
    parts: int = 1  # in how many equal parts they lie on ranks

    def uniform(
        self, shape: tuple[int, ...], *, layer: int, device: torch.device, stream: int = 0
    ) -> Tensor:
        """Return U(0, 1) of `shape` = (T, ...), T a multiple of the number of sequences.

        Args:
            shape: of the result.
            layer: which layer draws.
            device: of the result.
            stream: tells apart the draws of one layer.
        """
        positions = shape[0] // len(self.sequences)
        mine = slice(self.part * positions, (self.part + 1) * positions)
        more = (stream,) if stream else ()
        rows = []
        for sequence in self.sequences:
            mixed = _mix(self.seed, self.step, sequence, layer, *more)
            generator = torch.Generator().manual_seed(mixed)
            whole = torch.rand((positions * self.parts, *shape[1:]), generator=generator)
            rows.append(whole[mine])
        return torch.cat(rows).to(device)


def _mix(*parts: int) -> int:
    """Hash integers to 63 bits (the finaliser of SplitMix64 on a running sum)."""
    value = 0
    for part in parts:
        value = (value + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """What is threaded through the layers; replaced, never mutated."""

    state_TH: Tensor | None = None  # recurrent routers: state after the previous MoE layer
    ahead: tuple[Decision | None, ...] | None = None  # by layer: decisions made before layer 0
    token_ids: Tensor | None = None  # int64 (T,), for hash routers
    padding_T: Tensor | None = None  # bool, True = padding
    sequences: int = 1  # B; T is sequence-major
    noise: NoiseKey | None = None  # None: no noise (evaluation)
    columns: ExpertColumns | None = None  # of this layer's experts, for routers that read them
    measures: bool = True  # False: nobody reads losses, load and health of the routings

    def decision(self, layer: int) -> Decision | None:
        """Return what was decided ahead for a layer of the model; None where it decides itself."""
        return None if self.ahead is None else self.ahead[layer]


class Router(Protocol):
    """A decision per token in one layer.

    `router.py` has what a model further asks of its routers: parameters, losses, `after_step`.
    """

    num_experts: int

    def __call__(
        self, x_TD: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Routing, RoutingContext]:
        """Route `x_TD`; return the decision and the context for the next layer."""
        ...
