"""Where each of our tensors stands in a Megatron-core checkpoint of a GPT model.

Megatron keeps the tensors of equal layers as one, `decoder.layers.mlp...` with the layer first, and
those of unlike layers apart, `decoder.layers.3.mlp...`; both are read. Queries, keys and values lie
group by group there (the queries of a key-value head, its key, its value), here all queries first.
The gate's rows come before up's on both sides, and rotary pairs are the halves of a head.

Routers of ours keep their own names, as `moe/backends/megatron.py` registers them.

Shapes:  H query heads   J key-value heads   W width per head   D model width
Source:  `sharded_state_dict` of megatron-core 0.16.1's GPTModel.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.config import RouterConfig, Scorer

__all__ = ["Place", "find_places"]

Turn = Callable[[Tensor], Tensor]

_WHOLE = {
    "embedding": "embedding.word_embeddings.weight",
    "norm_final.gain": "decoder.final_layernorm.weight",
    "head": "output_layer.weight",
}
_LAYER = {
    "norm_attention.gain": "self_attention.linear_qkv.layer_norm_weight",
    "attention.w_qkv": "self_attention.linear_qkv.weight",
    "attention.w_out": "self_attention.linear_proj.weight",
    "attention.norm_q.gain": "self_attention.q_layernorm.weight",
    "attention.norm_k.gain": "self_attention.k_layernorm.weight",
}
_DENSE = {
    "norm_feed_forward.gain": "mlp.linear_fc1.layer_norm_weight",
    "feed_forward.w_in_GD": "mlp.linear_fc1.weight",
    "feed_forward.w_out_DF": "mlp.linear_fc2.weight",
}
_MOE = {
    "norm_feed_forward.gain": "pre_mlp_layernorm.weight",
    "feed_forward.experts.w_in_eGD": "mlp.experts.experts.linear_fc1.weight",
    "feed_forward.experts.w_out_eDF": "mlp.experts.experts.linear_fc2.weight",
    "feed_forward.shared.w_in_GD": "mlp.shared_experts.linear_fc1.weight",
    "feed_forward.shared.w_out_DF": "mlp.shared_experts.linear_fc2.weight",
}
# what the layers without TransformerEngine call it (--transformer-impl local)
_LOCAL = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_ROUTER = "feed_forward.router"


@dataclass(frozen=True, slots=True)
class Place:
    """One of our tensors' place there."""

    theirs: str  # with the layer's number, where it belongs to a layer
    together: str | None = None  # the name that holds all layers; None: it belongs to none
    layer: int = 0
    to_ours: Turn | None = None
    to_theirs: Turn | None = None


def find_places(
    names: Iterable[str], model: ModelConfig, router: RouterConfig, *, local: bool
) -> dict[str, Place]:
    """Return the place of every tensor.

    Args:
        names: of our tensors, as checkpoints have them (`model/...`, `bias/...`).
        model: sizes.
        router: settings.
        local: whether the layers there do without TransformerEngine.

    Raises:
        CheckpointError: naming what Megatron's layout has no place for.
    """
    if model.attention != type(model.attention)():
        raise CheckpointError(
            "model.attention differs from plain attention, which is what Megatron's layout is "
            "converted for; leave model.attention.* at their defaults"
        )
    places: dict[str, Place] = {}
    homeless = []
    for name in names:
        kind, _, rest = name.partition("/")
        place = _find(kind, rest, model, router, local=local)
        if place is not None:
            places[name] = place
        elif kind != "bias":  # of a router that has no bias; it is zero
            homeless.append(name)
    if homeless:
        raise CheckpointError(
            f"Megatron's layout has no place for {homeless[0]}"
            + (f" and {len(homeless) - 1} more" if len(homeless) > 1 else "")
            + "; convert models of plain attention, with a router that chooses in the layers"
        )
    return places


def _find(
    kind: str, name: str, model: ModelConfig, router: RouterConfig, *, local: bool
) -> Place | None:
    block = _BLOCK.fullmatch(name)
    if block is not None:
        layer, part = int(block[1]), block[2]
        return _find_in_layer(kind, part, layer, model, router, local=local)
    if kind != "model":
        return None
    if name.startswith("router_cell."):
        first = model.moe_layers()[0]
        return _of_layer(first, f"mlp.router.shared.0.{name.removeprefix('router_cell.')}")
    return Place(_WHOLE[name]) if name in _WHOLE else None


def _find_in_layer(
    kind: str, part: str, layer: int, model: ModelConfig, router: RouterConfig, *, local: bool
) -> Place | None:
    if kind == "bias":
        has_bias = part == _ROUTER and router.bias_rate > 0
        return _of_layer(layer, _router_name("bias_E", router)) if has_bias else None
    if kind == "model" and part.startswith(f"{_ROUTER}."):
        return _of_layer(layer, _router_name(part.removeprefix(f"{_ROUTER}."), router))
    table = _LAYER | (_MOE if model.is_moe(layer) else _DENSE)
    if kind != "model" or part not in table:
        return None
    place = _of_layer(layer, _LOCAL.get(table[part], table[part]) if local else table[part])
    if part != "attention.w_qkv":
        return place
    by_kind, by_group = _turns(model.heads, model.kv_heads or model.heads)
    return Place(place.theirs, place.together, layer, by_kind, by_group)


def _turns(heads: int, kv_heads: int) -> tuple[Turn, Turn]:
    """Return how queries, keys and values come to lie as here, and as there."""

    def by_kind(qkv_ND: Tensor) -> Tensor:
        columns = qkv_ND.shape[1]
        width = qkv_ND.shape[0] // (heads + 2 * kv_heads)
        groups = qkv_ND.view(kv_heads, -1, columns)
        sizes = (heads // kv_heads * width, width, width)
        return torch.cat([x.reshape(-1, columns) for x in groups.split(sizes, 1)])

    def by_group(qkv_ND: Tensor) -> Tensor:
        columns = qkv_ND.shape[1]
        width = qkv_ND.shape[0] // (heads + 2 * kv_heads)
        parts = qkv_ND.split((heads * width, kv_heads * width, kv_heads * width))
        return torch.cat([x.view(kv_heads, -1, columns) for x in parts], 1).reshape(-1, columns)

    return by_kind, by_group


def _router_name(name: str, router: RouterConfig) -> str:
    """Return a router's tensor by Megatron's own name where its router can hold it."""
    if router.scorer is Scorer.linear and not router.ahead.is_on:
        own = {"weight": "mlp.router.weight", "bias_E": "mlp.router.expert_bias"}
        if name in own:
            return own[name]
    return f"mlp.router.router.{name}"


def _of_layer(layer: int, part: str) -> Place:
    return Place(f"decoder.layers.{layer}.{part}", f"decoder.layers.{part}", layer)
