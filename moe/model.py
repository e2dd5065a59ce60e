"""The decoder: embeddings, blocks of attention and feed-forward, final norm, output weights.

Read first: `layer.py` (the MoE layer). The model knows no ranks: build it on the meta device, let
`parallelize.py` place the experts, then `initialise` it; the values depend on the seed alone.

Shapes:  B sequences   S positions   T = B * S tokens   D model width   V vocabulary
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from gatewise.moe.attention import Attention, KeyValueCache, RMSNorm
from gatewise.moe.config import ModelConfig
from gatewise.moe.dispatch import LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.latent import LatentAttention
from gatewise.moe.layer import MoELayer
from gatewise.moe.plan_ahead import BatchPlan, plan_tickets
from gatewise.moe.rotary import rotary_tables
from gatewise.moe.tickets import PassTickets
from gatewise.parallel.parameters import Label, Owner, ParameterSpec, Span, take_spans
from gatewise.parallel.sequence import WHOLE_SEQUENCES
from gatewise.routers.ahead.agreement import learn_to_agree
from gatewise.routers.ahead.config import Exchange
from gatewise.routers.ahead.plan import RoutePlan
from gatewise.routers.ahead.pregate import build_pregate
from gatewise.routers.api import Decision, NoiseKey, Routing, RoutingContext
from gatewise.routers.config import RouterConfig
from gatewise.routers.recurrent import RecurrentCell
from gatewise.routers.router import ComposedRouter, build_cell, build_router
from gatewise.routers.shapes import Start
from gatewise.routers.weights import RouterWeights, fill

__all__ = [
    "Block",
    "Decoder",
    "DecoderOutput",
    "gradient_turns",
    "initialise",
    "parameter_specs",
    "set_precision",
]


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """Final hidden states, and one routing per MoE layer."""

    hidden_BSD: Tensor
    routings: tuple[Routing, ...]


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals.

    Args:
        config: sizes.
        router: settings of the router, used where this layer has experts.
        layer: index from 0.
        cell: what the routers of all layers share, registered by the model; or None.
        vocab_size: for routers that choose by token id.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        layer: int,
        *,
        cell: RecurrentCell | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.norm_attention = RMSNorm(config.hidden, config.norm_eps)
        self.attention: Attention | LatentAttention = (
            LatentAttention(config) if config.attention.latent.is_on else Attention(config, layer)
        )
        self.norm_feed_forward = RMSNorm(config.hidden, config.norm_eps)
        self.feed_forward: MoELayer | FeedForward
        if config.is_moe(layer):
            shared = config.shared()
            self.feed_forward = MoELayer(
                build_router(
                    router,
                    config.hidden,
                    config.num_experts,
                    config.top_k,
                    cell=cell,
                    index=config.moe_layers().index(layer),
                    vocab_size=vocab_size,
                ),
                GroupedExperts(
                    config.num_experts,
                    config.hidden,
                    config.expert_width,
                    config.activation,
                    biases=config.clamped_experts,
                ),
                LocalDispatcher(config.num_experts),
                shared=FeedForward(
                    config.hidden, shared, config.activation, gated=config.shared_gate
                )
                if shared
                else None,
                capacity=config.capacity,
            )
        else:
            self.feed_forward = FeedForward(
                config.hidden, config.feed_forward_width(), config.activation
            )

    def forward(
        self,
        x_BSD: Tensor,
        context: RoutingContext,
        rotary: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
        tickets: PassTickets | None = None,
    ) -> tuple[Tensor, Routing | None, RoutingContext]:
        """Return the block's output, its routing (None for a dense layer) and the context."""
        x_BSD = x_BSD + self.attention(self.norm_attention(x_BSD), rotary, self.layer, cache)
        normed_BSD = self.norm_feed_forward(x_BSD)
        if isinstance(self.feed_forward, FeedForward):
            return x_BSD + self.feed_forward(normed_BSD), None, context
        y_TD, routing, context = self.feed_forward(
            normed_BSD.flatten(0, 1), context, self.layer, tickets
        )
        return x_BSD + y_TD.view_as(x_BSD), routing, context


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: sizes.
        router: settings of every layer's router.
        vocab_size: V.
    """

    def __init__(self, config: ModelConfig, router: RouterConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.router_config = router
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.hidden))
        if config.num_experts:
            router.check(config.num_experts, config.top_k, causal=True)
        self.ahead = build_pregate(
            router.ahead,
            vocab_size,
            layers=len(config.moe_layers()),
            num_experts=config.num_experts,
            top_k=config.top_k,
            table=router.hash_table,
        )
        self.follows_ahead = True  # false: the layers' routers decide, as if there were no pre-gate
        self.router_cell = build_cell(router, config.hidden) if config.moe_layers() else None
        self.blocks = nn.ModuleList(
            Block(config, router, i, cell=self.router_cell, vocab_size=vocab_size)
            for i in range(config.layers)
        )
        self.norm_final = RMSNorm(config.hidden, config.norm_eps)
        self.head = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.hidden))
        )
        self.recompute = False  # activation checkpointing of every block
        self.split = WHOLE_SEQUENCES  # how the positions of sequences lie on ranks

    @property
    def output_weight(self) -> Tensor:
        """The matrix (V, D) from hidden states to logits."""
        return self.embedding if self.head is None else self.head

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in order."""
        return [b.feed_forward for b in self._blocks() if isinstance(b.feed_forward, MoELayer)]

    def routers(self) -> list[ComposedRouter]:
        """Return the routers of the MoE layers in order."""
        routers = [layer.router for layer in self.moe_layers()]
        return [router for router in routers if isinstance(router, ComposedRouter)]

    def plan(
        self, batches: Sequence[Tensor], *, paddings: Sequence[Tensor | None] | None = None
    ) -> list[BatchPlan | None]:
        """Let the pre-gate decide for several micro-batches, with one exchange of counts.

        Args:
            batches: token ids (B, S) of each, on all ranks equally many.
            paddings: True where a token is padding, per micro-batch.

        Returns:
            A plan per micro-batch, good until the parameters change; None where there is no
            pre-gate.
        """
        if self.ahead is None or not self.follows_ahead:
            return [None] * len(batches)
        masks = paddings or [None] * len(batches)
        with record_function("moe.decide_ahead"):
            routes = [
                self.ahead.plan(token_BS, padding_T=padding_T)
                for token_BS, padding_T in zip(batches, masks, strict=True)
            ]
        return list(self.plan_routes(routes))

    def plan_routes(self, routes: Sequence[RoutePlan]) -> list[BatchPlan]:
        """Prepare given routes, a pre-gate's or recorded ones, to be followed by `forward`.

        With `router.ahead.exchange=layer` the layers exchange counts themselves.
        """
        layers = self.moe_layers()
        if self.router_config.ahead.exchange is Exchange.layer:
            return [BatchPlan(route) for route in routes]
        schedules = [layer.schedule for layer in layers]
        first = layers[0]
        return plan_tickets(
            routes, first.dispatcher, schedules=schedules, execution=first.execution
        )

    def _decisions(self, plan: BatchPlan, tokens: int) -> tuple[Decision | None, ...]:
        """Return the decision of every layer of the model; None for a dense one."""
        if self.ahead is not None:
            plan.check_version(self.ahead.version)
        places = self.config.moe_layers()
        plan.route.check(layers=len(places), tokens=tokens, num_experts=self.config.num_experts)
        decisions: list[Decision | None] = [None] * self.config.layers
        for index, layer in enumerate(places):
            decisions[layer] = plan.route.layer(index)
        return tuple(decisions)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(
        self,
        token_BS: Tensor,
        context: RoutingContext | None = None,
        cache: KeyValueCache | None = None,
        plan: BatchPlan | None = None,
    ) -> DecoderOutput:
        """Return final hidden states; `logits` turns them into logits.

        Where positions are spread over ranks, these are the states of our part of them.

        Args:
            token_BS: int64 token ids.
            context: what the routers are told; `sequences` and `token_ids` are set here.
            cache: keys and values of earlier calls, extended in place.
            plan: experts of all layers, from `plan` or `plan_routes`; None lets the pre-gate
                decide, where there is one.

        Raises:
            ValueError: if the plan is of another batch or model.
            StalePlanError: if the pre-gate changed since it made the plan.
        """
        context = context or RoutingContext()
        batch, positions = token_BS.shape
        if plan is None and self.ahead is not None and self.follows_ahead:
            with record_function("moe.decide_ahead"):
                route = self.ahead.plan(
                    token_BS, padding_T=context.padding_T, cache=cache.ahead if cache else None
                )
            (plan,) = self.plan_routes([route])
        own_BS = self.split.own(token_BS)
        context = RoutingContext(
            ahead=None if plan is None else self._decisions(plan, token_BS.numel()),
            token_ids=own_BS.flatten(),
            padding_T=self._own_padding(context, token_BS),
            sequences=batch,
            noise=self._own_noise(context),
            measures=context.measures and cache is None,  # generation asks for no measures
        )
        rotary = self.rotary(positions, start=cache.length if cache else 0, device=token_BS.device)
        x_BSD = F.embedding(own_BS, self.embedding)
        routings: list[Routing] = []
        for place, block in enumerate(self.blocks):
            tickets = None
            if plan is not None and self.config.is_moe(place):
                tickets = plan.layer(len(routings))
            if self.recompute and torch.is_grad_enabled():
                x_BSD, routing, context = checkpoint(
                    block, x_BSD, context, rotary, cache, tickets, use_reentrant=False
                )
            else:
                x_BSD, routing, context = block(x_BSD, context, rotary, cache, tickets)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += positions
        if plan is not None and self.training:
            routings = learn_to_agree(
                routings, plan.route, self.router_config.ahead, padding_T=context.padding_T
            )
        return DecoderOutput(self.norm_final(x_BSD), tuple(routings))

    def rotary(
        self, positions: int, *, start: int = 0, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the rotary tables of positions from `start`."""
        return rotary_tables(
            positions,
            self.config.rope_width(),
            self.config.rope_base,
            start=start,
            device=device,
            scaling=self.config.rope,
        )

    def _own_padding(self, context: RoutingContext, token_BS: Tensor) -> Tensor | None:
        if context.padding_T is None or self.split.parts == 1:
            return context.padding_T
        return self.split.own(context.padding_T.view_as(token_BS)).flatten()

    def _own_noise(self, context: RoutingContext) -> NoiseKey | None:
        if context.noise is None:
            return None
        return replace(context.noise, part=self.split.part, parts=self.split.parts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.output_weight).float()


def initialise(model: Decoder, seed: int) -> None:
    """Give every parameter its starting value from the seed, its name and its expert alone.

    Any placement of experts, and any number of ranks, starts from the same model. Matrices are
    normal with `init_std`, those that write to the residual stream divided by sqrt(2 * layers);
    routers say how theirs start.
    """
    residual = model.config.init_std / math.sqrt(2 * model.config.layers)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if name == "gain":
                nn.init.ones_(parameter)
                continue
            if name.startswith(("bias", "sinks")) and not isinstance(module, RouterWeights):
                nn.init.zeros_(parameter)
                continue
            std = residual if name in ("w_out", "w_out_DF", "w_out_eDF") else model.config.init_std
            if isinstance(module, RouterWeights):
                _draw(parameter.data, module.starts[name], std, seed, full_name)
            elif isinstance(module, GroupedExperts):
                for local in range(module.num_local):
                    expert = module.first_expert + local
                    mine = parameter.data[local]
                    whole = mine
                    if module.shards > 1:
                        whole = mine.new_empty(module.whole_shape(name))
                    _draw(whole, Start(), std, seed, f"{full_name}.{expert}")
                    if whole is not mine:
                        mine.copy_(module.part_of(name, whole))
            elif isinstance(module, Attention) and module.spans(name):
                whole = parameter.new_empty(module.whole_shape(name))
                _draw(whole, Start(), std, seed, full_name)
                parameter.data.copy_(take_spans(whole, module.spans(name)).view_as(parameter))
            else:
                _draw(parameter.data, Start(), std, seed, full_name)
        if isinstance(module, RouterWeights):
            module.reset_state()


def _draw(data: Tensor, start: Start, std: float, seed: int, name: str) -> None:
    # a CPU generator looks at the low 32 bits of its seed only, so both must be mixed into these
    mixed = (zlib.crc32(name.encode()) + seed * 0x9E3779B1) & 0xFFFFFFFF
    fill(data, start, std, torch.Generator().manual_seed(mixed))


def set_precision(model: Decoder, dtype: torch.dtype) -> None:
    """Cast the matrices to `dtype`; routers and norms stay fp32 (fp64 with fp64 matrices)."""
    small = torch.promote_types(dtype, torch.float32)
    for module in model.modules():
        keep = isinstance(module, RMSNorm | RouterWeights)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(small if keep else dtype)


def gradient_turns(model: Decoder) -> dict[str, int]:
    """Return after how many backward passes of MoE layers each parameter's gradient is complete.

    Parameters that several blocks share, or that act before the first one, are left out: their
    gradients are complete only at the end.
    """
    places = model.config.moe_layers()
    turns = {}
    for name, _ in model.named_parameters():
        part, _, rest = name.partition(".")
        if part == "blocks":
            block = int(rest.partition(".")[0])
            turns[name] = sum(place >= block for place in places)
        elif part in ("norm_final", "head"):
            turns[name] = 0
    return turns


def parameter_specs(model: Decoder) -> list[ParameterSpec]:
    """Describe every parameter: whose it is, and where it lies in the whole model."""
    num_experts = model.config.num_experts
    specs = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            label: Label = "dense"
            if isinstance(module, GroupedExperts):
                label = "expert"
            elif isinstance(module, RouterWeights):
                label = "router"
            elif name == "embedding":
                label = "embedding"
            shape: tuple[int, ...] = tuple(parameter.shape)
            owner: Owner = "all"
            spans: tuple[Span, ...] = ()
            if isinstance(module, GroupedExperts):
                shape = (num_experts, *module.whole_shape(name))
                owner, spans = "expert", (module.span(name),)
            elif isinstance(module, Attention):
                shape, spans = module.whole_shape(name), module.spans(name)
                owner = "tensor" if spans else "all"
            specs.append(
                ParameterSpec(
                    f"{module_name}.{name}" if module_name else name,
                    parameter,
                    label,
                    owner,
                    decay=parameter.dim() > 1 and label != "embedding" and name[:4] != "bias",
                    shape=shape,
                    spans=spans,
                )
            )
    return specs
