"""Wire a model for many ranks, from outside: place experts and heads, choose how rows travel."""

from dataclasses import dataclass
from functools import partial

import torch

from gatewise.moe.attention import Attention
from gatewise.moe.columns import gather_columns
from gatewise.moe.config import ModelConfig
from gatewise.moe.dispatch import AllToAllDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.job import GradientSink
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block, Decoder, gradient_turns, initialise, set_precision
from gatewise.moe.stages import Schedule
from gatewise.parallel.collectives import NO_GROUP, Group
from gatewise.parallel.dims import ExpertGroups
from gatewise.parallel.reducer import GradientReducer
from gatewise.parallel.schedule.executor import Execution, Handle
from gatewise.parallel.sequence import SequenceSplit
from gatewise.parallel.slices import plan_turns
from gatewise.routers.config import RouterConfig

__all__ = [
    "apply_expert_parallel",
    "apply_schedule",
    "apply_tensor_parallel",
    "build_model",
    "send_slices_in_windows",
    "write_gradients_directly",
]


def apply_expert_parallel(model: Decoder, groups: Group | ExpertGroups) -> None:
    """Leave each rank its share of every layer's experts.

    Call it before the parameters have values (on the meta device) and before an optimizer sees
    them. One rank alone keeps everything.

    Args:
        model: its experts are all local still.
        groups: rank p of `rows` gets experts [p * E / P, (p + 1) * E / P), and rank s of `shard`
            a part of the width of each; a plain group spreads whole experts.
    """
    groups = groups if isinstance(groups, ExpertGroups) else ExpertGroups.of(groups)
    if groups.size == 1:
        return
    shard, config = groups.shard, model.config
    for layer in model.moe_layers():
        dispatcher = AllToAllDispatcher(config.num_experts, groups)
        with torch.device(layer.experts.w_in_eGD.device):
            layer.experts = GroupedExperts(
                dispatcher.num_local,
                config.hidden,
                config.expert_width,
                config.activation,
                first_expert=dispatcher.first_expert,
                shard=shard.rank,
                shards=shard.size,
            )
        layer.dispatcher = dispatcher
        layer.columns = partial(gather_columns, group=groups.everyone, shards=shard.size)
        layer.schedule = Schedule.serial(is_sharded=shard.size > 1)


def apply_tensor_parallel(model: Decoder, group: Group) -> None:
    """Leave each rank of `group` its share of attention heads and of every sequence's positions.

    Call it as `apply_expert_parallel`. A group of one rank changes nothing.

    Args:
        model: with all heads still.
        group: its ranks read the same sequences, and give `forward` all of their tokens; rank t
            gets back the hidden states of the t-th part of the positions.
    """
    if group.size == 1:
        return
    config = model.config
    model.split = SequenceSplit(group)
    for block in model.blocks:
        assert isinstance(block, Block)
        with torch.device(block.norm_attention.gain.device):
            block.attention = Attention(config, block.layer, split=model.split)
        if isinstance(block.feed_forward, MoELayer):
            block.feed_forward.split = model.split


def build_model(
    config: ModelConfig,
    router: RouterConfig,
    *,
    vocab_size: int,
    group: Group | ExpertGroups,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    tensor: Group = NO_GROUP,
) -> Decoder:
    """Build, place and initialise a decoder; no rank ever holds experts that are not its own."""
    with torch.device("meta"):
        model = Decoder(config, router, vocab_size)
    apply_expert_parallel(model, group)
    apply_tensor_parallel(model, tensor)
    model.to_empty(device=device)
    initialise(model, seed)
    set_precision(model, dtype)
    return model


def write_gradients_directly(model: Decoder, reducer: GradientReducer) -> None:
    """Let the experts' backward pass write into the reducer's buckets, past autograd.

    Not where the router reads the experts' weights: there autograd adds a second gradient. Nor for
    clamped experts, whose whole gradient is autograd's.
    """
    for layer in model.moe_layers():
        experts = layer.experts
        if layer.reads_columns or experts.bias_in_eG is not None:
            continue
        sink_in, sink_out = (
            GradientSink(reducer.slot(weight), partial(reducer.written, weight))
            for weight in (experts.w_in_eGD, experts.w_out_eDF)
        )
        experts.sinks = (sink_in, sink_out)


def apply_schedule(model: Decoder, schedule: Schedule, execution: Execution) -> None:
    """Let every MoE layer run by the same plans, on the same lanes."""
    for layer in model.moe_layers():
        layer.schedule, layer.execution = schedule, execution


@dataclass(frozen=True, slots=True)
class _TurnSender:
    """Sends what travels with one layer's backward pass."""

    reducer: GradientReducer
    turn: int

    def send(self, index: int) -> Handle | None:
        return self.reducer.send_slice(self.turn, index)

    def finish(self) -> None:
        self.reducer.send_beside(self.turn)


def send_slices_in_windows(
    model: Decoder, reducer: GradientReducer, *, window_bytes: float
) -> None:
    """Let slices of the gradient sums travel within the layers' backward passes.

    Where the layers' plans have no window, sums are sent when a bucket is full.

    Args:
        model: its layers have their schedule already.
        reducer: of the model's buckets.
        window_bytes: gradients that fit into one layer's window.
    """
    layers = model.moe_layers()
    shares = layers[0].schedule.reduce_shares if layers else ()
    for layer in layers:
        layer.gradient_slices = None
    if not shares:
        reducer.hold(())
        return
    turns = plan_turns(
        reducer.buckets,
        gradient_turns(model),
        turns=len(layers),
        window_bytes=window_bytes,
        shares=shares,
    )
    reducer.hold(turns)
    for turn, layer in enumerate(reversed(layers)):
        layer.gradient_slices = _TurnSender(reducer, turn)
