"""The Mixture-of-Experts layer: route, then run the stage graph.

Read first: `stages.py` (the stages) and `routers/api.py` (what a router decides). The layer works
without any process group; with one it is expert-parallel over it. `parallelize.py` wires the layers
of a whole model from outside.

Shapes:  T tokens on this rank   D model width   E experts, all ranks   K experts per token
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewise.moe.capacity import apply_capacity
from gatewise.moe.clamped import clamped_experts
from gatewise.moe.columns import gather_columns
from gatewise.moe.compute import moe_compute
from gatewise.moe.config import Activation, CapacityConfig
from gatewise.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.job import Job, SliceSender
from gatewise.moe.packed import PackedExperts
from gatewise.moe.stages import Schedule
from gatewise.moe.tickets import PassTickets
from gatewise.moe.whole_routing import route_whole
from gatewise.parallel.collectives import Group
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.sequence import WHOLE_SEQUENCES
from gatewise.routers.api import (
    Demand,
    ExpertColumns,
    Load,
    Router,
    Routing,
    RoutingContext,
    SlotMix,
)
from gatewise.routers.balance import global_balance_loss
from gatewise.routers.config import RouterConfig
from gatewise.routers.presets import preset
from gatewise.routers.router import ComposedRouter, build_cell, build_router

__all__ = ["MoE", "MoELayer"]


class MoELayer(nn.Module):
    """Routes tokens to experts and sums what they return; the form that models use.

    Args:
        router: any `Router`.
        experts: this rank's experts.
        dispatcher: how rows travel; must own as many experts as `experts`.
        shared: a feed-forward network that every token passes as well, or None.
        capacity: dropping, in training only.

    `expert_gradient_scale` multiplies the gradients of the experts' weights; `columns` returns
    their statistics over all ranks, for routers that read them; `split` tells how the positions of
    sequences lie on ranks; `packed`, where it is not None, computes in the place of `experts`,
    without gradients; `prune`, where set, takes experts out of the routing before anything is sent.
    """

    columns: Callable[[GroupedExperts, float], ExpertColumns]
    prune: Callable[[Tensor, Routing, RoutingContext], Routing] | None

    def __init__(
        self,
        router: Router,
        experts: GroupedExperts,
        dispatcher: Dispatcher,
        *,
        shared: nn.Module | None = None,
        capacity: CapacityConfig | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.shared = shared
        self.capacity = capacity or CapacityConfig()
        self.schedule = Schedule.serial()
        self.execution = Execution()
        self.gradient_slices: SliceSender | None = None  # what travels with the backward pass
        self.expert_gradient_scale = 1.0
        composed = router if isinstance(router, ComposedRouter) else None
        self.reads_columns = composed is not None and composed.reads_columns
        self.looks_at_sequences = composed is not None and composed.looks_at_sequences
        self.split = WHOLE_SEQUENCES
        self.columns = gather_columns
        self.packed: PackedExperts | None = None
        self.prune = None

    def forward(
        self,
        x_TD: Tensor,
        context: RoutingContext,
        layer: int,
        tickets: PassTickets | None = None,
    ) -> tuple[Tensor, Routing, RoutingContext]:
        """Return the layer's output, its routing, and the context for the next layer.

        Padding gives zeros: it is not sent to experts, and whatever it holds stays out of all
        gradients. Tickets made ahead (`plan_ahead.py`) spare the exchange of counts.
        """
        if context.padding_T is not None:
            x_TD = x_TD.masked_fill(context.padding_T.unsqueeze(1), 0.0)
        drops = self.capacity.factor is not None and self.training
        if self.prune is not None:
            tickets = None  # made ahead, they would send what is dropped
        assert tickets is None or not drops  # dropping is decided here, after the tickets
        routing, context, may_drop = self.decide(x_TD, context, layer)
        if routing.slots is not None:
            y_TD = self._compute_slots(x_TD, routing.slots, layer)
        else:
            y_TD = self._compute(
                x_TD,
                routing.weight_TK,
                routing.expert_TK,
                may_drop=may_drop,
                layer=layer,
                tickets=tickets,
            )
        return self._add_shared(x_TD, y_TD), routing, context

    def decide(
        self, x_TD: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Routing, RoutingContext, bool]:
        """Return the routing, the context for the next layer, and whether pairs may be dropped.

        Args:
            x_TD: tokens; padding is zero.
            context: what the router is told.
            layer: index in the model.
        """
        padding_T = context.padding_T
        if self.reads_columns:
            columns = self.columns(self.experts, self.expert_gradient_scale)
            routing, context = self._route(x_TD, replace(context, columns=columns), layer)
            context = replace(context, columns=None)
        else:
            routing, context = self._route(x_TD, context, layer)
        if routing.slots is not None:
            return routing, context, False
        if self.prune is not None:
            routing = self.prune(x_TD, routing, context)
        drops = self.capacity.factor is not None and self.training
        if drops:
            asked_TK = routing.expert_TK
            routing = apply_capacity(
                routing,
                self.capacity,
                context,
                num_experts=self.router.num_experts,
                layer=layer,
                top_k=getattr(self.router, "top_k", None) if routing.variable else None,
            )
            dropped_TK = routing.expert_TK < 0
            if routing.variable:
                dropped_TK = dropped_TK & (asked_TK >= 0)
            if padding_T is not None:
                dropped_TK = dropped_TK & ~padding_T.unsqueeze(1)
            dropped = dropped_TK.sum().float()
            routing = replace(routing, health={**routing.health, "dropped": dropped})
        if padding_T is not None:
            unpadded_TK = torch.where(padding_T.unsqueeze(1), -1, routing.expert_TK)
            routing = replace(routing, expert_TK=unpadded_TK)
        return routing, context, drops or padding_T is not None or routing.variable

    def _route(
        self, x_TD: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Routing, RoutingContext]:
        if self.split.parts > 1 and self.looks_at_sequences:
            return route_whole(self.router, x_TD, context, layer, self.split)
        return self.router(x_TD, context, layer)

    def job(
        self,
        expert_TK: Tensor,
        *,
        may_drop: bool,
        layer: int,
        tickets: PassTickets | None = None,
    ) -> Job:
        """Return what one computation of this layer's experts needs beside tokens and weights."""
        return Job(
            expert_TK,
            may_drop,
            self.experts.activation,
            self.dispatcher,
            self.schedule,
            self.experts.sinks,
            self.expert_gradient_scale,
            self.experts.memory,
            tickets,
            layer,
            self.execution,
            self.gradient_slices,
        )

    def _compute(
        self,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        *,
        may_drop: bool,
        layer: int,
        tickets: PassTickets | None = None,
    ) -> Tensor:
        if self.packed is not None:
            return self.packed(x_TD, expert_TK, weight_TK)  # type: ignore[no-any-return]  # a module
        if self.experts.bias_in_eG is not None:
            return clamped_experts(x_TD, expert_TK, weight_TK, self.experts)
        job = self.job(expert_TK, may_drop=may_drop, layer=layer, tickets=tickets)
        return moe_compute(x_TD, weight_TK, self.experts.w_in_eGD, self.experts.w_out_eDF, job)

    def _compute_slots(self, x_TD: Tensor, mix: SlotMix, layer: int) -> Tensor:
        """Mix tokens into slots, give each slot to its one expert, and mix the outputs back."""
        batch, num_slots, positions = mix.gather_BSP.shape
        x_BPD = x_TD.view(batch, positions, x_TD.shape[1])
        slot_BSD = torch.bmm(mix.gather_BSP.to(x_TD.dtype), x_BPD)
        expert_N1 = mix.expert_S.repeat(batch).unsqueeze(1)
        one_N1 = mix.gather_BSP.new_ones(batch * num_slots, 1)
        slot_ND = self._compute(
            slot_BSD.flatten(0, 1), one_N1, expert_N1, may_drop=False, layer=layer
        )
        y_BPD = torch.bmm(
            mix.scatter_BPS.to(slot_ND.dtype), slot_ND.view(batch, num_slots, x_TD.shape[1])
        )
        return y_BPD.flatten(0, 1)

    def _add_shared(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)


