"""A GPT model of Megatron-core's between two conversions; run by a test in a process.

    python megatron_model.py FOLDER

FOLDER/in.pt holds settings, tokens and the path of a checkpoint of `gatewise`. It is written for
Megatron (theirs/), loaded into its model, which gives logits (out.pt) and saves itself (again/).
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")


@contextmanager
def no_generator(*_: Any) -> Iterator[None]:
    """Stand for a fork of the generator on a GPU."""
    yield


def answer_for_cuda() -> None:
    from megatron_layer import NoStream

    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = cuda.current_stream = cuda.Event = NoStream
    cuda.stream = nullcontext
    cuda.synchronize = lambda *_: None
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda *_: None
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    random.CudaRNGStatesTracker.fork = no_generator
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def build(saved: dict[str, Any]) -> Any:
    """Build the model of the same settings."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, router = saved["model"], saved["router"]
    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.expert_width,
        moe_ffn_hidden_size=model.expert_width,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.top_k,
        moe_router_load_balancing_type="none",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=router.bias_rate > 0,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=model.num_experts,
            moe_grouped_gemm=False,
            qk_layernorm=model.qk_norm,
            normalization="RMSNorm",
        ),
        vocab_size=saved["vocab_size"],
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=int(model.rope_base),
        share_embeddings_and_output_weights=model.tie_embeddings,
    ).eval()


def main(folder: Path) -> None:
    from gatewise.training.megatron.convert import hand_out

    saved = torch.load(folder / "in.pt", weights_only=False)
    hand_out(
        saved["checkpoint"],
        saved["model"],
        saved["router"],
        saved["vocab_size"],
        out=folder / "theirs",
        local=True,
    )
    answer_for_cuda()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel()
    model = build(saved)
    wanted = model.sharded_state_dict()
    weights = {name: part for name, part in wanted.items() if "_extra_state" not in name}
    model.load_state_dict(dist_checkpointing.load(weights, str(folder / "theirs")), strict=False)
    token_BS = saved["token_BS"]
    place_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS)
    with torch.no_grad():
        future = torch.ones(1, 1, token_BS.shape[1], token_BS.shape[1]).triu(1).bool()
        logits_BSV = model(token_BS, place_BS, future)
    (folder / "again").mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / "again"))
    torch.save(logits_BSV, folder / "out.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
