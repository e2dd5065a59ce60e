"""Which tokens keep all their experts when experts are dropped: the ones that others look at.

Importance of a token is the L1 norm of the MoE layer's input times the mean attention that the
token receives from the positions that can see it, averaged over heads. A position that sums its own
row of attention gets 1 whatever it attends to: the sum goes over the queries, down a column.

Shapes:  B sequences   S positions of this call   P positions with earlier ones in a cache
         H query heads   J key-value heads   W width per head   Q queries that are looked at
         T = B * S tokens   D model width
Source:  MC-MoE, arXiv:2410.06270, section 3.3 (importance of a token).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.compression.config import Protect
from gatewise.routers.api import RoutingContext
from gatewise.routers.choice import rank_of_scores

__all__ = ["Attended", "Protection", "mean_attention", "most_important"]

Attended = tuple[Tensor, Tensor]  # rotated queries (B, H, S, W) and all keys (B, J, P, W)


@dataclass(frozen=True, slots=True)
class Protection:
    """How one layer chooses the tokens that keep all their experts.

    A sequence of L tokens protects int(share * L) of them. A single new token, as in decoding, has
    no others to be compared with: it is protected if its L1 norm is above `decode_norm`.
    """

    kind: Protect
    share: float
    queries: int  # attention of so many last positions counts
    decode_norm: float

    def protected(
        self, x_TD: Tensor, context: RoutingContext, attended: Attended | None
    ) -> Tensor | None:
        """Return who is protected, bool (T,), or None where nobody is.

        Args:
            x_TD: inputs of the MoE layer; padding is zeros.
            context: its sequences and padding.
            attended: of this block's attention; only `col` needs it.

        Raises:
            ValueError: if `col` is told of no attention.
        """
        if self.kind is Protect.none or not x_TD.shape[0]:
            return None
        norm_BS = x_TD.abs().sum(1, dtype=torch.float32).view(context.sequences, -1)
        if norm_BS.shape[1] == 1:
            return (norm_BS > self.decode_norm).flatten()
        padding_BS = None
        if context.padding_T is not None:
            padding_BS = context.padding_T.view_as(norm_BS)
        importance_BS = norm_BS
        if self.kind is Protect.col:
            if attended is None:
                raise ValueError(
                    "prune.protect is col, which needs the attention before this layer, but none "
                    "was watched; use it in a model, or protect by l1"
                )
            importance_BS = norm_BS * mean_attention(attended, padding_BS, queries=self.queries)
        return most_important(importance_BS, padding_BS, share=self.share).flatten()


def mean_attention(attended: Attended, padding_BS: Tensor | None, *, queries: int) -> Tensor:
    """Return the mean attention that each position receives, fp32 (B, S).

    Args:
        attended: queries of this call, and the keys of it and of earlier ones.
        padding_BS: True where a query is padding and does not count.
        queries: only the last so many that count are looked at.

    Returns:
        The sum of a column over the queries that see the position, divided by their number; 0
        where no query that is looked at sees it.
    """
    q_BHSW, k_BJPW = attended
    batch, heads, positions, width = q_BHSW.shape
    total, repeats = k_BJPW.shape[2], heads // k_BJPW.shape[1]
    place_P = torch.arange(total, device=q_BHSW.device)
    received_BS = torch.zeros(batch, positions, dtype=torch.float32, device=q_BHSW.device)
    for sequence in range(batch):  # one by one: the scores of all heads are large
        seen_Q = torch.arange(positions, device=q_BHSW.device)
        if padding_BS is not None:
            seen_Q = seen_Q[~padding_BS[sequence]]
        seen_Q = seen_Q[-queries:]
        q_HQW = q_BHSW[sequence][:, seen_Q].float()
        k_HPW = k_BJPW[sequence].float().repeat_interleave(repeats, 0)
        score_HQP = q_HQW @ k_HPW.transpose(1, 2) / math.sqrt(width)
        hidden_QP = place_P > (seen_Q + total - positions).unsqueeze(1)
        share_HQP = score_HQP.masked_fill(hidden_QP, float("-inf")).softmax(-1)
        column_P = share_HQP.mean(0).sum(0)
        count_P = (~hidden_QP).sum(0).clamp(min=1)
        received_BS[sequence] = (column_P / count_P)[total - positions :]
    return received_BS


def most_important(importance_BS: Tensor, padding_BS: Tensor | None, *, share: float) -> Tensor:
    """Mark the int(share * L) most important of each sequence's L tokens, ties lowest first.

    Args:
        importance_BS: any floating type.
        padding_BS: True where a position is padding: never marked, and not counted in L.
        share: from 0 to 1.
    """
    if padding_BS is None:
        padding_BS = torch.zeros_like(importance_BS, dtype=torch.bool)
    size_B1 = (share * (~padding_BS).sum(1, keepdim=True).double()).long()
    place_BS = rank_of_scores(importance_BS.masked_fill(padding_BS, float("-inf")), 1)
    return (place_BS < size_B1) & ~padding_BS
