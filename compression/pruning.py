"""Dynamic pruning: experts that a token hardly weighs are not run for it.

`LayerPruner` stands between a layer's router and its dispatcher. It takes the routing as it is,
after any grouping or bias, and sets dropped choices to -1, so their rows are never sent. It works
on the combine weights alone: these come from scores without bias, and dividing them by their sum
changes no ratio. The largest weight of a token always stays; shared experts are not in the routing.

| rule | the expert of rank j (by weight, from 1) is dropped if |
|---|---|
| ratio, budget | w_j / w_1 is below the layer's threshold of its rank, or a rank before went |
| ser | j > keep_least and w_j <= threshold * w_1 |
| top_p | the ranks before hold at least top_p of the token's weight |
| saliency | w_j times the mean norm of the expert's output is below the layer's threshold |

Read first: `routers/api.py`. The thresholds are found in `thresholds.py`.

Shapes:  T tokens   K choices per token   E experts   D model width
Source:  MC-MoE, arXiv:2410.06270, section 3.3 (ratio). saliency: the factor of REAP.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.config import Protect, PruneRule
from gatewise.compression.protection import Attended, Protection
from gatewise.moe.attention import Attention
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block, Decoder
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.api import Routing, RoutingContext
from gatewise.routers.router import ComposedRouter

__all__ = [
    "PRUNE_FILE",
    "LayerPruner",
    "LayerRule",
    "Pruning",
    "apply_pruning",
    "kept_choices",
    "prune_routing",
    "read_pruning",
    "renormalises",
    "sort_choices",
]

PRUNE_FILE = "prune.json"
PRUNE_FORMAT = 1
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class LayerRule:
    """What one layer drops; fields of other rules are empty."""

    layer: int
    decode_norm: float  # of `Protection`
    ratio: tuple[float, ...] = ()  # least w_j / w_1 by rank, the first of which is not used
    top_p: float = 1.0
    saliency: float = 0.0
    output_norm: tuple[float, ...] = ()  # mean of |E(x)| by expert


@dataclass(frozen=True, slots=True)
class Pruning:
    """How a whole model is pruned."""

    rule: PruneRule
    protect: Protect
    share: float  # of the tokens of a sequence that are protected
    queries: int
    preserve_sum: bool  # rescale the weights also where the model does not renormalise
    layers: tuple[LayerRule, ...]  # of every MoE layer

    def to_json(self) -> str:
        """Return it as text; `from_json` gives an equal one back."""
        record = asdict(self)
        record |= {"format": PRUNE_FORMAT, "rule": self.rule.name, "protect": self.protect.name}
        return json.dumps(record, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes, *, source: str) -> "Pruning":
        """Read it.

        Raises:
            CheckpointError: if the text is none; `source` names it.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            found = record.pop("format")
            if found != PRUNE_FORMAT:
                raise CheckpointError(
                    f"{source} has format {found}; this version reads {PRUNE_FORMAT}"
                )
            layers = []
            for item in record.pop("layers"):
                for name in ("ratio", "output_norm"):
                    item[name] = tuple(item[name])
                layers.append(LayerRule(**item))
            rule, protect = PruneRule[record.pop("rule")], Protect[record.pop("protect")]
            return Pruning(rule=rule, protect=protect, layers=tuple(layers), **record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{source} is damaged: it is no pruning rule") from error


class LayerPruner:
    """Prunes the routing of one layer.

    Args:
        kind: which rule.
        rule: its thresholds in this layer.
        protection: who keeps all experts.
        rescale: whether the kept weights get the sum that all had.
    """

    def __init__(
        self, kind: PruneRule, rule: LayerRule, protection: Protection, *, rescale: bool
    ) -> None:
        self._kind, self._rule, self._protection = kind, rule, protection
        self._rescale = rescale
        self._attended: Attended | None = None

    def watch(self, q_BHSW: Tensor, k_BJPW: Tensor) -> None:
        """Take the queries and keys of the attention right before this layer."""
        self._attended = (q_BHSW, k_BJPW)

    def __call__(self, x_TD: Tensor, routing: Routing, context: RoutingContext) -> Routing:
        """Return the routing without the choices that are dropped."""
        attended, self._attended = self._attended, None
        with torch.no_grad():
            keep_TK = kept_choices(self._kind, self._rule, routing.expert_TK, routing.weight_TK)
            protected_T = self._protection.protected(x_TD, context, attended)
            if protected_T is not None:
                keep_TK = keep_TK | protected_T.unsqueeze(1)
        return prune_routing(routing, keep_TK, rescale=self._rescale)


def apply_pruning(model: Decoder, pruning: Pruning) -> None:
    """Let every MoE layer of a model drop experts, in all calls from now on.

    Raises:
        CheckpointError: if the rule is of other layers than the model has.
    """
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    rules = {rule.layer: rule for rule in pruning.layers}
    if sorted(rules) != model.config.moe_layers():
        raise CheckpointError(
            f"the pruning rule is of layers {sorted(rules)}, but the model has experts in layers "
            f"{model.config.moe_layers()}"
        )
    for layer, rule in rules.items():
        block = blocks[layer]
        assert isinstance(block.feed_forward, MoELayer)
        protection = Protection(pruning.protect, pruning.share, pruning.queries, rule.decode_norm)
        pruner = LayerPruner(
            pruning.rule,
            rule,
            protection,
            rescale=pruning.preserve_sum or renormalises(block.feed_forward),
        )
        block.feed_forward.prune = pruner
        if pruning.protect is Protect.col:
            assert isinstance(block.attention, Attention)
            block.attention.watch = pruner.watch


def renormalises(layer: MoELayer) -> bool:
    """Tell whether a layer's router divides the chosen scores by their sum."""
    router = layer.router
    return isinstance(router, ComposedRouter) and router.config.renormalise and router.top_k > 1


def sort_choices(expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's places and weights by falling weight, fp64; empty places weigh 0."""
    present_TK = expert_TK >= 0
    key_TK = torch.where(present_TK, weight_TK.double(), -1.0)
    order_TK = key_TK.sort(dim=1, descending=True, stable=True).indices
    return order_TK, key_TK.gather(1, order_TK).clamp(min=0)


def kept_choices(kind: PruneRule, rule: LayerRule, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return which choices stay, bool (T, K); empty places do not.

    Args:
        kind: which rule.
        rule: its thresholds.
        expert_TK: int64, -1 where there is no expert.
        weight_TK: combine weights, at least 0, in any order.
    """
    order_TK, sorted_TK = sort_choices(expert_TK, weight_TK)
    if kind is PruneRule.top_p:
        share_TK = sorted_TK / sorted_TK.sum(1, keepdim=True).clamp(min=_TINY)
        before_TK = share_TK.cumsum(1) - share_TK
        keep_TK = (before_TK < rule.top_p) | (rule.top_p >= 1)
    elif kind is PruneRule.saliency:
        norm_E = sorted_TK.new_tensor(rule.output_norm)
        chosen_TK = expert_TK.gather(1, order_TK).clamp(min=0)
        keep_TK = sorted_TK * norm_E[chosen_TK] >= rule.saliency
    else:
        ratio_TK = sorted_TK / sorted_TK[:, :1].clamp(min=_TINY)
        keep_TK = (ratio_TK >= sorted_TK.new_tensor(rule.ratio)).cumprod(1).bool()
    keep_TK[:, :1] = True
    return torch.zeros_like(keep_TK).scatter(1, order_TK, keep_TK) & (expert_TK >= 0)


def prune_routing(routing: Routing, keep_TK: Tensor, *, rescale: bool) -> Routing:
    """Return a routing with only some of its choices; tokens that keep all stay bit-identical.

    Args:
        routing: with experts per token.
        keep_TK: bool; what it says of empty places does not matter.
        rescale: give the kept weights of a token the sum that all had.
    """
    dropped_TK = ~keep_TK & (routing.expert_TK >= 0)
    weight_TK = routing.weight_TK.masked_fill(dropped_TK, 0.0)
    if rescale:
        before_T1 = routing.weight_TK.sum(1, keepdim=True)
        after_T1 = weight_TK.sum(1, keepdim=True)
        lost_T1 = dropped_TK.any(1, keepdim=True) & (after_T1 > 0)
        before_T1 = torch.where(lost_T1, before_T1, 1.0)
        weight_TK = weight_TK * before_T1 / torch.where(lost_T1, after_T1, 1.0)
    expert_TK = routing.expert_TK.masked_fill(dropped_TK, -1)
    return replace(routing, expert_TK=expert_TK, weight_TK=weight_TK, variable=True)


def read_pruning(folder: Path) -> Pruning | None:
    """Return how an artefact is pruned, or None where it is not."""
    file = folder / PRUNE_FILE
    return Pruning.from_json(file.read_bytes(), source=str(file)) if file.exists() else None
