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
    """

    def __init__(self, hidden: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        inner = 2 * width if activation is Activation.swiglu else width
        self.w_in_GD = nn.Parameter(torch.empty(inner, hidden))
        self.w_out_DF = nn.Parameter(torch.empty(hidden, width))
        for weight in (self.w_in_GD, self.w_out_DF):
            if not weight.is_meta:  # drawing nothing there imports torch's compiler
                nn.init.normal_(weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply the network to rows of any leading shape."""
        hidden_TG = multiply(x_TD, self.w_in_GD)
        return multiply(activate(hidden_TG, self.activation), self.w_out_DF)
