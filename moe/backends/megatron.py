"""Our routers in the place of Megatron-core's: recurrent, pre-gated, and all that choose top-k.

    routers = MegatronRouters(preset("rmoe"), layers=24)
    submodules = MoESubmodules(experts=..., router=routers.build)     # of every MoE layer's spec
    routers.watch(model)                                              # where a pre-gate reads ids

Megatron builds one router per MoE layer, in order, and calls each with the layer's input alone.
What runs over layers (the recurrent state, what was decided ahead) is kept beside them, from the
first MoE layer of a forward pass to the last. So all MoE layers must be on one pipeline stage, and
a layer must not be computed twice.

Shapes:  S positions   B sequences   T = B * S tokens   D model width   E experts, all ranks
         K experts per token
Source:  the interface of megatron-core's `MoELayer`: probabilities and a map, both (T, E), tokens
         position-major; written against 0.16.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.routers.ahead.agreement import learn_to_agree
from gatewise.routers.ahead.plan import RoutePlan
from gatewise.routers.ahead.pregate import build_pregate
from gatewise.routers.api import Demand, Load, Routing, RoutingContext
from gatewise.routers.config import BalanceScope, RouterConfig, Scorer, Selector
from gatewise.routers.router import ComposedRouter, build_cell, build_router

__all__ = ["MegatronRouter", "MegatronRouters"]


@dataclass(slots=True)
class _Carry:
    """What the layers of one forward pass hand on."""

    route: RoutePlan | None = None
    context: RoutingContext | None = None


class MegatronRouter(nn.Module):
    """The router of one layer; Megatron's `MoELayer` calls it.

    Args:
        router: ours.
        carry: shared by the routers of all layers.
        index: which MoE layer, from 0.
        layers: number of MoE layers.
        shared: parameters that all layers use, registered with the first.
    """

    def __init__(
        self,
        router: ComposedRouter,
        carry: _Carry,
        *,
        index: int,
        layers: int,
        shared: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.router = router
        self.shared = nn.ModuleList(shared)
        self.layer_number: int | None = None
        self.losses: dict[str, Tensor] = {}  # of the last call, weighted
        self.load: Load | None = None  # summed since the last update of the bias
        self._carry = carry
        self._index, self._layers = index, layers

    def set_layer_number(self, layer_number: int) -> None:
        """Note the layer's number in Megatron's model."""
        self.layer_number = layer_number

    def forward(
        self, hidden_SBD: Tensor, padding_SB: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each token's combine weights (T, E), fp32, and which experts it uses.

        Args:
            hidden_SBD: the layer's input.
            padding_SB: True where a token is padding; it is routed, and counts nowhere.
        """
        batch = hidden_SBD.shape[1]
        x_TD = hidden_SBD.transpose(0, 1).flatten(0, 1)  # ours is sequence-major
        padding_T = None if padding_SB is None else padding_SB.transpose(0, 1).flatten()
        context = self._context(batch, x_TD.shape[0], padding_T)
        routing, self._carry.context = self.router(x_TD, context, self._index)
        routing = self._teach(routing, padding_T)
        self.losses = dict(routing.losses)
        if self.training and self.router.moves and routing.load is not None:
            self.load = _add(self.load, routing.load)
        weight_TE = x_TD.new_zeros(x_TD.shape[0], self.router.num_experts, dtype=torch.float32)
        weight_TE = weight_TE.scatter(1, routing.expert_TK, routing.weight_TK.float())
        chosen_TE = torch.zeros_like(weight_TE, dtype=torch.bool)
        chosen_TE = chosen_TE.scatter(1, routing.expert_TK, True)
        if self.training and self.losses:
            weight_TE = _attach(weight_TE, torch.stack(list(self.losses.values())).sum())
        return _position_major(weight_TE, batch), _position_major(chosen_TE, batch)

    def _context(self, batch: int, tokens: int, padding_T: Tensor | None) -> RoutingContext:
        carry = self._carry
        if self._index == 0:
            ahead = None
            if carry.route is not None:
                carry.route.check(
                    layers=self._layers, tokens=tokens, num_experts=self.router.num_experts
                )
                ahead = tuple(carry.route.layer(layer) for layer in range(self._layers))
            return RoutingContext(sequences=batch, padding_T=padding_T, ahead=ahead)
        if carry.context is None:
            raise RuntimeError(
                f"MoE layer {self._index} was called before the first one; the routers need all "
                "MoE layers in one forward pass on one pipeline stage"
            )
        return replace(carry.context, padding_T=padding_T)

    def _teach(self, routing: Routing, padding_T: Tensor | None) -> Routing:
        """Add the loss from which a pre-gate learns what this layer would choose."""
        route = self._carry.route
        if route is None or not self.training:
            return routing
        decision, ahead = route.layer(self._index), self.router.config.ahead
        if decision.logits_TE is None:
            return routing
        own = replace(
            route,
            expert_LTK=decision.expert_TK.unsqueeze(0),
            logits_LTE=decision.logits_TE.unsqueeze(0),
            layers=1,
        )
        share = replace(ahead, distil=ahead.distil / self._layers)
        return learn_to_agree([routing], own, share, padding_T=padding_T)[0]


