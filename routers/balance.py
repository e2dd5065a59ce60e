"""Load balance: counts, losses and the bias update; pure functions without communication.

Read `api.py` first. The caller reduces counts over ranks, because only it knows the groups.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token   B sequences
         `...` any leading dims, e.g. layers; the functions treat each alike.
Source:  Switch Transformer, arXiv:2101.03961, eq. 4-6; global-batch scope: arXiv:2501.11873;
         balancing bias: arXiv:2408.15664; z-loss: ST-MoE, arXiv:2202.08906, eq. 5.
"""

import torch
from torch import Tensor

__all__ = [
    "balance_loss",
    "count_per_expert",
    "global_balance_loss",
    "max_violation",
    "sequence_balance_loss",
    "update_bias_",
    "z_loss",
]


def count_per_expert(
    expert_TK: Tensor,
    num_experts: int,
    *,
    padding_T: Tensor | None = None,
    variable: bool = False,
) -> Tensor:
    """Count the pairs that each expert was chosen for.

    Args:
        expert_TK: int64 in [0, num_experts); -1 where `variable` leaves a place empty.
        num_experts: E.
        padding_T: bool, True where a token is padding and does not count.
        variable: whether there can be empty places.

    Returns:
        float32 (E,); exact up to 2^24 pairs.
    """
    flat_N = expert_TK.flatten()
    first = 0
    if variable:  # empty places fall into a bin before the experts'
        flat_N, first = flat_N + 1, 1
    if padding_T is None:
        return torch.bincount(flat_N, minlength=num_experts + first)[first:].float()
    real_N = (~padding_T).float().repeat_interleave(expert_TK.shape[1])
    return torch.bincount(flat_N, real_N, minlength=num_experts + first)[first:].float()


def balance_loss(score_E: Tensor, count_E: Tensor, *, tokens: Tensor, top_k: int) -> Tensor:
    """Penalise sending many tokens to experts whose mean score is high: E * sum_e f_e P_e.

    Args:
        score_E: (..., E) sum over tokens of scores that sum to 1 per token; gradients flow
            through these only.
        count_E: (..., E) pairs per expert over the same tokens.
        tokens: number of tokens behind both, broadcastable to (...).
        top_k: K.

    Returns:
        (...) values: 1 when load and mean scores are uniform, E / K when all tokens choose the
        same K experts with all their score; 0 for zero tokens.

    Source: arXiv:2101.03961, eq. 4, with f normalised by T * K.
    """
    tokens = tokens.clamp(min=1)
    fraction_E = count_E / (tokens.unsqueeze(-1) * top_k)
    mean_E = score_E / tokens.unsqueeze(-1)
    return score_E.shape[-1] * (fraction_E.detach() * mean_E).sum(-1)


def sequence_balance_loss(
    score_TE: Tensor,
    expert_TK: Tensor,
    *,
    sequences: int,
    padding_T: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Average `balance_loss` over sequences, each with counters of its own.

    Args:
        score_TE: rows sum to 1.
        expert_TK: chosen experts; with `top_k` given, -1 is an empty place.
        sequences: B; T must be a multiple of it.
        padding_T: True where a token does not count.
        top_k: experts per token of uniform load, where their number varies; None: K.

    Returns:
        A scalar; 1 at uniform load in every sequence.
    """
    num_tokens, num_experts = score_TE.shape
    if num_tokens == 0:
        return score_TE.sum()
    chosen_TE = torch.zeros_like(score_TE, requires_grad=False)
    if top_k is None:
        chosen_TE.scatter_(1, expert_TK, 1.0)
    else:
        chosen_TE.scatter_add_(1, expert_TK.clamp(min=0), (expert_TK >= 0).to(score_TE.dtype))
    if padding_T is None:
        tokens_B = score_TE.new_full((sequences,), num_tokens / sequences)
    else:
        real_T1 = (~padding_T).to(score_TE.dtype).unsqueeze(1)
        # where, not a product: padding may hold NaN
        score_TE = torch.where(real_T1.bool(), score_TE, 0.0)
        chosen_TE = chosen_TE * real_T1
        tokens_B = real_T1.view(sequences, -1).sum(1)
    loss_B = balance_loss(
        score_TE.view(sequences, -1, num_experts).sum(1),
        chosen_TE.view(sequences, -1, num_experts).sum(1),
        tokens=tokens_B,
        top_k=top_k or expert_TK.shape[1],
    )
    return loss_B.sum() / (tokens_B > 0).sum().clamp(min=1)


def global_balance_loss(
    score_LE: Tensor, count_LE: Tensor, *, tokens: Tensor, top_k: int, ranks: int
) -> Tensor:
    """Return this rank's part of the global-batch balance loss, summed over layers.

    The average of the parts over ranks is the loss of the whole batch, and so is the average of
    their gradients, whatever share of the tokens each rank had.

    Args:
        score_LE: this rank's sums of scores per layer; they carry the gradient.
        count_LE: pairs per expert over all ranks.
        tokens: scalar, tokens over all ranks.
        top_k: K.
        ranks: number of ranks that are averaged.

    Returns:
        A scalar; its average over ranks is L at uniform load.

    Source: arXiv:2501.11873.
    """
    return balance_loss(score_LE * ranks, count_LE, tokens=tokens, top_k=top_k).sum()


def z_loss(logits_TE: Tensor, *, padding_T: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2; 0 for zero tokens."""
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    if padding_T is None:
        return logits_TE.logsumexp(-1).square().mean()
    # masked on both sides: a NaN in padding would reach the gradient as 0 * NaN
    real_TE = torch.where(padding_T.unsqueeze(1), 0.0, logits_TE)
    square_T = torch.where(padding_T, 0.0, real_TE.logsumexp(-1).square())
    return square_T.sum() / (~padding_T).sum().clamp(min=1)


def update_bias_(bias_E: Tensor, count_E: Tensor, *, rate: float) -> None:
    """Move the balancing bias one step towards the experts with less than mean demand.

    Args:
        bias_E: (..., E) float32, changed in place; its mean over E stays 0.
        count_E: (..., E) demand of the whole optimizer step over all ranks.
        rate: size of the step.

    Source: arXiv:2408.15664, algorithm 1, with the mean of the step removed.
    """
    step_E = rate * torch.sign(count_E.mean(-1, keepdim=True) - count_E)
    bias_E.add_(step_E - step_E.mean(-1, keepdim=True))


def max_violation(count_E: Tensor) -> Tensor:
    """Return max_e count_e / mean(count) - 1 over the last dim; 0 is perfect balance."""
    mean = count_E.mean(-1).clamp(min=1e-9)
    return count_E.amax(-1) / mean - 1
