"""Token choice: which experts a token takes, from its own scores alone.

All functions are pure and without gradient. Ties go to the lowest expert.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token   G groups of experts
"""

import torch
from torch import Tensor

__all__ = ["choices_of_mask", "limit_to_groups", "rank_of_scores", "stable_topk", "top_p_choice"]

# Below this many choices a token, repeated argmax beats a top-k over 64-bit keys.
_ARGMAX_CHOICES = 4


def stable_topk(score_TE: Tensor, top_k: int) -> Tensor:
    """Return the indices of the `top_k` largest scores per row, best first, ties lowest first.

    `torch.topk` promises no order among ties; different orders on different devices or shards
    would route the same token differently.

    Args:
        score_TE: finite values of any floating type.
        top_k: from 1 to E.

    Returns:
        int64 (T, top_k).
    """
    num_experts = score_TE.shape[1]
    if top_k <= _ARGMAX_CHOICES:
        left_TE, chosen = score_TE, []
        for choice in range(top_k):
            best_T1 = left_TE.argmax(-1, keepdim=True)  # the first of equal maxima
            chosen.append(best_T1)
            if choice + 1 < top_k:
                left_TE = left_TE.scatter(1, best_T1, float("-inf"))
        return torch.cat(chosen, 1)
    if score_TE.dtype == torch.float64:
        return score_TE.sort(stable=True, dim=-1, descending=True).indices[:, :top_k]
    # Order-preserving integers, made unique by the index in their low bits; + 0.0 makes -0.0 equal
    # to 0.0.
    bits_TE = (score_TE.float() + 0.0).view(torch.int32).long()
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    rank_E = torch.arange(num_experts - 1, -1, -1, device=score_TE.device)
    return ((ordered_TE << 20) | rank_E).topk(top_k, -1).indices


def limit_to_groups(score_TE: Tensor, *, num_groups: int, top_groups: int) -> Tensor:
    """Leave only the experts of each token's `top_groups` best groups; others become -inf.

    A group's score is the sum of its two best experts (of its one expert where it has one).

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (node-limited routing).
    """
    num_tokens, num_experts = score_TE.shape
    grouped_TGe = score_TE.view(num_tokens, num_groups, num_experts // num_groups)
    group_TG = grouped_TGe.topk(min(2, grouped_TGe.shape[2]), -1).values.sum(-1)
    allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    allowed_TG.scatter_(1, stable_topk(group_TG, top_groups), True)
    return grouped_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).flatten(1)


def top_p_choice(score_TE: Tensor, top_p: float) -> Tensor:
    """Return each token's fewest best experts whose scores sum to at least `top_p`.

    Args:
        score_TE: rows sum to 1; no NaN.
        top_p: in (0, 1].

    Returns:
        int64 (T, E), best first, -1 behind the last chosen; at least one is chosen.

    Source: arXiv:2403.07652, eq. 3.
    """
    order_TE = score_TE.sort(stable=True, dim=-1, descending=True).indices
    sorted_TE = score_TE.gather(1, order_TE)
    before_TE = sorted_TE.cumsum(-1) - sorted_TE
    before_TE[:, :1] = -1.0  # the first is always chosen
    return torch.where(before_TE < top_p, order_TE, -1)


def choices_of_mask(chosen_TE: Tensor) -> Tensor:
    """Turn a mask of chosen experts into indices: int64 (T, E), -1 where not chosen."""
    expert_E = torch.arange(chosen_TE.shape[1], device=chosen_TE.device)
    return torch.where(chosen_TE, expert_E, -1)


def rank_of_scores(score: Tensor, dim: int) -> Tensor:
    """Return each value's place along `dim` in descending order; ties go to the lower index."""
    order = score.sort(stable=True, dim=dim, descending=True).indices
    place = torch.arange(score.shape[dim], device=score.device)
    shape = [1] * score.dim()
    shape[dim] = -1
    return torch.empty_like(order).scatter_(dim, order, place.view(shape).expand_as(order))
