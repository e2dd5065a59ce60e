"""What routers choose and how they weigh it: T0 to T4.

The properties of routers are numbered: T0 to T4 in `test_router_choice.py`, T5 and T7 to T9 in
`test_router_losses.py`, T10 to T12 in `test_router_balancing.py`, T13 in
`test_router_recurrence.py`, T14 and T15 in `test_router_state.py`, T6 in
`tests/distributed/test_router_ranks.py`.

Shapes:  T tokens   E experts   K experts per token   D width
"""

import math
from dataclasses import replace

import pytest
import torch
from router_cases import FAMILY, FIXED, ROWWISE, VOCAB, D, E, K, context_of, make, route, tokens
from slow_moe import slow_expert, slow_moe
from torch import Tensor, nn

from gatewise.moe import MoE
from gatewise.moe.capacity import keep_within_capacity
from gatewise.moe.config import Activation
from gatewise.routers import compete
from gatewise.routers.api import Routing, RoutingContext
from gatewise.routers.balance import (
    count_per_expert,
)
from gatewise.routers.choice import stable_topk, top_p_choice
from gatewise.routers.config import (
    RouterConfig,
    ScoreFunction,
    Scorer,
)
from gatewise.routers.presets import preset
from gatewise.routers.router import build_cell, build_router

# --- T0: a slow loop


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (2, 2), (5, 3), (8, 8)])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 64])
def test_t00_the_layer_is_the_slow_loop_over_tokens_and_experts(
    num_experts: int, top_k: int, num_tokens: int
) -> None:
    torch.manual_seed(0)
    layer = MoE(6, 4, num_experts, top_k, activation="gelu").double()
    leaves = [layer.router.weight, layer.experts.w_in_eGD, layer.experts.w_out_eDF]  # type: ignore[attr-defined]
    for leaf in leaves:
        nn.init.normal_(leaf)
    x_TD = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    sign_TD = torch.randn(num_tokens, 6, dtype=torch.float64)
    y_TD = layer(x_TD)
    slow_TD = slow_moe(x_TD, *leaves, top_k=top_k, activation=Activation.gelu)
    torch.testing.assert_close(y_TD, slow_TD, rtol=1e-10, atol=1e-12)
    have = torch.autograd.grad((y_TD * sign_TD).sum(), [x_TD, *leaves])
    want = torch.autograd.grad((slow_TD * sign_TD).sum(), [x_TD, *leaves], allow_unused=True)
    for mine, slow in zip(have, want, strict=True):
        slow = torch.zeros_like(mine) if slow is None else slow  # noqa: PLW2901 - no token at all
        torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(FAMILY) - {"soft"}))
def test_t00_any_routing_is_combined_as_the_slow_loop_does(name: str) -> None:
    torch.manual_seed(0)
    layer = MoE(D, 4, E, K, activation="relu", router=name, vocab_size=VOCAB).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x_TD = torch.randn(9, D, dtype=torch.float64)
    ids_T = torch.arange(9)
    seen: list[Routing] = []
    layer.layer.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    y_TD = layer(x_TD, token_ids=ids_T)
    rows = []
    for x_D, expert_K, weight_K in zip(
        x_TD, seen[0].expert_TK.tolist(), seen[0].weight_TK, strict=True
    ):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(expert_K, weight_K, strict=True):
            if expert >= 0:
                w_in_GD, w_out_DF = layer.experts.w_in_eGD[expert], layer.experts.w_out_eDF[expert]
                y_D = y_D + weight * slow_expert(x_D, w_in_GD, w_out_DF, Activation.relu)
        rows.append(y_D)
    torch.testing.assert_close(y_TD, torch.stack(rows), rtol=1e-10, atol=1e-12)