class MoE(nn.Module):
    """The layer alone, an ordinary module for anyone's model.

    After a call `losses` holds the weighted router losses of that call: add them to yours. With a
    router that keeps balance by a state beside its parameters (`bias_rate` as in "deepseek_v3",
    `sparsity_rate` as in "remoe"), call `update_router` after each optimizer step.

    With a process group of P ranks each rank holds E / P experts and brings its own tokens. Average
    the gradients of all other parameters over the ranks, as DistributedDataParallel does; those of
    `experts` come out averaged already and must not be reduced (they differ between ranks).

    Args:
        hidden: D, the width of the input and output.
        expert_width: F, the inner width of each expert.
        num_experts: E over all ranks.
        top_k: K, experts per token.
        activation: "swiglu", "gelu" or "relu".
        router: a preset's name (`gatewise.routers.presets.PRESETS`), a `RouterConfig`, or a module
            that follows the `Router` protocol.
        group: a process group, or None for this rank alone.
        shared_experts: experts of the same width that every token passes.
        capacity_factor: None drops nothing; else pairs over capacity are dropped in training.
        vocab_size: number of token ids, for routers that choose by them.

    Raises:
        ValueError: for sizes that do not fit each other, naming the argument.
    """

    losses: dict[str, Tensor]

    def __init__(
        self,
        hidden: int,
        expert_width: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "swiglu",
        router: str | RouterConfig | Router = "mixtral",
        group: dist.ProcessGroup | None = None,
        shared_experts: int = 0,
        capacity_factor: float | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("expert_width", expert_width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        kind = _activation(activation)
        config = preset(router) if isinstance(router, str) else router
        if isinstance(config, RouterConfig) and config.ahead.is_on:
            raise ValueError(
                f"router is {router!r}, which decides for the layers of a model before the first; "
                "a layer alone needs a router that decides in it"
            )
        self._group = Group.of(group)
        self.router_cell = build_cell(config, hidden) if isinstance(config, RouterConfig) else None
        dispatcher: Dispatcher = LocalDispatcher(num_experts)
        if self._group.handle is not None:
            dispatcher = AllToAllDispatcher(num_experts, self._group)
        experts = GroupedExperts(
            dispatcher.num_local,
            hidden,
            expert_width,
            kind,
            first_expert=dispatcher.first_expert,
        )
        self.layer = MoELayer(
            build_router(
                config,
                hidden,
                num_experts,
                top_k,
                cell=self.router_cell,
                vocab_size=vocab_size,
            )
            if isinstance(config, RouterConfig)
            else config,
            experts,
            dispatcher,
            shared=FeedForward(hidden, shared_experts * expert_width, kind)
            if shared_experts
            else None,
            capacity=CapacityConfig(factor=capacity_factor),
        )
        self.layer.expert_gradient_scale = 1 / self._group.size
        self.layer.columns = partial(gather_columns, group=self._group)
        self.losses = {}
        self._load: Load | None = None  # summed since the last update of the router

    def __getstate__(self) -> dict[str, Any]:  # Any: whatever a module's attributes are
        """Leave the last call's losses out of copies: they belong to that call's graph."""
        return {**self.__dict__, "losses": {}}

    @property
    def router(self) -> Router:
        """The router."""
        return self.layer.router

    @property
    def experts(self) -> GroupedExperts:
        """This rank's experts."""
        return self.layer.experts

    def forward(
        self, x: Tensor, padding: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., hidden), of the parameters' dtype; with a leading batch dim, sequence losses
                take each of its rows as one sequence.
            padding: bool (...), True where a token is padding: it gives zeros and counts nowhere.
            token_ids: int64 (...), for routers that choose by them.

        Returns:
            A tensor like `x`.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        context = RoutingContext(
            sequences=x.shape[0] if x.dim() > 2 and x.shape[0] else 1,
            padding_T=None if padding is None else padding.reshape(-1),
            token_ids=None if token_ids is None else token_ids.reshape(-1),
        )
        y_TD, routing, _ = self.layer(x_TD, context, 0)
        self.losses = dict(routing.losses)
        router, load = self.layer.router, routing.load
        if isinstance(router, ComposedRouter) and load is not None:
            if router.moves and self.training:
                self._load = _add_loads(self._load, load)
            weight = router.global_loss_weight
            if isinstance(weight, Tensor) or weight > 0:
                self.losses["balance"] = weight * self._global_balance(load, router.top_k)
        y: Tensor = y_TD.view_as(x)
        return y

    @torch.no_grad()
    def update_router(self) -> None:
        """Move the router's balance by the demand of all training calls since the last update.

        Over a group all ranks must call it. Routers without such a state stay as they are.
        """
        router = self.layer.router
        if not isinstance(router, ComposedRouter) or not router.moves:
            return
        load, self._load = self._load, None
        if load is None:  # the other ranks may have seen tokens
            zero_E = torch.zeros_like(router.bias_E)
            load = Load(zero_E, zero_E, zero_E.sum(), router.no_margins())
        parts = [load.count_E, load.tokens.view(1)]
        parts += [] if load.margin_EM is None else [load.margin_EM.flatten()]
        packed = torch.cat(parts)
        if self._group.handle is not None:
            dist.all_reduce(packed, group=self._group.handle)
        count_E, tokens, margins = packed.split(
            (len(load.count_E), 1, len(packed) - len(load.count_E) - 1)
        )
        margin_LEM = None
        if load.margin_EM is not None:
            margin_LEM = margins.view(1, *load.margin_EM.shape)
        router.after_step(Demand(count_E.unsqueeze(0), tokens[0], margin_LEM))

    def _global_balance(self, load: Load, top_k: int) -> Tensor:
        packed = torch.cat((load.count_E, load.tokens.view(1)))
        if self._group.handle is not None:
            dist.all_reduce(packed, group=self._group.handle)
        return global_balance_loss(
            load.score_E,
            packed[:-1],
            tokens=packed[-1],
            top_k=top_k,
            ranks=self._group.size,
        )


def _add_loads(total: Load | None, load: Load) -> Load:
    """Add the counts of two calls; scores are left out."""
    if total is None:
        return replace(load, score_E=load.score_E.detach())
    margins = None
    if total.margin_EM is not None and load.margin_EM is not None:
        margins = total.margin_EM + load.margin_EM
    return Load(total.count_E + load.count_E, total.score_E, total.tokens + load.tokens, margins)


def _activation(name: str) -> Activation:
    try:
        return Activation[name]
    except KeyError:
        known = ", ".join(kind.value for kind in Activation)
        raise ValueError(f"activation is {name!r}; it must be one of {known}") from None
