"""Choices grouped by token id, position and time, against loops and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from gatewise.training.measures.groups import (
    agreement,
    conditional_independence,
    context_independence,
    count_by_group,
    drops_by_position,
    saturation,
    saturation_step,
    std_score,
    top_groups,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_choices(tokens: int, experts: int, top_k: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(tokens, experts, generator=generator(seed)).argsort(1)[:, :top_k]


def random_groups(tokens: int, groups: int, seed: int = 1) -> Tensor:
    return torch.randint(groups, (tokens,), generator=generator(seed))


def test_pairs_are_counted_as_in_a_loop_and_no_expert_counts_nowhere() -> None:
    expert_TK, group_T = random_choices(40, 4), random_groups(40, 3)
    expert_TK[5, 1] = -1
    expert_TK[6] = -1
    count_VE = count_by_group(expert_TK, group_T, num_experts=4, num_groups=5)
    want = torch.zeros(5, 4)
    for t in range(40):
        for expert in expert_TK[t].tolist():
            if expert >= 0:
                want[int(group_T[t]), expert] += 1
    assert torch.equal(count_VE, want.double())


def test_the_std_score_is_0_for_even_use_and_known_for_one_expert_each() -> None:
    tokens_V = torch.tensor([200, 200])
    assert std_score(torch.full((2, 4), 50.0), tokens_V) == 0
    one = torch.tensor([[200.0, 0, 0, 0], [0, 200, 0, 0]])
    assert std_score(one, tokens_V) == pytest.approx(math.sqrt(3) / 4)
    both = torch.cat((one, torch.full((1, 4), 9.0)))
    assert std_score(both, torch.tensor([200, 200, 36])) == pytest.approx(math.sqrt(3) / 4)
    assert std_score(one, tokens_V, least=201) == 0


def test_context_independence_is_1_where_the_group_decides() -> None:
    group_T = random_groups(4000, 4)
    value = context_independence(
        group_T.unsqueeze(1), group_T, num_experts=4, num_groups=4, generator=generator()
    )
    assert value.plain == pytest.approx(1)
    assert value.corrected == pytest.approx(1, abs=0.01)
    assert value.entropy == pytest.approx(math.log(4), abs=0.01)


def test_the_corrections_of_context_independence_remove_chance() -> None:
    """300 groups of 10 tokens: the plug-in value is large although nothing depends on anything."""
    expert_TK, group_T = random_choices(3000, 8, 1), random_groups(3000, 300)
    value = context_independence(
        expert_TK, group_T, num_experts=8, num_groups=300, generator=generator()
    )
    assert value.plain > 0.15
    assert abs(value.corrected) < 0.02
    assert abs(value.miller_madow) < 0.5 * value.plain  # it corrects too little in small groups


def test_one_of_two_experts_fixed_by_the_group_gives_the_known_share() -> None:
    """E is 0 or 1 by the group in half of the pairs and 2 or 3 by a coin in the others."""
    tokens = 20000
    group_T = torch.arange(tokens) % 2
    coin_T = 2 + torch.randint(2, (tokens,), generator=generator())
    value = context_independence(
        torch.stack((group_T, coin_T), 1),
        group_T,
        num_experts=4,
        num_groups=2,
        generator=generator(),
    )
    # H(E) = ln 4; H(E | V) = entropy of (1/2, 1/4, 1/4) = 1.5 ln 2
    assert value.entropy == pytest.approx(math.log(4), abs=0.001)
    assert value.plain == pytest.approx((math.log(4) - 1.5 * math.log(2)) / math.log(4), abs=0.001)


def test_conditioning_on_the_position_removes_what_it_explains() -> None:
    tokens = 6000
    bucket_T = torch.arange(tokens) % 3
    group_T = bucket_T.clone()  # the group is the position, and so is the expert
    arguments = {"num_experts": 3, "num_groups": 3}
    within = conditional_independence(
        bucket_T.unsqueeze(1), group_T, bucket_T, generator=generator(), **arguments
    )
    assert within == pytest.approx(0, abs=1e-9)
    coin_T = torch.randint(3, (tokens,), generator=generator())
    within = conditional_independence(
        coin_T.unsqueeze(1), coin_T, bucket_T, generator=generator(), **arguments
    )
    assert within == pytest.approx(1, abs=0.01)


def test_the_top_groups_of_an_expert_come_most_first_ties_lowest() -> None:
    count_VE = torch.tensor([[3.0, 0], [5, 2], [3, 9]])
    group_EN, pairs_EN = top_groups(count_VE, 2)
    assert group_EN.tolist() == [[1, 0], [2, 1]]
    assert pairs_EN.tolist() == [[5, 3], [9, 2]]
    assert top_groups(count_VE, 10)[0].shape == (2, 3)


def test_agreement_is_the_common_share() -> None:
    one = torch.tensor([[10.0, 0], [5, 5], [0, 0]])
    two = torch.tensor([[0.0, 3], [2, 6], [1, 1]])
    assert agreement(one, one) == 1
    assert agreement(one, two) == pytest.approx((0 + 0.75) / 2)
    assert agreement(one[2:], one[2:]) == 0


def test_saturation_is_the_share_of_final_experts_already_chosen() -> None:
    final_TK = torch.tensor([[0, 1], [2, 3], [4, -1], [-1, -1]])
    now_TK = torch.tensor([[1, 5], [0, 1], [4, 2], [0, 1]])
    assert saturation(now_TK, final_TK) == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert saturation(final_TK, final_TK) == 1


def test_chance_saturation_is_k_over_e() -> None:
    value = saturation(random_choices(20000, 8, seed=1), random_choices(20000, 8, seed=2))
    assert value == pytest.approx(2 / 8, abs=0.01)


def test_the_saturation_step_is_the_first_near_the_end() -> None:
    assert saturation_step([10, 20, 30], [0.3, 0.91, 1.0]) == 20
    assert saturation_step([10, 20, 30], [0.3, 0.95, 0.6]) == 20
    assert saturation_step([], []) is None


def test_drops_towards_the_end_are_measured_by_position() -> None:
    position_T = torch.arange(64).repeat(10)
    pairs_T = torch.full((640,), 2)
    dropped_T = (position_T >= 48).long()  # one of two pairs in the last quarter
    value = drops_by_position(dropped_T, pairs_T, position_T, bucket=16)
    assert value.ratio == (0, 0, 0, 0.5)
    assert value.towards_end == 0.5
    even = drops_by_position(torch.ones_like(pairs_T), pairs_T, position_T, bucket=20)
    assert even.ratio == (0.5,) * 4
    assert even.towards_end == even.slope == 0


def test_the_slope_is_that_of_a_line_through_the_tokens() -> None:
    position_T = torch.cat((torch.arange(50), torch.arange(20)))
    pairs_T = torch.full((70,), 4)
    dropped_T = torch.randint(5, (70,), generator=generator())
    x, y = position_T.double(), dropped_T / pairs_T
    want = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert drops_by_position(dropped_T, pairs_T, position_T).slope == pytest.approx(1000 * want)
