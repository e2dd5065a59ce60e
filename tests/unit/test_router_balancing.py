"""Balancing without a loss, steered sparsity, even assignments: T10 to T12.

The properties of routers are numbered: T0 to T4 in `test_router_choice.py`, T5 and T7 to T9 in
`test_router_losses.py`, T10 to T12 in `test_router_balancing.py`, T13 in
`test_router_recurrence.py`, T14 and T15 in `test_router_state.py`, T6 in
`tests/distributed/test_router_ranks.py`.

Shapes:  T tokens   E experts   K experts per token   D width
"""

from dataclasses import replace

import pytest
import torch
from router_cases import D, E, K, make, tokens
from torch import nn

from gatewise.moe import MoE
from gatewise.routers import compete
from gatewise.routers.api import Demand, RoutingContext
from gatewise.routers.balance import (
    global_balance_loss,
    max_violation,
)
from gatewise.routers.config import (
    BiasRule,
    RouterConfig,
    ScoreFunction,
)
from gatewise.routers.presets import preset
from gatewise.routers.router import ComposedRouter, build_router

# --- T10: bias


def toy_violations(config: RouterConfig, steps: int) -> list[float]:
    """Route the toy population by a linear router with logits N(mu_e, 1), and balance it."""
    num_tokens, num_experts, top_k = 4096, 32, 4
    generator = torch.Generator().manual_seed(0)
    mean_E = torch.randn(num_experts, generator=generator)
    router = ComposedRouter(num_experts, num_experts, top_k, config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    violations = []
    for _ in range(steps):
        x_TD = mean_E + torch.randn(num_tokens, num_experts, generator=generator)
        with torch.no_grad():
            load = router(x_TD, RoutingContext(), 0)[0].load
        assert load is not None
        violations.append(float(max_violation(load.count_E)))
        margins = None if load.margin_EM is None else load.margin_EM.unsqueeze(0)
        router.after_step(Demand(load.count_E.unsqueeze(0), load.tokens, margins))
    return violations


def toy_config(rule: BiasRule, rate: float) -> RouterConfig:
    return RouterConfig(
        score=ScoreFunction.sigmoid, bias_rule=rule, bias_rate=rate, balance_loss=0.0, z_loss=0.0
    )


@pytest.mark.parametrize(("rate", "steps"), [(1e-3, 300), (1e-2, 35)])
def test_t10_the_sign_bias_balances_the_toy_population(rate: float, steps: int) -> None:
    violations = toy_violations(toy_config(BiasRule.sign, rate), steps)
    assert violations[0] > 2
    assert min(violations[-10:]) < 0.2


def test_t10_the_quantile_bias_balances_the_toy_population_in_three_steps() -> None:
    violations = toy_violations(toy_config(BiasRule.quantile, 1.0), 4)
    assert violations[0] > 2
    assert max(violations[3:]) < 0.2  # after three updates


def test_t10_the_bias_leaves_weights_alone_and_a_constant_changes_nothing() -> None:
    for rule in BiasRule:
        router = make("deepseek_v3", bias_rule=rule)
        x_TD = tokens(30)
        plain = router(x_TD, RoutingContext(), 0)[0]
        router.bias_E.copy_(torch.linspace(-2, 2, E))
        moved = router(x_TD, RoutingContext(), 0)[0]
        assert not torch.equal(moved.expert_TK, plain.expert_TK)
        assert plain.logits_TE is not None
        score_TK = plain.logits_TE.sigmoid().gather(1, moved.expert_TK)
        torch.testing.assert_close(moved.weight_TK, 2.5 * score_TK / score_TK.sum(1, keepdim=True))
        router.bias_E += 0.5
        assert torch.equal(router(x_TD, RoutingContext(), 0)[0].expert_TK, moved.expert_TK)
        assert not router.bias_E.requires_grad


def test_t10_demand_is_counted_before_drops() -> None:
    layer = MoE(D, 4, E, K, router="deepseek_v3", capacity_factor=0.25).train()
    _, routing, _ = layer.layer(tokens(60), RoutingContext(), 0)
    assert routing.load is not None
    assert float(routing.load.count_E.sum()) == 60 * K > int((routing.expert_TK >= 0).sum())


# --- T11: ReMoE


def test_t11_the_steered_loss_reaches_the_wanted_sparsity_by_its_factor_alone() -> None:
    torch.manual_seed(0)
    config = replace(preset("remoe"), balance_loss=0.01)
    router = build_router(config, 16, 8, 2).train()
    nn.init.normal_(router.weight, std=0.3)
    optimizer = torch.optim.SGD([router.weight], lr=0.1)
    sparsities, weights = [], []
    for _ in range(300):
        x_TD = torch.randn(128, 16)
        x_TD[:, 0] = 1.0
        routing, _ = router(x_TD, RoutingContext(), 0)
        load, logits_TE = routing.load, routing.logits_TE
        assert load is not None
        assert logits_TE is not None
        balance = global_balance_loss(
            load.score_E, load.count_E, tokens=load.tokens, top_k=2, ranks=1
        )
        # the other part wants every expert active
        total = router.global_loss_weight * balance + 0.5 * (logits_TE - 0.5).square().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        weights.append(float(router.loss_weight))
        router.after_step(Demand(load.count_E.unsqueeze(0), load.tokens))
        sparsities.append(float((routing.expert_TK < 0).double().mean()))
    assert sparsities[0] == pytest.approx(0.5, abs=0.05)
    assert sum(sparsities[-100:]) / 100 == pytest.approx(1 - 2 / 8, abs=0.02)
    assert weights[0] == pytest.approx(0.01)
    assert min(weights) > 0
    for sparsity, before, after in zip(sparsities, weights, weights[1:], strict=False):
        factor = 1.2 if sparsity < 1 - 2 / 8 else 1 / 1.2
        assert after / before == pytest.approx(factor, rel=1e-5)


# --- T12: Sinkhorn and BASE


def test_t12_sinkhorn_plans_have_even_rows_and_columns_for_any_logits() -> None:
    logits_PE = tokens(48, width=E).double()
    plan_PE = compete.sinkhorn_plan(logits_PE).exp()
    row_P, column_E = torch.full((48,), 1 / 48).double(), torch.full((E,), 1 / E).double()
    torch.testing.assert_close(plan_PE.sum(1), row_P, rtol=1e-3, atol=0)
    torch.testing.assert_close(plan_PE.sum(0), column_E, rtol=1e-3, atol=0)
    shifted_PE = compete.sinkhorn_plan(logits_PE + 30).exp()
    torch.testing.assert_close(shifted_PE, plan_PE, rtol=1e-3, atol=1e-9)
    assert torch.isfinite(compete.sinkhorn_plan(100 * logits_PE.float())).all()


@pytest.mark.parametrize(("positions", "num_experts"), [(8, 4), (30, 5), (64, 8), (23, 4)])
def test_t12_base_assignments_are_even_and_the_best(positions: int, num_experts: int) -> None:
    score_PE = tokens(positions, width=num_experts).double()
    expert_P = compete.assign_evenly(score_PE)
    count_E = torch.bincount(expert_P, minlength=num_experts)
    assert int(count_E.max()) - int(count_E.min()) <= (1 if positions % num_experts else 0)
    scipy = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    if positions % num_experts:
        return
    places = score_PE.repeat_interleave(positions // num_experts, 1).numpy()
    rows, columns = scipy.linear_sum_assignment(places, maximize=True)
    best = float(places[rows, columns].sum())
    assert float(score_PE.gather(1, expert_P.unsqueeze(1)).sum()) == pytest.approx(best, rel=1e-9)