def test_t00_soft_slots_are_the_formula() -> None:
    torch.manual_seed(0)
    config = replace(preset("soft"), slots=2)
    layer = MoE(D, 4, E, K, activation="relu", router=config).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x_BPD = torch.randn(2, 5, D, dtype=torch.float64)
    rows = []
    for x_PD in x_BPD:
        logits_PS = x_PD @ layer.router.weight.T  # type: ignore[attr-defined]
        slot_SD = logits_PS.softmax(0).T @ x_PD
        out_SD = torch.stack(
            [
                slow_expert(
                    x_D,
                    layer.experts.w_in_eGD[s // 2],
                    layer.experts.w_out_eDF[s // 2],
                    Activation.relu,
                )
                for s, x_D in enumerate(slot_SD)
            ]
        )
        rows.append(logits_PS.softmax(1) @ out_SD)
    torch.testing.assert_close(layer(x_BPD), torch.stack(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scorer", [Scorer.recurrent, Scorer.cosine, Scorer.mlp])
def test_t00_gradients_of_a_scorer_are_those_of_finite_differences(scorer: Scorer) -> None:
    config = RouterConfig(scorer=scorer, state_dim=3, mlp_width=3, cosine_dim=2)
    router = build_router(config, 4, 3, 2, cell=build_cell(config, 4)).double()
    x_TD = tokens(2, width=4).double().requires_grad_()
    state_TH = tokens(2, 5, width=3).double().requires_grad_()

    def logits(x_TD: Tensor, state_TH: Tensor) -> Tensor:
        return router._logits(x_TD, RoutingContext(state_TH=state_TH), None)[0]

    assert torch.autograd.gradcheck(logits, (x_TD, state_TH))


# --- T1 and T2: weights and indices


@pytest.mark.parametrize("name", sorted(set(FAMILY) - {"soft"}))
def test_t01_weights_are_at_least_0_and_0_only_where_no_expert_is(name: str) -> None:
    routing = route(name, tokens(40))
    assert (routing.weight_TK >= 0).all()
    assert not routing.weight_TK[routing.expert_TK < 0].any()
    config = preset(name)
    if config.renormalise:
        want_T = torch.full((40,), config.scale)
        torch.testing.assert_close(routing.weight_TK.sum(1), want_T, rtol=1e-6, atol=1e-6)
    elif config.score is ScoreFunction.softmax:
        assert (routing.weight_TK.sum(1) <= 1 + 1e-6).all()


def test_t01_each_family_gives_its_number_of_experts() -> None:
    x_TD = tokens(60)
    for name in FIXED:
        assert ((route(name, x_TD).expert_TK >= 0).sum(1) == K).all(), name
    assert ((route("top_p", x_TD).expert_TK >= 0).sum(1) >= 1).all()
    taken_TK = route("expert_choice", x_TD).expert_TK
    assert count_per_expert(taken_TK, E, variable=True).tolist() == [math.ceil(2 * 60 / E)] * E
    relu = route("remoe", x_TD)
    assert torch.equal(relu.expert_TK >= 0, relu.logits_TE > 0)  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(set(FAMILY) - {"soft"}))
def test_t02_experts_of_a_token_are_different_and_in_range(name: str) -> None:
    expert_TK = route(name, tokens(40)).expert_TK
    assert expert_TK.dtype == torch.int64
    assert -1 <= int(expert_TK.min()) <= int(expert_TK.max()) < E
    for row in expert_TK.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(set(chosen)) == len(chosen)


def test_t02_ties_go_to_the_lowest_index() -> None:
    equal_TE = torch.full((4, E), 0.25)
    assert stable_topk(equal_TE, 3).tolist() == [[0, 1, 2]] * 4
    assert top_p_choice(equal_TE * 4 / E, 0.4).tolist() == [[0, 1, 2, -1, -1, -1]] * 4
    taken_TE = compete.expert_choice(equal_TE, factor=3.0, sequences=1, padding_T=None)
    assert (taken_TE[:2] >= 0).all()  # ceil(3 * 4 / 6) tokens, the first ones
    assert (taken_TE[2:] < 0).all()


# --- T3: permutations


@pytest.mark.parametrize("name", ROWWISE)
def test_t03_permuted_tokens_get_their_own_experts(name: str) -> None:
    router, x_TD, context = make(name), tokens(32), context_of(32)
    state_TH = tokens(32, 3, width=128) if name == "rmoe" else None
    order_T = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    assert context.token_ids is not None
    moved = replace(context, token_ids=context.token_ids[order_T])
    if state_TH is not None:
        context, moved = (
            replace(context, state_TH=state_TH),
            replace(moved, state_TH=state_TH[order_T]),
        )
    (one, after), (two, after_moved) = router(x_TD, context, 0), router(x_TD[order_T], moved, 0)
    assert torch.equal(two.expert_TK, one.expert_TK[order_T])
    torch.testing.assert_close(two.weight_TK, one.weight_TK[order_T])
    if name == "rmoe":
        torch.testing.assert_close(after_moved.state_TH, after.state_TH[order_T])


@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn", "soft"])
def test_t03_tokens_that_compete_depend_on_their_own_sequence_only(name: str) -> None:
    router, x_TD = make(name).train(), tokens(32)
    alone = router(x_TD[:16], context_of(16), 0)[0]
    both = router(x_TD, context_of(32, sequences=2), 0)[0]
    changed_TD = torch.cat((x_TD[:16], tokens(16, 7)))
    other = router(changed_TD, context_of(32, sequences=2), 0)[0]
    mixed = router(torch.cat((x_TD[:15], tokens(1, 8))), context_of(16), 0)[0]
    if name == "soft":
        for routing in (both, other):
            torch.testing.assert_close(routing.slots.gather_BSP[0], alone.slots.gather_BSP[0])
        assert not torch.equal(mixed.slots.gather_BSP[0, :, :15], alone.slots.gather_BSP[0, :, :15])
    else:
        assert torch.equal(both.expert_TK[:16], alone.expert_TK)
        assert torch.equal(other.expert_TK[:16], alone.expert_TK)


# --- T4: capacity


@pytest.mark.parametrize("name", ["mixtral", "top_p", "remoe"])
def test_t04_experts_keep_at_most_their_capacity_also_of_a_varying_number(name: str) -> None:
    layer = MoE(D, 4, E, K, router=name, capacity_factor=0.5).train()
    nn.init.normal_(layer.router.weight)  # type: ignore[attr-defined]
    x_TD = tokens(48)
    asked = layer.router(x_TD, RoutingContext(), 0)[0]
    _, routing, _ = layer.layer(x_TD, RoutingContext(), 0)
    capacity = math.ceil(0.5 * K * 48 / E)
    demand_E = count_per_expert(asked.expert_TK, E, variable=True)
    kept_E = count_per_expert(routing.expert_TK, E, variable=True)
    assert torch.equal(kept_E, demand_E.clamp(max=capacity))
    assert float(routing.health["dropped"]) == float((demand_E - kept_E).sum())
    for expert in range(E):  # the largest weights stay
        mine = asked.weight_TK[asked.expert_TK == expert].sort(descending=True).values
        kept = routing.weight_TK[routing.expert_TK == expert].sort(descending=True).values
        assert torch.equal(mine[:capacity], kept)


def test_t04_position_keeps_the_first_tokens_and_notices_their_order() -> None:
    expert_TK = torch.zeros(10, 1, dtype=torch.int64)
    same_TK = torch.zeros(10, 1)
    keep_TK = keep_within_capacity(expert_TK, same_TK, num_experts=1, capacity=4)
    assert keep_TK[:, 0].tolist() == [True] * 4 + [False] * 6
