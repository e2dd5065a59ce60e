"""Counts, balance losses and the balancing bias, against formulas and slow loops."""

import math

import pytest
import torch
from torch import Tensor

from gatewise.routers.api import RoutingContext
from gatewise.routers.balance import (
    balance_loss,
    count_per_expert,
    global_balance_loss,
    max_violation,
    sequence_balance_loss,
    update_bias_,
    z_loss,
)
from gatewise.routers.config import RouterConfig, ScoreFunction
from gatewise.routers.router import ComposedRouter


def draw(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits in float64 that need a gradient, and the experts they choose."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    return logits_TE.requires_grad_(), logits_TE.detach().topk(top_k).indices


def loss_by_hand(score_TE: Tensor, expert_TK: Tensor, real_T: list[bool]) -> Tensor:
    """Switch Transformer's loss in a loop over tokens: E * sum_e f_e P_e, f over T * K pairs."""
    num_experts, top_k = score_TE.shape[1], expert_TK.shape[1]
    count, mean = [0] * num_experts, [score_TE.new_zeros(())] * num_experts
    for token, real in enumerate(real_T):
        if not real:
            continue
        for expert in expert_TK[token].tolist():
            count[expert] += 1
        for expert in range(num_experts):
            mean[expert] = mean[expert] + score_TE[token, expert] / sum(real_T)
    pairs = sum(real_T) * top_k
    parts = [count[e] / pairs * mean[e] for e in range(num_experts)]
    return num_experts * torch.stack(parts).sum()


def test_counts_leave_padding_out() -> None:
    expert_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert count_per_expert(expert_TK, 4).tolist() == [2, 1, 3, 0]
    padding_T = torch.tensor([False, True, False])
    assert count_per_expert(expert_TK, 4, padding_T=padding_T).tolist() == [2, 0, 2, 0]
    assert count_per_expert(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_uniform_load_and_scores_give_one() -> None:
    expert_TK = torch.arange(24).view(12, 2) % 8
    score_TE = torch.full((12, 8), 1 / 8, dtype=torch.float64)
    loss = sequence_balance_loss(score_TE, expert_TK, sequences=1)
    torch.testing.assert_close(loss, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (6, 3)])
def test_collapse_gives_experts_over_choices(num_experts: int, top_k: int) -> None:
    expert_TK = torch.arange(top_k).expand(20, top_k)
    score_TE = torch.zeros(20, num_experts, dtype=torch.float64)
    score_TE[:, :top_k] = 1 / top_k
    loss = sequence_balance_loss(score_TE, expert_TK, sequences=1)
    torch.testing.assert_close(loss, torch.tensor(num_experts / top_k, dtype=torch.float64))


def test_the_loss_and_its_gradient_are_those_of_the_formula() -> None:
    logits_TE, expert_TK = draw(30, 8, 2)
    real_T = [token % 4 != 1 for token in range(30)]
    padding_T = ~torch.tensor(real_T)
    loss = sequence_balance_loss(logits_TE.softmax(-1), expert_TK, sequences=1, padding_T=padding_T)
    expected = loss_by_hand(logits_TE.softmax(-1), expert_TK, real_T)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits_TE)[0],
        torch.autograd.grad(expected, logits_TE)[0],
        rtol=1e-10,
        atol=1e-14,
    )


def test_sequence_loss_is_the_mean_of_each_sequences_loss() -> None:
    logits_TE, expert_TK = draw(24, 8, 2)
    score_TE = logits_TE.softmax(-1)
    loss = sequence_balance_loss(score_TE, expert_TK, sequences=3)
    parts = [
        loss_by_hand(score_TE[first : first + 8], expert_TK[first : first + 8], [True] * 8)
        for first in (0, 8, 16)
    ]
    torch.testing.assert_close(loss, torch.stack(parts).mean(), rtol=1e-12, atol=0)
    whole = sequence_balance_loss(score_TE, expert_TK, sequences=1)
    assert abs(float((whole - loss).detach())) > 1e-3  # the scopes differ on this batch


def test_a_sequence_of_padding_alone_does_not_enter_the_mean() -> None:
    logits_TE, expert_TK = draw(24, 8, 2)
    score_TE = logits_TE.softmax(-1)
    padding_T = torch.arange(24) >= 16
    loss = sequence_balance_loss(score_TE, expert_TK, sequences=3, padding_T=padding_T)
    expected = sequence_balance_loss(score_TE[:16], expert_TK[:16], sequences=2)
    torch.testing.assert_close(loss, expected)


