"""Small models of transformers, drawn at random, one for each layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["LAYOUTS", "build", "logits_of", "needs_transformers"]

_COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 40, "rope_parameters": _LLAMA3},
    "llama tied": {
        "intermediate_size": 40,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "head_dim": 10,
    },
    "mistral": {"intermediate_size": 40, "sliding_window": 5},
    "qwen2": {"intermediate_size": 40},
    "qwen3": {"intermediate_size": 40, "head_dim": 12},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 24, **_EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
        "mlp_only_layers": [0],
        **_EXPERTS,
    },
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 12,
        **_EXPERTS,
    },
    "deepseek_v3": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "rope_parameters": _YARN,
        "num_mtp_layers": 0,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "num_hidden_layers": 3,
        "rope_parameters": {**_YARN, "mscale": None, "mscale_all_dim": None, "truncate": False},
    },
}


def needs_transformers() -> None:
    """Skip the calling module where transformers is not installed."""
    pytest.importorskip("transformers", reason="transformers is not installed (the extra hf)")


def build(
    layout: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
    **save: Any,
) -> Any:
    """Build a model with parameters of all sizes, save it, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_COMMON, **LAYOUTS[layout], **(changes or {})}
    config = AutoConfig.for_model(layout.partition(" ")[0], **settings)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("norm.weight", "bias", "sinks")):  # these start at 1 and 0
            tensor.data.add_(0.3 * torch.randn_like(tensor))
        elif name.endswith(("gate.weight", "router.weight")):
            tensor.data.copy_(torch.randn_like(tensor))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **save)
    return model


@torch.no_grad()
def logits_of(model: Any, token_BS: torch.Tensor) -> torch.Tensor:
    """Return logits of a model of transformers."""
    logits: torch.Tensor = model(token_BS).logits
    return logits
