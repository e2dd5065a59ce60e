"""Sorting of (token, choice) pairs by expert, and moving rows there and back.

Pure functions without autograd; each backward is a function of its own. On a CPU with a compiler
C++ kernels do the work (`native.py`); the plain torch versions here do it everywhere else.

Shapes:  T tokens   K experts per token   N pairs that are kept, at most T * K   E experts
         D model width
"""

import torch
from torch import Tensor

from gatewise.moe.ops.native import kernels_for, load_kernels

__all__ = [
    "combine_rows",
    "combine_rows_backward",
    "gather_rows",
    "gather_rows_backward",
    "sort_pairs",
]


def sort_pairs(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the pairs by expert, and by token within an expert.

    Args:
        expert_TK: int64 in [0, E); -1 marks a dropped pair.
        num_experts: E.

    Returns:
        order_M: for each position the flat pair `token * K + choice`; M = T * K. The dropped
            pairs come last, after `count_E.sum()` kept ones, so no size depends on the data.
        token_M: `order_M // K`, the token of each position.
        inverse_TK: position of each pair; -1 for a dropped one.
        count_E: int64, kept pairs per expert.
    """
    kernels = load_kernels() if expert_TK.device.type == "cpu" else None
    if kernels is not None:
        return kernels.sort_pairs(expert_TK.contiguous(), num_experts)
    top_k = expert_TK.shape[1]
    flat_M = expert_TK.reshape(-1)
    key_M = torch.where(flat_M < 0, num_experts, flat_M)
    order_M = torch.argsort(key_M, stable=True)  # stable: within an expert tokens keep their order
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_M.device)
    count_E.scatter_add_(0, key_M, torch.ones_like(key_M))
    position_M = torch.arange(flat_M.shape[0], device=flat_M.device)
    inverse_M = torch.empty_like(order_M).scatter_(0, order_M, position_M)
    inverse_M = torch.where(flat_M < 0, -1, inverse_M)
    token_M = order_M // max(top_k, 1)
    return order_M, token_M, inverse_M.view_as(expert_TK), count_E[:num_experts]


def gather_rows(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """Return one row per pair: `x_TD[token_N]`."""
    kernels = kernels_for(x_TD)
    if kernels is not None:
        return kernels.gather_rows(x_TD.contiguous(), token_N.contiguous())
    return x_TD.index_select(0, token_N)


def gather_rows_backward(dx_ND: Tensor, inverse_TK: Tensor) -> Tensor:
    """Return the gradient of `gather_rows`: each token sums its rows in the order of its choices.

    Args:
        dx_ND: gradient of the gathered rows.
        inverse_TK: position of each pair; -1 for a dropped one.

    Returns:
        Gradient (T, D), summed in fp32 (fp64 for fp64), of the dtype of `dx_ND`.
    """
    return _sum_rows(dx_ND, inverse_TK, None)


def combine_rows(y_ND: Tensor, inverse_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum each token's expert outputs with its weights, in the order of its choices.

    Args:
        y_ND: expert outputs, one row per kept pair.
        inverse_TK: row of each pair; -1 for a dropped one, which adds nothing.
        weight_TK: combine weights, fp32 (fp64 with fp64 rows).

    Returns:
        Tokens (T, D), summed in fp32 (fp64 for fp64), of the dtype of `y_ND`.
    """
    return _sum_rows(y_ND, inverse_TK, weight_TK)


def combine_rows_backward(
    dy_TD: Tensor, y_ND: Tensor, order_N: Tensor, inverse_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `combine_rows`.

    Args:
        dy_TD: gradient of the tokens.
        y_ND: expert outputs given to `combine_rows`.
        order_N: flat pair of each row: `sort_pairs`' first result without the dropped pairs.
        inverse_TK: row of each pair; -1 for a dropped one, whose weight has gradient zero.
        weight_TK: combine weights.

    Returns:
        dy_ND of the dtype of `y_ND`, and dweight_TK of the dtype of `weight_TK`.
    """
    kernels = kernels_for(y_ND)
    if kernels is not None and weight_TK.dtype == torch.float32:
        return kernels.combine_backward(
            *(x.contiguous() for x in (dy_TD, y_ND, inverse_TK, weight_TK))
        )
    num_tokens, top_k = inverse_TK.shape
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    dy_rows_ND = dy_TD.index_select(0, order_N // max(top_k, 1)).to(wide)
    weight_N = weight_TK.reshape(-1).index_select(0, order_N).to(wide)
    dot_N = (dy_rows_ND * y_ND).sum(1)
    dweight_M = torch.zeros(num_tokens * top_k, dtype=wide, device=y_ND.device)
    dweight_M.index_copy_(0, order_N, dot_N)
    dy_ND = dy_rows_ND.mul_(weight_N.unsqueeze(1)).to(y_ND.dtype)
    return dy_ND, dweight_M.view(num_tokens, top_k).to(weight_TK.dtype)


def _sum_rows(y_ND: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """Sum `weight * y[inverse]` over the choices, first to last, wide, rounded once."""
    kernels = kernels_for(y_ND)
    if kernels is not None and (weight_TK is None or weight_TK.dtype == torch.float32):
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        return kernels.sum_rows(y_ND.contiguous(), inverse_TK.contiguous(), weight_TK)
    num_tokens, top_k = inverse_TK.shape
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    total_TD = torch.zeros(num_tokens, y_ND.shape[1], dtype=wide, device=y_ND.device)
    if y_ND.shape[0] == 0:
        return total_TD.to(y_ND.dtype)
    for choice in range(top_k):
        row_T = inverse_TK[:, choice]
        rows_TD = y_ND.index_select(0, row_T.clamp_min(0)).to(wide)
        # where, not a weight of zero: the row that stands in may hold NaN
        rows_TD = torch.where((row_T >= 0).unsqueeze(1), rows_TD, 0.0)
        if weight_TK is None:
            total_TD += rows_TD
        else:
            total_TD.addcmul_(rows_TD, weight_TK[:, choice].to(wide).unsqueeze(1))
    return total_TD.to(y_ND.dtype)
