"""Further losses of routers, each of one rank's tokens; `balance.py` has the common ones.

Losses over a batch are taken per sequence and averaged where `sequences` is above 1.

Shapes:  T tokens on this rank   E experts, all ranks   B sequences   P positions of a sequence
"""

import torch
from torch import Tensor

__all__ = ["batch_entropy_loss", "smooth_load", "squared_variation", "token_entropy_loss"]


def squared_variation(value_TE: Tensor, *, sequences: int, padding_T: Tensor | None) -> Tensor:
    """Return the squared coefficient of variation over experts of the sums over tokens.

    Args:
        value_TE: at least 0.
        sequences: B; one value each, then the mean.
        padding_T: True where a token does not count.

    Source: arXiv:1701.06538, eq. 6 to 11 (importance and load).
    """
    if value_TE.shape[0] == 0:
        return value_TE.sum()
    sum_BE = _per_sequence(value_TE, sequences, padding_T)
    variance_B = sum_BE.var(-1, correction=0)
    return (variance_B / (sum_BE.mean(-1).square() + 1e-10)).mean()


def smooth_load(
    clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, expert_TK: Tensor
) -> Tensor:
    """Return the probability that each expert is chosen when its noise alone is drawn again.

    Args:
        clean_TE: logits without noise.
        noisy_TE: logits that were chosen from.
        noise_std_TE: size of the noise.
        expert_TK: the choice, best first; K is below E.

    Source: arXiv:1701.06538, eq. 8 and 9.
    """
    top_k = expert_TK.shape[1]
    chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter_(1, expert_TK, True)
    left_TE = noisy_TE.masked_fill(chosen_TE, float("-inf"))
    next_T1 = left_TE.amax(1, keepdim=True)  # the threshold for experts that were chosen
    last_T1 = noisy_TE.gather(1, expert_TK[:, top_k - 1 :])  # and for those that were not
    bar_TE = torch.where(chosen_TE, next_T1, last_T1)
    load_TE: Tensor = torch.special.ndtr((clean_TE - bar_TE) / noise_std_TE)
    return load_TE


def batch_entropy_loss(logits_TE: Tensor, *, sequences: int, padding_T: Tensor | None) -> Tensor:
    """Return minus the entropy of the mean of softmax(logits): -ln E at balance, at most 0.

    Source: sigma-MoE, arXiv:2310.10837, eq. 21.
    """
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    sum_BE = _per_sequence(logits_TE.softmax(-1), sequences, padding_T)
    mean_BE = sum_BE / sum_BE.sum(-1, keepdim=True).clamp(min=1e-20)
    entropy_B: Tensor = torch.special.entr(mean_BE.clamp(min=1e-30)).sum(-1)
    return -entropy_B.mean()


def token_entropy_loss(share_TE: Tensor, *, padding_T: Tensor | None) -> Tensor:
    """Return the mean over tokens of the entropy of their scores, which sum to 1.

    Source: arXiv:2403.07652, eq. 5.
    """
    if share_TE.shape[0] == 0:
        return share_TE.sum()
    if padding_T is not None:
        share_TE = torch.where(padding_T.unsqueeze(1), 1.0, share_TE)  # entropy 0
    entropy_T: Tensor = torch.special.entr(share_TE.clamp(min=1e-30)).sum(-1)
    if padding_T is None:
        return entropy_T.mean()
    return torch.where(padding_T, 0.0, entropy_T).sum() / (~padding_T).sum().clamp(min=1)


def _per_sequence(value_TE: Tensor, sequences: int, padding_T: Tensor | None) -> Tensor:
    """Sum over the tokens of each sequence: (B, E)."""
    if padding_T is not None:
        value_TE = torch.where(padding_T.unsqueeze(1), 0.0, value_TE)
    return value_TE.view(sequences, -1, value_TE.shape[1]).sum(1)
