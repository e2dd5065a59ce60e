"""Choices in which the tokens of a sequence compete: expert choice, Sinkhorn, BASE.

Each sequence is balanced by itself, so nothing depends on how sequences lie on ranks. A token's
experts depend on later tokens: a causal model learns from what it will not have when it generates.

Shapes:  T tokens on this rank   B sequences   P positions of a sequence   E experts, all ranks
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gatewise.routers.choice import choices_of_mask, rank_of_scores

__all__ = ["assign_evenly", "base_scores", "expert_choice", "sinkhorn_plan", "sinkhorn_scores"]

_LOW = -1e30  # below every score, and finite


def expert_choice(
    score_TE: Tensor, *, factor: float, sequences: int, padding_T: Tensor | None
) -> Tensor:
    """Let each expert take the tokens with its highest scores.

    Args:
        score_TE: finite; ties go to the earlier token.
        factor: each expert takes ceil(factor * tokens / E) tokens of each sequence.
        sequences: B.
        padding_T: True where a token cannot be taken.

    Returns:
        int64 (T, E), -1 where the expert did not take the token; a token may have none.

    Source: arXiv:2202.09368, section 3.2.
    """
    num_experts = score_TE.shape[1]
    score_BPE = score_TE.view(sequences, -1, num_experts)
    positions = score_BPE.shape[1]
    rank_BPE = rank_of_scores(score_BPE, 1)
    if padding_T is None:
        take = math.ceil(factor * positions / num_experts)
        return choices_of_mask((rank_BPE < take).view(-1, num_experts))
    padding_BP1 = padding_T.view(sequences, positions, 1)
    rank_BPE = rank_of_scores(score_BPE.masked_fill(padding_BP1, float("-inf")), 1)
    real_B11 = (~padding_BP1).sum(1, keepdim=True).double()
    take_B11 = (factor * real_B11 / num_experts).ceil()
    return choices_of_mask(((rank_BPE < take_B11) & ~padding_BP1).view(-1, num_experts))


def sinkhorn_scores(logits_TE: Tensor, *, sequences: int, padding_T: Tensor | None) -> Tensor:
    """Return the logarithm of each sequence's balanced plan, to choose from; finite."""
    return _by_sequence(logits_TE, sequences, padding_T, sinkhorn_plan)


def base_scores(logits_TE: Tensor, *, sequences: int, padding_T: Tensor | None) -> Tensor:
    """Return 1 for the expert of each token's even assignment within its sequence, else 0."""

    def assigned(logits_PE: Tensor) -> Tensor:
        expert_P = assign_evenly(logits_PE)
        return torch.nn.functional.one_hot(expert_P, logits_PE.shape[1]).to(logits_PE.dtype)

    return _by_sequence(logits_TE, sequences, padding_T, assigned)


def sinkhorn_plan(
    logits_PE: Tensor, *, tolerance: float = 1e-4, max_iterations: int = 200
) -> Tensor:
    """Return the log of the plan that is nearest to exp(logits) with even rows and columns.

    Rows sum to 1 / P and columns to 1 / E. In logarithms, so that no logit is too large.

    Args:
        logits_PE: finite.
        tolerance: stop when no column's sum is off by more than this share.
        max_iterations: stop anyway.

    Source: S-BASE, arXiv:2202.01169, appendix; the iteration of arXiv:1306.0895.
    """
    positions, num_experts = logits_PE.shape
    column_E = logits_PE.new_zeros(num_experts)
    plan_PE = logits_PE
    for _ in range(max_iterations):
        row_P1 = -(logits_PE + column_E).logsumexp(1, keepdim=True) - math.log(max(positions, 1))
        plan_PE = logits_PE + row_P1 + column_E
        error_E = plan_PE.logsumexp(0) + math.log(num_experts)
        # the host waits, in a selector that is not made for speed
        if float(error_E.abs().max()) < tolerance:
            break
        column_E = column_E - error_E
    return plan_PE


def assign_evenly(score_PE: Tensor) -> Tensor:
    """Assign every token to one expert, evenly, with the largest sum of scores.

    Every expert gets floor(P / E) tokens and P mod E experts one more. Tokens enter one by one;
    each time the cheapest chain of moves between experts makes room (successive shortest paths,
    exact). On the CPU in float64.

    Args:
        score_PE: finite.

    Returns:
        int64 (P,).

    Source: balanced assignment of BASE layers, arXiv:2103.16716, section 3.2.1.
    """
    positions, num_experts = score_PE.shape
    score = score_PE.detach().double().cpu()
    expert_P = torch.full((positions,), -1, dtype=torch.int64)
    room_E = torch.full((num_experts,), positions // num_experts)
    extra = positions % num_experts
    # move[a, b]: least loss of moving one of a's tokens to b; mover[a, b]: which token
    move_EE = torch.full((num_experts, num_experts), float("inf"), dtype=torch.float64)
    mover_EE = torch.full((num_experts, num_experts), -1, dtype=torch.int64)
    for token in range(positions):
        full_E = room_E <= (0 if extra == 0 else -1)
        cost_E, parent_E = _cheapest_entry(-score[token], move_EE)
        end = int(cost_E.masked_fill(full_E, float("inf")).argmin())
        if room_E[end] <= 0:
            extra -= 1
        room_E[end] -= 1
        changed = {end}
        while int(parent_E[end]) >= 0:  # push tokens along the chain, from its end
            before = int(parent_E[end])
            expert_P[mover_EE[before, end]] = end
            end = before
            changed.add(end)
        expert_P[token] = end
        for expert in changed:
            members = (expert_P == expert).nonzero()[:, 0]
            loss = score[members, expert].unsqueeze(1) - score[members]
            move_EE[expert], best = loss.min(0)
            mover_EE[expert] = members[best]
            move_EE[expert, expert] = float("inf")
    return expert_P.to(score_PE.device)


def _cheapest_entry(cost_E: Tensor, move_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each expert, the least cost of a chain that ends there, and its predecessor."""
    num_experts = cost_E.shape[0]
    cost_E = cost_E.clone()
    parent_E = torch.full((num_experts,), -1, dtype=torch.int64)
    for _ in range(num_experts):
        through_EE = cost_E.unsqueeze(1) + move_EE
        best_E, via_E = through_EE.min(0)
        better_E = best_E < cost_E - 1e-12
        if not bool(better_E.any()):
            break
        cost_E = torch.where(better_E, best_E, cost_E)
        parent_E = torch.where(better_E, via_E, parent_E)
    return cost_E, parent_E


def _by_sequence(
    logits_TE: Tensor, sequences: int, padding_T: Tensor | None, balance: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply `balance` to the real tokens of each sequence; padding keeps its logits."""
    result_TE = logits_TE.clone()
    positions = logits_TE.shape[0] // max(sequences, 1)
    for start in range(0, logits_TE.shape[0], max(positions, 1)):
        rows = torch.arange(start, start + positions, device=logits_TE.device)
        if padding_T is not None:
            rows = rows[~padding_T[rows]]
        if rows.numel():
            result_TE[rows] = balance(logits_TE[rows])
    return result_TE.clamp(min=_LOW)
