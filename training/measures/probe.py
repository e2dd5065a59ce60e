"""Run a model over text and keep what its routers did, for the measures to look at.

Nothing is dropped and no noise is drawn; what the capacity of training would have dropped is
counted from the same decisions.

Shapes:  W sequences   S positions   T = W * S tokens   L MoE layers   K experts per token
         E experts   D model width
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatewise.moe.capacity import apply_capacity
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import ConfigError
from gatewise.routers.api import Routing, RoutingContext
from gatewise.routers.config import RouterConfig
from gatewise.routers.health import inner_balance, outer_balance, token_entropy
from gatewise.routers.scorers import scores, shares
from gatewise.training.indexed import Tokens
from gatewise.training.measures.experts import OutputSquares, output_squares
from gatewise.training.measures.information import binned_information

__all__ = ["LayerProbe", "Probe", "ProbeText", "choices", "collect", "cut_text"]

_BINNED_TOKENS = 1 << 22  # tokens times squared experts that the binned measure looks at


@dataclass(frozen=True, slots=True)
class ProbeText:
    """Neighbouring sequences, with the token that follows each position."""

    input_WS: Tensor  # int64
    next_WS: Tensor  # int64


@dataclass(frozen=True, slots=True)
class LayerProbe:
    """What one layer's router did with every token; on the CPU."""

    expert_TK: Tensor  # int64; -1 is none
    first_T: Tensor  # int64, the one of the largest combine weight; -1 is none
    dropped_T: Tensor  # int64, pairs that the capacity of training would drop
    entropy_T: Tensor
    inner_T: Tensor
    outer_T: Tensor
    weight_T: Tensor  # sum of the combine weights
    logsumexp_T: Tensor
    largest_logit: float
    outputs: OutputSquares


@dataclass(frozen=True, slots=True)
class Probe:
    """One model's routing of one text."""

    token_T: Tensor
    next_T: Tensor
    position_T: Tensor
    layers: tuple[LayerProbe, ...]
    binned_LL: Tensor  # the RMoE paper's cross-layer information
    binned_tokens: int  # tokens that it is the mean of

    def expert_LTK(self) -> Tensor:
        """Return the choices of all layers; narrower ones are filled up with -1."""
        return _stacked([layer.expert_TK for layer in self.layers])


