"""Where dynamic pruning draws the line: thresholds from the calibration tokens.

All are found on the quantised model, because quantisation moves the weights of experts, with
nothing pruned in the layers before. The threshold of a quantile q lies above int(q N) of the N
values that were seen, or fewer where values are equal: those of one rank for `ratio`, those of all
ranks from the second for `saliency`. What is dropped differs from that share where tokens are
protected, where a rank follows a dropped one, and in layers behind pruned ones. `budget` knows for
some thresholds of every layer how many activations they keep and how far they move the layer's
output, and chooses one per layer: the least sum of errors among all choices that keep no more than
asked, an exact knapsack. The error is relative to the residual stream after the block, which is
what the next layers normalise.

Read first: `pruning.py`, `stream.py`.

Shapes:  T tokens   K choices per token   E experts   R rows of one expert   D model width
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from gatewise.compression.config import Protect, PruneConfig, PruneRule
from gatewise.compression.knapsack import solve_knapsack
from gatewise.compression.observe import check_finite, inner_activations
from gatewise.compression.protection import Attended, Protection
from gatewise.compression.pruning import (
    LayerRule,
    Pruning,
    kept_choices,
    prune_routing,
    renormalises,
    sort_choices,
)
from gatewise.compression.stream import BlockStream
from gatewise.moe.attention import Attention
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block
from gatewise.parallel.errors import ConfigError
from gatewise.routers.api import Routing, RoutingContext

__all__ = ["LayerThresholds", "choose_rules", "measure_thresholds"]

ALL = sys.float_info.max  # a threshold that nothing reaches; JSON has no infinity
_LEVELS = 20  # thresholds of a layer that `budget` chooses from, beside dropping nothing
_ROWS = 4096  # tokens whose expert outputs are in memory together


@dataclass(slots=True)
class LayerThresholds:
    """What the calibration tokens say of one layer; what the rule does not need stays empty."""

    layer: int
    tokens: int
    pairs: int  # of tokens and experts
    choices: int  # K
    decode_norm: float  # the quantile of the inputs' L1 norms above which a share lies
    ratio: list[float] = field(default_factory=list)  # quantile of w_j / w_1 by rank
    output_norm: list[float] = field(default_factory=list)  # mean of |E(x)| by expert
    saliency: float = 0.0  # quantile of w_j * |E| over the ranks from the second
    level_ratio: list[float] = field(default_factory=list)  # thresholds that were tried
    level_kept: list[int] = field(default_factory=list)  # pairs that each keeps
    level_error: list[float] = field(default_factory=list)  # relative squared change, summed

    def to_json(self) -> str:
        """Return it as text, exactly."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "LayerThresholds":
        """Read what `to_json` wrote."""
        return LayerThresholds(**json.loads(text))


