"""Capacity: which pairs are kept, in each order, and that nothing else changes."""

import math

import pytest
import torch
from torch import Tensor

from gatewise.moe.capacity import apply_capacity, keep_within_capacity
from gatewise.moe.config import CapacityConfig, CapacityOrder
from gatewise.moe.layer import MoE
from gatewise.routers.api import NoiseKey, Routing, RoutingContext

EXPERTS, TOP_K = 4, 2
BY_WEIGHT = CapacityOrder.probs


def draw(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return skewed choices without repetition in a row, and weights without ties."""
    generator = torch.Generator().manual_seed(seed)
    skew_E = torch.tensor([3.0, 1.0, 0.5, 0.1])
    logits_TE = torch.randn(num_tokens, EXPERTS, generator=generator) + skew_E
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(TOP_K)
    return expert_TK, weight_TK


def keep_by_hand(expert_TK: Tensor, priority_TK: Tensor, capacity: int) -> list[list[bool]]:
    """Let the pairs of each expert stand in line, best first, and take the first `capacity`."""
    lines: dict[int, list[tuple[float, int, int]]] = {}
    for token, row in enumerate(expert_TK.tolist()):
        for choice, expert in enumerate(row):
            place = (-float(priority_TK[token, choice]), token, choice)
            lines.setdefault(expert, []).append(place)
    kept = [[False] * expert_TK.shape[1] for _ in range(expert_TK.shape[0])]
    for line in lines.values():
        for _, token, choice in sorted(line)[:capacity]:
            kept[token][choice] = True
    return kept


def drop(
    expert_TK: Tensor, weight_TK: Tensor, factor: float, order: CapacityOrder, **context: object
) -> Tensor:
    routing = apply_capacity(
        Routing(expert_TK, weight_TK),
        CapacityConfig(factor=factor, order=order),
        RoutingContext(**context),  # type: ignore[arg-type]
        num_experts=EXPERTS,
        layer=0,
    )
    assert routing.weight_TK is weight_TK  # not renormalised
    kept_TK = routing.expert_TK >= 0
    assert torch.equal(routing.expert_TK[kept_TK], expert_TK[kept_TK])
    return kept_TK


@pytest.mark.parametrize("capacity", [0, 1, 3, 7, 100])
def test_an_expert_keeps_the_first_of_its_line(capacity: int) -> None:
    for num_tokens in (0, 1, 23):
        expert_TK, weight_TK = draw(num_tokens)
        for priority_TK in (weight_TK, torch.zeros_like(weight_TK), (weight_TK * 4).round()):
            keep_TK = keep_within_capacity(
                expert_TK, priority_TK, num_experts=EXPERTS, capacity=capacity
            )
            assert keep_TK.tolist() == keep_by_hand(expert_TK, priority_TK, capacity)
            demand_E = torch.bincount(expert_TK.flatten(), minlength=EXPERTS)
            kept_E = torch.bincount(expert_TK[keep_TK], minlength=EXPERTS)
            assert torch.equal(kept_E, demand_E.clamp(max=capacity))


@pytest.mark.parametrize("order", list(CapacityOrder))
@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_capacity_is_the_factor_times_the_mean_demand(order: CapacityOrder, factor: float) -> None:
    expert_TK, weight_TK = draw(23)
    kept_TK = drop(expert_TK, weight_TK, factor, order)
    capacity = math.ceil(factor * TOP_K * 23 / EXPERTS)
    demand_E = torch.bincount(expert_TK.flatten(), minlength=EXPERTS)
    kept_E = torch.bincount(expert_TK[kept_TK], minlength=EXPERTS)
    assert torch.equal(kept_E, demand_E.clamp(max=capacity))
    if factor == 4.0:
        assert kept_TK.all()


def test_probs_keeps_the_largest_weights_and_position_the_first_tokens() -> None:
    expert_TK, weight_TK = draw(40)
    by_weight_TK = drop(expert_TK, weight_TK, 0.5, CapacityOrder.probs)
    by_place_TK = drop(expert_TK, weight_TK, 0.5, CapacityOrder.position)
    for expert in range(EXPERTS):
        demand = (expert_TK == expert).nonzero()
        count = int(((expert_TK == expert) & by_weight_TK).sum())
        mine = weight_TK[expert_TK == expert]
        kept = weight_TK[(expert_TK == expert) & by_weight_TK]
        assert sorted(kept.tolist()) == sorted(mine.tolist())[len(mine) - count :]
        first = ((expert_TK == expert) & by_place_TK).nonzero()
        assert torch.equal(first, demand[: len(first)])


def test_permuting_tokens_permutes_what_probs_keeps_but_not_what_position_keeps() -> None:
    expert_TK, weight_TK = draw(40)
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    same = {}
    for order in (CapacityOrder.probs, CapacityOrder.position):
        kept_TK = drop(expert_TK, weight_TK, 0.5, order)
        permuted_TK = drop(expert_TK[order_T], weight_TK[order_T], 0.5, order)
        same[order] = torch.equal(permuted_TK, kept_TK[order_T])
    assert same == {CapacityOrder.probs: True, CapacityOrder.position: False}


def test_random_selection_follows_its_key_and_favours_no_position() -> None:
    expert_TK = torch.zeros(64, 1, dtype=torch.int64)
    weight_TK = torch.ones(64, 1)
    share = torch.zeros(64)
    for step in range(100):
        key = NoiseKey(seed=0, step=step, sequences=(0, 1))
        kept_TK = drop(expert_TK, weight_TK, 1.0, CapacityOrder.random, noise=key)
        again_TK = drop(expert_TK, weight_TK, 1.0, CapacityOrder.random, noise=key)
        assert torch.equal(kept_TK, again_TK)
        share += kept_TK[:, 0] / 100
    assert float(share.mean()) == pytest.approx(1 / 4)
    assert float(share.min()) > 0.06
    assert float(share.max()) < 0.5


@pytest.mark.parametrize("order", list(CapacityOrder))
def test_padding_takes_no_place(order: CapacityOrder) -> None:
    expert_TK, weight_TK = draw(40)
    padding_T = torch.arange(40) % 4 == 0
    kept_TK = drop(expert_TK, weight_TK, 0.5, order, padding_T=padding_T)
    demand_E = torch.bincount(expert_TK[~padding_T].flatten(), minlength=EXPERTS)
    kept_E = torch.bincount(expert_TK[kept_TK & ~padding_T[:, None]], minlength=EXPERTS)
    assert torch.equal(kept_E, demand_E.clamp(max=math.ceil(0.5 * TOP_K * 40 / EXPERTS)))


def test_a_weight_of_nan_takes_no_place() -> None:
    expert_TK, weight_TK = draw(40)
    bad_T = torch.arange(40) % 4 == 0
    kept_TK = drop(expert_TK, weight_TK.masked_fill(bad_T[:, None], torch.nan), 0.5, BY_WEIGHT)
    demand_E = torch.bincount(expert_TK[~bad_T].flatten(), minlength=EXPERTS)
    kept_E = torch.bincount(expert_TK[kept_TK & ~bad_T[:, None]], minlength=EXPERTS)
    assert torch.equal(kept_E, demand_E.clamp(max=math.ceil(0.5 * TOP_K * 40 / EXPERTS)))


def test_a_layer_drops_in_training_only_and_counts_demand() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 8, EXPERTS, TOP_K, capacity_factor=0.5)
    whole = MoE(8, 8, EXPERTS, TOP_K)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(40, 8)
    context = RoutingContext()
    y_TD, routing, _ = layer.layer(x, context, 0)
    assert routing.load is not None
    assert routing.load.count_E.sum() == 40 * TOP_K
    dropped = float(routing.health["dropped"])
    assert dropped == (routing.expert_TK < 0).sum() > 0
    lost_T = (routing.expert_TK < 0).all(1)
    assert lost_T.any()
    assert not y_TD[lost_T].any()  # the residual connection carries these
    layer.eval()
    assert torch.equal(layer(x), whole(x))


def test_dropped_pairs_get_no_gradient() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 8, EXPERTS, 1, capacity_factor=0.5, router="switch").double()
    layer.router.eval()  # type: ignore[attr-defined]  # no jitter
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    y_TD, routing, _ = layer.layer(x, RoutingContext(), 0)
    y_TD.sum().backward()
    assert x.grad is not None
    lost_T = (routing.expert_TK < 0).all(1)
    assert lost_T.any()
    assert not x.grad[lost_T].any()
    assert x.grad[~lost_T].all(1).all()


def test_padding_does_not_count_as_dropped() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 8, EXPERTS, TOP_K, capacity_factor=1.5)
    padding_T = torch.arange(40) >= 30
    _, routing, _ = layer.layer(torch.randn(40, 8), RoutingContext(padding_T=padding_T), 0)
    lost_TK = (routing.expert_TK < 0) & ~padding_T.unsqueeze(1)
    assert float(routing.health["dropped"]) == lost_TK.sum()
    assert (routing.expert_TK[padding_T] == -1).all()
