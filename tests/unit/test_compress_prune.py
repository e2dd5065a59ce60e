"""Dropping experts per token: who is dropped, who is protected, and what the weights become."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewise.compression.config import Protect, PruneConfig, PruneRule
from gatewise.compression.protection import Protection, mean_attention, most_important
from gatewise.compression.pruning import (
    LayerPruner,
    LayerRule,
    Pruning,
    kept_choices,
    prune_routing,
    renormalises,
)
from gatewise.compression.thresholds import LayerThresholds, choose_rules, quantile
from gatewise.moe.attention import Attention, KeyValueCache
from gatewise.moe.config import Activation, ModelConfig
from gatewise.moe.dispatch import LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.layer import MoELayer
from gatewise.moe.rotary import rotary_tables
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.routers.api import Routing, RoutingContext
from gatewise.routers.config import RouterConfig, ScoreFunction
from gatewise.routers.router import ComposedRouter

HIDDEN, WIDTH, EXPERTS = 8, 6, 8
NOBODY = Protection(Protect.none, 0.0, 512, 0.0)
ROUTERS = {
    "softmax, renormalised": RouterConfig(),
    "softmax as it is": RouterConfig(renormalise=False),
    "sigmoid and bias": RouterConfig(score=ScoreFunction.sigmoid, scale=2.5, bias_rate=0.001),
}


def layer_of(router: RouterConfig | None = None, top_k: int = 2, *, shared: int = 0) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(
        ComposedRouter(HIDDEN, EXPERTS, top_k, router or RouterConfig()),
        GroupedExperts(EXPERTS, HIDDEN, WIDTH, Activation.swiglu),
        LocalDispatcher(EXPERTS),
        shared=FeedForward(HIDDEN, shared, Activation.swiglu) if shared else None,
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    assert isinstance(layer.router, ComposedRouter)
    layer.router.bias_E.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    return layer.eval()


def tokens(count: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def ratio_rule(*ratio: float, **others: Any) -> LayerRule:
    return LayerRule(0, 0.0, ratio=(0.0, *ratio), **others)


def pruner(
    layer: MoELayer,
    rule: LayerRule,
    kind: PruneRule = PruneRule.ratio,
    *,
    protection: Protection = NOBODY,
    preserve_sum: bool = False,
) -> LayerPruner:
    rescale = preserve_sum or renormalises(layer)
    return LayerPruner(kind, rule, protection, rescale=rescale)


def routings(layer: MoELayer, prune: LayerPruner, x_TD: Tensor) -> tuple[Routing, Routing]:
    """Return the routing before and after."""
    layer.prune = None
    before = layer(x_TD, RoutingContext(), 0)[1]
    layer.prune = prune
    return before, layer(x_TD, RoutingContext(), 0)[1]


@pytest.mark.parametrize("top_k", [2, 6])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (PruneRule.ratio, ratio_rule(0.0, 0.0, 0.0, 0.0, 0.0)),
        (PruneRule.top_p, LayerRule(0, 0.0, top_p=1.0)),
        (PruneRule.saliency, LayerRule(0, 0.0, output_norm=(1.0,) * EXPERTS)),
    ],
    ids=["mu 0", "top_p 1", "saliency 0"],
)
@torch.no_grad()
def test_c25_a_threshold_of_zero_gives_the_same_bits(
    kind: PruneRule, rule: LayerRule, router: RouterConfig, top_k: int
) -> None:
    layer, x_TD = layer_of(router, top_k), tokens()
    dense_TD = layer(x_TD, RoutingContext(), 0)[0]
    if rule.ratio:
        rule = ratio_rule(*rule.ratio[1:top_k])
    layer.prune = pruner(layer, rule, kind)
    assert torch.equal(layer(x_TD, RoutingContext(), 0)[0], dense_TD)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
@torch.no_grad()
def test_c26_the_largest_weight_stays_whatever_the_threshold(router: RouterConfig) -> None:
    layer, x_TD = layer_of(router, 3), tokens()
    for mu in (0.3, 0.8, 1.0, math.inf):
        before, after = routings(layer, pruner(layer, ratio_rule(mu, mu)), x_TD)
        kept_TK = after.expert_TK >= 0
        largest_T1 = before.weight_TK.argmax(1, keepdim=True)
        assert kept_TK.gather(1, largest_T1).all()
    assert (kept_TK.sum(1) == 1).all()
    top_T1 = before.expert_TK.gather(1, largest_T1)
    weight_T1 = before.weight_TK.gather(1, largest_T1)
    if renormalises(layer):
        weight_T1 = before.weight_TK.sum(1, keepdim=True)
    layer.prune = None
    one_TD = layer._compute(x_TD, weight_T1, top_T1, may_drop=False, layer=0)
    layer.prune = pruner(layer, ratio_rule(math.inf, math.inf))
    torch.testing.assert_close(layer(x_TD, RoutingContext(), 0)[0], one_TD)


@torch.no_grad()
def test_c27_a_larger_threshold_keeps_no_more_and_full_protection_keeps_all() -> None:
    layer, x_TD = layer_of(top_k=4), tokens(200)
    kept = []
    for mu in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0):
        _, after = routings(layer, pruner(layer, ratio_rule(mu, mu, mu)), x_TD)
        kept.append(int((after.expert_TK >= 0).sum()))
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 800
    assert kept[-1] == 200
    layer.prune = None
    dense_TD = layer(x_TD, RoutingContext(), 0)[0]
    everybody = Protection(Protect.l1, 1.0, 512, -1.0)
    layer.prune = pruner(layer, ratio_rule(2.0, 2.0, 2.0), protection=everybody)
    assert torch.equal(layer(x_TD, RoutingContext(), 0)[0], dense_TD)
    one_by_one = [layer(row_1D, RoutingContext(), 0)[0] for row_1D in x_TD[:5].split(1)]
    torch.testing.assert_close(torch.cat(one_by_one), dense_TD[:5])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_c28_as_many_tokens_of_each_sequence_are_protected(share: float) -> None:
    importance_BS = torch.rand(4, 60, generator=torch.Generator().manual_seed(2))
    padding_BS = torch.zeros(4, 60, dtype=torch.bool)
    padding_BS[1, 47:] = padding_BS[2, :59] = padding_BS[3] = True
    marked_BS = most_important(importance_BS, padding_BS, share=share)
    lengths = (~padding_BS).sum(1).tolist()
    assert lengths == [60, 47, 1, 0]
    assert marked_BS.sum(1).tolist() == [int(share * length) for length in lengths]
    assert not (marked_BS & padding_BS).any()
    for row in range(2):
        inside = importance_BS[row][marked_BS[row]]
        outside = importance_BS[row][~marked_BS[row] & ~padding_BS[row]]
        if len(inside) and len(outside):
            assert inside.min() > outside.max()


def test_c28_a_new_token_alone_is_protected_by_its_norm() -> None:
    x_TD = torch.tensor([[1.0, -1.0], [3.0, 2.0], [0.5, 0.0]])
    protection = Protection(Protect.col, 0.02, 512, 2.0)
    found_T = protection.protected(x_TD, RoutingContext(sequences=3), None)
    assert found_T is not None
    assert found_T.tolist() == [False, True, False]


@pytest.mark.parametrize("preserve_sum", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_c29_weights_keep_their_sum_only_where_the_model_renormalises(
    name: str, preserve_sum: bool
) -> None:
    layer, x_TD = layer_of(ROUTERS[name], 3), tokens(100)
    prune = pruner(layer, ratio_rule(0.3, 0.2), preserve_sum=preserve_sum)
    before, after = routings(layer, prune, x_TD)
    dropped_T = (after.expert_TK < 0).any(1)
    assert 0 < int(dropped_T.sum()) < 100
    kept_TK = after.expert_TK >= 0
    if name == "softmax as it is" and not preserve_sum:
        assert torch.equal(after.weight_TK[kept_TK], before.weight_TK[kept_TK])
        assert (after.weight_TK.sum(1) < before.weight_TK.sum(1))[dropped_T].all()
    else:
        torch.testing.assert_close(after.weight_TK.sum(1), before.weight_TK.sum(1))
    if name == "softmax, renormalised":
        torch.testing.assert_close(after.weight_TK.sum(1), torch.ones(100))
    assert torch.equal(after.weight_TK[~dropped_T], before.weight_TK[~dropped_T])
    assert (after.weight_TK[~kept_TK] == 0).all()


@pytest.mark.parametrize("count", [100, 101])
def test_c30_the_median_drops_half_of_the_second_experts(count: int) -> None:
    first_T = 0.5 + 0.5 * torch.rand(count, generator=torch.Generator().manual_seed(3))
    weight_TK = torch.stack((first_T, 1 - first_T), 1)
    mu = quantile((weight_TK[:, 1].double() / weight_TK[:, 0].double()), 0.5)
    expert_TK = torch.tensor([[0, 1]]).expand(count, 2)
    keep_TK = kept_choices(PruneRule.ratio, ratio_rule(mu), expert_TK, weight_TK)
    assert abs(int((~keep_TK).sum()) - count / 2) <= 1
    assert quantile(torch.rand(7), 1.0) > 1e300
    assert quantile(torch.tensor([3.0, 1.0, 2.0]), 0.0) == 1.0


def attention_of(heads: int, kv_heads: int) -> Attention:
    torch.manual_seed(4)
    attention = Attention(ModelConfig(hidden=16, heads=heads, kv_heads=kv_heads), 0)
    nn.init.normal_(attention.w_qkv, std=0.8)
    nn.init.normal_(attention.w_out)
    return attention


def brute_force(
    q_BHSW: Tensor, k_BJPW: Tensor, padding_BS: Tensor, queries: int
) -> list[list[float]]:
    batch, heads, positions, width = q_BHSW.shape
    past = k_BJPW.shape[2] - positions
    rows = []
    for b in range(batch):
        real = [i for i in range(positions) if not padding_BS[b, i]][-queries:]
        received = [[0.0] * positions for _ in real]
        for h, (place, i) in itertools.product(range(heads), enumerate(real)):
            keys = k_BJPW[b, h * k_BJPW.shape[1] // heads, : past + i + 1].double()
            score = (keys @ q_BHSW[b, h, i].double()) / math.sqrt(width)
            for j, share in enumerate(score.softmax(0).tolist()[past:]):
                received[place][j] += share / heads
        row = []
        for j in range(positions):
            seen_by = [received[place][j] for place, i in enumerate(real) if i >= j]
            row.append(sum(seen_by) / max(len(seen_by), 1))
        rows.append(row)
    return rows


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("queries", [100, 5])
@pytest.mark.parametrize("cached", [0, 3])
@torch.no_grad()
def test_c31_importance_is_the_mean_of_attention_columns(
    kv_heads: int, queries: int, cached: int
) -> None:
    attention, seen = attention_of(4, kv_heads), []
    attention.watch = lambda q, k: seen.append((q, k))
    x_BSD = torch.randn(2, 11 + cached, 16, generator=torch.Generator().manual_seed(5))
    cache = KeyValueCache()
    if cached:
        rotary = rotary_tables(cached, 4, 1e4, device=x_BSD.device)
        attention(x_BSD[:, :cached], rotary, 0, cache)
    rotary = rotary_tables(11, 4, 1e4, start=cached, device=x_BSD.device)
    attention(x_BSD[:, cached:], rotary, 0, cache)
    padding_BS = torch.zeros(2, 11, dtype=torch.bool)
    padding_BS[1, 8:] = True
    found_BS = mean_attention(seen[-1], padding_BS, queries=queries)
    wanted_BS = torch.tensor(brute_force(*seen[-1], padding_BS, queries))
    torch.testing.assert_close(found_BS, wanted_BS, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_c31_sums_of_rows_would_be_the_same_for_all() -> None:
    attention, seen = attention_of(4, 4), []
    attention.watch = lambda q, k: seen.append((q, k))
    x_BSD = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(6))
    attention(x_BSD, rotary_tables(20, 4, 1e4, device=x_BSD.device), 0)
    columns_S = mean_attention(seen[0], None, queries=100)[0]
    assert columns_S.max() > 2 * columns_S.min()
    q_HSW, k_HSW = seen[0][0][0], seen[0][1][0]
    score_HSS = (q_HSW @ k_HSW.transpose(1, 2) / 2).masked_fill(
        torch.ones(20, 20, dtype=torch.bool).triu(1), -math.inf
    )
    torch.testing.assert_close(score_HSS.softmax(-1).mean(0).sum(1), torch.ones(20))


def test_c32_with_more_experts_nothing_stays_behind_a_dropped_one() -> None:
    weight_TK = torch.rand(300, 5, generator=torch.Generator().manual_seed(7))
    expert_TK = torch.stack([torch.randperm(8)[:5] for _ in range(300)])
    rule = ratio_rule(0.9, 0.2, 0.7, 0.1)
    keep_TK = kept_choices(PruneRule.ratio, rule, expert_TK, weight_TK)
    for weights, kept in zip(weight_TK.tolist(), keep_TK.tolist(), strict=True):
        order = sorted(range(5), key=lambda place: -weights[place])
        wanted, alive = set(), True
        for rank, place in enumerate(order):
            alive = alive and weights[place] / weights[order[0]] >= rule.ratio[rank]
            wanted |= {place} if alive else set()
        assert {place for place in range(5) if kept[place]} == wanted


@torch.no_grad()
def test_c32_shared_experts_and_the_choice_itself_stay() -> None:
    config = ROUTERS["sigmoid and bias"]
    layer, x_TD = layer_of(config, 4, shared=5), tokens(60)
    before, after = routings(layer, pruner(layer, ratio_rule(0.8, 0.8, 0.8)), x_TD)
    kept_TK = after.expert_TK >= 0
    assert torch.equal(after.expert_TK[kept_TK], before.expert_TK[kept_TK])
    sorted_by_weight = (before.weight_TK.diff(dim=1) <= 0).all(1)
    assert not sorted_by_weight.all()  # the bias decides the order of the choices, not of weights
    ratio_TK = before.weight_TK / before.weight_TK.amax(1, keepdim=True)
    assert torch.equal(kept_TK, ratio_TK >= 0.8)
    y_TD = layer(x_TD, RoutingContext(), 0)[0]
    shared, layer.shared = layer.shared, None
    assert shared is not None
    torch.testing.assert_close(y_TD - layer(x_TD, RoutingContext(), 0)[0], shared(x_TD))


def test_ser_top_p_and_saliency_drop_as_their_formulas_say() -> None:
    weight_TK = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]])
    expert_TK = torch.tensor([[0, 1, 2], [3, 4, 5]])
    thresholds = LayerThresholds(0, 2, 6, 3, 0.0)

    def kept(config: PruneConfig) -> list[list[bool]]:
        rule = choose_rules([thresholds], config).layers[0]
        return kept_choices(config.rule, rule, expert_TK, weight_TK).tolist()

    ser = PruneConfig(rule=PruneRule.ser, threshold=0.5)
    assert kept(ser) == [[True, True, False], [False, True, True]]
    two = PruneConfig(rule=PruneRule.ser, threshold=1.0, keep_least=2)
    assert kept(two) == [[True, True, False], [False, True, True]]
    assert kept(PruneConfig(rule=PruneRule.ser, threshold=1.0))[1] == [False, True, False]
    assert all(map(all, kept(PruneConfig(rule=PruneRule.ser, threshold=0.0))))
    mass = PruneConfig(rule=PruneRule.top_p, top_p=0.75)
    assert kept(mass) == [[True, True, False], [False, True, True]]
    thresholds.output_norm, thresholds.saliency = [1.0, 0.1, 9.0, 9.0, 1.0, 0.1], 0.3
    saliency = PruneConfig(rule=PruneRule.saliency)
    assert kept(saliency) == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize(("scale", "rounds"), [(1, 20), (9973, 2)])
def test_the_budget_is_met_at_the_least_error_of_all_choices(scale: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(8)
    for _ in range(rounds):
        layers = []
        for layer in range(3):
            falls = torch.randint(10 * scale, 30 * scale, (4,), generator=generator)
            kept = [200 * scale, *(200 * scale - falls.cumsum(0)).tolist()]
            rises = torch.rand(4, generator=generator).cumsum(0).tolist()
            levels = LayerThresholds(layer, 100 * scale, 200 * scale, 2, 0.0)
            levels.level_ratio = [0.0, 0.2, 0.4, 0.6, 0.8]
            levels.level_kept = kept
            levels.level_error = [0.0, *rises]
            layers.append(levels)
        keep = 0.8
        choices = itertools.product(range(5), repeat=3)
        best = min(
            (sum(a.level_error[i] for a, i in zip(layers, choice, strict=True)), choice)
            for choice in choices
            if sum(a.level_kept[i] for a, i in zip(layers, choice, strict=True))
            <= keep * 600 * scale
        )
        config = PruneConfig(rule=PruneRule.budget, keep=keep)
        found = [rule.ratio[1] for rule in choose_rules(layers, config).layers]
        error = sum(
            a.level_error[a.level_ratio.index(mu)] for a, mu in zip(layers, found, strict=True)
        )
        assert error == pytest.approx(best[0], abs=1e-9)
    for found_layer in layers:  # many pairs, and none to spare
        found_layer.pairs = 5000001
        found_layer.level_kept = [5000001 - level for level in range(5)]
    tight = PruneConfig(rule=PruneRule.budget, keep=3 * 4999997 / (3 * 5000001))
    assert [rule.ratio[1] for rule in choose_rules(layers, tight).layers] == [0.8, 0.8, 0.8]
    with pytest.raises(ConfigError, match=r"prune\.keep is 0\.01, but the largest expert"):
        choose_rules(layers, PruneConfig(rule=PruneRule.budget, keep=0.01))


def test_a_rule_is_the_same_after_writing_and_reading() -> None:
    rule = LayerRule(3, 1.5, ratio=(0.0, 0.1 + 0.2), output_norm=(1 / 3,), saliency=0.7)
    pruning = Pruning(PruneRule.ratio, Protect.col, 0.02, 64, False, (rule,))
    assert Pruning.from_json(pruning.to_json(), source="x") == pruning
    for text in ("{", "{}", pruning.to_json().replace("ratio", "ratoi")):
        with pytest.raises(CheckpointError, match="x is damaged"):
            Pruning.from_json(text, source="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, r"prune\.share is 1\.5"),
        ({"keep": 0.0}, r"prune\.keep is 0"),
        ({"mu": -1.0}, r"prune\.mu is -1"),
        ({"mu": math.inf}, r"prune\.mu is inf; it must be a finite number"),
        ({"mu": math.nan}, r"prune\.mu is nan"),
        ({"keep_least": 0}, r"prune\.keep_least is 0"),
    ],
)
def test_a_pruning_that_cannot_work_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**changes)


def test_columns_without_attention_are_refused() -> None:
    protection = Protection(Protect.col, 0.02, 512, 0.0)
    with pytest.raises(ValueError, match="none was watched"):
        protection.protected(tokens(), RoutingContext(), None)


def test_gradients_flow_through_what_stays() -> None:
    weight_TK = torch.tensor([[0.6, 0.4], [0.9, 0.1]], requires_grad=True)
    routing = Routing(torch.tensor([[0, 1], [0, 1]]), weight_TK)
    keep_TK = torch.tensor([[True, True], [True, False]])
    pruned = prune_routing(routing, keep_TK, rescale=True)
    (pruned.weight_TK * torch.tensor([[1.0, 2.0], [1.0, 2.0]])).sum().backward()  # type: ignore[no-untyped-call]
    assert weight_TK.grad is not None
    assert torch.isfinite(weight_TK.grad).all()
