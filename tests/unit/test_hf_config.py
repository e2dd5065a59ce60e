"""What a config.json means where it is silent, and what of it is refused."""

from typing import Any

import pytest

from gatewise.moe.attention_config import RopeScaling
from gatewise.parallel.errors import CheckpointError
from gatewise.training.interop.read_config import read_config

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
}
MISTRAL = SIZES | {"model_type": "mistral"}
MIXTRAL = SIZES | {"model_type": "mixtral", "num_local_experts": 4}
QWEN = SIZES | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}
QWEN_MOE = SIZES | {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 4}
GPT_OSS = SIZES | {"model_type": "gpt_oss", "num_local_experts": 4}
DEEPSEEK = SIZES | {
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def test_silence_means_what_the_layout_has_by_default() -> None:
    def model(record: dict[str, Any]) -> Any:
        return read_config(record, "x")[1]

    assert model(MISTRAL).attention.window == model(QWEN).attention.window == 4096
    assert (model(MIXTRAL).attention.window, model(MIXTRAL).rope_base) == (None, 1e6)
    gpt_oss = model(GPT_OSS)
    assert (gpt_oss.attention.window, gpt_oss.attention.full_every) == (128, 2)
    assert (gpt_oss.rope.scaling, gpt_oss.rope.factor) == (RopeScaling.yarn, 32.0)
    assert (gpt_oss.rope_base, gpt_oss.rope.truncate) == (150000.0, False)
    router = read_config(DEEPSEEK, "x")[2]
    assert (router.num_groups, router.top_groups, router.scale) == (8, 4, 2.5)
    assert model({k: v for k, v in QWEN_MOE.items() if k != "intermediate_size"}).layers == 4


def test_a_length_beside_the_scaling_is_the_one_of_pretraining() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99}
    record = MIXTRAL | {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    assert read_config(record, "x")[1].rope.original_length == 16


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (DEEPSEEK | {"rope_interleave": False}, "rope_interleave is False"),
        (DEEPSEEK | {"attention_bias": True}, "attention_bias is True"),
        (DEEPSEEK | {"rope_scaling": LINEAR | {"mscale_all_dim": 1.0}}, "mscale_all_dim"),
        (QWEN | {"layer_types": ["chunked_attention"] * 4}, "layer_types is"),
        (QWEN | {"layer_types": ["full_attention"]}, "layer_types is"),
        (MIXTRAL | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(
    record: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_config(record, "x")