def cut_text(tokens: Tokens, *, sequence_length: int, limit: int) -> ProbeText:
    """Cut the first tokens of a split into whole sequences that do not overlap.

    Args:
        tokens: of the split.
        sequence_length: S; a shorter split gives one shorter sequence.
        limit: at most so many tokens, at least one sequence.
    """
    length = min(sequence_length, len(tokens) - 1)
    number = max(1, min(limit, len(tokens) - 1) // length)
    cut_N = torch.from_numpy(np.asarray(tokens[: number * length + 1], dtype=np.int64))
    return ProbeText(cut_N[:-1].view(number, length), cut_N[1:].view(number, length))


@torch.no_grad()
def collect(
    model: Decoder,
    text: ProbeText,
    *,
    batch: int,
    device: torch.device,
) -> Probe:
    """Run the model over a text and keep what its routers did.

    Args:
        model: with all experts on this rank; put into evaluation mode, and back.
        text: what to run it on.
        batch: sequences per pass.
        device: of the model.

    Raises:
        ConfigError: if a router chooses no experts (soft routing).
    """
    parts: list[list[LayerProbe]] = []
    binned, binned_tokens = torch.zeros(0, 0, dtype=torch.float64), 0
    limit = _BINNED_TOKENS // model.config.num_experts**2
    for routings, inputs in _passes(model, text, batch=batch, device=device):
        layers = list(zip(model.moe_layers(), routings, inputs, strict=True))
        share_LTE = [_shares_of(layer, routing) for layer, routing, _ in layers]
        parts.append(
            [
                _look(layer, routing, share_TE, x_TD, index=index, top_k=model.config.top_k)
                for index, ((layer, routing, x_TD), share_TE) in enumerate(
                    zip(layers, share_LTE, strict=True)
                )
            ]
        )
        few = min(len(share_LTE[0]), limit - binned_tokens)
        if few > 0:
            value_LL = binned_information(torch.stack([s[:few] for s in share_LTE]).cpu())
            binned = value_LL * few + (binned if binned_tokens else 0)
            binned_tokens += few
    number, length = text.input_WS.shape
    return Probe(
        token_T=text.input_WS.flatten(),
        next_T=text.next_WS.flatten(),
        position_T=torch.arange(length).repeat(number),
        layers=tuple(_join(layer) for layer in zip(*parts, strict=True)),
        binned_LL=binned / max(binned_tokens, 1),
        binned_tokens=binned_tokens,
    )


@torch.no_grad()
def choices(model: Decoder, text: ProbeText, *, batch: int, device: torch.device) -> Tensor:
    """Return only the choices of each layer (L, T, K); arguments as those of `collect`."""
    parts = [
        _stacked([routing.expert_TK.cpu() for routing in routings])
        for routings, _ in _passes(model, text, batch=batch, device=device)
    ]
    width = max(part.shape[2] for part in parts)
    return torch.cat([_widened(part, width) for part in parts], 1)


def _passes(
    model: Decoder, text: ProbeText, *, batch: int, device: torch.device
) -> Iterator[tuple[Sequence[Routing], list[Tensor]]]:
    """Yield each pass's routings and the inputs of the MoE layers."""
    was_training = model.training
    model.eval()
    try:
        with _inputs(model) as inputs:
            for input_BS in text.input_WS.split(batch):
                inputs.clear()
                yield model(input_BS.to(device)).routings, inputs
    finally:
        model.train(was_training)


@contextmanager
def _inputs(model: Decoder) -> Iterator[list[Tensor]]:
    """Collect what every MoE layer gets."""
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:  # Any: as torch calls it
        found.append(arguments[0])

    handles = [layer.register_forward_pre_hook(keep) for layer in model.moe_layers()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _shares_of(layer: MoELayer, routing: Routing) -> Tensor:
    """Return scores that sum to 1; where a router has none, its weights stand for them."""
    if not routing.expert_TK.shape[1]:
        raise ConfigError(
            "the checkpoint's router mixes all tokens and chooses no experts; there is nothing to "
            "analyse"
        )
    config = getattr(layer.router, "config", None)
    if routing.logits_TE is not None and isinstance(config, RouterConfig):
        return shares(scores(routing.logits_TE, config.score), config.score)
    weight_TK = torch.where(routing.expert_TK >= 0, routing.weight_TK, 0.0)
    share_TE = weight_TK.new_zeros(len(weight_TK), layer.router.num_experts)
    share_TE.scatter_add_(1, routing.expert_TK.clamp(min=0), weight_TK)
    return share_TE / share_TE.sum(-1, keepdim=True).clamp(min=1e-20)


def _look(
    layer: MoELayer,
    routing: Routing,
    share_TE: Tensor,
    x_TD: Tensor,
    *,
    index: int,
    top_k: int,
) -> LayerProbe:
    expert_TK = routing.expert_TK
    weight_TK = torch.where(expert_TK >= 0, routing.weight_TK, 0.0)
    best_T1 = weight_TK.masked_fill(expert_TK < 0, -1.0).argmax(1, keepdim=True)
    dropped_T = torch.zeros(len(expert_TK), dtype=torch.int64)
    if layer.capacity.factor is not None:
        kept = apply_capacity(
            routing,
            layer.capacity,
            RoutingContext(),
            num_experts=layer.router.num_experts,
            top_k=top_k,
            layer=index,
        )
        dropped_T = ((kept.expert_TK < 0) & (expert_TK >= 0)).sum(1).cpu()
    logits_TE = share_TE.log() if routing.logits_TE is None else routing.logits_TE
    finite_TE = torch.where(logits_TE.isfinite(), logits_TE, 0.0)
    return LayerProbe(
        expert_TK=expert_TK.cpu(),
        first_T=expert_TK.gather(1, best_T1)[:, 0].cpu(),
        dropped_T=dropped_T,
        entropy_T=token_entropy(share_TE).cpu(),
        inner_T=inner_balance(share_TE).cpu(),
        outer_T=outer_balance(share_TE, expert_TK).cpu(),
        weight_T=weight_TK.sum(1).cpu(),
        logsumexp_T=logits_TE.logsumexp(1).cpu(),
        largest_logit=float(finite_TE.abs().max()),
        outputs=output_squares(x_TD, expert_TK, layer.experts),
    )


def _join(parts: Sequence[LayerProbe]) -> LayerProbe:
    """Put the passes of one layer together."""
    width = max(part.expert_TK.shape[1] for part in parts)
    outputs = parts[0].outputs
    for part in parts[1:]:
        outputs = outputs + part.outputs
    return LayerProbe(
        expert_TK=torch.cat([_widened(part.expert_TK, width) for part in parts]),
        first_T=torch.cat([part.first_T for part in parts]),
        dropped_T=torch.cat([part.dropped_T for part in parts]),
        entropy_T=torch.cat([part.entropy_T for part in parts]),
        inner_T=torch.cat([part.inner_T for part in parts]),
        outer_T=torch.cat([part.outer_T for part in parts]),
        weight_T=torch.cat([part.weight_T for part in parts]),
        logsumexp_T=torch.cat([part.logsumexp_T for part in parts]),
        largest_logit=max(part.largest_logit for part in parts),
        outputs=outputs,
    )


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.stack([_widened(part, width) for part in parts])


def _widened(expert_TK: Tensor, width: int) -> Tensor:
    """Fill the last dim up with -1."""
    return torch.nn.functional.pad(expert_TK, (0, width - expert_TK.shape[-1]), value=-1)