class MegatronRouters:
    """The routers of one Megatron model.

    Args:
        config: settings, as `gatewise.routers.presets` has them.
        layers: MoE layers of the model.
        vocab_size: number of token ids, for a pre-gate.

    Raises:
        ValueError: for parts that Megatron's layer has no place for.
    """

    def __init__(self, config: RouterConfig, *, layers: int, vocab_size: int | None = None) -> None:
        _check(config, vocab_size)
        self._config, self._layers, self._vocab_size = config, layers, vocab_size
        self._carry = _Carry()
        self._shared: tuple[nn.Module, ...] = ()
        self._gate: Any = None  # a pre-gate of any kind
        self._cell: Any = None
        self.built: list[MegatronRouter] = []

    def build(self, *, config: Any, pg_collection: Any = None) -> MegatronRouter:
        """Build the next layer's router: `router` of Megatron's `MoESubmodules`.

        Args:
            config: Megatron's `TransformerConfig`: sizes, and what must not be set beside this.
            pg_collection: Megatron's groups; not needed.

        Raises:
            ValueError: for settings of Megatron's that this router cannot follow.
        """
        _check_megatron(config, over_layers=self._runs_over_layers)
        index = len(self.built)
        if index == self._layers:
            raise ValueError(
                f"layers is {self._layers} but Megatron builds one more MoE layer; give the number "
                "of MoE layers of the whole model"
            )
        hidden, experts, top_k = (
            config.hidden_size,
            config.num_moe_experts,
            config.moe_router_topk,
        )
        if index == 0:
            self._cell = build_cell(self._config, hidden)
            self._gate = build_pregate(
                self._config.ahead,
                self._vocab_size or 0,
                layers=self._layers,
                num_experts=experts,
                top_k=top_k,
                table=self._config.hash_table,
            )
        router = build_router(self._config, hidden, experts, top_k, cell=self._cell, index=index)
        shared = [m for m in (self._cell, self._gate) if m is not None and index == 0]
        built = MegatronRouter(router, self._carry, index=index, layers=self._layers, shared=shared)
        for parameter in built.parameters():  # so that Megatron sums it over tensor ranks
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.built.append(built)
        return built

    def begin(self, token_BS: Tensor) -> None:
        """Let the pre-gate decide for a batch, before its first layer."""
        self._carry.context = None
        self._carry.route = None if self._gate is None else self._gate.plan(token_BS)

    def watch(self, model: nn.Module) -> None:
        """Call `begin` at every forward pass of a `GPTModel`, with its `input_ids`."""

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.begin(named["input_ids"] if "input_ids" in named else arguments[0])

        model.register_forward_pre_hook(before, with_kwargs=True)

    @torch.no_grad()
    def update(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Move the balancing biases by the demand since the last call, after an optimizer step.

        Args:
            group: ranks whose tokens count, all of which call this: Megatron's tensor, context
                and data parallel ranks together. None is this rank alone.
        """
        loads = [router.load for router in self.built]
        if not all(loads):
            return
        counts = torch.stack([load.count_E for load in loads if load is not None])
        packed = torch.cat((counts.flatten(), loads[0].tokens.view(1)))  # type: ignore[union-attr]
        if group is not None:
            torch.distributed.all_reduce(packed, group=group)
        demand = Demand(packed[:-1].view_as(counts), packed[-1])
        for router in self.built:
            router.router.after_step(demand)
            router.load = None

    @property
    def _runs_over_layers(self) -> bool:
        return self._config.scorer is Scorer.recurrent or self._config.ahead.is_on


def _position_major(values_TE: Tensor, batch: int) -> Tensor:
    """Reorder rows from sequence-major to position-major, as Megatron flattens its tokens."""
    return values_TE.view(batch, -1, values_TE.shape[1]).transpose(0, 1).flatten(0, 1)


def _attach(weight_TE: Tensor, loss: Tensor) -> Tensor:
    """Let the backward pass of the weights add a loss's gradient, scaled as Megatron's own."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    attached: Tensor = MoEAuxLossAutoScaler.apply(weight_TE, loss)
    return attached


def _add(before: Load | None, load: Load) -> Load:
    count_E, tokens = load.count_E, load.tokens
    if before is not None:
        count_E, tokens = count_E + before.count_E, tokens + before.tokens
    return Load(count_E, load.score_E.detach(), tokens)


def _check(config: RouterConfig, vocab_size: int | None) -> None:
    """Refuse what Megatron's layer cannot carry: other than K experts, ids, experts' weights."""
    for wrong, name, remedy in (
        (config.selector is not Selector.topk, "selector", "topk"),
        (config.hash_layers > 0, "hash_layers", "0"),
        (config.scorer is Scorer.sparsity, "scorer", "linear or recurrent"),
        (config.random_second, "random_second", "false"),
        (config.expert_dropout > 0, "expert_dropout", "0"),
        (config.bias_rule.name == "quantile" and config.bias_rate > 0, "bias_rule", "sign"),
        (config.sparsity_rate > 0, "sparsity_rate", "0"),
    ):
        if wrong:
            value = getattr(config, name)
            raise ValueError(
                f"router.{name} is {getattr(value, 'name', value)}, which Megatron's MoE layer has "
                f"no place for; use {remedy}"
            )
    if config.balance_scope is BalanceScope.global_batch and config.balance_loss:
        raise ValueError(
            "router.balance_scope is global_batch, whose loss needs the counts of all ranks; "
            "use micro_batch or sequence, or router.balance_loss=0"
        )
    if config.ahead.is_on and vocab_size is None:
        raise ValueError(
            "router.ahead chooses by token ids but vocab_size is not given; pass the number of ids"
        )


def _check_megatron(config: Any, *, over_layers: bool) -> None:
    """Refuse settings of Megatron's own router, which this one does not read."""
    coefficients = config.moe_aux_loss_coeff
    total = sum(coefficients) if isinstance(coefficients, list) else coefficients
    for wrong, name in (
        (total > 0, "moe_aux_loss_coeff"),
        (config.moe_z_loss_coeff is not None, "moe_z_loss_coeff"),
        (config.moe_router_enable_expert_bias, "moe_router_enable_expert_bias"),
        (config.moe_expert_capacity_factor is not None, "moe_expert_capacity_factor"),
        (config.moe_input_jitter_eps is not None, "moe_input_jitter_eps"),
    ):
        if wrong:
            raise ValueError(
                f"{name} is {getattr(config, name)}, which belongs to Megatron's own router; leave "
                "it out and set gatewise's router instead"
            )
    if not over_layers:
        return
    if config.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"pipeline_model_parallel_size is {config.pipeline_model_parallel_size}, but this "
            "router hands a state from layer to layer; use 1, or a linear scorer"
        )
    again = config.recompute_granularity
    if again == "full" or (again == "selective" and "moe" in (config.recompute_modules or [])):
        raise ValueError(
            f"recompute_granularity is {again}, which computes a MoE layer a second time without "
            "the layers before it; leave moe out of recompute_modules"
        )
