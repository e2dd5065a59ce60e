"""Scorers without a state: pure functions from tokens and weights to logits.

All compute in the type of the tokens, which the router has made fp32 or fp64.

Shapes:  T tokens on this rank   D model width   E experts, all ranks   Q, W inner widths
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.routers.api import ExpertColumns
from gatewise.routers.config import ScoreFunction

__all__ = ["cosine_logits", "mlp_logits", "scores", "shares", "sparsity_logits"]

_LARGEST_LOG_SCALE = math.log(100.0)


def scores(logits_TE: Tensor, function: ScoreFunction) -> Tensor:
    """Turn logits into scores."""
    if function is ScoreFunction.softmax:
        return logits_TE.softmax(-1)
    if function is ScoreFunction.sigmoid:
        return logits_TE.sigmoid()
    if function is ScoreFunction.sqrt_softplus:
        # the square root's gradient is infinite at 0, which softplus rounds to below -104
        return F.softplus(logits_TE).clamp(min=1e-30).sqrt()
    return logits_TE.relu()


def shares(score_TE: Tensor, function: ScoreFunction) -> Tensor:
    """Return scores that sum to 1 per token (to 0 where all are 0)."""
    if function is ScoreFunction.softmax:
        return score_TE
    return score_TE / score_TE.sum(-1, keepdim=True).clamp(min=1e-20)


def cosine_logits(
    x_TD: Tensor,
    projection_QD: Tensor,
    bias_Q: Tensor | None,
    weight_EQ: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Return cosines between projected tokens and experts' vectors, times exp(temperature).

    Args:
        x_TD: tokens; a row of zeros has cosine 0 with every expert.
        projection_QD: projection to Q dimensions.
        bias_Q: of the projection, or None.
        weight_EQ: one vector per expert.
        temperature: log of the scale, (1,); the scale is at most 100.

    Source: X-MoE, arXiv:2204.09179, eq. 3 and 4.
    """
    wide = x_TD.dtype
    bias_Q = None if bias_Q is None else bias_Q.to(wide)
    angle_TQ = F.normalize(F.linear(x_TD, projection_QD.to(wide), bias_Q), dim=-1)
    expert_EQ = F.normalize(weight_EQ.to(wide), dim=-1)
    scale = temperature.to(wide).clamp(max=_LARGEST_LOG_SCALE).exp()
    return F.linear(angle_TQ, expert_EQ) * scale


def mlp_logits(x_TD: Tensor, projection_WD: Tensor, weight_EW: Tensor) -> Tensor:
    """Return the logits of two matrices with GELU between them, no biases."""
    wide = x_TD.dtype
    return F.linear(F.gelu(F.linear(x_TD, projection_WD.to(wide))), weight_EW.to(wide))


def sparsity_logits(x_TD: Tensor, columns: ExpertColumns) -> Tensor:
    """Score experts by how few of their units a token would activate.

    With the entries of column j of an expert's first weight independent and normal with mean m_j
    and variance v_j, a unit's input is normal with mean m x and variance v x^2, and the logit is
    -erf(mean / (sqrt(2) std)), a falling function of the share of active units.

    Args:
        x_TD: tokens; a row of zeros gives equal logits.
        columns: statistics of all experts' weights; gradients flow into them.

    Source: MoE-X, arXiv:2503.07639, section 4.
    """
    wide = x_TD.dtype
    mean_TE = F.linear(x_TD, columns.mean_ED.to(wide))
    variance_TE = F.linear(x_TD.square(), columns.variance_ED.to(wide))
    tiny = torch.finfo(wide).tiny ** 0.5
    return -torch.erf(mean_TE / (2 * (variance_TE + tiny)).sqrt())
