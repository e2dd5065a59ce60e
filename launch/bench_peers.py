"""The layers that `gatewise bench layer` compares: ours, the dense one, and the peers installed.

Each builder returns a callable from tokens to tokens and the parameters behind it, filled from
one set of weights, so that all sparse candidates compute the same function. A builder imports its
package; which packages exist is asked first, without importing them.

Shapes:  T tokens   D width   E experts   K experts per token   F expert width
         G = 2F with a gate (gate rows first), else F
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.moe.config import Activation
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.layer import MoE

__all__ = ["DENSE", "OURS", "PEERS", "Candidate", "Cell", "Weights", "build", "installed"]

OURS = "gatewise"
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the comparison."""

    experts: int
    top_k: int
    activation: Activation
    dtype: torch.dtype
    threads: int
    skew: float  # largest expert's load over the mean; 1 leaves the router alone
    tokens: int
    hidden: int
    expert_width: int


@dataclass(frozen=True, slots=True)
class Weights:
    """What all sparse candidates are filled with."""

    router_ED: Tensor  # fp32
    w_in_EGD: Tensor
    w_out_EDF: Tensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer ready to be timed."""

    name: str
    forward: Callable[[Tensor], Tensor]  # (T, D) to (T, D)
    parameters: list[nn.Parameter]
    drops_tokens: bool = False


@dataclass(frozen=True, slots=True)
class _Peer:
    package: str | None  # top-level name, or None for code of this file
    make: Callable[[Cell, Weights], Candidate]
    gated_only: bool = False


def installed() -> list[str]:
    """Return the names of the peers whose packages exist."""
    return [
        name
        for name, peer in PEERS.items()
        if peer.package is None or importlib.util.find_spec(peer.package) is not None
    ]


def build(name: str, cell: Cell, weights: Weights) -> Candidate | None:
    """Build one candidate, or return None where it has no such layer."""
    if name == OURS:
        return _ours(cell, weights)
    if name == DENSE:
        return _dense(cell)
    peer = PEERS[name]
    if peer.gated_only and cell.activation is not Activation.swiglu:
        return None
    return peer.make(cell, weights)


def _ours(cell: Cell, weights: Weights) -> Candidate:
    layer = MoE(
        cell.hidden,
        cell.expert_width,
        cell.experts,
        cell.top_k,
        activation=cell.activation.value,
        router="mixtral",
    ).to(cell.dtype)
    router: Any = layer.router  # a ComposedRouter, by its preset
    _fill((router.weight, layer.experts.w_in_eGD, layer.experts.w_out_eDF), weights)
    return Candidate(OURS, layer, list(layer.parameters()))


def _dense(cell: Cell) -> Candidate:
    """Return the layer of equal active arithmetic: every token passes top_k * F inner units."""
    layer = FeedForward(cell.hidden, cell.top_k * cell.expert_width, cell.activation)
    layer = layer.to(cell.dtype)
    return Candidate(DENSE, layer, list(layer.parameters()))


class _LoopedExperts(nn.Module):
    """The layer as it is written first: a loop over experts with a mask and an index."""

    def __init__(self, cell: Cell, weights: Weights) -> None:
        super().__init__()
        self.top_k = cell.top_k
        self.activation = cell.activation
        self.router_ED = nn.Parameter(weights.router_ED.clone())
        self.w_in_EGD = nn.Parameter(weights.w_in_EGD.to(cell.dtype))
        self.w_out_EDF = nn.Parameter(weights.w_out_EDF.to(cell.dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        score_TE = F.linear(x_TD.float(), self.router_ED).softmax(-1)
        weight_TK, expert_TK = score_TE.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        weight_TK = weight_TK.to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.w_in_EGD.shape[0]):
            token_R, choice_R = torch.where(expert_TK == expert)
            if token_R.numel() == 0:
                continue
            hidden_RG = F.linear(x_TD[token_R], self.w_in_EGD[expert])
            if self.activation is Activation.swiglu:
                gate_RF, up_RF = hidden_RG.chunk(2, -1)
                inner_RF = F.silu(gate_RF) * up_RF
            elif self.activation is Activation.gelu:
                inner_RF = F.gelu(hidden_RG)
            else:
                inner_RF = F.relu(hidden_RG)
            y_RD = F.linear(inner_RF, self.w_out_EDF[expert])
            y_TD = y_TD.index_add(0, token_R, y_RD * weight_TK[token_R, choice_R].unsqueeze(1))
        return y_TD


def _loop(cell: Cell, weights: Weights) -> Candidate:
    layer = _LoopedExperts(cell, weights)
    return Candidate("loop", layer, list(layer.parameters()))


def _transformers(cell: Cell, weights: Weights) -> Candidate:
    """Return Mixtral's block with grouped products, the default of its models."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=cell.hidden,
        intermediate_size=cell.expert_width,
        num_local_experts=cell.experts,
        num_experts_per_tok=cell.top_k,
        router_jitter_noise=0.0,
    )
    config._experts_implementation = "grouped_mm"  # a bare block has no model to set it
    layer = MixtralSparseMoeBlock(config).to(cell.dtype)
    experts = layer.experts
    _fill((layer.gate.weight, experts.gate_up_proj, experts.down_proj), weights)

    def forward(x_TD: Tensor) -> Tensor:
        y = layer(x_TD.unsqueeze(0))
        y_1TD: Tensor = y[0] if isinstance(y, tuple) else y
        return y_1TD.squeeze(0)

    return Candidate("transformers", forward, list(layer.parameters()))


