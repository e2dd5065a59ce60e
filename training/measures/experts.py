"""What happens inside the experts, where a collapse can hide behind healthy routing.

Shapes:  E experts   G rows of the first weight: 2F with a gate (swiglu), else F   D model width
         F expert width   T tokens   K experts per token
Source:  similarity: RMoE, arXiv:2408.06793, section 4, here without the diagonal.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.ops.grouped_ffn import ffn_forward

__all__ = [
    "OutputSquares",
    "expert_similarity",
    "mean_off_diagonal",
    "output_squares",
    "weight_norms",
]


def expert_similarity(w_in_EGD: Tensor, w_out_EDF: Tensor, *, activation: Activation) -> Tensor:
    """Compare experts by the directions that they read and write on average.

    Each of an expert's matrices gives one direction: the mean of its gate rows, of its up rows,
    of its output columns, each of length 1. The value of two experts is the mean over the
    matrices of the cosine between their directions.

    Returns:
        float64 (E, E), 1 on the diagonal (0 where a mean is zero).
    """
    parts = list(w_in_EGD.double().chunk(2, 1) if activation is Activation.swiglu else (w_in_EGD,))
    directions = [part.double().mean(1) for part in parts] + [w_out_EDF.double().mean(2)]
    joined = torch.cat([F.normalize(direction_ED, dim=1) for direction_ED in directions], 1)
    return joined @ joined.T / len(directions)


def mean_off_diagonal(value_EE: Tensor) -> float:
    """Return the mean of all entries but the diagonal; 0 for one expert.

    Unlike the mean of all entries, which is at least 1 / E, it is 0 for unrelated experts.
    """
    size = len(value_EE)
    if size < 2:
        return 0.0
    return float((value_EE.sum() - value_EE.diagonal().sum()) / (size * (size - 1)))


def weight_norms(w_in_EGD: Tensor, w_out_EDF: Tensor) -> Tensor:
    """Return the norm of each expert's weights, float64 (E,)."""
    squares = [weight.double().square().sum((1, 2)) for weight in (w_in_EGD, w_out_EDF)]
    return (squares[0] + squares[1]).sqrt()


@dataclass(frozen=True, slots=True)
class OutputSquares:
    """Sums over an expert's rows, to be added over batches."""

    square_E: Tensor  # float64, of the squares of its outputs
    values_E: Tensor  # float64, how many outputs

    def __add__(self, other: "OutputSquares") -> "OutputSquares":
        return OutputSquares(self.square_E + other.square_E, self.values_E + other.values_E)

    def rms(self) -> Tensor:
        """Return the root mean square of each expert's outputs; 0 for one without rows."""
        return (self.square_E / self.values_E.clamp(min=1)).sqrt()


@torch.no_grad()
def output_squares(x_TD: Tensor, expert_TK: Tensor, experts: GroupedExperts) -> OutputSquares:
    """Run tokens through their experts and sum the squares of what comes out, unweighted.

    Args:
        x_TD: input of the layer.
        expert_TK: chosen experts; -1 is none.
        experts: all of the layer's, on this rank.
    """
    expert_N = expert_TK.flatten()
    order_N = torch.sort(expert_N, stable=True).indices
    order_N = order_N[expert_N[order_N] >= 0]
    count_E = torch.bincount(expert_N[order_N], minlength=experts.num_local)
    x_RD = x_TD[order_N // expert_TK.shape[1]].to(experts.w_in_eGD.dtype)
    y_RD, _ = ffn_forward(
        x_RD,
        count_E.cumsum(0).int(),
        experts.w_in_eGD,
        experts.w_out_eDF,
        experts.activation,
        count_list=count_E.tolist(),
    )
    square_E = torch.zeros(experts.num_local, dtype=torch.float64)
    square_E.index_add_(0, expert_N[order_N].cpu(), y_RD.double().square().sum(1).cpu())
    return OutputSquares(square_E, count_E.cpu().double() * x_TD.shape[1])
