"""Which tensor of a layout is which part of a tensor of ours.

A piece is one tensor of theirs and the place in ours where it goes; the pieces of one of ours fill
it exactly. Most go as they are; `Turn` says how the others lie.

Shapes:  V vocabulary   D model width   F inner width   E experts   G = 2F
         H heads   W width per head   J key-value heads
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.routers.config import RouterConfig, Scorer
from gatewise.training.interop.families import Family

__all__ = ["GateUpColumns", "Piece", "RotaryRows", "Same", "Transposed", "Turn", "list_pieces"]


class Turn(Protocol):
    """How a tensor of theirs lies beside ours; the two functions undo each other."""

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Return the tensor as we keep it."""
        ...

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Return the tensor as they keep it."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """As ours."""

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Return it."""
        return theirs

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Return it."""
        return ours


@dataclass(frozen=True, slots=True)
class Transposed:
    """Inputs before outputs."""

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Swap the last two dims."""
        return theirs.transpose(-1, -2)

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Swap the last two dims."""
        return ours.transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class GateUpColumns:
    """Inputs before outputs, gate and up alternating; of a bias, the outputs alone."""

    is_bias: bool = False

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Put the gate rows before the up rows."""
        parts = torch.cat((theirs[..., ::2], theirs[..., 1::2]), -1)
        return parts if self.is_bias else parts.transpose(-1, -2)

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Let gate and up alternate."""
        columns = ours if self.is_bias else ours.transpose(-1, -2)
        return torch.stack(columns.chunk(2, -1), -1).flatten(-2)


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """Rows of heads whose rotary part pairs neighbours (2i, 2i + 1) where ours pairs halves.

    Args:
        plain: rows of a head before the rotary ones, without positions.
        rotary: rotary rows of a head.
    """

    plain: int
    rotary: int

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Put the first of each pair before the second ones."""
        plain, rotary = self._split(theirs)
        halves = rotary.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((plain, halves), 1).flatten(0, 1)

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Put pairs together."""
        plain, rotary = self._split(ours)
        pairs = rotary.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat((plain, pairs), 1).flatten(0, 1)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        heads = rows.unflatten(0, (-1, self.plain + self.rotary))
        return heads[:, : self.plain], heads[:, self.plain :]


_SAME = Same()


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of theirs, and where it lies in one of ours."""

    theirs: str
    ours: str  # name in a checkpoint of ours
    shape: tuple[int, ...]  # theirs
    rows: slice | None = None  # of ours (of one expert's matrix); None: all
    expert: int | None = None  # index in ours, where it holds all experts
    turn: Turn = field(default=_SAME)

    def place(self, ours: Tensor) -> Tensor:
        """Return the view of ours that this piece fills."""
        part = ours if self.expert is None else ours[self.expert]
        return part if self.rows is None else part[self.rows]


def list_pieces(
    family: Family, model: ModelConfig, router: RouterConfig, vocab_size: int
) -> list[Piece]:
    """List all tensors of a model in a layout, from the embedding to the output weights.

    What has no place in the layout, such as a recurrent router, is left out.
    """
    size = (vocab_size, model.hidden)
    found = [Piece("model.embed_tokens.weight", "model/embedding", size)]
    for layer in range(model.layers):
        found += _block(family, model, router, layer)
    found.append(Piece("model.norm.weight", "model/norm_final.gain", (model.hidden,)))
    if not model.tie_embeddings:
        found.append(Piece("lm_head.weight", "model/head", size))
    return found


def _block(family: Family, model: ModelConfig, router: RouterConfig, layer: int) -> Iterator[Piece]:
    theirs, ours = f"model.layers.{layer}", f"model/blocks.{layer}"
    for their_norm, our_norm in (
        ("input_layernorm", "norm_attention"),
        ("post_attention_layernorm", "norm_feed_forward"),
    ):
        yield Piece(f"{theirs}.{their_norm}.weight", f"{ours}.{our_norm}.gain", (model.hidden,))
    names = (f"{theirs}.self_attn", f"{ours}.attention")
    yield from _latent(model, *names) if model.attention.latent.is_on else _heads(model, *names)
    names = (f"{theirs}.mlp", f"{ours}.feed_forward")
    if not model.is_moe(layer):
        yield from _feed_forward(*names, model.hidden, model.feed_forward_width())
    elif family.clamped:
        yield from _clamped(model, *names)
    else:
        yield from _experts(family, model, router, *names)


