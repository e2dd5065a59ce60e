"""Two of Megatron-core's MoE layers with our routers on one CPU rank; run by a test in a process.

    python megatron_layer.py STORE IN OUT

IN lists cases, each with settings, weights and tokens of `gatewise` layers; OUT gets the outputs
and gradients of each.
What Megatron asks of `torch.cuda` is answered for this process only: there is no GPU.
"""

import sys
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")


class NoStream:
    """A stream or event on which everything has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self) -> "NoStream":
        return self

    def synchronize(self) -> None:
        pass

    def wait_stream(self, _: "NoStream") -> None:
        pass


def answer_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = cuda.current_stream = NoStream
    cuda.stream = nullcontext
    cuda.Event = NoStream
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda *_: None


def main(store: str, given: str, result: str) -> None:
    answer_for_cuda()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    torch.save([run(saved) for saved in torch.load(given, weights_only=False)], result)


def run(saved: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gatewise.moe.backends.megatron import MegatronRouters

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 names it also where TransformerEngine is absent
    hidden, width = saved["x_BSD"].shape[-1], saved["w_out"][0].shape[2]
    experts, top_k, layers = saved["w_out"][0].shape[0], saved["top_k"], len(saved["w_out"])
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=1,
        ffn_hidden_size=width,
        moe_ffn_hidden_size=width,
        num_moe_experts=experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type=saved["dispatcher"],
        moe_grouped_gemm=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
    )
    routers = MegatronRouters(saved["router"], layers=layers, vocab_size=saved["vocab_size"])
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec = MoESubmodules(
        experts=ModuleSpec(module=SequentialMLP, submodules=linear), router=routers.build
    )
    stack = torch.nn.ModuleList(MoELayer(config, spec) for _ in range(layers))
    with torch.no_grad():
        for index, layer in enumerate(stack):
            layer.set_layer_number(index + 1)
            layer.router.router.load_state_dict(saved["routers"][index])
            for expert, module in enumerate(layer.experts.local_experts):
                module.linear_fc1.weight.copy_(saved["w_in"][index][expert])
                module.linear_fc2.weight.copy_(saved["w_out"][index][expert])
        for module, state in zip(stack[0].router.shared, saved["shared"], strict=True):
            module.load_state_dict(state)
    x_SBD = saved["x_BSD"].transpose(0, 1).contiguous().requires_grad_()
    routers.begin(saved["token_BS"])
    hidden_SBD = x_SBD
    for layer in stack:
        hidden_SBD = hidden_SBD + layer(hidden_SBD)[0]
    (hidden_SBD * saved["pull_BSD"].transpose(0, 1)).sum().backward()
    return {
        "y_BSD": hidden_SBD.detach().transpose(0, 1),
        "dx_BSD": x_SBD.grad.transpose(0, 1),  # type: ignore[union-attr]
        "w_in": [
            torch.stack([e.linear_fc1.weight.grad for e in layer.experts.local_experts])
            for layer in stack
        ],
        "w_out": [
            torch.stack([e.linear_fc2.weight.grad for e in layer.experts.local_experts])
            for layer in stack
        ],
        "routers": [
            {name: p.grad for name, p in layer.router.router.named_parameters()} for layer in stack
        ],
        "shared": [
            {name: p.grad for name, p in module.named_parameters()}
            for module in stack[0].router.shared
        ],
        "registered": sum("router.shared" in name for name, _ in stack.named_parameters()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
