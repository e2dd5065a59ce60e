"""The dense feed-forward network: of dense layers, and of shared experts.

Shapes:  T tokens   D model width   F inner width   G = 2F with a gate (gate rows first), else F
"""

import torch
from torch import Tensor, nn

from gatewise.moe.config import Activation
from gatewise.moe.ops.activate import activate
from gatewise.moe.packed import multiply

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between; weights as those of one expert.

    Args:
        hidden: D.
        width: F.
        activation: swiglu has a gate, gelu (erf form) and relu have none.
        gated: a sigmoid of a linear map of the token scales the output (Qwen2-MoE).
    """

    def __init__(
        self, hidden: int, width: int, activation: Activation, *, gated: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation
        inner = 2 * width if activation is Activation.swiglu else width
        self.w_in_GD = nn.Parameter(torch.empty(inner, hidden))
        self.w_out_DF = nn.Parameter(torch.empty(hidden, width))
        self.w_gate_1D = nn.Parameter(torch.empty(1, hidden)) if gated else None
        for weight in self.parameters():
            if not weight.is_meta:  # drawing nothing there imports torch's compiler
                nn.init.normal_(weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply the network to rows of any leading shape."""
        hidden_TG = multiply(x_TD, self.w_in_GD)
        y_TD = multiply(activate(hidden_TG, self.activation), self.w_out_DF)
        if self.w_gate_1D is not None:
            y_TD = y_TD * multiply(x_TD, self.w_gate_1D).sigmoid()
        return y_TD
