"""Wire a model for many ranks, from outside: place the experts, choose how rows travel."""

from dataclasses import dataclass
from functools import partial

import torch

from gatewise.moe.columns import gather_columns
from gatewise.moe.config import ModelConfig
from gatewise.moe.dispatch import AllToAllDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.job import GradientSink
from gatewise.moe.model import Decoder, gradient_turns, initialise, set_precision
from gatewise.moe.stages import Schedule
from gatewise.parallel.collectives import Group
from gatewise.parallel.reducer import GradientReducer
from gatewise.parallel.schedule.executor import Execution, Handle
from gatewise.parallel.slices import plan_turns
from gatewise.routers.config import RouterConfig

__all__ = [
    "apply_expert_parallel",
    "apply_schedule",
    "build_model",
    "send_slices_in_windows",
    "write_gradients_directly",
]


def apply_expert_parallel(model: Decoder, group: Group) -> None:
    """Leave each rank of `group` its share of every layer's experts.

    Call it before the parameters have values (on the meta device) and before an optimizer sees
    them. A group of one rank changes nothing.

    Args:
        model: its experts are all local still.
        group: rank p gets experts [p * E / P, (p + 1) * E / P).
    """
    for layer in model.moe_layers():
        if group.handle is None or group.size == 1:
            continue
        config = model.config
        dispatcher = AllToAllDispatcher(config.num_experts, group)
        device = layer.experts.w_in_eGD.device
        with torch.device(device):
            layer.experts = GroupedExperts(
                dispatcher.num_local,
                config.hidden,
                config.expert_width,
                config.activation,
                first_expert=dispatcher.first_expert,
            )
        layer.dispatcher = dispatcher
        layer.columns = partial(gather_columns, group=group)


def build_model(
    config: ModelConfig,
    router: RouterConfig,
    *,
    vocab_size: int,
    group: Group,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Decoder:
    """Build, place and initialise a decoder; no rank ever holds experts that are not its own."""
    with torch.device("meta"):
        model = Decoder(config, router, vocab_size)
    apply_expert_parallel(model, group)
    model.to_empty(device=device)
    initialise(model, seed)
    set_precision(model, dtype)
    return model


def write_gradients_directly(model: Decoder, reducer: GradientReducer) -> None:
    """Let the experts' backward pass write into the reducer's buckets, past autograd.

    Not where the router reads the experts' weights: there autograd adds a second gradient.
    """
    for layer in model.moe_layers():
        experts = layer.experts
        if layer.reads_columns:
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

    Nothing changes where the layers' plans have no window.

    Args:
        model: its layers have their schedule already.
        reducer: of the model's buckets.
        window_bytes: gradients that fit into one layer's window.
    """
    layers = model.moe_layers()
    shares = layers[0].schedule.reduce_shares if layers else ()
    if not shares:
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