def _heads(model: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    """List queries, keys, values, their norms, biases and sinks, and the output."""
    extra, hidden, width = model.attention, model.hidden, model.head_width()
    kv_heads = model.kv_heads or model.heads
    start = 0
    for name, heads in (("q", model.heads), ("k", kv_heads), ("v", kv_heads)):
        rows = slice(start, start + heads * width)
        start = rows.stop
        size = (heads * width, hidden)
        yield Piece(f"{theirs}.{name}_proj.weight", f"{ours}.w_qkv", size, rows)
        if extra.qkv_bias:
            yield Piece(f"{theirs}.{name}_proj.bias", f"{ours}.bias_qkv", size[:1], rows)
        if model.qk_norm and name != "v":
            gains = heads * width if extra.norm_whole else width
            yield Piece(f"{theirs}.{name}_norm.weight", f"{ours}.norm_{name}.gain", (gains,))
    yield Piece(f"{theirs}.o_proj.weight", f"{ours}.w_out", (hidden, model.heads * width))
    if extra.out_bias:
        yield Piece(f"{theirs}.o_proj.bias", f"{ours}.bias_out", (hidden,))
    if extra.sinks:
        yield Piece(f"{theirs}.sinks", f"{ours}.sinks", (model.heads,))


def _latent(model: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    """List latent attention; rotary rows are kept in halves, as all of ours are."""
    latent, hidden, heads = model.attention.latent, model.hidden, model.heads
    query = heads * model.head_width()
    by_head = RotaryRows(latent.plain_width, latent.rope_width)
    if latent.query_rank is None:
        size = (query, hidden)
        yield Piece(f"{theirs}.q_proj.weight", f"{ours}.w_query", size, turn=by_head)
    else:
        rank = latent.query_rank
        yield Piece(f"{theirs}.q_a_proj.weight", f"{ours}.w_query_down", (rank, hidden))
        yield Piece(f"{theirs}.q_a_layernorm.weight", f"{ours}.norm_query.gain", (rank,))
        size = (query, rank)
        yield Piece(f"{theirs}.q_b_proj.weight", f"{ours}.w_query", size, turn=by_head)
    down = RotaryRows(latent.rank, latent.rope_width)
    size = (latent.rank + latent.rope_width, hidden)
    yield Piece(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.w_down", size, turn=down)
    yield Piece(f"{theirs}.kv_a_layernorm.weight", f"{ours}.norm_latent.gain", (latent.rank,))
    size = (heads * (latent.plain_width + latent.value_width), latent.rank)
    yield Piece(f"{theirs}.kv_b_proj.weight", f"{ours}.w_up", size)
    size = (hidden, heads * latent.value_width)
    yield Piece(f"{theirs}.o_proj.weight", f"{ours}.w_out", size)


def _feed_forward(theirs: str, ours: str, hidden: int, width: int) -> Iterator[Piece]:
    for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width))):
        yield Piece(f"{theirs}.{name}.weight", f"{ours}.w_in_GD", (width, hidden), rows)
    yield Piece(f"{theirs}.down_proj.weight", f"{ours}.w_out_DF", (hidden, width))


def _experts(
    family: Family, model: ModelConfig, router: RouterConfig, theirs: str, ours: str
) -> Iterator[Piece]:
    """List the router, the experts one by one, and the shared ones."""
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if family.kind == "mixtral":
        theirs = theirs.removesuffix("mlp") + "block_sparse_moe"
        gate, up, down = "w1", "w3", "w2"
    hidden, width, experts = model.hidden, model.expert_width, model.num_experts
    if router.scorer is Scorer.linear and not router.ahead.weighs:
        yield Piece(f"{theirs}.gate.weight", f"{ours}.router.weight", (experts, hidden))
    if family.balance_bias:
        state = ours.replace("model/", "bias/", 1)
        yield Piece(f"{theirs}.gate.e_score_correction_bias", f"{state}.router", (experts,))
    inner, outer = f"{ours}.experts.w_in_eGD", f"{ours}.experts.w_out_eDF"
    for expert in range(experts):
        own = f"{theirs}.experts.{expert}"
        for name, rows in ((gate, slice(0, width)), (up, slice(width, 2 * width))):
            yield Piece(f"{own}.{name}.weight", inner, (width, hidden), rows, expert)
        yield Piece(f"{own}.{down}.weight", outer, (hidden, width), expert=expert)
    if family.shared == "gated":
        yield from _feed_forward(
            f"{theirs}.shared_expert", f"{ours}.shared", hidden, model.shared()
        )
        size = (1, hidden)
        yield Piece(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared.w_gate_1D", size)
    elif family.shared == "plain":
        names = (f"{theirs}.shared_experts", f"{ours}.shared")
        yield from _feed_forward(*names, hidden, model.shared())


def _clamped(model: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    """List gpt-oss's router and experts, all of a layer in one tensor."""
    hidden, width, experts = model.hidden, model.expert_width, model.num_experts
    yield Piece(f"{theirs}.router.weight", f"{ours}.router.weight", (experts, hidden))
    yield Piece(f"{theirs}.router.bias", f"{ours}.router.logit_bias", (experts,))
    for name, parameter, size, turn in (
        ("gate_up_proj", "w_in_eGD", (hidden, 2 * width), GateUpColumns()),
        ("gate_up_proj_bias", "bias_in_eG", (2 * width,), GateUpColumns(is_bias=True)),
        ("down_proj", "w_out_eDF", (width, hidden), Transposed()),
        ("down_proj_bias", "bias_out_eD", (hidden,), Same()),
    ):
        own = f"{ours}.experts.{parameter}"
        yield Piece(f"{theirs}.experts.{name}", own, (experts, *size), turn=turn)
