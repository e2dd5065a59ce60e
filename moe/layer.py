"""The Mixture-of-Experts layer: route, then run the stage graph.

Read first: `compute.py` (the stages) and `routers/api.py` (what a router decides). The layer works
without any process group; with one it is expert-parallel over it. `parallelize.py` wires the layers
of a whole model from outside.

Shapes:  T tokens on this rank   D model width   E experts, all ranks   K experts per token
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewise.moe.capacity import apply_capacity
from gatewise.moe.compute import Job, Schedule, moe_compute
from gatewise.moe.config import Activation, CapacityConfig
from gatewise.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.parallel.collectives import Group
from gatewise.routers.api import Router, Routing, RoutingContext
from gatewise.routers.balance import global_balance_loss, update_bias_
from gatewise.routers.config import BalanceScope, RouterConfig, preset
from gatewise.routers.topk import TopKRouter

__all__ = ["MoE", "MoELayer"]


class MoELayer(nn.Module):
    """Routes tokens to experts and sums what they return; the form that models use.

    Args:
        router: any `Router`.
        experts: this rank's experts.
        dispatcher: how rows travel; must own as many experts as `experts`.
        shared: a feed-forward network that every token passes as well, or None.
        capacity: dropping, in training only.

    `expert_gradient_scale` multiplies the gradients of the experts' weights.
    """

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
        self.expert_gradient_scale = 1.0

    def forward(
        self, x_TD: Tensor, context: RoutingContext, layer: int
    ) -> tuple[Tensor, Routing, RoutingContext]:
        """Return the layer's output, its routing, and the context for the next layer.

        Padding gives zeros: it is not sent to experts, and whatever it holds stays out of all
        gradients.
        """
        padding_T = context.padding_T
        if padding_T is not None:
            x_TD = x_TD.masked_fill(padding_T.unsqueeze(1), 0.0)
        routing, context = self.router(x_TD, context, layer)
        drops = self.capacity.factor is not None and self.training
        if drops:
            routing = apply_capacity(
                routing, self.capacity, context, num_experts=self.router.num_experts, layer=layer
            )
            dropped_TK = routing.expert_TK < 0
            if padding_T is not None:
                dropped_TK = dropped_TK & ~padding_T.unsqueeze(1)
            dropped = dropped_TK.sum().float()
            routing = replace(routing, health={**routing.health, "dropped": dropped})
        if padding_T is not None:
            unpadded_TK = torch.where(padding_T.unsqueeze(1), -1, routing.expert_TK)
            routing = replace(routing, expert_TK=unpadded_TK)
        job = Job(
            routing.expert_TK,
            drops or padding_T is not None,
            self.experts.activation,
            self.dispatcher,
            self.schedule,
            self.experts.sinks,
            self.expert_gradient_scale,
            self.experts.memory,
        )
        y_TD = moe_compute(
            x_TD, routing.weight_TK, self.experts.w_in_eGD, self.experts.w_out_eDF, job
        )
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, routing, context


class MoE(nn.Module):
    """The layer alone, an ordinary module for anyone's model.

    After a call `losses` holds the weighted router losses of that call: add them to yours. With a
    router whose bias balances (`bias_rate`, as in "deepseek_v3"), call `update_bias` after each
    optimizer step.

    With a process group of P ranks each rank holds E / P experts and brings its own tokens. Average
    the gradients of all other parameters over the ranks, as DistributedDataParallel does; those of
    `experts` come out averaged already and must not be reduced (they differ between ranks).

    Args:
        hidden: D, the width of the input and output.
        expert_width: F, the inner width of each expert.
        num_experts: E over all ranks.
        top_k: K, experts per token.
        activation: "swiglu", "gelu" or "relu".
        router: a preset's name (`gatewise.routers.config.PRESETS`), a `RouterConfig`, or a module
            that follows the `Router` protocol.
        group: a process group, or None for this rank alone.
        shared_experts: experts of the same width that every token passes.
        capacity_factor: None drops nothing; else pairs over capacity are dropped in training.

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
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("expert_width", expert_width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        kind = _activation(activation)
        config = preset(router) if isinstance(router, str) else router
        self._group = Group.of(group)
        self._config = config if isinstance(config, RouterConfig) else None
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
            TopKRouter(hidden, num_experts, top_k, config)
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
        self.losses = {}
        self._demand_E: Tensor | None = None  # since the last update of the bias

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

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., hidden), of the parameters' dtype; with a leading batch dim, sequence losses
                take each of its rows as one sequence.
            padding: bool (...), True where a token is padding: it gives zeros and counts nowhere.

        Returns:
            A tensor like `x`.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        context = RoutingContext(
            sequences=x.shape[0] if x.dim() > 2 and x.shape[0] else 1,
            padding_T=None if padding is None else padding.reshape(-1),
        )
        y_TD, routing, _ = self.layer(x_TD, context, 0)
        self.losses = dict(routing.losses)
        config = self._config
        if config and config.bias_rate and self.training and routing.load is not None:
            demand_E = routing.load.count_E
            self._demand_E = demand_E if self._demand_E is None else self._demand_E + demand_E
        if config and config.balance_loss and config.balance_scope is BalanceScope.global_batch:
            self.losses["balance"] = config.balance_loss * self._global_balance(routing)
        y: Tensor = y_TD.view_as(x)
        return y

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the balancing bias by the demand of all training calls since the last update.

        Over a group all ranks must call it. Without a `bias_rate` it does nothing.
        """
        config, router = self._config, self.layer.router
        if not config or not config.bias_rate or not isinstance(router, TopKRouter):
            return
        demand_E, self._demand_E = self._demand_E, None
        if demand_E is None:
            demand_E = torch.zeros_like(router.bias_E)
        if self._group.handle is not None:
            dist.all_reduce(demand_E, group=self._group.handle)
        update_bias_(router.bias_E, demand_E, rate=config.bias_rate)

    def _global_balance(self, routing: Routing) -> Tensor:
        load = routing.load
        assert load is not None
        packed = torch.cat((load.count_E, load.tokens.view(1)))
        if self._group.handle is not None:
            dist.all_reduce(packed, group=self._group.handle)
        return global_balance_loss(
            load.score_E,
            packed[:-1],
            tokens=packed[-1],
            top_k=routing.expert_TK.shape[1],
            ranks=self._group.size,
        )


def _activation(name: str) -> Activation:
    try:
        return Activation[name]
    except KeyError:
        known = ", ".join(kind.value for kind in Activation)
        raise ValueError(f"activation is {name!r}; it must be one of {known}") from None
