"""How evenly the experts are used: values of counts alone.

Counts are sums over tokens, so ranks add them up and nothing per token is ever sent.

Shapes:  `...` any leading dims, e.g. layers   E experts, all ranks
"""

import math

import torch
from torch import Tensor

__all__ = [
    "dead_share",
    "drop_ratio",
    "effective_experts",
    "effective_k",
    "load_cv",
    "load_entropy",
    "load_ratio",
]


def load_ratio(count_E: Tensor) -> Tensor:
    """Return count / mean(count), (..., E); 1 is balance, 0 for every expert without pairs."""
    return count_E / count_E.mean(-1, keepdim=True).clamp(min=1e-9)


def load_cv(count_E: Tensor) -> Tensor:
    """Return the standard deviation of the counts over their mean; 0 is balance."""
    return load_ratio(count_E).std(-1, correction=0)


def load_entropy(count_E: Tensor) -> Tensor:
    """Return the entropy of the counts' shares over ln E; 1 is balance, 0 for one expert."""
    return _entropy(count_E) / max(math.log(count_E.shape[-1]), 1e-9)


def effective_experts(count_E: Tensor) -> Tensor:
    """Return exp of the entropy of the counts' shares: how many equally used experts it equals."""
    return _entropy(count_E).exp()


def dead_share(count_E: Tensor) -> Tensor:
    """Return the share of experts that nobody chose."""
    return (count_E == 0).double().mean(-1)


def drop_ratio(dropped: Tensor, pairs: Tensor) -> Tensor:
    """Return dropped over chosen pairs; 0 where there are none."""
    return dropped / pairs.clamp(min=1)


def effective_k(pairs: Tensor, dropped: Tensor, tokens: Tensor) -> Tensor:
    """Return how many experts a token meets on average, drops left out; 0 for no tokens."""
    return (pairs - dropped) / tokens.clamp(min=1)


def _entropy(count_E: Tensor) -> Tensor:
    share_E = count_E / count_E.sum(-1, keepdim=True).clamp(min=1e-9)
    entropy: Tensor = torch.special.entr(share_E).sum(-1)
    return entropy
