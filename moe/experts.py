"""The experts' weights, each matrix of all local experts in one tensor.

Shapes:  e experts of this rank   E experts, all ranks   D model width   F expert width
         G = 2F with a gate (swiglu; gate rows first, then up rows), else F
"""

import torch
from torch import nn

from gatewise.moe.config import Activation
from gatewise.moe.job import GradientSink
from gatewise.moe.ops.reuse import ReusedMemory

__all__ = ["GroupedExperts"]


class GroupedExperts(nn.Module):
    """Weights of consecutive experts; the arithmetic is in `ops/grouped_ffn.py`.

    Args:
        num_local: e.
        hidden: D.
        expert_width: F.
        activation: the non-linearity; swiglu has a gate.
        first_expert: global index of the first one.
    """

    def __init__(
        self,
        num_local: int,
        hidden: int,
        expert_width: int,
        activation: Activation,
        *,
        first_expert: int = 0,
    ) -> None:
        super().__init__()
        self.num_local = num_local
        self.first_expert = first_expert
        self.activation = activation
        inner = 2 * expert_width if activation is Activation.swiglu else expert_width
        self.w_in_eGD = nn.Parameter(torch.empty(num_local, inner, hidden))
        self.w_out_eDF = nn.Parameter(torch.empty(num_local, hidden, expert_width))
        self.memory = ReusedMemory()
        self.sinks: tuple[GradientSink, GradientSink] | None = None
        for weight in (self.w_in_eGD, self.w_out_eDF):
            if not weight.is_meta:  # drawing nothing there imports torch's compiler
                nn.init.normal_(weight, std=0.02)