class _Recorder:
    """Stands where a pruner would, drops nothing and keeps what it sees."""

    def __init__(self, protection: Protection) -> None:
        self._protection = protection
        self._attended: Attended | None = None
        self.x: list[Tensor] = []
        self.routings: list[Routing] = []
        self.protected: list[Tensor] = []

    def watch(self, q_BHSW: Tensor, k_BJPW: Tensor) -> None:
        self._attended = (q_BHSW, k_BJPW)

    def __call__(self, x_TD: Tensor, routing: Routing, context: RoutingContext) -> Routing:
        attended, self._attended = self._attended, None
        mask_T = self._protection.protected(x_TD, context, attended)
        if mask_T is None:
            mask_T = torch.zeros(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        self.x.append(x_TD.float())
        self.routings.append(routing)
        self.protected.append(mask_T)
        return routing


@dataclass(frozen=True, slots=True)
class _Seen:
    x_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    protected_T: Tensor
    stream_T: Tensor  # squared norm of the residual stream after the block, fp64


@torch.no_grad()
def measure_thresholds(stream: BlockStream, block: Block, config: PruneConfig) -> LayerThresholds:
    """Measure one layer of the quantised model.

    Args:
        stream: its batches stand before the block.
        block: quantised, with experts.
        config: rule and protection.

    Raises:
        DataError: if an input is not finite.
    """
    layer = block.feed_forward
    assert isinstance(layer, MoELayer)
    seen = _watch(stream, block, config)
    order_TK, sorted_TK = sort_choices(seen.expert_TK, seen.weight_TK)
    present_TK = seen.expert_TK.gather(1, order_TK) >= 0
    norm_T = seen.x_TD.abs().sum(1, dtype=torch.float32)
    found = LayerThresholds(
        layer=block.layer,
        tokens=seen.x_TD.shape[0],
        pairs=int(present_TK.sum()),
        choices=seen.expert_TK.shape[1],
        decode_norm=-1.0 if config.share == 1 else quantile(norm_T, 1 - config.share),
    )
    ratio_TK = sorted_TK / sorted_TK[:, :1].clamp(min=1e-300)
    if config.rule is PruneRule.ratio:
        found.ratio = [0.0] + [
            quantile(ratio_TK[present_TK[:, rank], rank], config.quantile)
            for rank in range(1, found.choices)
        ]
    elif config.rule is PruneRule.saliency:
        norm_E, _ = _run_experts(seen, layer, [], rescale=False)
        found.output_norm = norm_E.tolist()
        chosen_TK = seen.expert_TK.gather(1, order_TK).clamp(min=0)
        value_TK = sorted_TK * norm_E[chosen_TK]
        found.saliency = quantile(value_TK[:, 1:][present_TK[:, 1:]], config.quantile)
    elif config.rule is PruneRule.budget:
        later_N = ratio_TK[:, 1:][present_TK[:, 1:]]
        found.level_ratio = [0.0] + [
            quantile(later_N, level / _LEVELS) for level in range(1, _LEVELS + 1)
        ]
        masks = [
            kept_choices(config.rule, _one_ratio(found, mu), seen.expert_TK, seen.weight_TK)
            | (seen.protected_T.unsqueeze(1) & (seen.expert_TK >= 0))
            for mu in found.level_ratio
        ]
        found.level_kept = [int(mask_TK.sum()) for mask_TK in masks]
        rescale = config.preserve_sum or renormalises(layer)
        _, found.level_error = _run_experts(seen, layer, masks, rescale=rescale)
    return found


def choose_rules(found: Sequence[LayerThresholds], config: PruneConfig) -> Pruning:
    """Return the rule of every layer.

    Args:
        found: of all MoE layers.
        config: as the layers were measured with.

    Raises:
        ConfigError: if `prune.keep` is less than even one expert a token.
    """
    levels = _solve(found, config.keep) if config.rule is PruneRule.budget else []
    rules = []
    for index, layer in enumerate(found):
        ratio: tuple[float, ...] = ()
        if config.rule is PruneRule.ratio:
            ratio = tuple(layer.ratio)
            if config.mu is not None:
                ratio = _one_ratio(layer, config.mu).ratio
        elif config.rule is PruneRule.ser:
            # kept above the threshold, not at it; 0 drops nothing
            above = math.nextafter(config.threshold, 2) if config.threshold else 0.0
            always = min(config.keep_least, layer.choices)
            ratio = (0.0,) * always + (above,) * (layer.choices - always)
        elif config.rule is PruneRule.budget:
            ratio = _one_ratio(layer, layer.level_ratio[levels[index]]).ratio
        rules.append(
            LayerRule(
                layer=layer.layer,
                decode_norm=layer.decode_norm,
                ratio=ratio,
                top_p=config.top_p if config.rule is PruneRule.top_p else 1.0,
                saliency=layer.saliency,
                output_norm=tuple(layer.output_norm),
            )
        )
    return Pruning(
        rule=config.rule,
        protect=config.protect,
        share=config.share,
        queries=config.queries,
        preserve_sum=config.preserve_sum,
        layers=tuple(rules),
    )


def quantile(value_N: Tensor, share: float) -> float:
    """Return a threshold that int(share * N) of N values lie below, fewer if some are equal.

    A share of 1 gives `ALL`, which is above all of them.
    """
    count = int(share * value_N.numel())
    if count >= value_N.numel():
        return ALL
    return float(value_N.sort().values[count])


def _one_ratio(layer: LayerThresholds, mu: float) -> LayerRule:
    ratio = (0.0,) + (mu,) * (layer.choices - 1)
    return LayerRule(layer.layer, layer.decode_norm, ratio=ratio)


def _solve(found: Sequence[LayerThresholds], keep: float) -> list[int]:
    """Return the level of every layer."""
    pairs = sum(layer.pairs for layer in found)
    budget = int(keep * pairs + 1e-6)  # 0.29 * 100 is 28.999...
    least = sum(min(layer.level_kept) for layer in found)
    if least > budget:
        raise ConfigError(
            f"prune.keep is {keep:g}, but the largest expert of every token, and all of protected "
            f"tokens, are {least / pairs:.4g} of all activations already; raise it"
        )
    errors = [layer.level_error for layer in found]
    # among equal errors the later option wins: fewer experts
    return solve_knapsack(errors, [layer.level_kept for layer in found], budget)


def _watch(stream: BlockStream, block: Block, config: PruneConfig) -> _Seen:
    """Run the batches through a block."""
    layer = block.feed_forward
    assert isinstance(layer, MoELayer)
    assert isinstance(block.attention, Attention)
    recorder = _Recorder(Protection(config.protect, config.share, config.queries, 0.0))
    layer.prune = recorder
    if config.protect is Protect.col:
        block.attention.watch = recorder.watch
    try:
        streams = [
            x_BSD.flatten(0, 1).double().square().sum(1) for x_BSD, _, _ in stream.run(block)
        ]
    finally:
        layer.prune = block.attention.watch = None
    x_TD = torch.cat(recorder.x)
    check_finite(x_TD, block.layer, "feed-forward")
    return _Seen(
        x_TD,
        torch.cat([routing.expert_TK for routing in recorder.routings]),
        torch.cat([routing.weight_TK for routing in recorder.routings]),
        torch.cat(recorder.protected),
        torch.cat(streams),
    )


def _run_experts(
    seen: _Seen, layer: MoELayer, masks: Sequence[Tensor], *, rescale: bool
) -> tuple[Tensor, list[float]]:
    """Return the mean output norm of each expert, and what each mask changes.

    Args:
        seen: of the layer.
        layer: its experts.
        masks: choices that stay, bool (T, K) each.
        rescale: as `prune_routing`.
    """
    experts = layer.experts
    total_E = torch.zeros(experts.num_local, dtype=torch.float64, device=seen.x_TD.device)
    count_E = torch.zeros_like(total_E)
    errors = [0.0] * len(masks)
    for start in range(0, seen.x_TD.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        x_TD, expert_TK = seen.x_TD[part], seen.expert_TK[part]
        output_TKD = x_TD.new_zeros(*expert_TK.shape, x_TD.shape[1])
        for expert in range(experts.num_local):
            token_R, choice_R = torch.nonzero(expert_TK == expert, as_tuple=True)
            inner_RF = inner_activations(
                x_TD[token_R], experts.w_in_eGD[expert], experts.activation
            )
            output_RD = inner_RF @ experts.w_out_eDF[expert].t()
            output_TKD[token_R, choice_R] = output_RD
            total_E[expert] += output_RD.double().norm(dim=1).sum()
            count_E[expert] += len(token_R)
        routing = Routing(expert_TK, seen.weight_TK[part])
        for index, mask_TK in enumerate(masks):
            pruned = prune_routing(routing, mask_TK[part], rescale=rescale)
            moved_TK1 = (routing.weight_TK - pruned.weight_TK).unsqueeze(2)
            moved_T = (moved_TK1 * output_TKD).sum(1).double().square().sum(1)
            errors[index] += float((moved_T / seen.stream_T[part].clamp(min=1e-300)).sum())
    return total_E / count_E.clamp(min=1), errors
