"""Numbers that tell how a run is doing, summed on the device and reduced in one collective.

Shapes:  L MoE layers   E experts, all ranks
Names:   `group/name_unit`; `moe/` values are over all layers, `moe/layer_03/...` over one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.buckets import OwnedGradient
from gatewise.parallel.collectives import Group
from gatewise.parallel.squares import square_sums
from gatewise.routers.api import Routing
from gatewise.routers.balance import max_violation
from gatewise.training.measures.load import (
    dead_share,
    drop_ratio,
    effective_k,
    load_cv,
    load_entropy,
)

__all__ = ["SUMS", "HealthMeter", "expert_squares", "summarise"]

# rows of the per-layer sums: what routers report, tokens
SUMS = ("confidence", "entropy", "inner", "outer", "weight", "logsumexp", "dropped", "tokens")
_RECALL = "recall"  # one row more, where a pre-gate learns
# values of which the largest layer's stands for all; of the others the mean
_WORST = ("max_violation", "cv", "dead_frac", "router_max_logit")


class HealthMeter:
    """Sums of one logging window.

    Args:
        layers: L; 0 for a dense model.
        num_experts: E.
        device: where sums are kept.
        ahead: whether a pre-gate learns from the layers, so that its recall is known.
    """

    def __init__(
        self, layers: int, num_experts: int, device: torch.device, *, ahead: bool = False
    ) -> None:
        self._layers, self._num_experts = layers, num_experts
        self._names = (*SUMS, _RECALL) if ahead else SUMS
        self._count_LE = torch.zeros(layers, num_experts, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(self._names), layers, dtype=torch.float64, device=device)
        self._largest_L = torch.zeros(layers, dtype=torch.float64, device=device)
        self._norm_squares = torch.zeros(layers * num_experts, dtype=torch.float64, device=device)

    def add(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch."""
        for index, routing in enumerate(routings):
            assert routing.load is not None
            self._count_LE[index] += routing.load.count_E
            for row, name in enumerate(self._names):
                value = routing.load.tokens if name == "tokens" else routing.health.get(name)
                if value is not None:
                    # a step with NaN is skipped, and shall not spoil the whole window
                    self._sums[row, index] += torch.nan_to_num(value)
            largest = routing.health.get("largest_logit")
            if largest is not None:
                largest = torch.nan_to_num(largest).to(self._largest_L.dtype)
                self._largest_L[index] = torch.maximum(self._largest_L[index], largest)

    def sums(self) -> dict[str, Tensor]:
        """Return this rank's sums since the last `drain`; views, to be copied or loaded into."""
        return {
            "count_LE": self._count_LE,
            "sums": self._sums,
            "largest_logit_L": self._largest_L,
        }

    def measure_gradients(self, squares_LE: Tensor, divisor: float) -> None:
        """Take the norms of single experts.

        Args:
            squares_LE: from `expert_squares`, this rank's share.
            divisor: of the gradients, as they are sums over ranks.
        """
        if self._layers:
            self._norm_squares = squares_LE.flatten() / divisor**2

    def drain(self, control: Group) -> dict[str, Any]:
        """Return the window's values over all ranks and start a new window.

        Beside single numbers there is `experts/load_ratio`: for each MoE layer a list of the
        experts' demand over its mean.

        Args:
            control: all ranks.
        """
        if not self._layers:
            return {}
        # a sum over ranks carries each rank's maxima too, in a row of its own
        largest_RL = self._largest_L.new_zeros(control.size, self._layers)
        largest_RL[control.rank] = self._largest_L
        packed = torch.cat(
            (
                self._count_LE.flatten(),
                self._sums.flatten(),
                self._norm_squares,
                largest_RL.flatten(),
            )
        )
        if control.handle is not None:
            dist.all_reduce(packed, group=control.handle)
        cut = self._layers * self._num_experts
        counts, sums, squares, largest = packed.split(
            (cut, self._sums.numel(), cut, largest_RL.numel())
        )
        count_LE = counts.view(self._layers, self._num_experts)
        values: dict[str, Any] = {
            **summarise(count_LE, sums.view(self._sums.shape), largest.view_as(largest_RL).amax(0))
        }
        ratio_LE = count_LE / count_LE.mean(-1, keepdim=True).clamp(min=1e-9)
        values["experts/load_ratio"] = [
            [round(ratio, 4) for ratio in row] for row in ratio_LE.tolist()
        ]
        norms = squares.sqrt().sort().values
        for name, place in (("min", 0), ("median", norms.numel() // 2), ("max", -1)):
            values[f"grad/expert_norm_{name}"] = float(norms[place])
        self._count_LE.zero_()
        self._sums.zero_()
        self._largest_L.zero_()
        return values


def expert_squares(
    gradients: Sequence[OwnedGradient], layers: Sequence[str], num_experts: int
) -> Tensor:
    """Return (layers, E) sums of squares of each expert's gradient, for summing over ranks.

    Only what this rank owns counts, divided by how many ranks own it, as in `gradient_squares`.

    Args:
        gradients: other parameters' are passed over.
        layers: names of the experts of all layers, also of those that this rank owns nothing of.
        num_experts: E.
    """
    rows: dict[str, Tensor] = {}
    for gradient in gradients:
        part, spec = gradient.part, gradient.part.spec
        if spec.label != "expert":
            continue
        whole = gradient.values.new_zeros(spec.parameter.shape)
        whole.view(-1)[part.start : part.end] = gradient.values
        first = spec.start // math.prod(spec.shape[1:])
        square_e = square_sums(whole.flatten(1)) / gradient.replicas
        row = square_e.new_zeros(num_experts, dtype=torch.float64)
        row[first : first + square_e.shape[0]] += square_e
        layer = spec.name.rpartition(".")[0]
        rows[layer] = rows[layer] + row if layer in rows else row
    nothing = gradients[0].values.new_zeros(num_experts, dtype=torch.float64)
    return torch.stack([rows.get(name, nothing) for name in layers])


def summarise(count_LE: Tensor, sums: Tensor, largest_L: Tensor) -> dict[str, float]:
    """Turn sums over a window into named values.

    `max_violation` is max/mean - 1 of the demand (0 is balance), `cv` its standard deviation over
    its mean, `load_entropy` its entropy over ln E (1 is balance), `dead_frac` the share of experts
    that nobody chose, `drop_frac` the share of pairs dropped, `effective_k` the pairs a token kept.
    Of a token's scores: `router_entropy` in nats, `router_confidence` the best,
    `router_inner_balance` the geometric mean of best over second, `router_outer_balance` the share
    of the chosen, `router_weight_sum` the sum of the combine weights, `router_logsumexp` of the
    logits; means over tokens. `router_max_logit` is the largest |logit|. `ahead_recall`, where a
    pre-gate learns, is the share of a layer's own choice that the pre-gate had chosen.

    Args:
        count_LE: demand.
        sums: (rows as `SUMS`, and perhaps recall, L).
        largest_L: the largest |logit| of each layer.
    """
    sum_L = dict(zip((*SUMS, _RECALL)[: len(sums)], sums, strict=True))
    tokens_L, pairs_L = sum_L["tokens"], count_LE.sum(-1)
    mean_L = {name: value / tokens_L.clamp(min=1) for name, value in sum_L.items()}
    per_layer = {
        "max_violation": max_violation(count_LE),
        "cv": load_cv(count_LE),
        "load_entropy": load_entropy(count_LE),
        "dead_frac": dead_share(count_LE),
        "drop_frac": drop_ratio(sum_L["dropped"], pairs_L),
        "effective_k": effective_k(pairs_L, sum_L["dropped"], tokens_L),
        "router_entropy": mean_L["entropy"],
        "router_confidence": mean_L["confidence"],
        "router_inner_balance": mean_L["inner"].exp(),
        "router_outer_balance": mean_L["outer"],
        "router_weight_sum": mean_L["weight"],
        "router_logsumexp": mean_L["logsumexp"],
        "router_max_logit": largest_L,
    }
    if _RECALL in mean_L:
        per_layer["ahead_recall"] = mean_L[_RECALL]
    table = torch.stack([value.double() for value in per_layer.values()]).tolist()
    values: dict[str, float] = {}
    for name, row in zip(per_layer, table, strict=True):
        values[f"moe/{name}"] = max(row) if name in _WORST else sum(row) / len(row)
        values |= {f"moe/layer_{i:02d}/{name}": value for i, value in enumerate(row)}
    return values
