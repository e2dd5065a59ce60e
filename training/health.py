"""Numbers that tell how a run is doing, summed on the device and reduced in one collective.

Shapes:  L MoE layers   E experts, all ranks
Names:   `group/name_unit`; `moe/` values are over all layers, `moe/layer_03/...` over one.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.buckets import Bucket
from gatewise.parallel.collectives import Group
from gatewise.parallel.reducer import GradientReducer
from gatewise.routers.api import Routing
from gatewise.routers.balance import max_violation

__all__ = ["HealthMeter", "expert_squares", "summarise"]

# rows of the per-layer sums
_SUMS = ("confidence", "entropy", "dropped", "tokens")


class HealthMeter:
    """Sums of one logging window.

    Args:
        layers: L; 0 for a dense model.
        num_experts: E.
        top_k: experts per token.
        device: where sums are kept.
    """

    def __init__(self, layers: int, num_experts: int, top_k: int, device: torch.device) -> None:
        self._layers, self._num_experts, self._top_k = layers, num_experts, top_k
        self._count_LE = torch.zeros(layers, num_experts, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(_SUMS), layers, dtype=torch.float64, device=device)
        self._norm_squares = torch.zeros(layers * num_experts, dtype=torch.float64, device=device)

    def add(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch."""
        for index, routing in enumerate(routings):
            assert routing.load is not None
            self._count_LE[index] += routing.load.count_E
            for row, name in enumerate(_SUMS):
                value = routing.load.tokens if name == "tokens" else routing.health.get(name)
                if value is not None:
                    # a step with NaN is skipped, and shall not spoil the whole window
                    self._sums[row, index] += torch.nan_to_num(value)

    def sums(self) -> dict[str, Tensor]:
        """Return this rank's sums since the last `drain`; views, to be copied or loaded into."""
        return {"count_LE": self._count_LE, "sums": self._sums}

    def measure_gradients(self, reducer: GradientReducer) -> None:
        """Take the norms of single experts from a step's reduced gradients."""
        if self._layers:
            squares_LE = expert_squares(reducer.buckets, self._num_experts)
            self._norm_squares = squares_LE.flatten() / reducer.divisor**2

    def drain(self, control: Group) -> dict[str, float]:
        """Return the window's values over all ranks and start a new window.

        Args:
            control: all ranks.
        """
        if not self._layers:
            return {}
        packed = torch.cat((self._count_LE.flatten(), self._sums.flatten(), self._norm_squares))
        if control.handle is not None:
            dist.all_reduce(packed, group=control.handle)
        cut = self._layers * self._num_experts
        counts, sums, squares = packed.split((cut, self._sums.numel(), cut))
        values = summarise(
            counts.view(self._layers, self._num_experts),
            sums.view(len(_SUMS), self._layers),
            top_k=self._top_k,
        )
        norms = squares.sqrt().sort().values
        for name, place in (("min", 0), ("median", norms.numel() // 2), ("max", -1)):
            values[f"grad/expert_norm_{name}"] = float(norms[place])
        self._count_LE.zero_()
        self._sums.zero_()
        return values


def expert_squares(buckets: Sequence[Bucket], num_experts: int) -> Tensor:
    """Return (layers, E) sums of squares of each expert's gradient, for summing over ranks.

    Only what this rank owns counts, divided by how many ranks own it, as in `gradient_squares`.
    """
    rows: dict[str, Tensor] = {}
    for bucket in buckets:
        if bucket.label != "expert":
            continue
        owned, replicas = bucket.owned, bucket.groups.replicate.size
        for slot in bucket.slots:
            layer = slot.spec.name.rpartition(".")[0]
            # every rank lists every layer, also one of which it owns nothing: the sums must align
            row = rows.setdefault(
                layer, torch.zeros(num_experts, dtype=torch.float64, device=bucket.values.device)
            )
            start, end = max(slot.offset, owned.start), min(slot.end, owned.stop)
            if start >= end:
                continue
            width = slot.gradient[0].numel()
            first = slot.spec.start // width
            mine = torch.zeros_like(slot.gradient).view(-1)
            mine[start - slot.offset : end - slot.offset] = bucket.gradients[start:end]
            square_e = torch.linalg.vector_norm(mine.view(-1, width), dim=1).square() / replicas
            row[first : first + square_e.shape[0]] += square_e
    return torch.stack([rows[name] for name in sorted(rows)])


def summarise(count_LE: Tensor, sums: Tensor, *, top_k: int) -> dict[str, float]:
    """Turn sums over a window into named values.

    `max_violation` is max/mean - 1 of the demand (0 is balance), `cv` its standard deviation over
    its mean, `load_entropy` its entropy over ln E (1 is balance), `dead_frac` the share of experts
    that nobody chose, `drop_frac` the share of pairs dropped, `router_entropy` the mean entropy of
    a token's scores in nats, `router_confidence` the mean best score.
    """
    confidence_L, entropy_L, dropped_L, tokens_L = sums
    tokens_L = tokens_L.clamp(min=1)
    share_LE = count_LE / count_LE.sum(-1, keepdim=True).clamp(min=1)
    mean_L1 = count_LE.mean(-1, keepdim=True).clamp(min=1e-9)
    per_layer = {
        "max_violation": max_violation(count_LE),
        "cv": (count_LE / mean_L1).std(-1, correction=0),
        "load_entropy": torch.special.entr(share_LE).sum(-1)
        / max(torch.tensor(count_LE.shape[-1]).log().item(), 1e-9),
        "dead_frac": (count_LE == 0).double().mean(-1),
        "drop_frac": dropped_L / (tokens_L * top_k),
        "router_entropy": entropy_L / tokens_L,
        "router_confidence": confidence_L / tokens_L,
    }
    table = torch.stack(list(per_layer.values())).tolist()
    values: dict[str, float] = {}
    for name, row in zip(per_layer, table, strict=True):
        worst = name in ("max_violation", "cv", "dead_frac")
        values[f"moe/{name}"] = max(row) if worst else sum(row) / len(row)
        values |= {f"moe/layer_{i:02d}/{name}": value for i, value in enumerate(row)}
    return values
