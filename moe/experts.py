"""The experts' weights, each matrix of all local experts in one tensor.

Shapes:  e experts of this rank   E experts, all ranks   D model width   F expert width
         G = 2F with a gate (swiglu; gate rows first, then up rows), else F
         With S shards a rank holds F / S of each expert's width: rows of the first weight (of the
         gate and of up alike), columns of the second; their outputs add up to the expert's.
"""

import math

import torch
from torch import Tensor, nn

from gatewise.moe.config import Activation
from gatewise.moe.job import GradientSink
from gatewise.moe.ops.reuse import ReusedMemory
from gatewise.parallel.parameters import Span

__all__ = ["GroupedExperts"]


class GroupedExperts(nn.Module):
    """Weights of consecutive experts; the arithmetic is in `ops/grouped_ffn.py`.

    Args:
        num_local: e.
        hidden: D.
        expert_width: F.
        activation: the non-linearity; swiglu has a gate.
        first_expert: global index of the first one.
        shard: which part of the width these weights are.
        shards: in how many parts it is cut; a divisor of F.
        biases: both matrices have one (`clamped.py`); then the width is not cut.
    """

    def __init__(
        self,
        num_local: int,
        hidden: int,
        expert_width: int,
        activation: Activation,
        *,
        first_expert: int = 0,
        shard: int = 0,
        shards: int = 1,
        biases: bool = False,
    ) -> None:
        super().__init__()
        if expert_width % shards:
            raise ValueError(
                f"expert_width is {expert_width}, which {shards} shards do not divide; choose a "
                "divisor of the width"
            )
        self.num_local = num_local
        self.first_expert = first_expert
        self.activation = activation
        self.shard, self.shards = shard, shards
        self.expert_width = expert_width
        self.matrices_in = 2 if activation is Activation.swiglu else 1  # in the first weight
        part = expert_width // shards
        self.w_in_eGD = nn.Parameter(torch.empty(num_local, self.matrices_in * part, hidden))
        self.w_out_eDF = nn.Parameter(torch.empty(num_local, hidden, part))
        self.bias_in_eG: nn.Parameter | None = None
        self.bias_out_eD: nn.Parameter | None = None
        if biases:
            assert shards == 1
            self.bias_in_eG = nn.Parameter(torch.zeros(num_local, self.matrices_in * part))
            self.bias_out_eD = nn.Parameter(torch.zeros(num_local, hidden))
        self.memory = ReusedMemory()
        self.sinks: tuple[GradientSink, GradientSink] | None = None
        for weight in (self.w_in_eGD, self.w_out_eDF):
            if not weight.is_meta:  # drawing nothing there imports torch's compiler
                nn.init.normal_(weight, std=0.02)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight of one whole expert."""
        hidden = self.w_in_eGD.shape[2]
        if name.startswith("bias"):
            return tuple(getattr(self, name).shape[1:])
        if name == "w_in_eGD":
            return (self.matrices_in * self.expert_width, hidden)
        return (hidden, self.expert_width)

    def span(self, name: str) -> Span:
        """Return where a weight's elements lie in the flattened weight of all experts."""
        if self.shards == 1:
            size = math.prod(self.whole_shape(name))
            return Span(self.first_expert * size, 1, self.num_local * size)
        rows, columns = self.whole_shape(name)
        start = self.first_expert * rows * columns
        part = self.expert_width // self.shards
        if name == "w_in_eGD":  # consecutive rows of each matrix: of the gate, of up
            run, stride = part * columns, self.expert_width * columns
        else:  # consecutive columns of each row
            run, stride = part, self.expert_width
        return Span(
            start + self.shard * run, self.num_local * rows * columns // stride, run, stride
        )

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """Return our part of a weight of one or more whole experts, (..., rows, columns)."""
        part = self.expert_width // self.shards
        mine = slice(self.shard * part, (self.shard + 1) * part)
        if name == "w_out_eDF":
            return whole[..., mine]
        matrices: Tensor = whole.unflatten(-2, (self.matrices_in, self.expert_width))
        return matrices[..., mine, :].flatten(-3, -2)
