"""Settings of a model from transformers' `config.json`, of its old and its present form.

Whatever would change what the model computes, and is not known here, is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from gatewise.moe.attention_config import AttentionConfig, LatentConfig, RopeConfig, RopeScaling
from gatewise.moe.config import ModelConfig
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction
from gatewise.training.interop.families import FAMILIES, Family

__all__ = ["ROPE_NAMES", "read_config", "read_family"]

Record = Mapping[str, Any]  # Any: JSON

# Settings that change the function where they are not as here; of all layouts.
_EXPECTED = {
    "hidden_act": "silu",
    "clip_qkv": None,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "quantization_config": None,
}


def read_family(record: Record, source: str) -> Family:
    """Return the layout that a `config.json` names.

    Raises:
        CheckpointError: if it is unknown.
    """
    kind = record.get("model_type")
    if kind not in FAMILIES:
        named = record.get("architectures") or [None]
        raise CheckpointError(
            f"{source}: config.json has model_type {kind!r} ({named[0]}), which this version does "
            f"not know; it knows {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(kind)]


def read_config(record: Record, source: str) -> tuple[Family, ModelConfig, RouterConfig]:
    """Return layout, model and router of a `config.json`.

    Args:
        record: its contents.
        source: where it lies, for messages.

    Raises:
        CheckpointError: naming the setting that is missing, impossible or not supported.
    """
    family = read_family(record, source)
    try:
        _refuse_unknown(record)
        model = _model(family, record)
        router = _router(family, record, model)
        if model.num_experts:
            router.check(model.num_experts, model.top_k)
    except KeyError as error:
        raise CheckpointError(f"{source}: config.json has no {error.args[0]}") from error
    except (ValueError, TypeError) as error:
        text = str(error).removeprefix(f"{source}: ")
        raise CheckpointError(f"{source}: config.json: {text}") from error
    return family, model, router


def _refuse_unknown(record: Record) -> None:
    for name, wanted in _EXPECTED.items():
        value = record.get(name, wanted)
        if value != wanted and not (value is None and wanted in (1, 1.0, False)):
            if isinstance(value, dict):
                shown = value.get("quant_method", value)
                raise ValueError(f"{name} is {shown!r}; this version dequantises fp8 and mxfp4")
            raise ValueError(f"{name} is {value!r}; this version supports {wanted!r} only")


def _model(family: Family, record: Record) -> ModelConfig:
    layers, hidden = int(record["num_hidden_layers"]), int(record["hidden_size"])
    heads = int(record["num_attention_heads"])
    kv_heads = record.get("num_key_value_heads") or heads
    experts = _experts(family, record, layers) if family.experts else _dense(record)
    return ModelConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=None if kv_heads == heads else int(kv_heads),
        qk_norm=family.norm in ("head", "whole"),
        attention=_attention(family, record, layers),
        tie_embeddings=bool(record.get("tie_word_embeddings", False)),
        norm_eps=float(record.get("rms_norm_eps", family.norm_eps)),
        init_std=float(record.get("initializer_range", 0.02)),
        vocab_size=int(record["vocab_size"]),
        **_rope(family, record),
        **experts,
    )


def _dense(record: Record) -> dict[str, Any]:
    """Return the fields of a model without experts."""
    return {"num_experts": 0, "dense_width": int(record["intermediate_size"])}


def _experts(family: Family, record: Record, layers: int) -> dict[str, Any]:
    """Return the fields of the experts, and of the layers that have none."""
    width = int(record.get("moe_intermediate_size") or record["intermediate_size"])
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    number = next((record[name] for name in names if record.get(name) is not None), None)
    if number is None:
        raise KeyError("num_experts (or num_local_experts, n_routed_experts)")
    moe = [layer for layer in range(layers) if _is_moe(family, record, layer)]
    if not moe:
        raise ValueError("no layer has experts; such a model is of a dense layout")
    found: dict[str, Any] = {
        "num_experts": int(number),
        "top_k": int(record["num_experts_per_tok"]),
        "expert_width": width,
        **_pattern(moe, layers),
    }
    if len(moe) < layers:
        found["dense_width"] = int(record["intermediate_size"])
    if family.shared == "gated":
        shared = int(record["shared_expert_intermediate_size"])
        found |= {"shared_experts": max(1, shared // width), "shared_gate": True}
        if shared != found["shared_experts"] * width:
            found["shared_width"] = shared
    elif family.shared == "plain":
        found["shared_experts"] = int(record["n_shared_experts"])
    if family.clamped:
        found["clamped_experts"] = True
    return found


def _is_moe(family: Family, record: Record, layer: int) -> bool:
    if family.dense_layers == "first":
        return layer >= int(record.get("first_k_dense_replace", 3))
    if family.dense_layers == "any":
        step = int(record.get("decoder_sparse_step", 1))
        plain = record.get("mlp_only_layers") or []
        return layer not in plain and (layer + 1) % step == 0
    return True


def _pattern(moe: list[int], layers: int) -> dict[str, int]:
    """Return `dense_layers` and `moe_every` that put experts into these layers."""
    for every in range(1, layers + 1):
        for dense in range(layers):
            sizes = ModelConfig(layers=layers, dense_layers=dense, moe_every=every)
            if sizes.moe_layers() == moe:
                return {"dense_layers": dense, "moe_every": every}
    raise ValueError(
        f"the layers with experts are {moe} of {layers}; they must be every n-th one after the "
        "first few"
    )


def _attention(family: Family, record: Record, layers: int) -> AttentionConfig:
    if family.norm == "latent":
        for name, wanted in (("rope_interleave", True), ("attention_bias", False)):
            if bool(record.get(name, wanted)) != wanted:
                raise ValueError(f"{name} is {record[name]}; this version supports {wanted} only")
        return AttentionConfig(
            latent=LatentConfig(
                rank=int(record["kv_lora_rank"]),
                query_rank=record.get("q_lora_rank"),
                plain_width=int(record["qk_nope_head_dim"]),
                rope_width=int(record["qk_rope_head_dim"]),
                value_width=int(record["v_head_dim"]),
            )
        )
    usual = int(record["hidden_size"]) // int(record["num_attention_heads"])
    width = record.get("head_dim") or (64 if family.clamped else usual)
    biases = bool(record.get("attention_bias", family.clamped))
    if family.biases == "none" and biases:
        raise ValueError("attention_bias is true, which this layout has not")
    qkv = {"qkv": True, "qkv or none": bool(record.get("qkv_bias", True))}
    window, full_every = _window(family, record, layers)
    return AttentionConfig(
        head_width=None if width == usual else int(width),
        norm_whole=family.norm == "whole",
        qkv_bias=qkv.get(family.biases, biases),
        out_bias=biases and family.biases == "all",
        window=window,
        full_every=full_every,
        sinks=family.clamped,
    )


def _window(family: Family, record: Record, layers: int) -> tuple[int | None, int]:
    """Return the window, and which layers see everything."""
    size = record.get("sliding_window", family.window_size)
    used = record.get("use_sliding_window", not family.kind.startswith("qwen"))
    if not size or not used or family.window == "none":
        return None, 0
    kinds = record.get("layer_types")
    if kinds is not None and family.window == "by layer":
        if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"layer_types is {kinds}; it must say full_attention or sliding_attention of each "
                f"of the {layers} layers"
            )
        narrow = [layer for layer in range(layers) if kinds[layer] == "sliding_attention"]
    else:
        narrow = [layer for layer in range(layers) if _is_narrow(family, record, layer)]
    if not narrow:
        return None, 0
    for every in (0, *range(2, layers + 1)):
        if narrow == [layer for layer in range(layers) if not every or (layer + 1) % every]:
            return int(size), every
    raise ValueError(
        f"the layers with a sliding window are {narrow} of {layers}; they must be all, or all but "
        "every n-th"
    )


def _is_narrow(family: Family, record: Record, layer: int) -> bool:
    """Tell whether a layer has the window where `layer_types` does not."""
    if family.clamped:
        return layer % 2 == 0
    first = int(record.get("max_window_layers", 28))
    if family.kind == "qwen2_moe":
        return layer % 2 == 0 and layer < first
    return layer >= first if family.window == "by layer" else True


def _rope(family: Family, record: Record) -> dict[str, Any]:
    """Return base and scaling of the rotary positions, from either form."""
    stated = record.get("rope_scaling") or record.get("rope_parameters") or {}
    if family.clamped and not stated:
        stated = _GPT_OSS_ROPE
    if any(isinstance(value, dict) for value in stated.values()):
        raise ValueError("rope_parameters differ between layers, which this version has not")
    base = float(stated.get("rope_theta") or record.get("rope_theta") or family.rope_base)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if stated.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1; this version rotates whole heads")
    if kind == "default":
        return {"rope_base": base}
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope type is {kind!r}; this version knows default, linear, llama3, yarn")
    if family.norm == "latent" and kind != "yarn" and stated.get("mscale_all_dim"):
        raise ValueError(f"rope type is {kind} with mscale_all_dim, which is known with yarn only")
    found: dict[str, Any] = {"scaling": RopeScaling[kind], "factor": stated.get("factor")}
    name = "original_max_position_embeddings"
    original = record.get(name) or stated.get(name)
    longest = int(record.get("max_position_embeddings") or 0)
    if kind != "linear":
        found["original_length"] = int(original or longest)
    if found["factor"] is None:
        found["factor"] = longest / found["original_length"]
    for ours, theirs in ROPE_NAMES[kind].items():
        if stated.get(theirs) is not None:
            found[ours] = stated[theirs]
    return {"rope_base": base, "rope": RopeConfig(**found)}


# What a config.json of gpt-oss means that says nothing of positions.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# Our names of the further settings of each kind of scaling, and theirs.
ROPE_NAMES = {
    "linear": dict[str, str](),
    "llama3": {"low_factor": "low_freq_factor", "high_factor": "high_freq_factor"},
    "yarn": {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all": "mscale_all_dim",
    },
}


def _router(family: Family, record: Record, model: ModelConfig) -> RouterConfig:
    """Return a router that computes the same, with the losses that the layout is trained with."""
    if not model.num_experts:
        return RouterConfig()
    renormalise = family.always_renormalises or bool(
        record.get("norm_topk_prob", family.balance_bias)
    )
    if renormalise and model.top_k == 1:
        raise ValueError(
            "num_experts_per_tok is 1 and its weight is divided by itself, which teaches a router "
            "nothing and is not supported"
        )
    if family.balance_bias:
        groups = int(record.get("n_group", 8) or 1)
        return RouterConfig(
            score=ScoreFunction.sigmoid,
            renormalise=renormalise,
            scale=float(record.get("routed_scaling_factor", 2.5)),
            num_groups=groups,
            top_groups=int(record.get("topk_group", 4) or 1) if groups > 1 else 1,
            bias_rate=0.001,
            balance_loss=0.0001,
            balance_scope=BalanceScope.sequence,
            z_loss=0.0,
        )
    return RouterConfig(
        renormalise=renormalise,
        balance_loss=float(record.get("router_aux_loss_coef", 0.001)),
        z_loss=0.0,
        logit_bias=family.clamped,
    )