def test_sequence_and_micro_batch_scope_agree_for_one_sequence() -> None:
    x_TD = torch.randn(20, 8)
    losses = []
    for scope in ("sequence", "micro_batch"):
        torch.manual_seed(1)
        config = RouterConfig(balance_scope=type(RouterConfig().balance_scope)(scope))
        routing, _ = ComposedRouter(8, 6, 2, config)(x_TD, RoutingContext(sequences=1), 0)
        losses.append(routing.losses["balance"])
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("shares", [(20, 20), (35, 5), (40, 0)])
def test_parts_of_the_global_loss_average_to_the_loss_of_the_whole_batch(
    shares: tuple[int, int],
) -> None:
    logits_TE, expert_TK = draw(40, 8, 2)
    count_LE = count_per_expert(expert_TK, 8).double().unsqueeze(0)
    parts, first = [], 0
    for share in shares:
        mine_TE = logits_TE[first : first + share].softmax(-1)
        parts.append(
            global_balance_loss(
                mine_TE.sum(0, keepdim=True),
                count_LE,
                tokens=torch.tensor(40.0),
                top_k=2,
                ranks=len(shares),
            )
        )
        first += share
    mean = torch.stack(parts).mean()
    whole = loss_by_hand(logits_TE.softmax(-1), expert_TK, [True] * 40)
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(mean, logits_TE)[0], torch.autograd.grad(whole, logits_TE)[0]
    )


def test_no_token_gives_zero_and_not_nan() -> None:
    zero_E = torch.zeros(4, requires_grad=True)
    loss = balance_loss(zero_E, torch.zeros(4), tokens=torch.zeros(()), top_k=2)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.isfinite(zero_E.grad).all()
    assert float(z_loss(torch.zeros(0, 4))) == 0


def test_z_loss_is_the_square_of_the_log_of_the_sum() -> None:
    num_experts, shift = 8, 0.7
    zeros_TE = torch.zeros(5, num_experts, dtype=torch.float64)
    expected = (math.log(num_experts) + shift) ** 2
    assert math.isclose(float(z_loss(zeros_TE + shift)), expected, rel_tol=1e-12)


def test_z_loss_ignores_padding_that_holds_nan_in_value_and_gradient() -> None:
    logits_TE = torch.randn(6, 4, dtype=torch.float64)
    padding_T = torch.arange(6) % 3 == 1
    dirty_TE = logits_TE.clone()
    dirty_TE[padding_T] = float("nan")
    dirty_TE.requires_grad_()
    loss = z_loss(dirty_TE, padding_T=padding_T)
    torch.testing.assert_close(loss, z_loss(logits_TE[~padding_T]))
    gradient_TE = torch.autograd.grad(loss, dirty_TE)[0]
    assert torch.isfinite(gradient_TE).all()
    assert not gradient_TE[padding_T].any()


def test_the_bias_moves_towards_neglected_experts_with_mean_zero() -> None:
    bias_E = torch.zeros(4)
    update_bias_(bias_E, torch.tensor([10.0, 2.0, 2.0, 2.0]), rate=0.01)
    torch.testing.assert_close(bias_E, torch.tensor([-0.015, 0.005, 0.005, 0.005]))
    for seed in range(20):
        counts_E = torch.randint(0, 9, (4,), generator=torch.Generator().manual_seed(seed)).float()
        update_bias_(bias_E, counts_E, rate=0.01)
    assert abs(float(bias_E.mean())) < 1e-7


def test_the_bias_does_not_move_at_balance() -> None:
    bias_LE = torch.zeros(2, 4)
    update_bias_(bias_LE, torch.tensor([[5.0] * 4, [8.0, 2.0, 5.0, 5.0]]), rate=0.01)
    assert not bias_LE[0].any()
    torch.testing.assert_close(bias_LE[1], torch.tensor([-0.01, 0.01, 0.0, 0.0]))


@pytest.mark.parametrize(("rate", "steps"), [(1e-3, 300), (1e-2, 35)])
def test_the_bias_alone_balances_the_toy_population(rate: float, steps: int) -> None:
    num_tokens, num_experts, top_k = 4096, 32, 4
    generator = torch.Generator().manual_seed(0)
    mean_E = torch.randn(num_experts, generator=generator)
    config = RouterConfig(score=ScoreFunction.sigmoid, bias_rate=rate, balance_loss=0.0, z_loss=0.0)
    router = ComposedRouter(num_experts, num_experts, top_k, config).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    violations = []
    for _ in range(steps):
        x_TD = mean_E + torch.randn(num_tokens, num_experts, generator=generator)
        expert_TK, _ = router._select(x_TD.sigmoid(), x_TD, RoutingContext(), 0)
        count_E = count_per_expert(expert_TK, num_experts)
        violations.append(float(max_violation(count_E)))
        update_bias_(router.bias_E, count_E, rate=rate)
    assert violations[0] > 2
    assert min(violations[-10:]) < 0.2


def test_max_violation_is_the_excess_of_the_fullest_expert() -> None:
    assert float(max_violation(torch.tensor([2.0, 2.0, 2.0, 2.0]))) == 0
    assert float(max_violation(torch.tensor([8.0, 0.0, 0.0, 0.0]))) == 3
    assert float(max_violation(torch.zeros(4))) == -1
