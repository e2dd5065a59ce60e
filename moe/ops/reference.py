"""Slow and obvious float64 loops: what the fast kernels are held to.

Nothing here is used in training. Every function works one row and one expert at a time, so that
a reader can check it against the formula.

Shapes:  T tokens   K experts per token   R rows   E experts   D model width   F expert width
         G rows of the first weight: 2F with a gate (swiglu), else F
"""

import math

import torch
from torch import Tensor

from gatewise.moe.config import Activation

__all__ = ["combine_reference", "ffn_reference", "layer_reference"]


def _activate_reference(hidden_G: Tensor, activation: Activation) -> Tensor:
    """Apply the non-linearity to one row of the first product."""
    if activation is Activation.swiglu:
        gate_F, up_F = hidden_G.chunk(2)
        return gate_F / (1 + torch.exp(-gate_F)) * up_F
    if activation is Activation.gelu:
        return 0.5 * hidden_G * (1 + torch.erf(hidden_G / math.sqrt(2)))
    return hidden_G.clamp_min(0)


def ffn_reference(
    x_RD: Tensor,
    end_e: Tensor,
    w_in_eGD: Tensor,
    w_out_eDF: Tensor,
    activation: Activation,
) -> Tensor:
    """Apply each expert to its rows, one row at a time, in float64, differentiable.

    Args:
        x_RD: rows sorted by expert.
        end_e: for each expert the end of its rows.
        w_in_eGD: first weights, `nn.Linear` layout; gate rows come before up rows.
        w_out_eDF: second weights.
        activation: the non-linearity between them.

    Returns:
        The experts' outputs, float64, in the order of `x_RD`.
    """
    x_RD, w_in_eGD, w_out_eDF = x_RD.double(), w_in_eGD.double(), w_out_eDF.double()
    rows = []
    start = 0
    for expert, end in enumerate(end_e.tolist()):
        for row in range(start, end):
            inner_F = _activate_reference(w_in_eGD[expert] @ x_RD[row], activation)
            rows.append(w_out_eDF[expert] @ inner_F)
        start = end
    return torch.stack(rows) if rows else x_RD.new_zeros(0, w_out_eDF.shape[1])


def combine_reference(y_ND: Tensor, inverse_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum each token's expert outputs with its weights, in float64; -1 marks a dropped pair."""
    tokens = []
    for token, positions in enumerate(inverse_TK.tolist()):
        total_D = y_ND.new_zeros(y_ND.shape[1], dtype=torch.float64)
        for choice, position in enumerate(positions):
            if position >= 0:
                total_D = total_D + weight_TK[token, choice].double() * y_ND[position].double()
        tokens.append(total_D)
    if not tokens:
        return y_ND.new_zeros(0, y_ND.shape[1], dtype=torch.float64)
    return torch.stack(tokens)


def layer_reference(  # noqa: PLR0917 - the operands of one layer
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    w_in_EGD: Tensor,
    w_out_EDF: Tensor,
    activation: Activation,
) -> Tensor:
    """Mix the experts of every token in a loop over tokens and choices, in float64.

    Args:
        x_TD: tokens.
        expert_TK: chosen experts; -1 marks a dropped pair.
        weight_TK: combine weights.
        w_in_EGD: first weights of all experts.
        w_out_EDF: second weights of all experts.
        activation: the non-linearity between them.

    Returns:
        `sum_k weight[t, k] * expert[t, k](x[t])`, float64, differentiable.
    """
    tokens = []
    for token, experts in enumerate(expert_TK.tolist()):
        total_D = x_TD.new_zeros(x_TD.shape[1], dtype=torch.float64)
        for choice, expert in enumerate(experts):
            if expert < 0:
                continue
            hidden_G = w_in_EGD[expert].double() @ x_TD[token].double()
            output_D = w_out_EDF[expert].double() @ _activate_reference(hidden_G, activation)
            total_D = total_D + weight_TK[token, choice].double() * output_D
        tokens.append(total_D)
    if not tokens:
        return x_TD.new_zeros(0, x_TD.shape[1], dtype=torch.float64)
    return torch.stack(tokens)
