"""What experts specialise in: choices grouped by token id, position or time.

q(e|g) is the share of group g's pairs that went to expert e. Everything here follows from counts
per group and expert; only the shuffled corrections need the tokens themselves.

Shapes:  T tokens   K experts per token   E experts   V groups, e.g. token ids   C checkpoints
Source:  OpenMoE, arXiv:2402.01739, sections 4.1 to 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.training.measures.information import entropy, miller_madow, mutual_information

__all__ = [
    "ContextIndependence",
    "DropsByPosition",
    "agreement",
    "conditional_independence",
    "context_independence",
    "count_by_group",
    "drops_by_position",
    "saturation",
    "saturation_step",
    "std_score",
    "top_groups",
]


def count_by_group(
    expert_TK: Tensor, group_T: Tensor, *, num_experts: int, num_groups: int
) -> Tensor:
    """Count the pairs of each group and expert.

    Args:
        expert_TK: chosen experts; -1 is none and does not count.
        group_T: int64 in [0, num_groups).
        num_experts: E.
        num_groups: V.

    Returns:
        float64 (V, E).
    """
    cell_TK = group_T.unsqueeze(1) * num_experts + expert_TK
    cell_N = cell_TK[expert_TK >= 0]
    flat = torch.bincount(cell_N, minlength=num_groups * num_experts)
    return flat.view(num_groups, num_experts).double()


def std_score(count_VE: Tensor, tokens_V: Tensor, *, least: int = 128) -> float:
    """Return how unevenly a group's pairs lie on experts: std over e of q(e|g), mean over groups.

    Args:
        count_VE: from `count_by_group`.
        tokens_V: tokens of each group.
        least: groups with fewer tokens are left out.

    Returns:
        0 where every group uses all experts alike; 0 too where no group is large enough.
    """
    kept_VE = count_VE[(tokens_V >= least) & (count_VE.sum(1) > 0)]
    if not len(kept_VE):
        return 0.0
    share_VE = kept_VE / kept_VE.sum(1, keepdim=True)
    return float(share_VE.std(1, correction=0).mean())


@dataclass(frozen=True, slots=True)
class ContextIndependence:
    """I(E; V) / H(E), where E is one of a token's experts, drawn uniformly, and V its group.

    1: the group alone decides; 0: it says nothing.
    """

    plain: float  # plug-in
    corrected: float  # less what shuffled groups give
    miller_madow: float
    entropy: float  # H(E), nats


def context_independence(
    expert_TK: Tensor,
    group_T: Tensor,
    *,
    num_experts: int,
    num_groups: int,
    generator: torch.Generator,
    shuffles: int = 2,
) -> ContextIndependence:
    """Measure how far a token's group alone decides its experts.

    Args:
        expert_TK: chosen experts; -1 is none.
        group_T: int64 in [0, num_groups), e.g. token ids.
        num_experts: E.
        num_groups: V.
        generator: of the shuffles.
        shuffles: how many are averaged.
    """
    sizes = {"num_experts": num_experts, "num_groups": num_groups}
    joint = count_by_group(expert_TK, group_T, **sizes)
    chance = 0.0
    for _ in range(shuffles):
        mixed_T = group_T[torch.randperm(len(group_T), generator=generator)]
        chance += float(mutual_information(count_by_group(expert_TK, mixed_T, **sizes)))
    own = float(entropy(joint.sum(0)))
    scale = max(own, 1e-12)
    plain = float(mutual_information(joint))
    return ContextIndependence(
        plain=plain / scale,
        corrected=(plain - chance / max(shuffles, 1)) / scale,
        miller_madow=float(miller_madow(joint)) / scale,
        entropy=own,
    )


def conditional_independence(
    expert_TK: Tensor,
    group_T: Tensor,
    bucket_T: Tensor,
    *,
    num_experts: int,
    num_groups: int,
    generator: torch.Generator,
) -> float:
    """Return I(E; V | bucket) / H(E | bucket), less what groups shuffled inside buckets give.

    Args:
        expert_TK: chosen experts; -1 is none.
        group_T: int64 in [0, num_groups).
        bucket_T: int64 from 0, e.g. position buckets.
        num_experts: E.
        num_groups: V.
        generator: of the shuffle.
    """
    information, own = 0.0, 0.0
    for bucket in torch.unique(bucket_T).tolist():
        inside_T = bucket_T == bucket
        value = context_independence(
            expert_TK[inside_T],
            group_T[inside_T],
            num_experts=num_experts,
            num_groups=num_groups,
            generator=generator,
            shuffles=1,
        )
        weight = float(inside_T.sum())
        information += weight * value.corrected * value.entropy
        own += weight * value.entropy
    return information / max(own, 1e-12)


def top_groups(count_VE: Tensor, number: int = 10) -> tuple[Tensor, Tensor]:
    """Return each expert's `number` groups with most pairs, and their counts, both (E, number).

    The most come first, ties lowest first.
    """
    number = min(number, len(count_VE))
    order_VE = torch.sort(count_VE, dim=0, descending=True, stable=True).indices[:number]
    return order_VE.T, count_VE.gather(0, order_VE).T


def agreement(count_VE: Tensor, other_VE: Tensor) -> float:
    """Return the mean over groups of sum_e min(q(e|g), q'(e|g)): 1 is the same use of experts.

    Groups without pairs on either side are left out.
    """
    kept_V = (count_VE.sum(1) > 0) & (other_VE.sum(1) > 0)
    if not bool(kept_V.any()):
        return 0.0
    one_VE, two_VE = (x[kept_V] / x[kept_V].sum(1, keepdim=True) for x in (count_VE, other_VE))
    return float(torch.minimum(one_VE, two_VE).sum(1).mean())


def saturation(expert_TK: Tensor, final_TK: Tensor) -> float:
    """Return the mean share of a token's final experts that it chose already.

    Chance level is K / E. A token without final experts is left out.
    """
    common_TK = (expert_TK.unsqueeze(1) == final_TK.unsqueeze(2)).any(2) & (final_TK >= 0)
    size_T = (final_TK >= 0).sum(1)
    kept_T = size_T > 0
    if not bool(kept_T.any()):
        return 0.0
    return float((common_TK.sum(1)[kept_T] / size_T[kept_T]).double().mean())


def saturation_step(
    steps: Sequence[int], value_C: Sequence[float], *, share: float = 0.9
) -> int | None:
    """Return the first step whose value is at least `share` of the last one's, or None."""
    for step, value in zip(steps, value_C, strict=True):
        if value >= share * value_C[-1]:
            return step
    return None


@dataclass(frozen=True, slots=True)
class DropsByPosition:
    """Where in a sequence pairs are dropped."""

    bucket: int  # positions in a bucket
    ratio: tuple[float, ...]  # dropped over chosen pairs of each bucket
    towards_end: float  # ratio of the last quarter of positions less that of the first
    slope: float  # least squares, change of the ratio per 1000 positions


def drops_by_position(
    dropped_T: Tensor, pairs_T: Tensor, position_T: Tensor, *, bucket: int = 128
) -> DropsByPosition:
    """Measure whether later positions lose more.

    Args:
        dropped_T: dropped pairs of each token.
        pairs_T: chosen pairs of each token.
        position_T: int64 from 0, place in the sequence.
        bucket: positions in a bucket.
    """
    length = int(position_T.max()) + 1 if len(position_T) else 1
    dropped_S, pairs_S = (
        torch.zeros(length, dtype=torch.float64).index_add_(0, position_T, x.double())
        for x in (dropped_T, pairs_T)
    )
    quarter = max(1, length // 4)
    place_S = torch.arange(length, dtype=torch.float64)
    return DropsByPosition(
        bucket=bucket,
        ratio=tuple(
            _ratio(d, p)
            for d, p in zip(dropped_S.split(bucket), pairs_S.split(bucket), strict=True)
        ),
        towards_end=_ratio(dropped_S[-quarter:], pairs_S[-quarter:])
        - _ratio(dropped_S[:quarter], pairs_S[:quarter]),
        slope=1000 * _weighted_slope(place_S, dropped_S / pairs_S.clamp(min=1), pairs_S),
    )


def _ratio(dropped: Tensor, pairs: Tensor) -> float:
    return float(dropped.sum() / pairs.sum().clamp(min=1))


def _weighted_slope(x_S: Tensor, y_S: Tensor, weight_S: Tensor) -> float:
    total = weight_S.sum().clamp(min=1)
    from_mean_S = x_S - (weight_S * x_S).sum() / total
    spread = (weight_S * from_mean_S.square()).sum()
    return float((weight_S * from_mean_S * y_S).sum() / spread) if spread > 0 else 0.0
