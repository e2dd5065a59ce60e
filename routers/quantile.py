"""Quantile balancing: the bias that would have balanced the last step, without a step size.

A token t takes expert e when its logit plus the expert's bias exceeds the (K+1)-th largest such
sum, alpha_t. So the bias -q_e gives every expert equal demand when q_e is that quantile over all
tokens of `logit - alpha_t` which K / E of them exceed. The quantiles of a whole step over all ranks
come from histograms: counts add up, in any layout, to the same numbers.

Shapes:  T tokens on this rank   E experts, all ranks   M bins   `...` any leading dims
Source:  quantile balancing as in Megatron-core's router; histograms in place of sorting.
"""

import torch
from torch import Tensor

from gatewise.routers.choice import rank_of_scores

__all__ = ["BINS", "balancing_bias", "margin_histogram"]

BINS = 1024
# Bins are equal steps of asinh(8 v): 0.0024 wide at 0, 2 percent of v far away, up to 1300.
_STRETCH = 8.0
_REACH = 10.0


def margin_histogram(
    logits_TE: Tensor, bias_E: Tensor, *, top_k: int, padding_T: Tensor | None = None
) -> Tensor:
    """Count by how much each token's logits exceed its (K+1)-th largest biased logit.

    Args:
        logits_TE: without bias, finite.
        bias_E: added in the choice.
        top_k: K, below E.
        padding_T: True where a token does not count.

    Returns:
        float32 (E, M) counts.
    """
    num_experts = logits_TE.shape[1]
    biased_TE = logits_TE + bias_E
    next_TE = rank_of_scores(biased_TE, 1) == top_k
    alpha_T1 = torch.where(next_TE, biased_TE, 0.0).sum(1, keepdim=True)
    place_TE = torch.asinh(_STRETCH * (logits_TE - alpha_T1)) / _REACH  # in -1 to 1
    bin_TE = ((place_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    bin_TE += BINS * torch.arange(num_experts, device=logits_TE.device)
    weight_N = None
    if padding_T is not None:
        weight_N = (~padding_T).float().repeat_interleave(num_experts)
    counts = torch.bincount(bin_TE.flatten(), weight_N, minlength=num_experts * BINS)
    return counts.float().view(num_experts, BINS)


def balancing_bias(histogram_EM: Tensor, *, share: float) -> Tensor:
    """Return the bias with which every expert is chosen by `share` of the tokens.

    Args:
        histogram_EM: (..., E, M) counts of `margin_histogram`, summed over ranks.
        share: K / E.

    Returns:
        float32 (..., E), with mean 0.
    """
    above_EM = histogram_EM.double().flip(-1).cumsum(-1)  # counts from the top
    wanted_E1 = share * above_EM[..., -1:]
    index_E1 = (above_EM < wanted_E1).sum(-1, keepdim=True).clamp(max=BINS - 1)
    inside_E1 = histogram_EM.double().flip(-1).gather(-1, index_E1)
    before_E1 = above_EM.gather(-1, index_E1) - inside_E1
    part_E1 = (wanted_E1 - before_E1) / inside_E1.clamp(min=1)
    place_E = 1 - (index_E1 + part_E1).squeeze(-1) * (2 / BINS)
    quantile_E = torch.sinh(place_E * _REACH) / _STRETCH
    return (quantile_E.mean(-1, keepdim=True) - quantile_E).float()
