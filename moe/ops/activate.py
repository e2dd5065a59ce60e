"""The non-linearity of a feed-forward network in plain torch operators, differentiable.

Shapes:  T rows   F inner width   G = 2F with a gate (gate rows first), else F
"""

import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.config import Activation

__all__ = ["activate"]


def activate(hidden_TG: Tensor, activation: Activation) -> Tensor:
    """Return the inner activations (T, F) of the first product."""
    if activation is Activation.swiglu:
        gate_TF, up_TF = hidden_TG.chunk(2, -1)
        return F.silu(gate_TF) * up_TF
    if activation is Activation.gelu:
        return F.gelu(hidden_TG)
    return hidden_TG.relu()
