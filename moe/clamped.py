"""gpt-oss's experts: biases in both matrices, and a clamped SwiGLU; plain autograd, on one rank.

Shapes:  T tokens   K experts per token   E experts   R rows of one expert   D model width
         F expert width   G = 2F, gate rows first
Source:  the release of gpt-oss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.experts import GroupedExperts

__all__ = ["clamped_experts", "clamped_swiglu"]

_GAIN, _CLAMP = 1.702, 7.0


def clamped_experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: GroupedExperts
) -> Tensor:
    """Sum the outputs of each token's experts with its weights; -1 is no expert.

    Args:
        x_TD: tokens, in the experts' type.
        expert_TK: chosen experts.
        weight_TK: combine weights, fp32 or fp64.
        experts: all of the layer, with biases.
    """
    assert experts.bias_in_eG is not None
    assert experts.bias_out_eD is not None
    y_TD = torch.zeros_like(x_TD)
    # unbind: indexing by expert would make autograd add a whole tensor of zeros for each of them
    parts = zip(
        experts.w_in_eGD.unbind(),
        experts.bias_in_eG.unbind(),
        experts.w_out_eDF.unbind(),
        experts.bias_out_eD.unbind(),
        strict=True,
    )
    for expert, (w_in_GD, bias_G, w_out_DF, bias_D) in enumerate(parts):
        token_R, choice_R = torch.where(expert_TK == expert)
        inner_RF = clamped_swiglu(F.linear(x_TD[token_R], w_in_GD, bias_G))
        out_RD = F.linear(inner_RF, w_out_DF, bias_D)
        share_R1 = weight_TK[token_R, choice_R].unsqueeze(1).to(out_RD.dtype)
        y_TD = y_TD.index_add(0, token_R, out_RD * share_R1)
    return y_TD


def clamped_swiglu(hidden_RG: Tensor) -> Tensor:
    """Return (up + 1) gate sigmoid(1.702 gate), gate at most 7 and up within 7 of 0."""
    gate_RF, up_RF = hidden_RG.chunk(2, -1)
    gate_RF, up_RF = gate_RF.clamp(max=_CLAMP), up_RF.clamp(-_CLAMP, _CLAMP)
    return (up_RF + 1) * gate_RF * torch.sigmoid(_GAIN * gate_RF)
