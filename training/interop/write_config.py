"""transformers' `config.json` from the settings of a model."""

from typing import Any

from gatewise.moe.attention_config import RopeScaling
from gatewise.moe.config import ModelConfig
from gatewise.routers.config import RouterConfig
from gatewise.training.interop.families import Family
from gatewise.training.interop.read_config import ROPE_NAMES

__all__ = ["write_config"]


def write_config(
    family: Family, model: ModelConfig, router: RouterConfig, *, vocab_size: int, positions: int
) -> dict[str, Any]:
    """Return the settings of a layout for a model whose body it has.

    Args:
        family: from `choose_family`.
        model: sizes.
        router: of its layers with experts.
        vocab_size: rows of the embedding.
        positions: longest sequence that the model was made for.
    """
    record: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_parameters": _rope(model),
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
    }
    record |= _attention(family, model)
    if not family.experts:
        return record | {"intermediate_size": model.feed_forward_width()}
    return record | _experts(family, model, router)


def _rope(model: ModelConfig) -> dict[str, Any]:
    rope = model.rope
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if rope.scaling is RopeScaling.none:
        return found
    found |= {"rope_type": rope.scaling.name, "factor": rope.factor}
    if rope.scaling is not RopeScaling.linear:
        found["original_max_position_embeddings"] = rope.original_length
    for ours, theirs in ROPE_NAMES[rope.scaling.name].items():
        value = getattr(rope, ours)
        if value is not None and not (ours.startswith("mscale") and value == 0):
            found[theirs] = value
    return found


def _attention(family: Family, model: ModelConfig) -> dict[str, Any]:
    extra, latent = model.attention, model.attention.latent
    if latent.is_on:
        return {
            "kv_lora_rank": latent.rank,
            "q_lora_rank": latent.query_rank,
            "qk_nope_head_dim": latent.plain_width,
            "qk_rope_head_dim": latent.rope_width,
            "v_head_dim": latent.value_width,
            "rope_interleave": True,
            "attention_bias": False,
        }
    found: dict[str, Any] = {"head_dim": model.head_width()}
    if family.biases == "all":
        found["attention_bias"] = extra.qkv_bias
    elif family.kind == "qwen2_moe":
        found["qkv_bias"] = extra.qkv_bias
    if family.window == "none":
        return found
    found["sliding_window"] = extra.window
    if family.kind.startswith("qwen"):
        found["use_sliding_window"] = extra.window is not None
    if family.window == "by layer":
        found["layer_types"] = [
            "full_attention" if extra.window_of(layer) is None else "sliding_attention"
            for layer in range(model.layers)
        ]
    return found


def _experts(family: Family, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """Return the settings of experts and router; the names differ between layouts."""
    found: dict[str, Any] = {
        "num_experts_per_tok": model.top_k,
        "router_aux_loss_coef": router.balance_loss,
    }
    renormalise = router.renormalise and model.top_k > 1
    moe_width = {"intermediate_size": model.expert_width}
    if family.kind in ("qwen2_moe", "qwen3_moe", "deepseek_v3"):
        moe_width = {
            "intermediate_size": model.feed_forward_width(),
            "moe_intermediate_size": model.expert_width,
        }
    found |= moe_width
    if family.kind in ("mixtral", "gpt_oss"):
        return found | {"num_local_experts": model.num_experts}
    found["norm_topk_prob"] = renormalise
    if family.kind == "deepseek_v3":
        return found | {
            "n_routed_experts": model.num_experts,
            "n_shared_experts": model.shared() // model.expert_width,
            "first_k_dense_replace": model.dense_layers,
            "routed_scaling_factor": router.scale,
            "n_group": router.num_groups,
            "topk_group": router.top_groups,
            "num_nextn_predict_layers": 0,
        }
    found["num_experts"] = model.num_experts
    if family.dense_layers == "any":
        dense = [layer for layer in range(model.layers) if not model.is_moe(layer)]
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if family.shared == "gated":
        found["shared_expert_intermediate_size"] = model.shared()
    return found
