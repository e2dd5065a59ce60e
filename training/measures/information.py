"""Entropy and mutual information of choices, from counts, with what chance alone would give.

All values are in nats and float64. An estimate from n samples is too large by about
(X - 1)(Y - 1) / (2n), so each comes with a correction: Miller and Madow's, or the value after the
samples of one side were shuffled.

Shapes:  T tokens   L layers   E experts   X, Y states of two variables
Source:  Miller-Madow: Miller 1955; the binned variant: RMoE, arXiv:2408.06793, appendix A.4.2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "PathEntropy",
    "Redundancy",
    "binned_information",
    "entropy",
    "joint_counts",
    "layer_information",
    "miller_madow",
    "mutual_information",
    "path_entropy",
    "redundancy",
    "set_labels",
    "shuffled_layer_information",
]

_BINS = 100  # of the scores' range [0, 1] in the binned variant
_PAIRS_AT_ONCE = 1 << 22  # comparisons of the binned variant that are held in memory


def entropy(count_X: Tensor) -> Tensor:
    """Return the plug-in entropy of counts over the last dim; 0 for no samples."""
    count_X = count_X.double()
    share_X = count_X / count_X.sum(-1, keepdim=True).clamp(min=1e-300)
    nats: Tensor = torch.special.entr(share_X).sum(-1)
    return nats


def joint_counts(a_T: Tensor, b_T: Tensor, states: tuple[int, int]) -> Tensor:
    """Count how often two variables take each pair of values.

    Args:
        a_T: int64 in [0, states[0]).
        b_T: int64 in [0, states[1]).
        states: X and Y.

    Returns:
        float64 (X, Y).
    """
    flat = torch.bincount(a_T * states[1] + b_T, minlength=states[0] * states[1])
    return flat.view(states).double()


def mutual_information(joint_XY: Tensor) -> Tensor:
    """Return the plug-in mutual information of counts (..., X, Y)."""
    both = entropy(joint_XY.flatten(-2))
    return (entropy(joint_XY.sum(-1)) + entropy(joint_XY.sum(-2)) - both).clamp(min=0)


def miller_madow(joint_XY: Tensor) -> Tensor:
    """Return the mutual information of counts (X, Y) less its estimated bias; may be below 0.

    Each plug-in entropy is too small by (states that occur - 1) / (2n).
    """
    samples = joint_XY.sum().clamp(min=1)
    states = [(joint_XY.sum(dim) > 0).sum() for dim in (0, 1)]
    excess = states[0] + states[1] - (joint_XY > 0).sum() - 1
    return mutual_information(joint_XY) + excess / (2 * samples)


def layer_information(top_LT: Tensor, num_experts: int) -> Tensor:
    """Return the mutual information of each pair of layers' choices over tokens.

    Args:
        top_LT: int64, each token's first expert in each layer.
        num_experts: E.

    Returns:
        (L, L), symmetric; the diagonal holds the entropies.
    """
    return _pairs(top_LT, top_LT, num_experts)


def shuffled_layer_information(
    top_LT: Tensor, num_experts: int, *, generator: torch.Generator, shuffles: int = 4
) -> Tensor:
    """Return `layer_information` after the tokens of one layer of each pair were shuffled.

    This is what independent choices with the same loads would show; the mean over `shuffles`.
    """
    total_LL = torch.zeros(len(top_LT), len(top_LT), dtype=torch.float64)
    for _ in range(shuffles):
        mixed_LT = top_LT[:, torch.randperm(top_LT.shape[1], generator=generator)]
        total_LL += _pairs(top_LT, mixed_LT, num_experts)
    return total_LL / max(shuffles, 1)


def _pairs(top_LT: Tensor, other_LT: Tensor, num_experts: int) -> Tensor:
    layers = len(top_LT)
    value_LL = torch.zeros(layers, layers, dtype=torch.float64)
    for i in range(layers):
        for j in range(i, layers):
            joint = joint_counts(top_LT[i], other_LT[j], (num_experts, num_experts))
            value_LL[i, j] = value_LL[j, i] = mutual_information(joint)
    return value_LL


def binned_information(score_LTE: Tensor, *, bins: int = _BINS) -> Tensor:
    """Return the RMoE paper's cross-layer value: within each token, over the experts' indices.

    Each token's scores of each layer fall into equal bins of [0, 1]; the mutual information of
    the two bins over the E coordinates is averaged over tokens. It compares experts of the same
    index, and depends on the bins: with flat scores all fall into one and the value is 0.

    Args:
        score_LTE: scores in [0, 1].
        bins: number of bins.

    Returns:
        (L, L), symmetric.
    """
    layers, tokens, experts = score_LTE.shape
    code_LTE = (score_LTE * bins).long().clamp(0, bins - 1)
    total_LL = torch.zeros(layers, layers, dtype=torch.float64)
    step = max(1, _PAIRS_AT_ONCE // max(1, experts * experts * layers))
    for first in range(0, tokens, step):
        code_LtE = code_LTE[:, first : first + step]
        same_LtEE = code_LtE.unsqueeze(-1) == code_LtE.unsqueeze(-2)
        count_LtE = same_LtEE.sum(-1).double()
        for i in range(layers):
            for j in range(i, layers):
                both_tE = (same_LtEE[i] & same_LtEE[j]).sum(-1)
                ratio_tE = both_tE * experts / (count_LtE[i] * count_LtE[j])
                total_LL[i, j] += ratio_tE.log().sum() / experts
    upper_LL = total_LL / max(tokens, 1)
    return upper_LL + upper_LL.triu(1).T


@dataclass(frozen=True, slots=True)
class PathEntropy:
    """How varied the sequences of experts are that tokens take through the layers."""

    entropy: float  # plug-in, nats
    corrected: float  # Miller-Madow
    shuffled: float  # with each layer's tokens shuffled: independent layers of the same loads
    ceiling: float  # min(ln T, L ln E): no sample of T tokens can show more
    distinct: int  # paths that occur


def path_entropy(top_LT: Tensor, num_experts: int, *, generator: torch.Generator) -> PathEntropy:
    """Measure the paths of first choices.

    Args:
        top_LT: int64, each token's first expert in each layer.
        num_experts: E.
        generator: of the shuffle.
    """
    layers, tokens = top_LT.shape
    count_P = _path_counts(top_LT)
    mixed = [row[torch.randperm(tokens, generator=generator)] for row in top_LT]
    plain = float(entropy(count_P))
    return PathEntropy(
        entropy=plain,
        corrected=plain + (len(count_P) - 1) / (2 * max(tokens, 1)),
        shuffled=float(entropy(_path_counts(torch.stack(mixed)))),
        ceiling=min(math.log(max(tokens, 1)), layers * math.log(num_experts)),
        distinct=len(count_P),
    )


def _path_counts(top_LT: Tensor) -> Tensor:
    """Count equal columns: two columns get one number if layer after layer they agree."""
    path_T = torch.zeros(top_LT.shape[1], dtype=torch.int64)
    for row_T in top_LT:
        pair_T = path_T * (int(row_T.max()) + 1 if len(row_T) else 1) + row_T
        path_T = torch.unique(pair_T, return_inverse=True)[1]
    return torch.bincount(path_T)


@dataclass(frozen=True, slots=True)
class Redundancy:
    """How much of later decisions the earlier ones already hold; by label of each layer.

    A label is a token's first expert, or its set of experts. With the set as label the values
    of `agreement` compare sets of equal indices.
    """

    information_bits: tuple[float, ...]  # between neighbours l and l + 1, Miller-Madow
    share: tuple[float, ...]  # the same over the entropy of the later layer
    markov_accuracy: tuple[float, ...]  # of the best guess of layer l + 1 from layer l
    agreement: float  # mean share of layers that agree with a token's commonest index
    one_layer_accuracy: float  # mean over layers of the best guess from one layer ...
    best_layer: int  # ... the one (from 0) that tells most


def redundancy(label_LT: Tensor) -> Redundancy:
    """Measure how well one decision would do for all layers.

    Args:
        label_LT: int64 labels from 0, such as first experts or `set_labels`.
    """
    layers, tokens = label_LT.shape
    states = int(label_LT.max()) + 1 if label_LT.numel() else 1
    accuracy_LL = torch.ones(layers, layers, dtype=torch.float64)
    bits, share = [], []
    for i in range(layers):
        for j in range(layers):
            if i == j:
                continue
            joint = _sparse_joint(label_LT[i], label_LT[j], states)
            accuracy_LL[i, j] = joint.best / max(tokens, 1)
            if j == i + 1:
                bits.append(joint.information / math.log(2))
                share.append(joint.information / max(joint.entropy, 1e-12))
    from_one_L = accuracy_LL.mean(1)
    best = int(from_one_L.argmax()) if layers else 0
    same_LT = (label_LT.unsqueeze(1) == label_LT.unsqueeze(0)).sum(1)
    return Redundancy(
        information_bits=tuple(bits),
        share=tuple(share),
        markov_accuracy=tuple(float(accuracy_LL[i, i + 1]) for i in range(layers - 1)),
        agreement=float((same_LT.amax(0) / layers).double().mean()),
        one_layer_accuracy=float(from_one_L[best]),
        best_layer=best,
    )


@dataclass(frozen=True, slots=True)
class _Joint:
    information: float  # Miller-Madow
    entropy: float  # of the second variable
    best: float  # samples that the best guess of the second from the first gets right


def _sparse_joint(a_T: Tensor, b_T: Tensor, states: int) -> _Joint:
    """Compare two variables of many states by the pairs that occur."""
    pair_P, count_P = torch.unique(a_T * states + b_T, return_counts=True)
    count_a, count_b = (torch.bincount(x, minlength=states) for x in (a_T, b_T))
    best_a = torch.zeros(states, dtype=count_P.dtype)
    best_a.scatter_reduce_(0, pair_P // states, count_P, "amax")
    plain = entropy(count_a) + entropy(count_b) - entropy(count_P)
    excess = int((count_a > 0).sum() + (count_b > 0).sum()) - len(pair_P) - 1
    return _Joint(
        information=float(plain) + excess / (2 * max(len(a_T), 1)),
        entropy=float(entropy(count_b)),
        best=float(best_a.sum()),
    )


def set_labels(expert_LTK: Tensor) -> Tensor:
    """Number the sets of experts that occur, alike in all layers: int64 (L, T) from 0."""
    layers, tokens, _ = expert_LTK.shape
    ordered_NK = expert_LTK.sort(-1).values.flatten(0, 1)
    number_N: Tensor = torch.unique(ordered_NK, dim=0, return_inverse=True)[1]
    return number_N.view(layers, tokens)
