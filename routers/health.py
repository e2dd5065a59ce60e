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
    entropy_T: Tensor = torch.special.entr(share_TE).sum(-1)
    return entropy_T


def inner_balance(share_TE: Tensor) -> Tensor:
    """Return each token's best score over its second (T,); 1 for a single expert."""
    if share_TE.shape[-1] < 2:
        return torch.ones_like(share_TE[..., 0])
    best_T2 = share_TE.topk(2, -1).values.clamp(min=_LEAST)
    return best_T2[..., 0] / best_T2[..., 1]


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
    best_T = share_TE.amax(-1)
    columns = {
        "confidence": best_T,
        "entropy": token_entropy(share_TE),
        "inner": inner_balance(share_TE).log(),
        "outer": outer_balance(share_TE, expert_TK),
        "weight": torch.where(expert_TK >= 0, weight_TK, 0.0).sum(-1),
        "logsumexp": logits_TE.logsumexp(-1),
    }
    size_T = logits_TE.abs().amax(-1)
    if padding_T is not None:
        columns = {name: value.masked_fill(padding_T, 0.0) for name, value in columns.items()}
        size_T = size_T.masked_fill(padding_T, 0.0)
    sums = {name: value.sum().float() for name, value in columns.items()}
    zero = size_T.new_zeros(1)
    return sums | {"largest_logit": torch.cat((size_T, zero)).amax().float()}
