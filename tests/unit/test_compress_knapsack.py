"""The solver against enumeration and scipy's; budgets, ties and rules."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from gatewise.compression.knapsack import Infeasible, solve_knapsack

BITS = [1, 2, 3]


def brute_force(
    costs: list[list[float]], weights: list[list[int]], budget: int, required: tuple[int, ...] = ()
) -> float:
    plans = np.array(list(itertools.product(range(len(costs[0])), repeat=len(costs))))
    items = np.arange(len(costs))
    fits = np.asarray(weights)[items, plans].sum(axis=1) <= budget
    for option in required:
        fits &= (plans == option).any(axis=1)
    totals = np.asarray(costs)[items, plans].sum(axis=1)
    return float(totals[fits].min(initial=math.inf))


def random_costs(generator: np.random.Generator, items: int) -> list[list[float]]:
    """Return costs that fall with the width."""
    steps = generator.exponential(size=(items, 3)) ** 2
    return [[float(sum(row[k:])) for k in range(3)] for row in steps]


def total(costs: list[list[float]], plan: list[int]) -> float:
    return sum(row[option] for row, option in zip(costs, plan, strict=True))


def test_c1_the_plan_is_as_good_as_the_best_of_all_plans() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    for number in range(420):
        items = int(generator.integers(1, 7))
        costs = random_costs(generator, items)
        budget = int(generator.integers(items, 3 * items + 1))
        required = ((), (2, 1))[number % 2]
        want = brute_force(costs, [BITS] * items, budget, required)
        if want == math.inf:
            with pytest.raises(Infeasible):
                solve_knapsack(costs, [BITS] * items, budget, required=required)
            continue
        plan = solve_knapsack(costs, [BITS] * items, budget, required=required)
        assert total(costs, plan) == pytest.approx(want, rel=1e-9)
        assert set(required) <= set(plan)
        assert sum(BITS[option] for option in plan) <= budget


def test_c1_the_plan_is_as_good_as_that_of_an_integer_programme() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    for items in (8, 20):
        costs = random_costs(generator, items)
        weights = [[int(w) for w in np.sort(generator.integers(5, 90, 3))] for _ in range(items)]
        budget = int(np.mean(weights) * items)
        plan = solve_knapsack(costs, weights, budget)
        one = np.kron(np.eye(items), np.ones(3))
        found = milp(
            np.ravel(costs),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(np.ravel(weights)[None], -np.inf, budget),
            ],
            integrality=np.ones(3 * items),
            bounds=Bounds(0, 1),
        )
        assert total(costs, plan) == pytest.approx(found.fun, rel=1e-6)


def test_c2_bits_and_bytes_of_equal_experts_give_the_same_plan() -> None:
    costs = random_costs(np.random.Generator(np.random.PCG64(2)), 12)
    in_bits = solve_knapsack(costs, [BITS] * 12, 24)
    in_bytes = solve_knapsack(costs, [[4608 * bits for bits in BITS]] * 12, 24 * 4608)
    assert in_bits == in_bytes


def test_c3_a_plan_of_release_style_costs_stays_as_it_was() -> None:
    """Eight experts with costs share^1 * weight^1.5 * error, solved by enumeration."""
    frequency = [0.21, 0.05, 0.13, 0.09, 0.18, 0.12, 0.15, 0.07]
    weight = [0.24, 0.04, 0.12, 0.08, 0.20, 0.11, 0.15, 0.06]
    error = [[9.1, 6.9, 2.7], [7.2, 5.5, 2.2], [8.8, 6.6, 2.6], [30.0, 22.0, 8.8]] * 2
    costs = [
        [phi * w**1.5 * eps for eps in row]
        for phi, w, row in zip(frequency, weight, error, strict=True)
    ]
    want = brute_force(costs, [BITS] * 8, 16, (2, 1))
    plan = solve_knapsack(costs, [BITS] * 8, 16, required=(2, 1))
    assert total(costs, plan) == pytest.approx(want, rel=1e-9)
    assert [BITS[option] for option in plan] == [3, 1, 2, 2, 3, 1, 3, 1]


def test_c4_the_budget_is_used_up_where_an_upgrade_fits() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    for budget in range(6, 19):
        plan = solve_knapsack(random_costs(generator, 6), [BITS] * 6, budget)
        assert sum(BITS[option] for option in plan) == budget


def test_c5_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(Infeasible):
        solve_knapsack([[3.0, 2.0, 1.0]], [BITS], 3, required=(2, 1))
    with pytest.raises(Infeasible):
        solve_knapsack([[3.0, 2.0, 1.0]] * 4, [BITS] * 4, 3)


def test_c6_scaled_costs_give_the_same_plan() -> None:
    costs = random_costs(np.random.Generator(np.random.PCG64(4)), 16)
    plan = solve_knapsack(costs, [BITS] * 16, 32)
    for factor in (1e-12, 0.5, 3e7):
        scaled = [[factor * cost for cost in row] for row in costs]
        assert solve_knapsack(scaled, [BITS] * 16, 32) == plan


def test_c7_a_larger_budget_never_costs_more() -> None:
    costs = random_costs(np.random.Generator(np.random.PCG64(5)), 10)
    spent = [total(costs, solve_knapsack(costs, [BITS] * 10, budget)) for budget in range(10, 31)]
    assert spent == sorted(spent, reverse=True)


def test_c8_equal_costs_give_the_wider_codes_to_the_lower_numbers() -> None:
    assert solve_knapsack([[0.1, 0.1, 0.1]] * 4, [BITS] * 4, 9) == [2, 2, 1, 0]
    assert solve_knapsack([[0.0, 0.0, 0.0]] * 3, [BITS] * 3, 5) == [2, 0, 0]


def test_a_cost_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        solve_knapsack([[math.nan, 1.0, 0.0]], [BITS], 3)
