"""What a token's scores look like: sums for the metrics, and the values behind them.

A share is a token's scores divided by their sum. Means and medians of the values tell a sharp
gate from a flat one; the sums add over ranks and steps.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token
Source:  inner and outer balance: RMoE, arXiv:2408.06793, section 4.
"""

import torch
from torch import Tensor

__all__ = ["health_sums", "inner_balance", "outer_balance", "token_entropy"]

_LEAST = 1e-20  # of a share, before it divides


def token_entropy(share_TE: Tensor) -> Tensor:
    """Return each token's entropy in nats (T,), from 0 (certain) to ln E (knows nothing)."""
    # twice as fast as torch.special.entr; a share of 0 adds 0 here too
    return -(share_TE * share_TE.clamp(min=_LEAST).log()).sum(-1)


def inner_balance(share_TE: Tensor) -> Tensor:
    """Return each token's best score over its second (T,); 1 for a single expert."""
    best_T, second_T = _best_two(share_TE)
    return best_T.clamp(min=_LEAST) / second_T.clamp(min=_LEAST)


def outer_balance(share_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """Return what share of its score each token gave to the experts it chose (T,); -1 is none."""
    chosen_TK = share_TE.gather(-1, expert_TK.clamp(min=0))
    return torch.where(expert_TK >= 0, chosen_TK, 0.0).sum(-1)


def health_sums(
    logits_TE: Tensor,
    share_TE: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    *,
    padding_T: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return detached float32 sums over tokens, and the largest |logit|.

    Args:
        logits_TE: as scored.
        share_TE: rows sum to 1.
        expert_TK: chosen experts; -1 where there is none.
        weight_TK: combine weights.
        padding_T: True where a token does not count.

    Returns:
        `confidence` (best share), `entropy` (nats), `inner` (ln of best over second share),
        `outer` (share of the chosen), `weight`, `logsumexp`: sums over tokens; `largest_logit`:
        the largest |logit|, 0 for no token.
    """
    logits_TE, share_TE, weight_TK = logits_TE.detach(), share_TE.detach(), weight_TK.detach()
    best_T, second_T = _best_two(share_TE)
    columns = {
        "confidence": best_T,
        "entropy": token_entropy(share_TE),
        "inner": (best_T.clamp(min=_LEAST) / second_T.clamp(min=_LEAST)).log(),
        "outer": outer_balance(share_TE, expert_TK),
        "weight": torch.where(expert_TK >= 0, weight_TK, 0.0).sum(-1),
        "logsumexp": logits_TE.logsumexp(-1),
    }
    if padding_T is not None:
        columns = {name: value.masked_fill(padding_T, 0.0) for name, value in columns.items()}
        logits_TE = logits_TE.masked_fill(padding_T.unsqueeze(-1), 0.0)
    sums = {name: value.sum().float() for name, value in columns.items()}
    if not logits_TE.numel():
        return sums | {"largest_logit": logits_TE.new_zeros(()).float()}
    low, high = logits_TE.aminmax()
    return sums | {"largest_logit": torch.maximum(-low, high).float()}


def _best_two(share_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's two largest shares; for a single expert that one twice."""
    best_T1, place_T1 = share_TE.max(-1, keepdim=True)
    if share_TE.shape[-1] < 2:
        return best_T1[..., 0], best_T1[..., 0]
    # three times as fast as a top-k of two
    return best_T1[..., 0], share_TE.scatter(-1, place_T1, -1.0).amax(-1)
