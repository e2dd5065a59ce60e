"""The top-k router: what it chooses, with which weights, and what it is not moved by."""

import copy
from itertools import combinations

import pytest
import torch
from torch import Tensor

from gatewise.routers.api import NoiseKey, Routing, RoutingContext
from gatewise.routers.choice import limit_to_groups, stable_topk
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction
from gatewise.routers.presets import preset
from gatewise.routers.router import ComposedRouter

HIDDEN = 16


def make_router(
    num_experts: int, top_k: int, *, hidden: int = HIDDEN, **settings: object
) -> ComposedRouter:
    router = ComposedRouter(hidden, num_experts, top_k, RouterConfig(**settings))  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    return router


def route(router: ComposedRouter, x_TD: Tensor, **context: object) -> Routing:
    return router(x_TD, RoutingContext(**context), 0)[0]  # type: ignore[arg-type]


def logits_router(num_experts: int, top_k: int, **settings: object) -> ComposedRouter:
    """Return a router whose logits are its input."""
    router = make_router(num_experts, top_k, hidden=num_experts, **settings)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def tokens(num_tokens: int, width: int = HIDDEN, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def test_softmax_weights_are_those_of_a_softmax_over_the_chosen_logits() -> None:
    router, x_TD = make_router(8, 3), tokens(50)
    routing = route(router, x_TD)
    logits_TE = x_TD.double() @ router.weight.double().T
    best_TK = logits_TE.topk(3)
    assert torch.equal(routing.expert_TK, best_TK.indices)
    torch.testing.assert_close(
        routing.weight_TK.double(), best_TK.values.softmax(-1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("score", list(ScoreFunction))
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_renormalised_weights_sum_to_the_scale(score: ScoreFunction, scale: float) -> None:
    routing = route(make_router(8, 4, score=score, scale=scale), tokens(64))
    torch.testing.assert_close(routing.weight_TK.sum(1), torch.full((64,), scale))
    assert (routing.weight_TK >= 0).all()


def test_weights_that_are_not_renormalised_are_the_scores() -> None:
    router, x_TD = make_router(8, 2, renormalise=False), tokens(64)
    routing = route(router, x_TD)
    score_TE = (x_TD @ router.weight.T).softmax(-1)
    torch.testing.assert_close(routing.weight_TK, score_TE.gather(1, routing.expert_TK))
    assert (routing.weight_TK.sum(1) <= 1 + 1e-6).all()


def test_one_choice_keeps_its_score_so_that_the_router_gets_a_gradient() -> None:
    router, x_TD = make_router(8, 1), tokens(64)
    weight_TK = route(router, x_TD).weight_TK
    torch.testing.assert_close(
        weight_TK[:, 0], (x_TD @ router.weight.T).softmax(-1).amax(-1), rtol=1e-5, atol=1e-6
    )
    assert torch.autograd.grad(weight_TK.sum(), router.weight)[0].abs().sum() > 0


def test_sigmoid_scores_that_are_all_zero_give_finite_weights_and_gradients() -> None:
    router = logits_router(4, 2, score=ScoreFunction.sigmoid)
    x_TD = torch.full((3, 4), -200.0, requires_grad=True)
    routing = route(router, x_TD)
    (routing.weight_TK.sum() + routing.losses["z"]).backward()
    assert torch.isfinite(routing.weight_TK).all()
    assert x_TD.grad is not None
    assert torch.isfinite(x_TD.grad).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (8, 3), (8, 8), (40, 6)])
def test_every_token_gets_different_experts_in_range(num_experts: int, top_k: int) -> None:
    routing = route(make_router(num_experts, top_k), tokens(64))
    assert routing.expert_TK.dtype == torch.int64
    assert routing.expert_TK.shape == (64, top_k)
    assert 0 <= int(routing.expert_TK.min()) <= int(routing.expert_TK.max()) < num_experts
    ordered_TK = routing.expert_TK.sort(1).values
    assert (ordered_TK.diff(dim=1) > 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_go_to_the_lowest_expert(top_k: int, dtype: torch.dtype) -> None:
    # few different values, zeros of both signs among them: every row has ties
    draw = torch.randint(-2, 3, (200, 8), generator=torch.Generator().manual_seed(3))
    score_TE = draw.to(dtype) * torch.tensor([1.0, -1.0] * 4, dtype=dtype)
    by_hand = [
        sorted(range(8), key=lambda e: (-row[e], e))[:top_k] for row in score_TE.double().tolist()
    ]
    assert stable_topk(score_TE, top_k).tolist() == by_hand


def test_equal_logits_choose_the_first_experts_with_equal_weights() -> None:
    routing = route(make_router(8, 3), torch.zeros(5, HIDDEN))
    assert routing.expert_TK.tolist() == [[0, 1, 2]] * 5
    torch.testing.assert_close(routing.weight_TK, torch.full((5, 3), 1 / 3))


def _best_in_groups(
    score_E: list[float], num_groups: int, top_groups: int, top_k: int
) -> list[int]:
    """Try all sets of groups, by the sum of their two best scores; ties to the lowest."""
    size = len(score_E) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    value = [sum(sorted((score_E[e] for e in group), reverse=True)[:2]) for group in groups]
    best = max(
        combinations(range(num_groups), top_groups),
        key=lambda chosen: (sum(value[g] for g in chosen), [-g for g in chosen]),
    )
    allowed = [e for g in best for e in groups[g]]
    return sorted(allowed, key=lambda e: (-score_E[e], e))[:top_k]


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_groups", "top_k"),
    [(8, 4, 2, 3), (8, 8, 3, 3), (12, 3, 1, 4), (16, 4, 3, 6), (6, 2, 2, 5)],
)
def test_group_limited_choice_is_that_of_brute_force(
    num_experts: int, num_groups: int, top_groups: int, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    score_TE = torch.randn(100, num_experts, generator=generator, dtype=torch.float64)
    limited_TE = limit_to_groups(score_TE, num_groups=num_groups, top_groups=top_groups)
    chosen = stable_topk(limited_TE, top_k).tolist()
    assert chosen == [
        _best_in_groups(row, num_groups, top_groups, top_k) for row in score_TE.tolist()
    ]


def test_groups_limit_the_router_and_weights_come_from_its_scores() -> None:
    router = make_router(
        8, 2, num_groups=4, top_groups=1, score=ScoreFunction.sigmoid, renormalise=False
    )
    x_TD = tokens(40)
    routing = route(router, x_TD)
    assert (routing.expert_TK // 2 == routing.expert_TK[:, :1] // 2).all()
    score_TE = (x_TD @ router.weight.T).sigmoid()
    torch.testing.assert_close(routing.weight_TK, score_TE.gather(1, routing.expert_TK))


def test_permuted_tokens_are_routed_alike() -> None:
    router, x_TD = make_router(8, 2), tokens(64)
    order_T = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    routing, permuted = route(router, x_TD), route(router, x_TD[order_T])
    assert torch.equal(permuted.expert_TK, routing.expert_TK[order_T])
    torch.testing.assert_close(permuted.weight_TK, routing.weight_TK[order_T])


def test_renamed_experts_are_chosen_by_their_new_names() -> None:
    router, x_TD = make_router(8, 2), tokens(64)
    renamed = copy.deepcopy(router)
    order_E = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        renamed.weight.copy_(router.weight[order_E])
    routing, other = route(router, x_TD), route(renamed, x_TD)
    assert torch.equal(order_E[other.expert_TK], routing.expert_TK)
    torch.testing.assert_close(other.weight_TK, routing.weight_TK)


def test_no_token_gives_empty_routing_zero_losses_and_gradients() -> None:
    for scope in BalanceScope:
        router = make_router(8, 2, balance_scope=scope)
        x_TD = torch.zeros(0, HIDDEN, requires_grad=True)
        routing = route(router, x_TD)
        assert routing.expert_TK.shape == (0, 2)
        total = sum(routing.losses.values(), routing.weight_TK.sum())
        assert float(total.detach()) == 0
        total.backward()
        assert router.weight.grad is not None
        assert not router.weight.grad.any()
        assert routing.load is not None
        assert not routing.load.count_E.any()


def test_a_row_of_nan_changes_no_other_row_and_chooses_experts_in_range() -> None:
    for settings in ({}, {"num_groups": 4, "top_groups": 2}, {"score": ScoreFunction.sigmoid}):
        router, x_TD = make_router(8, 3, **settings), tokens(10)
        clean = route(router, x_TD)
        x_TD[4] = float("nan")
        routing = route(router, x_TD)
        others_T = torch.arange(10) != 4
        assert torch.equal(routing.expert_TK[others_T], clean.expert_TK[others_T])
        assert torch.equal(routing.weight_TK[others_T], clean.weight_TK[others_T])
        assert 0 <= int(routing.expert_TK[4].min()) <= int(routing.expert_TK[4].max()) < 8
        assert len(set(routing.expert_TK[4].tolist())) == 3
        assert routing.load is not None
        assert torch.isfinite(routing.load.count_E).all()
        assert routing.load.count_E.sum() == 30


@pytest.mark.parametrize("score", [s for s in ScoreFunction if s is not ScoreFunction.relu])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_logits_choose_different_experts_in_range(
    score: ScoreFunction, value: float
) -> None:
    router = logits_router(6, 2, score=score)
    logits_TE = torch.randn(4, 6)
    logits_TE[1, 2] = value
    logits_TE[2] = value
    with torch.no_grad():  # inf * 0 would be NaN: give the logits themselves
        router._logits = lambda _, context, __: (logits_TE, context)  # type: ignore[method-assign]
        expert_TK = route(router, logits_TE).expert_TK
    assert 0 <= int(expert_TK.min()) <= int(expert_TK.max()) < 6
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    if score is not ScoreFunction.softmax or value < 0:  # softmax of one +inf is a row of NaN
        assert (2 in expert_TK[1].tolist()) == (value > 0)


def test_scores_are_computed_in_fp32_from_bf16_input() -> None:
    router = make_router(64, 2, hidden=256)
    with torch.no_grad():
        router.weight.mul_(256**-0.5)
    x_TD = tokens(2000, 256).bfloat16()
    routing = route(router, x_TD)
    exact_TE = x_TD.double() @ router.weight.double().T
    best_TK = exact_TE.topk(2)
    assert routing.logits_TE is not None
    assert routing.logits_TE.dtype == routing.weight_TK.dtype == torch.float32
    same_T = (routing.expert_TK.sort(1).values == best_TK.indices.sort(1).values).all(1)
    assert same_T.double().mean() > 0.995
    error_TK = routing.weight_TK.double() / best_TK.values.softmax(-1) - 1
    assert error_TK[(routing.expert_TK == best_TK.indices).all(1)].abs().max() < 2**-8
    # the bound has teeth: in bf16 logits more sets than that change
    coarse_TK = (x_TD @ router.weight.bfloat16().T).float().topk(2).indices.sort(1).values
    assert (coarse_TK == best_TK.indices.sort(1).values).all(1).double().mean() < 0.995


def test_scores_stay_fp32_under_autocast() -> None:
    router, x_TD = make_router(8, 2), tokens(16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = route(router, x_TD)
    plain = route(router, x_TD)
    assert cast.logits_TE is not None
    assert plain.logits_TE is not None
    assert torch.equal(cast.logits_TE, plain.logits_TE)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_weight_and_bias_survive_a_cast_of_the_model_bit_for_bit(cast: str) -> None:
    router = make_router(8, 2, bias_rate=0.001)
    router.bias_E.copy_(torch.randn(8) / 3)
    weight_ED, bias_E = router.weight.detach().clone(), router.bias_E.clone()
    model = torch.nn.Sequential(router, torch.nn.Linear(4, 4))
    getattr(model, cast)()
    assert model[1].weight.dtype != torch.float32
    assert torch.equal(router.weight, weight_ED)
    assert torch.equal(router.bias_E, bias_E)
    state = {name: value.bfloat16() for name, value in router.state_dict().items()}
    router.load_state_dict(state)
    assert router.weight.dtype == router.bias_E.dtype == torch.float32


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    settings = {"score": ScoreFunction.sigmoid, "bias_rate": 0.001}
    router, x_TD = make_router(8, 2, **settings), tokens(64)
    router.bias_E.copy_(torch.linspace(-0.3, 0.3, 8))
    routing = route(router, x_TD)
    unbiased = route(make_router(8, 2, **settings), x_TD)
    assert not torch.equal(routing.expert_TK, unbiased.expert_TK)
    score_TE = (x_TD @ router.weight.T).sigmoid()
    chosen_TK = score_TE.gather(1, routing.expert_TK)
    torch.testing.assert_close(routing.weight_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))
    assert not router.bias_E.requires_grad
    assert "bias_E" in router.state_dict()


def test_a_bias_plus_a_constant_chooses_alike() -> None:
    router = make_router(8, 2, score=ScoreFunction.sigmoid, bias_rate=0.001)
    router.bias_E.copy_(torch.linspace(-0.3, 0.3, 8))
    before = route(router, tokens(64))
    router.bias_E += 0.25
    assert torch.equal(route(router, tokens(64)).expert_TK, before.expert_TK)


def test_a_trained_bias_still_counts_after_its_rate_is_set_to_zero() -> None:
    router = make_router(8, 2, score=ScoreFunction.sigmoid, bias_rate=0.0)
    assert (route(router, tokens(64)).expert_TK != 3).any()
    router.bias_E[3] = 10.0
    assert (route(router, tokens(64)).expert_TK[:, 0] == 3).all()


def test_padding_is_left_out_of_counts_losses_health_and_gradients_whatever_it_holds() -> None:
    for scope in BalanceScope:
        router = make_router(8, 2, balance_scope=scope, balance_loss=0.1)
        real_TD = tokens(30)
        padded_TD = torch.cat([real_TD, torch.full((10, HIDDEN), float("nan"))])
        order_T = torch.randperm(40, generator=torch.Generator().manual_seed(4))
        results = []
        for x_TD, padding_T in (
            (real_TD, None),
            (padded_TD[order_T], (torch.arange(40) >= 30)[order_T]),
        ):
            routing = route(router, x_TD, padding_T=padding_T)
            assert routing.load is not None
            total = sum(routing.losses.values(), routing.load.score_E.square().sum())
            real_TK = routing.weight_TK if padding_T is None else routing.weight_TK[~padding_T]
            total = total + real_TK[:, 0].sum()
            gradient = torch.autograd.grad(total, router.weight)[0]
            results.append((routing.load.count_E, routing.load.tokens, total, gradient))
            results[-1] += (routing.health["confidence"], routing.health["entropy"])
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_jitter_moves_training_only_and_by_at_most_its_size() -> None:
    router, x_TD = make_router(8, 2, jitter=0.1), tokens(40)
    key = NoiseKey(seed=0, step=3, sequences=(5, 6))
    plain = make_router(8, 2)(x_TD, RoutingContext(), 0)[0].logits_TE
    jittered = route(router, x_TD, noise=key).logits_TE
    router.eval()
    assert plain is not None
    assert jittered is not None
    assert torch.equal(plain, route(router, x_TD, noise=key).logits_TE)
    bound_TE = 0.1 * (x_TD.abs() @ router.weight.abs().T)
    assert (jittered != plain).any()
    assert ((jittered - plain).abs() <= bound_TE + 1e-5).all()


def test_noise_follows_the_sample_and_not_the_batch() -> None:
    key = NoiseKey(seed=1, step=2, sequences=(4, 5, 6, 7))
    device = torch.device("cpu")
    whole = key.uniform((40, 3), layer=1, device=device)
    halves = [
        NoiseKey(1, 2, part).uniform((20, 3), layer=1, device=device) for part in ((4, 5), (6, 7))
    ]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole, key.uniform((40, 3), layer=1, device=device))
    others = [
        NoiseKey(0, 2, key.sequences).uniform((40, 3), layer=1, device=device),
        NoiseKey(1, 3, key.sequences).uniform((40, 3), layer=1, device=device),
        NoiseKey(1, 2, (5, 6, 7, 8)).uniform((40, 3), layer=1, device=device),
        key.uniform((40, 3), layer=2, device=device),
        key.uniform((40, 3), layer=~1, device=device),
    ]
    assert all((whole != other).float().mean() > 0.99 for other in others)
    assert whole.min() >= 0
    assert whole.max() < 1


def test_the_balancing_preset_is_deepseeks() -> None:
    routing = route(ComposedRouter(HIDDEN, 8, 2, preset("deepseek_v3")), tokens(16), sequences=4)
    assert set(routing.losses) == {"balance"}
    torch.testing.assert_close(routing.weight_TK.sum(1), torch.full((16,), 2.5))