def _deepspeed(cell: Cell, weights: Weights, *, drops: bool) -> Candidate:
    """Return DeepSpeed's layer, dropless by padding to the fullest expert, or with factor 1."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    _start_group()
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    layer = DeepSpeedMoE(
        hidden_size=cell.hidden,
        expert=FeedForward(cell.hidden, cell.expert_width, cell.activation),
        num_experts=cell.experts,
        k=cell.top_k,
        drop_tokens=drops,
        capacity_factor=1.0,
        min_capacity=1,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()  # before any forward pass, or capacities are not shared
    layer = layer.to(cell.dtype)
    inner = layer.deepspeed_moe
    inner.gate.wg.float()
    with torch.no_grad():
        inner.gate.wg.weight.copy_(weights.router_ED)
        for index, expert in enumerate(inner.experts.deepspeed_experts):
            expert.w_in_GD.copy_(weights.w_in_EGD[index])
            expert.w_out_DF.copy_(weights.w_out_EDF[index])

    def forward(x_TD: Tensor) -> Tensor:
        y_TD: Tensor = layer(x_TD)[0]
        return y_TD

    name = "deepspeed_drop" if drops else "deepspeed"
    return Candidate(name, forward, list(layer.parameters()), drops_tokens=drops)


def _deepspeed_dropless(cell: Cell, weights: Weights) -> Candidate:
    return _deepspeed(cell, weights, drops=False)


def _deepspeed_dropping(cell: Cell, weights: Weights) -> Candidate:
    return _deepspeed(cell, weights, drops=True)


def _megatron(cell: Cell, weights: Weights, *, dispatcher: str) -> Candidate:
    """Return Megatron-core's layer with sequential experts, the only ones it has for a CPU."""
    _start_group()
    if not torch.cuda.is_available():
        _stand_in_for_cuda()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 names it also where TransformerEngine is absent
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    gated = cell.activation is Activation.swiglu
    functions = {Activation.swiglu: F.silu, Activation.gelu: F.gelu, Activation.relu: F.relu}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=cell.hidden,
        num_attention_heads=1,
        ffn_hidden_size=cell.expert_width,
        moe_ffn_hidden_size=cell.expert_width,
        num_moe_experts=cell.experts,
        moe_router_topk=cell.top_k,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type=dispatcher,
        moe_grouped_gemm=False,
        gated_linear_unit=gated,
        activation_func=functions[cell.activation],
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=cell.dtype,
        bf16=cell.dtype == torch.bfloat16,
    )
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = MoELayer(
        config, MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=linear))
    )
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(weights.router_ED)
        for index, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.copy_(weights.w_in_EGD[index])
            expert.linear_fc2.weight.copy_(weights.w_out_EDF[index])

    def forward(x_TD: Tensor) -> Tensor:
        y_T1D: Tensor = layer(x_TD.unsqueeze(1))[0]
        return y_T1D.squeeze(1)

    return Candidate(f"megatron_{dispatcher}", forward, list(layer.parameters()))


def _megatron_alltoall(cell: Cell, weights: Weights) -> Candidate:
    return _megatron(cell, weights, dispatcher="alltoall")


def _megatron_allgather(cell: Cell, weights: Weights) -> Candidate:
    return _megatron(cell, weights, dispatcher="allgather")


@dataclass(frozen=True)
class _NoStream:
    """Takes the place of a CUDA stream and its events where there is no GPU; all are one."""

    def record_event(self) -> "_NoStream":
        """Return an event that has already happened."""
        return self

    def synchronize(self) -> None:
        """Wait for nothing."""


def _stand_in_for_cuda() -> None:
    """Replace what Megatron's layer asks of torch.cuda on one rank whatever the device is.

    It moves the router to the current CUDA device and copies counts to the host on a side stream
    (Megatron-LM pull request 6270 is about such places).
    """
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = cuda.current_stream = _NoStream
    cuda.stream = nullcontext


def _start_group() -> None:
    """Start a process group of this rank alone; two peers do not work without one."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # public, not listed
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def _fill(parameters: Iterable[Tensor], weights: Weights) -> None:
    values = (weights.router_ED, weights.w_in_EGD, weights.w_out_EDF)
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


PEERS: dict[str, _Peer] = {
    "loop": _Peer(None, _loop),
    "transformers": _Peer("transformers", _transformers, gated_only=True),
    "deepspeed": _Peer("deepspeed", _deepspeed_dropless),
    "deepspeed_drop": _Peer("deepspeed", _deepspeed_dropping),
    "megatron_alltoall": _Peer("megatron", _megatron_alltoall),
    "megatron_allgather": _Peer("megatron", _megatron_allgather),
}
