"""Which transformers architecture computes what a model of ours computes, and its tensors' names.

| ours | transformers |
|---|---|
| no QK-norm, experts in every layer, weights renormalised | `mixtral` |
| QK-norm, dense layers anywhere | `qwen3_moe` |

Both have RMSNorm before attention and experts, rotary positions that pair (i, i + W/2), grouped
queries, SwiGLU experts, and a linear router whose softmax is cut to the best K. What neither has is
refused with the reason.

Shapes:  D model width   F expert width
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatewise.moe.config import Activation, ModelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import RouterConfig, ScoreFunction, Scorer, Selector
from gatewise.training.config import TrainConfig

__all__ = ["Layout", "Place", "choose_layout"]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where some rows of a tensor go."""

    module: str
    rows: slice

    @property
    def weight(self) -> str:
        """Name of the unquantised tensor."""
        return f"{self.module}.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and settings of one architecture for one model."""

    family: str  # "mixtral" or "qwen3_moe"
    model: ModelConfig

    def places(self, name: str, rows: int, expert: int | None = None) -> list[Place]:
        """Return where a parameter of ours goes.

        Args:
            name: of the parameter, as in `Decoder.named_parameters`.
            rows: its length, or that of one expert's matrix.
            expert: index of the slice, for the experts' parameters.
        """
        whole = slice(0, rows)
        outer = {"embedding": "model.embed_tokens", "head": "lm_head"}
        outer["norm_final.gain"] = "model.norm"
        if name in outer:
            return [Place(outer[name], whole)]
        match = _BLOCK.fullmatch(name)
        assert match is not None, name
        layer, inner = f"model.layers.{match[1]}", match[2]
        if inner == "attention.w_qkv":
            return self._attention(layer)
        mixtral = self.family == "mixtral"
        experts = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        owner = f"{experts}.experts.{expert}" if expert is not None else f"{layer}.mlp"
        single = {
            "norm_attention.gain": f"{layer}.input_layernorm",
            "norm_feed_forward.gain": f"{layer}.post_attention_layernorm",
            "attention.norm_q.gain": f"{layer}.self_attn.q_norm",
            "attention.norm_k.gain": f"{layer}.self_attn.k_norm",
            "attention.w_out": f"{layer}.self_attn.o_proj",
            "feed_forward.router.weight": f"{experts}.gate",
            "feed_forward.w_out_DF": f"{owner}.{down}",
            "feed_forward.experts.w_out_eDF": f"{owner}.{down}",
        }
        if inner in single:
            return [Place(single[inner], whole)]
        assert inner in ("feed_forward.w_in_GD", "feed_forward.experts.w_in_eGD"), name
        half = rows // 2
        return [
            Place(f"{owner}.{gate}", slice(0, half)),
            Place(f"{owner}.{up}", slice(half, rows)),
        ]

    def _attention(self, layer: str) -> list[Place]:
        width = self.model.hidden // self.model.heads
        queries = self.model.heads * width
        keys = (self.model.kv_heads or self.model.heads) * width
        ends = (queries, queries + keys, queries + 2 * keys)
        starts = (0, *ends[:-1])
        return [
            Place(f"{layer}.self_attn.{name}", slice(start, end))
            for name, start, end in zip(("q_proj", "k_proj", "v_proj"), starts, ends, strict=True)
        ]

    def settings(self, config: TrainConfig, vocab_size: int) -> dict[str, Any]:
        """Return config.json of the exported model, without its quantisation."""
        model = self.model
        record: dict[str, Any] = {
            "model_type": self.family,
            "vocab_size": vocab_size,
            "hidden_size": model.hidden,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads or model.heads,
            "head_dim": model.hidden // model.heads,
            "hidden_act": "silu",
            "max_position_embeddings": config.data.sequence_length,
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
            "sliding_window": None,
            "attention_dropout": 0.0,
            "tie_word_embeddings": model.tie_embeddings,
            "num_experts_per_tok": model.top_k,
            "router_aux_loss_coef": 0.0,
            "initializer_range": model.init_std,
            "use_cache": True,
            "dtype": "bfloat16",
        }
        if self.family == "mixtral":
            return record | {
                "architectures": ["MixtralForCausalLM"],
                "intermediate_size": model.expert_width,
                "num_local_experts": model.num_experts,
                "router_jitter_noise": 0.0,
            }
        return record | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": model.feed_forward_width(),
            "moe_intermediate_size": model.expert_width,
            "num_experts": model.num_experts,
            "norm_topk_prob": config.router.renormalise and model.top_k > 1,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(model.layers) if not model.is_moe(layer)],
            "attention_bias": False,
            "use_sliding_window": False,
        }


def choose_layout(config: TrainConfig, biases: Mapping[str, bool]) -> Layout:
    """Return the architecture that computes what the model computes.

    Args:
        config: of the training run.
        biases: by name of each router state beside the parameters, whether any of it is not 0.

    Raises:
        ConfigError: with the reason, if there is none.
    """
    model, router = config.model, config.router
    reasons = [*_model_reasons(model), *_router_reasons(router)]
    moved = sorted(name for name, is_set in biases.items() if is_set)
    if moved:
        reasons.append(f"the routers choose with a bias ({moved[0]})")
    if reasons:
        raise ConfigError(
            f"this model has no counterpart in transformers' mixtral or qwen3_moe: {reasons[0]}"
        )
    if model.qk_norm:
        return Layout("qwen3_moe", model)
    missing = ""
    if len(model.moe_layers()) < model.layers:
        missing = "it has dense layers, which go with QK-norm only (qwen3_moe)"
    elif not router.renormalise or model.top_k == 1:
        missing = "its weights are not renormalised, which goes with QK-norm only (qwen3_moe)"
    if missing:
        raise ConfigError(f"this model has no counterpart in transformers' mixtral: {missing}")
    return Layout("mixtral", model)


def _model_reasons(model: ModelConfig) -> list[str]:
    reasons = []
    if not model.moe_layers():
        reasons.append("it has no experts")
    if model.activation is not Activation.swiglu:
        reasons.append(f"model.activation is {model.activation.name}, not swiglu")
    if model.shared_experts:
        reasons.append(f"model.shared_experts is {model.shared_experts}")
    return reasons


def _router_reasons(router: RouterConfig) -> list[str]:
    reasons = []
    if router.ahead.is_on:
        reasons.append(f"a pre-gate ({router.ahead.kind.name}) chooses the experts")
    for name, value, wanted in (
        ("scorer", router.scorer, Scorer.linear),
        ("selector", router.selector, Selector.topk),
        ("score", router.score, ScoreFunction.softmax),
    ):
        if value is not wanted:
            reasons.append(f"router.{name} is {value.name}, not {wanted.name}")
    if router.scale != 1:
        reasons.append(f"router.scale is {router.scale:g}, not 1")
    if router.num_groups > 1:
        reasons.append(f"router.num_groups is {router.num_groups}")
    if router.hash_layers:
        reasons.append(f"router.hash_layers is {router.hash_layers}")
    return reasons
