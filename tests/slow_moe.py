"""The MoE layer as a loop over tokens and experts in float64: what the fast one is held to.

Nothing here sorts, gathers or communicates, so that it can be checked against the formula by eye.

Shapes:  T tokens   E experts   K experts per token   D width   G, F see `moe/ops/grouped_ffn.py`
"""

import math

import torch
from torch import Tensor

from gatewise.moe.config import Activation

__all__ = ["slow_expert", "slow_moe", "slow_route"]


def slow_expert(x_D: Tensor, w_in_GD: Tensor, w_out_DF: Tensor, activation: Activation) -> Tensor:
    """Apply one expert to one token."""
    hidden_G = w_in_GD @ x_D
    if activation is Activation.swiglu:
        width = hidden_G.shape[0] // 2
        gate_F, up_F = hidden_G[:width], hidden_G[width:]
        inner_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
    elif activation is Activation.gelu:
        inner_F = hidden_G * (1 + torch.erf(hidden_G / math.sqrt(2))) / 2
    else:
        inner_F = torch.where(hidden_G > 0, hidden_G, 0.0)
    return w_out_DF @ inner_F


def slow_route(x_TD: Tensor, router_ED: Tensor, top_k: int) -> list[list[tuple[int, Tensor]]]:
    """Return for each token its (expert, weight) pairs: softmax, best first, weights sum to 1."""
    pairs = []
    for x_D in x_TD:
        score_E = torch.softmax(router_ED @ x_D, 0)
        values = score_E.tolist()
        chosen = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
        total = sum((score_E[expert] for expert in chosen), torch.zeros((), dtype=score_E.dtype))
        if top_k == 1:
            total = torch.ones((), dtype=score_E.dtype)
        pairs.append([(expert, score_E[expert] / total) for expert in chosen])
    return pairs


def slow_moe(
    x_TD: Tensor,
    router_ED: Tensor,
    w_in_EGD: Tensor,
    w_out_EDF: Tensor,
    *,
    top_k: int,
    activation: Activation,
) -> Tensor:
    """Route every token and mix its experts' outputs, in float64, differentiable."""
    rows = []
    for x_D, chosen in zip(x_TD, slow_route(x_TD, router_ED, top_k), strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in chosen:
            y_D = y_D + weight * slow_expert(x_D, w_in_EGD[expert], w_out_EDF[expert], activation)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * 1.0
