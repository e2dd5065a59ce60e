"""The router: logits, scores, choice, weights and losses, put together as its settings say.

Read first: `api.py` (what goes in and out), `config.py` (the parts), `state.py` (what is kept
between steps). The parts are pure functions: `scorers.py`, `recurrent.py`, `choice.py`,
`compete.py`, `hashing.py`, `soft.py`, `balance.py`, `losses.py`, `quantile.py`. All arithmetic is
fp32 (fp64 for fp64 tokens) whatever the type of the model; ties go to the lowest expert; a NaN row
chooses experts in range and leaves other rows alone.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token, at most
         D model width
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.routers import balance, compete, losses
from gatewise.routers.api import Decision, Load, Routing, RoutingContext
from gatewise.routers.choice import (
    choices_of_mask,
    limit_to_groups,
    stable_topk,
    top_p_choice,
)
from gatewise.routers.config import BalanceScope, BiasRule, RouterConfig, Scorer, Selector
from gatewise.routers.hashing import look_up
from gatewise.routers.health import health_sums
from gatewise.routers.quantile import BINS, margin_histogram
from gatewise.routers.recurrent import RecurrentCell, recurrent_logits
from gatewise.routers.scorers import cosine_logits, mlp_logits, scores, shares, sparsity_logits
from gatewise.routers.soft import mix_slots, soft_load
from gatewise.routers.state import StatefulRouter

__all__ = ["ComposedRouter", "build_cell", "build_router"]

# streams of NoiseKey that keep the draws of one layer apart; the input's jitter has stream 0
_LOGIT_NOISE, _DROPOUT, _SECOND = 1, 2, 3


def build_cell(config: RouterConfig, hidden: int) -> RecurrentCell | None:
    """Build what the routers of all layers share; None where they share nothing.

    The model registers it once, at its root.
    """
    return RecurrentCell(config, hidden) if config.scorer is Scorer.recurrent else None


def build_router(
    config: RouterConfig,
    hidden: int,
    num_experts: int,
    top_k: int,
    *,
    cell: RecurrentCell | None = None,
    index: int = 0,
    vocab_size: int | None = None,
) -> "ComposedRouter":
    """Build the router of one MoE layer.

    Args:
        config: its settings.
        hidden: D.
        num_experts: E.
        top_k: K.
        cell: from `build_cell`, where that is not None.
        index: which of the model's MoE layers, from 0.
        vocab_size: number of token ids, for layers that choose by them.

    Raises:
        ValueError: for settings that do not fit the sizes.
    """
    return ComposedRouter(
        hidden, num_experts, top_k, config, cell=cell, index=index, vocab_size=vocab_size
    )


class ComposedRouter(StatefulRouter):
    """Chooses experts for every token of one layer; arguments as `StatefulRouter` has them."""

    def forward(
        self, x_TD: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Routing, RoutingContext]:
        """Route `x_TD`.

        Args:
            x_TD: any floating type; scores are computed in the wider of fp32 and its type.
            context: padding, sequences, noise, state, token ids and columns are used.
            layer: only keys the noise.

        Returns:
            The routing (weights fp32, or fp64 for fp64 input) and the context, with the state of
            a recurrent scorer.
        """
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = self._input(x_TD, context, layer)
            decision = context.decision(layer)
            logits_TE, context = self._logits(x_TD, context, decision)
            if config.selector is Selector.soft:
                return self._route_softly(logits_TE, context), context
            clean_TE, noise_TE = logits_TE, None
            if config.learned_noise and self.training:
                logits_TE, noise_TE = self._add_noise(x_TD, logits_TE, context, layer)
            score_TE = scores(logits_TE, config.score)
            if decision is not None:  # chosen ahead, or recorded: weighed here
                expert_TK, variable = decision.expert_TK, True
            else:
                expert_TK, variable = self._select(
                    score_TE.detach(), logits_TE.detach(), context, layer
                )
            weight_TK = self._weigh(score_TE, expert_TK, variable=variable)
            if config.random_second and self.training and decision is None:
                expert_TK = self._drop_second(expert_TK, weight_TK, context, layer)
                weight_TK = weight_TK.masked_fill(expert_TK < 0, 0.0)
                variable = True
            if not context.measures:
                return Routing(expert_TK, weight_TK, logits_TE, variable=variable), context
            share_TE = shares(score_TE, config.score)
            balanced_TE = score_TE if config.sparsity_rate else share_TE
            parts = self._losses(logits_TE, share_TE, balanced_TE, expert_TK, context, variable)
            if config.importance_loss or config.load_loss:
                parts |= self._noise_losses(
                    clean_TE, logits_TE, noise_TE, expert_TK, weight_TK, context
                )
            load = self._load(logits_TE, balanced_TE, expert_TK, context.padding_T, variable)
            health = health_sums(
                logits_TE, share_TE, expert_TK, weight_TK, padding_T=context.padding_T
            )
        routing = Routing(expert_TK, weight_TK, logits_TE, parts, load, health, variable)
        return routing, context

    def _input(self, x_TD: Tensor, context: RoutingContext, layer: int) -> Tensor:
        """Return the tokens in the router's type, padding as zeros, with jitter in training."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(wide)
        if context.padding_T is not None:
            # padding may hold anything; a NaN would reach the weight's gradient as 0 * NaN
            x_TD = x_TD.masked_fill(context.padding_T.unsqueeze(1), 0.0)
        if self.config.jitter and self.training:
            noise_TD = _uniform(x_TD, context, layer, 0)
            x_TD = x_TD * (1 + self.config.jitter * (2 * noise_TD - 1)).to(wide)
        return x_TD

    def _logits(
        self, x_TD: Tensor, context: RoutingContext, decision: Decision | None
    ) -> tuple[Tensor, RoutingContext]:
        config = self.config
        if config.ahead.weighs or (decision is not None and decision.weighs):
            if decision is None or decision.logits_TE is None:
                raise ValueError(
                    "router.ahead.weights is pregate, so this layer has no scores of its own, but "
                    "nothing was decided ahead; use it in a model with its pre-gate"
                )
            return decision.logits_TE.to(x_TD.dtype), context
        if config.scorer is Scorer.linear:
            bias_E = self.logit_bias.to(x_TD.dtype) if config.logit_bias else None
            return F.linear(x_TD, self.weight.to(x_TD.dtype), bias_E), context
        if config.scorer is Scorer.recurrent:
            (cell,) = self._shared
            assert cell is not None
            return recurrent_logits(
                x_TD,
                context,
                cell=cell,
                projection_HD=None if config.shared_projection else self.projection,
                weight_EH=self.weight,
                config=config,
            )
        if config.scorer is Scorer.cosine:
            bias_Q = self.projection_bias if config.cosine_bias else None
            logits_TE = cosine_logits(x_TD, self.projection, bias_Q, self.weight, self.temperature)
        elif config.scorer is Scorer.mlp:
            logits_TE = mlp_logits(x_TD, self.projection, self.weight)
        elif config.scorer is Scorer.sparsity:
            if context.columns is None:
                raise ValueError(
                    "router.scorer is sparsity, which scores by the experts' weights, but the "
                    "context holds no columns; use it inside a MoE layer"
                )
            logits_TE = sparsity_logits(x_TD, context.columns)
        else:
            logits_TE = x_TD.new_zeros(x_TD.shape[0], self.num_experts)
        return logits_TE, context

    def _add_noise(
        self, x_TD: Tensor, clean_TE: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return noisy logits and the size of the noise, which is learned."""
        size_TE = F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype))) + 1e-2
        uniform_TE = _uniform(clean_TE, context, layer, _LOGIT_NOISE).double()
        normal_TE = torch.special.ndtri(uniform_TE.clamp(1e-7, 1 - 1e-7)).to(clean_TE.dtype)
        return clean_TE + size_TE * normal_TE, size_TE

    def _select(
        self, score_TE: Tensor, logits_TE: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Tensor, bool]:
        """Return the chosen experts, and whether there may be empty places; no gradient."""
        config = self.config
        if self.hashed:
            return look_up(self.table_VK, context.token_ids), False
        # With bias_rate 0 the bias stays where training left it; 0 where there never was one.
        quantile = config.bias_rule is BiasRule.quantile
        biased_TE = (logits_TE if quantile else score_TE) + self.bias_E
        # A NaN must not win, nor make another row's choice depend on it.
        biased_TE = torch.nan_to_num(biased_TE, nan=-1e30, posinf=1e30, neginf=-1e30)
        hidden_TE = None
        if config.expert_dropout and self.training:
            hidden_TE = _uniform(score_TE, context, layer, _DROPOUT) < config.expert_dropout
            biased_TE = biased_TE.masked_fill(hidden_TE, float("-inf"))
        if config.selector is not Selector.topk:
            expert_TK = self._select_otherwise(biased_TE, logits_TE, context)
        else:
            if config.num_groups > 1:
                biased_TE = limit_to_groups(
                    biased_TE, num_groups=config.num_groups, top_groups=config.top_groups
                )
            expert_TK = stable_topk(biased_TE, self.top_k)
        if hidden_TE is not None:  # fewer than K may be left
            found_TK = hidden_TE.gather(1, expert_TK.clamp(min=0))
            return expert_TK.masked_fill(found_TK, -1), True
        varying = (Selector.top_p, Selector.threshold, Selector.expert_choice)
        return expert_TK, config.selector in varying

    def _select_otherwise(
        self, score_TE: Tensor, logits_TE: Tensor, context: RoutingContext
    ) -> Tensor:
        """Select by anything but the top-k of a token's scores."""
        config = self.config
        if config.selector is Selector.threshold:
            return choices_of_mask(score_TE > 0)
        if config.selector is Selector.top_p:
            return top_p_choice(score_TE.clamp(min=0), config.top_p)
        if config.selector is Selector.expert_choice:
            return compete.expert_choice(
                score_TE,
                factor=config.choice_factor,
                sequences=context.sequences,
                padding_T=context.padding_T,
            )
        if not self.training:  # as trained, but without looking at other tokens
            return stable_topk(score_TE, self.top_k)
        logits_TE = torch.nan_to_num(logits_TE, nan=-1e30, posinf=1e30, neginf=-1e30)
        balanced = (
            compete.sinkhorn_scores if config.selector is Selector.sinkhorn else compete.base_scores
        )
        return stable_topk(
            balanced(logits_TE, sequences=context.sequences, padding_T=context.padding_T),
            self.top_k,
        )

    def _weigh(self, score_TE: Tensor, expert_TK: Tensor, *, variable: bool) -> Tensor:
        """Return the combine weights of the chosen experts, from scores without bias."""
        config = self.config
        if variable:
            weight_TK = score_TE.gather(1, expert_TK.clamp(min=0))
            weight_TK = weight_TK.masked_fill(expert_TK < 0, 0.0)
        else:
            weight_TK = score_TE.gather(1, expert_TK)
        # One expert renormalised would have weight 1, and the router would learn nothing.
        if config.renormalise and (self.top_k > 1 or config.scorer is Scorer.hash):
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        if config.scale != 1.0:
            weight_TK = weight_TK * config.scale
        return weight_TK

    def _drop_second(
        self, expert_TK: Tensor, weight_TK: Tensor, context: RoutingContext, layer: int
    ) -> Tensor:
        """Leave the second expert out with probability 1 - 2 w (arXiv:2006.16668, section 3)."""
        drawn_T = _uniform(weight_TK[:, :1], context, layer, _SECOND)[:, 0]
        leave_T = drawn_T >= 2 * weight_TK[:, 1].detach()
        left_TK = torch.stack((torch.zeros_like(leave_T), leave_T), 1)
        return expert_TK.masked_fill(left_TK, -1)

    def _losses(  # noqa: PLR0917 - the router's intermediate results
        self,
        logits_TE: Tensor,
        share_TE: Tensor,
        balanced_TE: Tensor,
        expert_TK: Tensor,
        context: RoutingContext,
        variable: bool,
    ) -> dict[str, Tensor]:
        """Return the losses that this rank can compute alone.

        The global-batch loss needs the counts of all ranks: its owner computes it from
        `Routing.load`.
        """
        config, padding_T, parts = self.config, context.padding_T, dict[str, Tensor]()
        whole = config.balance_scope is BalanceScope.micro_batch
        sequences = 1 if whole else context.sequences
        local = config.balance_scope is not BalanceScope.global_batch
        if config.balance_loss and local and not self.fixed:
            first = config.first_choice_loss
            parts["balance"] = self._balance_weight * balance.sequence_balance_loss(
                balanced_TE,
                expert_TK[:, :1] if first else expert_TK,
                sequences=sequences,
                padding_T=padding_T,
                top_k=self.top_k if variable and not first else None,
            )
        if config.z_loss:
            parts["z"] = config.z_loss * balance.z_loss(logits_TE, padding_T=padding_T)
        if config.token_entropy_loss:
            parts["token_entropy"] = config.token_entropy_loss * losses.token_entropy_loss(
                share_TE, padding_T=padding_T
            )
        if config.batch_entropy_loss:
            parts["batch_entropy"] = config.batch_entropy_loss * losses.batch_entropy_loss(
                logits_TE, sequences=sequences, padding_T=padding_T
            )
        return parts

    def _noise_losses(  # noqa: PLR0917 - the router's intermediate results
        self,
        clean_TE: Tensor,
        noisy_TE: Tensor,
        noise_TE: Tensor | None,
        expert_TK: Tensor,
        weight_TK: Tensor,
        context: RoutingContext,
    ) -> dict[str, Tensor]:
        """Return Shazeer's importance and load losses; the load's needs the noise of training."""
        config, padding_T = self.config, context.padding_T
        whole = config.balance_scope is BalanceScope.micro_batch
        sequences, parts = 1 if whole else context.sequences, dict[str, Tensor]()
        if config.importance_loss:
            gate_TE = torch.zeros_like(clean_TE).scatter_add(1, expert_TK.clamp(min=0), weight_TK)
            parts["importance"] = config.importance_loss * losses.squared_variation(
                gate_TE, sequences=sequences, padding_T=padding_T
            )
        if config.load_loss and noise_TE is not None:
            load_TE = losses.smooth_load(clean_TE, noisy_TE, noise_TE, expert_TK)
            parts["load"] = config.load_loss * losses.squared_variation(
                load_TE, sequences=sequences, padding_T=padding_T
            )
        return parts

    def _load(
        self,
        logits_TE: Tensor,
        balanced_TE: Tensor,
        expert_TK: Tensor,
        padding_T: Tensor | None,
        variable: bool,
    ) -> Load:
        count_E = balance.count_per_expert(
            expert_TK, self.num_experts, padding_T=padding_T, variable=variable
        )
        if padding_T is None:
            tokens = count_E.new_tensor(balanced_TE.shape[0])
        else:
            tokens = (~padding_T).sum().float()
            balanced_TE = torch.where(padding_T.unsqueeze(1), 0.0, balanced_TE)
        if self.fixed:  # nothing that is learned decides the load
            balanced_TE = balanced_TE.detach()
        margin_EM = None
        if self.config.bias_rule is BiasRule.quantile and self.config.bias_rate:
            margin_EM = self._margins(logits_TE.detach(), padding_T)
        return Load(count_E, balanced_TE.sum(0), tokens, margin_EM)

    def _margins(self, logits_TE: Tensor, padding_T: Tensor | None) -> Tensor:
        if self.top_k == self.num_experts or self.fixed:  # nothing to balance
            return logits_TE.new_zeros(self.num_experts, BINS, dtype=torch.float32)
        logits_TE = torch.nan_to_num(logits_TE, nan=-1e30, posinf=1e30, neginf=-1e30)
        return margin_histogram(logits_TE, self.bias_E, top_k=self.top_k, padding_T=padding_T)

    def _route_softly(self, logits_TS: Tensor, context: RoutingContext) -> Routing:
        mix = mix_slots(
            logits_TS,
            num_experts=self.num_experts,
            sequences=context.sequences,
            padding_T=context.padding_T,
        )
        load, share_TE = soft_load(mix, self.num_experts, context.padding_T)
        nothing_T0 = logits_TS.new_zeros(logits_TS.shape[0], 0)
        return Routing(
            nothing_T0.long(),
            nothing_T0,
            logits_TS,
            {},
            load,
            health_sums(
                logits_TS, share_TE, nothing_T0.long(), nothing_T0, padding_T=context.padding_T
            ),
            slots=mix,
        )


def _uniform(like: Tensor, context: RoutingContext, layer: int, stream: int) -> Tensor:
    """Draw U(0, 1) of the shape of `like`, keyed by sample; alone, from torch's own generator."""
    shape = tuple(like.shape)
    if context.noise is None:
        return torch.rand(shape, device=like.device)
    return context.noise.uniform(shape, layer=layer, device=like.device, stream=stream)
