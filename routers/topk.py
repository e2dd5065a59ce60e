"""The token-choice router: linear scores, softmax or sigmoid, top-k with optional groups and bias.

Read `api.py` first. All arithmetic is fp32 whatever the type of the input; ties go to the lowest
expert index; a NaN row chooses experts in range and leaves other rows alone.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token   D model width
         G groups of experts
Source:  softmax top-k: arXiv:2401.04088, section 2.1; sigmoid scores, groups and bias:
         DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.routers.api import Load, Routing, RoutingContext
from gatewise.routers.balance import count_per_expert, sequence_balance_loss, z_loss
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction

__all__ = ["TopKRouter", "limit_to_groups", "stable_topk"]

# Below this many choices a token, repeated argmax beats a top-k over 64-bit keys.
_ARGMAX_CHOICES = 4


class TopKRouter(nn.Module):
    """Choose `top_k` experts per token by a linear score.

    Args:
        hidden: D.
        num_experts: E.
        top_k: K.
        config: scores, groups, bias, losses and noise.
    """

    bias_E: Tensor

    def __init__(self, hidden: int, num_experts: int, top_k: int, config: RouterConfig) -> None:
        super().__init__()
        config.check(num_experts, top_k)
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))
        # Not an optimizer parameter: moved by the counts of each optimizer step, frozen in
        # evaluation, kept in checkpoints.
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        if not self.weight.is_meta:  # drawing nothing there imports torch's compiler
            nn.init.normal_(self.weight, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """Keep weight and bias as they are when the model is cast to half precision."""

        def keep(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype in (torch.bfloat16, torch.float16):
                return tensor.detach().to(changed.device)
            return changed

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.bias_E = self.bias_E.float()
        return self

    def forward(
        self, x_TD: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Routing, RoutingContext]:
        """Route `x_TD`.

        Args:
            x_TD: any floating type; scores are computed in the wider of fp32 and its type.
            context: padding, sequences and noise are used.
            layer: only keys the noise.

        Returns:
            The routing (weights fp32, or fp64 for fp64 input) and the context, unchanged.
        """
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD, context, layer)
            score_TE = (
                logits_TE.softmax(-1)
                if config.score is ScoreFunction.softmax
                else logits_TE.sigmoid()
            )
            expert_TK = self._select(score_TE.detach())
            weight_TK = score_TE.gather(1, expert_TK)
            if config.renormalise and self.top_k > 1:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
            if config.scale != 1.0:
                weight_TK = weight_TK * config.scale
            share_TE = score_TE
            if config.score is ScoreFunction.sigmoid:
                share_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp(min=1e-20)
            losses = self._losses(logits_TE, share_TE, expert_TK, context)
            load = _load(share_TE, expert_TK, context.padding_T)
            health = _health(share_TE, context.padding_T)
        routing = Routing(expert_TK, weight_TK, logits_TE, losses, load, health)
        return routing, context

    def _logits(self, x_TD: Tensor, context: RoutingContext, layer: int) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(wide)
        if context.padding_T is not None:
            # padding may hold anything; a NaN would reach the weight's gradient as 0 * NaN
            x_TD = x_TD.masked_fill(context.padding_T.unsqueeze(1), 0.0)
        if self.config.jitter and self.training:
            shape = (x_TD.shape[0], x_TD.shape[1])
            noise_TD = (
                torch.rand(shape, device=x_TD.device)  # the layer alone: torch's own generator
                if context.noise is None
                else context.noise.uniform(shape, layer=layer, device=x_TD.device)
            )
            x_TD = x_TD * (1 + self.config.jitter * (2 * noise_TD - 1)).to(wide)
        return F.linear(x_TD, self.weight.to(wide))

    def _select(self, score_TE: Tensor) -> Tensor:
        """Return the K best experts of `score + bias`, groups respected; no gradient."""
        # With bias_rate 0 the bias stays where training left it; 0 where there never was one.
        biased_TE = score_TE + self.bias_E
        # A NaN must not win, nor make another row's choice depend on it.
        biased_TE = torch.nan_to_num(biased_TE, nan=-1e30, posinf=1e30, neginf=-1e30)
        if self.config.num_groups > 1:
            biased_TE = limit_to_groups(
                biased_TE, num_groups=self.config.num_groups, top_groups=self.config.top_groups
            )
        return stable_topk(biased_TE, self.top_k)

    def _losses(
        self, logits_TE: Tensor, share_TE: Tensor, expert_TK: Tensor, context: RoutingContext
    ) -> dict[str, Tensor]:
        """Return the losses that this rank can compute alone.

        The global-batch loss needs the counts of all ranks: its owner computes it from
        `Routing.load`.
        """
        config, losses = self.config, {}
        if config.balance_loss and config.balance_scope is not BalanceScope.global_batch:
            whole = config.balance_scope is BalanceScope.micro_batch
            losses["balance"] = config.balance_loss * sequence_balance_loss(
                share_TE,
                expert_TK,
                sequences=1 if whole else context.sequences,
                padding_T=context.padding_T,
            )
        if config.z_loss:
            losses["z"] = config.z_loss * z_loss(logits_TE, padding_T=context.padding_T)
        return losses


def stable_topk(score_TE: Tensor, top_k: int) -> Tensor:
    """Return the indices of the `top_k` largest scores per row, best first, ties lowest first.

    `torch.topk` promises no order among ties; different orders on different devices or shards
    would route the same token differently.

    Args:
        score_TE: finite values of any floating type.
        top_k: from 1 to E.

    Returns:
        int64 (T, top_k).
    """
    num_experts = score_TE.shape[1]
    if top_k <= _ARGMAX_CHOICES:
        left_TE, chosen = score_TE, []
        for choice in range(top_k):
            best_T1 = left_TE.argmax(-1, keepdim=True)  # the first of equal maxima
            chosen.append(best_T1)
            if choice + 1 < top_k:
                left_TE = left_TE.scatter(1, best_T1, float("-inf"))
        return torch.cat(chosen, 1)
    if score_TE.dtype == torch.float64:
        return score_TE.sort(stable=True, dim=-1, descending=True).indices[:, :top_k]
    # Order-preserving integers, made unique by the index in their low bits; + 0.0 makes -0.0 equal
    # to 0.0.
    bits_TE = (score_TE.float() + 0.0).view(torch.int32).long()
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    rank_E = torch.arange(num_experts - 1, -1, -1, device=score_TE.device)
    return ((ordered_TE << 20) | rank_E).topk(top_k, -1).indices


def limit_to_groups(score_TE: Tensor, *, num_groups: int, top_groups: int) -> Tensor:
    """Leave only the experts of each token's `top_groups` best groups; others become -inf.

    A group's score is the sum of its two best experts (of its one expert where it has one).

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (node-limited routing).
    """
    num_tokens, num_experts = score_TE.shape
    grouped_TGe = score_TE.view(num_tokens, num_groups, num_experts // num_groups)
    group_TG = grouped_TGe.topk(min(2, grouped_TGe.shape[2]), -1).values.sum(-1)
    allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    allowed_TG.scatter_(1, stable_topk(group_TG, top_groups), True)
    return grouped_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).flatten(1)


def _load(share_TE: Tensor, expert_TK: Tensor, padding_T: Tensor | None) -> Load:
    count_E = count_per_expert(expert_TK, share_TE.shape[1], padding_T=padding_T)
    if padding_T is None:
        tokens = count_E.new_tensor(share_TE.shape[0])
    else:
        tokens = (~padding_T).sum().float()
        share_TE = torch.where(padding_T.unsqueeze(1), 0.0, share_TE)
    return Load(count_E=count_E, score_E=share_TE.sum(0), tokens=tokens)


def _health(share_TE: Tensor, padding_T: Tensor | None) -> dict[str, Tensor]:
    """Return sums over tokens of the best score and the entropy, for means over many steps."""
    share_TE = share_TE.detach()
    if padding_T is not None:
        share_TE = torch.where(padding_T.unsqueeze(1), 0.0, share_TE)
    return {
        "confidence": share_TE.amax(-1).sum().float(),
        "entropy": torch.special.entr(share_TE).sum().float(),
    }
