"""Wire a model for many ranks, from outside: place the experts, choose how rows travel."""

from functools import partial

import torch

from gatewise.moe.columns import gather_columns
from gatewise.moe.compute import GradientSink, Schedule
from gatewise.moe.config import ModelConfig
from gatewise.moe.dispatch import AllToAllDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.model import Decoder, initialise, set_precision
from gatewise.parallel.collectives import Group
from gatewise.parallel.reducer import GradientReducer
from gatewise.routers.config import RouterConfig

__all__ = ["apply_expert_parallel", "build_model", "write_gradients_directly"]


def apply_expert_parallel(model: Decoder, group: Group, schedule: Schedule | None = None) -> None:
    """Leave each rank of `group` its share of every layer's experts.

    Call it before the parameters have values (on the meta device) and before an optimizer sees
    them. A group of one rank changes nothing.

    Args:
        model: its experts are all local still.
        group: rank p gets experts [p * E / P, (p + 1) * E / P).
        schedule: the plans of every layer's passes; None keeps the serial ones.
    """
    for layer in model.moe_layers():
        if schedule is not None:
            layer.schedule = schedule
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
