"""Properties that every router of the family has: T0 to T15, one place to find them.

T6 at several ranks and T14 across layouts are in `tests/distributed/test_router_ranks.py`; pieces
that a router shares with the layer (capacity, permutation) are tested in files of their own too.

Shapes:  T tokens   E experts   K experts per token   D width
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from slow_moe import slow_expert, slow_moe
from torch import Tensor, nn

from gatewise.moe import MoE
from gatewise.moe.capacity import keep_within_capacity
from gatewise.moe.config import Activation, ModelConfig, count_parameters
from gatewise.moe.model import Block, Decoder, parameter_specs
from gatewise.moe.parallelize import build_model
from gatewise.parallel.collectives import NO_GROUP
from gatewise.routers import compete, losses
from gatewise.routers.api import Demand, ExpertColumns, NoiseKey, Routing, RoutingContext
from gatewise.routers.balance import (
    balance_loss,
    count_per_expert,
    global_balance_loss,
    max_violation,
    sequence_balance_loss,
    z_loss,
)
from gatewise.routers.choice import stable_topk, top_p_choice
from gatewise.routers.config import (
    BiasRule,
    Cell,
    Recurrence,
    RouterConfig,
    RouterStart,
    ScoreFunction,
    Scorer,
)
from gatewise.routers.hashing import balanced_table, expert_table, read_table
from gatewise.routers.presets import PRESETS, preset
from gatewise.routers.recurrent import RecurrentCell
from gatewise.routers.router import ComposedRouter, build_cell, build_router
from gatewise.routers.scorers import sparsity_logits
from gatewise.routers.shapes import router_parameters

D, E, K, VOCAB = 12, 6, 2, 50
# routers that choose in each layer; those that choose ahead are in test_pregate.py
FAMILY = sorted(name for name in PRESETS if not name.endswith("pregate"))
FIXED = sorted(set(FAMILY) - {"top_p", "remoe", "expert_choice", "soft"})  # always K experts
ROWWISE = sorted(set(FAMILY) - {"expert_choice", "sinkhorn", "soft"})  # each token by itself


def make(name: str, *, top_k: int = K, hidden: int = D, **changes: object) -> ComposedRouter:
    """Build a preset's router with lively weights, in evaluation."""
    config = replace(preset(name), **changes)  # type: ignore[arg-type]
    torch.manual_seed(1)
    router = build_router(
        config, hidden, E, top_k, cell=build_cell(config, hidden), vocab_size=VOCAB
    )
    for parameter in router.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter)
    return router.eval()


def context_of(num_tokens: int, *, sequences: int = 1, **more: object) -> RoutingContext:
    generator = torch.Generator().manual_seed(9)
    ids_T = torch.randint(VOCAB, (num_tokens,), generator=generator)
    columns = ExpertColumns(
        torch.randn(E, D, generator=generator), torch.rand(E, D, generator=generator)
    )
    return RoutingContext(token_ids=ids_T, sequences=sequences, columns=columns, **more)  # type: ignore[arg-type]


def tokens(num_tokens: int, seed: int = 0, width: int = D) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def route(name: str, x_TD: Tensor, **changes: object) -> Routing:
    return make(name, **changes)(x_TD, context_of(x_TD.shape[0]), 0)[0]


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


# --- T5: losses


def test_t05_the_balance_loss_is_1_at_balance_and_e_over_k_at_collapse() -> None:
    even_E, tokens_T = torch.full((E,), 4.0), torch.tensor(12.0)
    assert float(balance_loss(torch.full((E,), 2.0), even_E, tokens=tokens_T, top_k=2)) == 1
    one_E = torch.tensor([12.0, 12.0] + [0.0] * (E - 2))
    collapsed = balance_loss(one_E / 2, one_E, tokens=tokens_T, top_k=2)
    assert float(collapsed) == pytest.approx(E / 2)


def test_t05_one_sequence_is_the_micro_batch_and_gradients_are_the_formulas() -> None:
    logits_TE = tokens(20, width=E).requires_grad_()
    share_TE = logits_TE.softmax(-1)
    expert_TK = stable_topk(share_TE.detach(), K)
    loss = sequence_balance_loss(share_TE, expert_TK, sequences=1)
    count_E = count_per_expert(expert_TK, E)
    by_hand = E * (count_E / (20 * K) * share_TE.mean(0)).sum()
    torch.testing.assert_close(loss, by_hand)
    (have,) = torch.autograd.grad(loss, logits_TE, retain_graph=True)
    (want,) = torch.autograd.grad(by_hand, logits_TE)
    torch.testing.assert_close(have, want)


def test_t05_a_varying_number_is_counted_as_it_is() -> None:
    share_TE = tokens(12, width=E).softmax(-1)
    expert_TK = top_p_choice(share_TE, 0.6)
    loss = sequence_balance_loss(share_TE, expert_TK, sequences=1, top_k=K)
    count_E = count_per_expert(expert_TK, E, variable=True)
    torch.testing.assert_close(loss, E * (count_E / (12 * K) * share_TE.mean(0)).sum())


def test_t05_the_z_loss_of_equal_logits_is_the_square_of_ln_e_plus_their_value() -> None:
    assert float(z_loss(torch.zeros(5, E))) == pytest.approx(math.log(E) ** 2, rel=1e-6)
    assert float(z_loss(torch.full((5, E), 2.0))) == pytest.approx((math.log(E) + 2) ** 2, rel=1e-6)


def test_t05_entropy_and_variation_losses_have_their_known_values() -> None:
    equal_TE = torch.zeros(5, E)
    assert float(losses.batch_entropy_loss(equal_TE, sequences=1, padding_T=None)) == pytest.approx(
        -math.log(E), rel=1e-6
    )
    assert float(losses.token_entropy_loss(equal_TE.softmax(-1), padding_T=None)) == pytest.approx(
        math.log(E), rel=1e-6
    )
    one_TE = torch.zeros(5, E)
    one_TE[:, 0] = 1.0
    varied = losses.squared_variation(one_TE, sequences=1, padding_T=None)
    assert float(varied) == pytest.approx(E - 1, rel=1e-5)


def test_t05_the_smooth_load_is_the_share_of_draws_that_choose_the_expert() -> None:
    clean_TE, size_TE = tokens(1, width=E), torch.full((1, E), 0.7)
    noisy_TE = clean_TE + size_TE * tokens(1, 4, width=E)
    expert_TK = stable_topk(noisy_TE, K)
    load_TE = losses.smooth_load(clean_TE, noisy_TE, size_TE, expert_TK)
    generator = torch.Generator().manual_seed(3)
    for expert in range(E):
        drawn_NE = noisy_TE.repeat(20000, 1)
        drawn_NE[:, expert] = clean_TE[0, expert] + 0.7 * torch.randn(20000, generator=generator)
        share = float((stable_topk(drawn_NE, K) == expert).any(1).double().mean())
        assert float(load_TE[0, expert]) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    "name", ["gshard", "shazeer", "sigma_moe", "top_p", "deepseek_v4", "remoe"]
)
def test_t05_padding_changes_no_loss_no_count_and_no_gradient(name: str) -> None:
    results = []
    for extra in (0, 6):
        router = make(name, **({"balance_loss": 1.0} if name == "remoe" else {}))
        x_TD = torch.cat((tokens(20), torch.full((extra, D), float("nan"))))
        padding_T = torch.arange(20 + extra) >= 20
        context = replace(context_of(20 + extra), padding_T=padding_T if extra else None)
        context = replace(context, token_ids=torch.arange(20 + extra) % VOCAB)
        routing = router(x_TD, context, 0)[0]
        assert routing.load is not None
        weight_TK = routing.weight_TK[:20]
        total = sum(routing.losses.values(), weight_TK[:, 0].sum() + routing.load.score_E[0])
        grads = torch.autograd.grad(total, router.weight)
        results.append((routing.load.count_E, routing.load.tokens, total, *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# --- T7: determinism and recomputation


@pytest.mark.parametrize("name", FAMILY)
def test_t07_recomputation_gives_the_same_experts_gradients_and_random_state(name: str) -> None:
    results = []
    for recompute in (False, True, True):
        model = decoder(name, layers=2).train()
        model.recompute = recompute
        torch.manual_seed(5)
        output = model(token_ids(), RoutingContext(noise=NoiseKey(0, 3, (4, 5))))
        total = output.hidden_BSD.square().sum()
        total = sum((v for r in output.routings for v in r.losses.values()), total)
        total.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append(
            [output.hidden_BSD, *(r.expert_TK for r in output.routings), *grads, torch.rand(3)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def decoder(name: str, *, layers: int = 3, dense: int = 0, **changes: object) -> Decoder:
    config = replace(preset(name), allow_noncausal=True, **changes)  # type: ignore[arg-type]
    sizes = ModelConfig(
        layers=layers,
        hidden=D,
        heads=2,
        num_experts=E,
        top_k=K,
        expert_width=8,
        dense_layers=dense,
        init_std=0.3,
    )
    return build_model(
        sizes,
        config,
        vocab_size=VOCAB,
        group=NO_GROUP,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
    )


def token_ids() -> Tensor:
    return torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(6))


# --- T8: edges


@pytest.mark.parametrize("name", FAMILY)
def test_t08_no_token_gives_empty_output_and_zero_gradients(name: str) -> None:
    layer = MoE(D, 4, E, K, router=name, vocab_size=VOCAB).train()
    x_TD = torch.zeros(0, D, requires_grad=True)
    y_TD = layer(x_TD, token_ids=torch.zeros(0, dtype=torch.int64))
    total = sum(layer.losses.values(), y_TD.sum())
    assert y_TD.shape == (0, D)
    assert float(total.detach()) == 0
    total.backward()
    for parameter in layer.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert layer.experts.w_in_eGD.grad is not None
    layer.update_router()


@pytest.mark.parametrize("name", ROWWISE)
def test_t08_a_row_of_nan_spoils_no_other_row_and_keeps_counts_finite(name: str) -> None:
    router, x_TD = make(name), tokens(10)
    clean = router(x_TD, context_of(10), 0)[0]
    spoilt_TD = x_TD.clone()
    spoilt_TD[4] = float("nan")
    routing = router(spoilt_TD, context_of(10), 0)[0]
    others_T = torch.arange(10) != 4
    assert torch.equal(routing.expert_TK[others_T], clean.expert_TK[others_T])
    torch.testing.assert_close(routing.weight_TK[others_T], clean.weight_TK[others_T])
    assert -1 <= int(routing.expert_TK[4].min()) <= int(routing.expert_TK[4].max()) < E
    assert routing.load is not None
    assert torch.isfinite(routing.load.count_E).all()


def test_t08_all_experts_are_the_dense_mixture_and_one_expert_is_itself() -> None:
    routing = route("mixtral", tokens(20), top_k=E)
    assert routing.logits_TE is not None
    dense_TE = torch.zeros(20, E).scatter(1, routing.expert_TK, routing.weight_TK)
    torch.testing.assert_close(dense_TE, routing.logits_TE.softmax(-1))
    torch.manual_seed(0)
    layer = MoE(D, 4, 1, 1)
    slow_TD = torch.stack(
        [
            slow_expert(
                x_D, layer.experts.w_in_eGD[0], layer.experts.w_out_eDF[0], Activation.swiglu
            )
            for x_D in tokens(5)
        ]
    )
    torch.testing.assert_close(layer(tokens(5)), slow_TD)


# --- T9: precision


@pytest.mark.parametrize("name", ["mixtral", "rmoe", "deepseek_v4", "xmoe"])
def test_t09_router_arithmetic_and_state_stay_fp32_in_a_bf16_model(name: str) -> None:
    model = decoder(name, layers=2)
    router = model.routers()[0]
    before = {n: t.clone() for n, t in (*router.named_parameters(), *router.state().items())}
    model.bfloat16()
    assert model.embedding.dtype == torch.bfloat16
    for name_, tensor in (*router.named_parameters(), *router.state().items()):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name_])
    routing, context = router(tokens(6).bfloat16(), context_of(6), 0)
    assert routing.weight_TK.dtype == torch.float32
    assert context.state_TH is None or context.state_TH.dtype == torch.float32
    if model.router_cell is not None:
        assert model.router_cell.weight_ih.dtype == torch.float32


def test_t09_bf16_tokens_flip_few_sets() -> None:
    config = preset("rmoe")
    torch.manual_seed(0)
    router = build_router(config, 64, 16, 2, cell=build_cell(config, 64))
    x_TD = tokens(2000, width=64).bfloat16()
    have = router(x_TD, RoutingContext(), 0)[0]
    want = router(x_TD.double(), RoutingContext(), 0)[0]
    same_T = (have.expert_TK.sort(1).values == want.expert_TK.sort(1).values).all(1)
    assert same_T.double().mean() > 0.995


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


# --- T13: RMoE


def chain(config: RouterConfig, layers: int = 4) -> list[ComposedRouter]:
    torch.manual_seed(2)
    cell = build_cell(config, D)
    return [build_router(config, D, E, K, cell=cell, index=i).double() for i in range(layers)]


def logits_of(routers: list[ComposedRouter], inputs: list[Tensor]) -> list[Tensor]:
    context, found = RoutingContext(), []
    for layer, (router, x_TD) in enumerate(zip(routers, inputs, strict=True)):
        routing, context = router(x_TD, context, layer)
        assert routing.logits_TE is not None
        found.append(routing.logits_TE)
    return found


def recurrent(**settings: object) -> RouterConfig:
    return RouterConfig(scorer=Scorer.recurrent, state_dim=8, z_loss=0.0, **settings)  # type: ignore[arg-type]


def layer_inputs(layers: int = 4) -> list[Tensor]:
    return [tokens(5, 20 + i).double().requires_grad_() for i in range(layers)]


def as_double(routers: list[ComposedRouter]) -> RecurrentCell:
    (cell,) = routers[0]._shared
    assert cell is not None
    return cell.double()  # type: ignore[return-value]  # torch returns the module


@pytest.mark.parametrize(
    ("cell", "reference"),
    [(Cell.gru, nn.GRUCell), (Cell.rnn, nn.RNNCell), (Cell.lstm, nn.LSTMCell)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_t13_logits_are_those_of_torchs_cell_run_over_the_layers(
    cell: Cell, reference: type, shared: bool
) -> None:
    routers, inputs = chain(recurrent(cell=cell, shared_projection=shared)), layer_inputs()
    ours, theirs = as_double(routers), reference(D if shared else 8, 8).double()
    theirs.load_state_dict(ours.state_dict())
    state = None
    for router, x_TD, logits_TE in zip(routers, inputs, logits_of(routers, inputs), strict=True):
        read = x_TD if shared else x_TD @ router.projection.T
        state = theirs(read, state)
        hidden = state[0] if cell is Cell.lstm else state
        torch.testing.assert_close(logits_TE, hidden @ router.weight.T)


def test_t13_the_gru_is_the_written_formula() -> None:
    (router,), (x_TD,) = chain(recurrent(), 1), layer_inputs(1)
    cell, h_TH = as_double([router]), tokens(5, 40, width=8).double()
    read_TH = x_TD @ router.projection.T
    w_r, w_z, w_n = cell.weight_ih.chunk(3)
    u_r, u_z, u_n = cell.weight_hh.chunk(3)
    bi_r, bi_z, bi_n = cell.bias_ih.chunk(3)
    bh_r, bh_z, bh_n = cell.bias_hh.chunk(3)
    r_TH = torch.sigmoid(read_TH @ w_r.T + bi_r + h_TH @ u_r.T + bh_r)
    z_TH = torch.sigmoid(read_TH @ w_z.T + bi_z + h_TH @ u_z.T + bh_z)
    n_TH = torch.tanh(read_TH @ w_n.T + bi_n + r_TH * (h_TH @ u_n.T + bh_n))
    want_TH = (1 - z_TH) * n_TH + z_TH * h_TH
    _, context = router(x_TD, RoutingContext(state_TH=h_TH), 0)
    torch.testing.assert_close(context.state_TH, want_TH)


def reached(recurrence: Recurrence) -> list[bool]:
    routers, inputs = chain(recurrent(recurrence=recurrence)), layer_inputs()
    as_double(routers)
    last_TE = logits_of(routers, inputs)[-1]
    grads = torch.autograd.grad(last_TE.square().sum(), inputs, allow_unused=True)
    return [grad is not None and bool(grad.any()) for grad in grads]


def test_t13_the_recurrence_reaches_all_earlier_layers_and_its_controls_none() -> None:
    assert reached(Recurrence.full) == [True] * 4
    assert reached(Recurrence.detach) == [False] * 3 + [True]
    assert reached(Recurrence.none) == [False] * 3 + [True]


def test_t13_detaching_changes_no_value_and_leaving_the_state_out_does() -> None:
    full, cut, none = (chain(recurrent(recurrence=kind)) for kind in Recurrence)
    inputs = layer_inputs()
    for routers in (full, cut, none):
        as_double(routers)
    wanted, found = logits_of(full, inputs), logits_of(cut, inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    other = logits_of(none, inputs)
    assert torch.equal(other[0], wanted[0])
    assert not torch.equal(other[1], wanted[1])


def test_t13_residual_scores_add_a_share_of_the_previous_layers_own_logits() -> None:
    inputs = layer_inputs()
    plain = chain(recurrent(recurrence=Recurrence.none))
    residual = chain(recurrent(recurrence=Recurrence.none, residual_scores=0.5))
    as_double(plain), as_double(residual)
    own, mixed = logits_of(plain, inputs), logits_of(residual, inputs)
    torch.testing.assert_close(mixed[0], own[0])
    for layer in (1, 2, 3):
        torch.testing.assert_close(mixed[layer], own[layer] + 0.5 * own[layer - 1])
    with_state = chain(recurrent(residual_scores=0.5))
    both = logits_of(with_state, [x.detach() for x in inputs[:1]] * 4)
    assert all(torch.isfinite(logits_TE).all() for logits_TE in both)


def test_t13_gradients_of_the_shared_cell_are_the_sum_over_copies_of_it() -> None:
    routers, inputs = chain(recurrent()), layer_inputs()
    shared = as_double(routers)
    copies = [copy.deepcopy(shared) for _ in routers]
    total = sum(logits_TE.square().sum() for logits_TE in logits_of(routers, inputs))
    want = torch.autograd.grad(total, list(shared.parameters()))
    for router, cell in zip(routers, copies, strict=True):
        router._shared = (cell,)
    total = sum(logits_TE.square().sum() for logits_TE in logits_of(routers, inputs))
    total.backward()
    for index, gradient in enumerate(want):
        parts = [list(cell.parameters())[index].grad for cell in copies]
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0))


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_t13_blocks_in_two_pieces_with_the_state_handed_over_give_the_same_bits(
    dense: int, cut: int
) -> None:
    """What pipeline stages do: the payload between them is (x, state)."""
    model, ids_BS = decoder("rmoe", layers=4, dense=dense), token_ids()
    whole = model(ids_BS)
    from gatewise.moe.attention import rotary_tables

    rotary = rotary_tables(8, D // 2, model.config.rope_base, start=0, device=ids_BS.device)
    context = RoutingContext(token_ids=ids_BS.flatten(), sequences=2)
    x_BSD = torch.nn.functional.embedding(ids_BS, model.embedding)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    experts = []
    for piece in (blocks[:cut], blocks[cut:]):
        state_TH = context.state_TH  # all that crosses the boundary beside x
        context = RoutingContext(token_ids=ids_BS.flatten(), sequences=2, state_TH=state_TH)
        for block in piece:
            x_BSD, routing, context = block(x_BSD, context, rotary, None)
            experts += [] if routing is None else [routing.expert_TK]
    assert torch.equal(model.norm_final(x_BSD), whole.hidden_BSD)
    assert all(torch.equal(a, b.expert_TK) for a, b in zip(experts, whole.routings, strict=True))


def test_t13_the_state_does_not_notice_drops() -> None:
    torch.manual_seed(0)
    states = []
    for factor in (None, 0.25):
        layer = MoE(D, 4, E, K, router="rmoe", capacity_factor=factor).train()
        nn.init.constant_(layer.router.weight, 0.1)  # type: ignore[attr-defined]
        for number, parameter in enumerate(layer.router_cell.parameters()):  # type: ignore[union-attr]
            parameter.data.copy_(tokens(1, number, parameter.numel()).view_as(parameter))
        layer.router.projection.data.copy_(tokens(128, 9))  # type: ignore[attr-defined]
        states.append(layer.layer(tokens(30), RoutingContext(), 0)[2].state_TH)
    assert torch.equal(states[0], states[1])


def test_t13_the_cell_is_one_module_at_the_root_and_trains() -> None:
    model = decoder("rmoe", layers=3, state_dim=8)
    names = [name for name, _ in model.named_parameters() if "_hh" in name or "_ih" in name]
    assert sorted(names) == [
        f"router_cell.{name}" for name in ("bias_hh", "bias_ih", "weight_hh", "weight_ih")
    ]
    model(token_ids()).hidden_BSD.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.router_cell.parameters())
    labels = {spec.name: spec for spec in parameter_specs(model)}
    assert {labels[name].label for name in names} == {"router"}
    assert [labels[f"router_cell.{n}"].decay for n in ("weight_hh", "bias_hh")] == [True, False]


@pytest.mark.parametrize("cell", list(Cell))
@pytest.mark.parametrize("shared", [False, True])
def test_t13_logits_start_as_large_as_a_linear_routers_or_as_the_release(
    cell: Cell, shared: bool
) -> None:
    hidden, layers = 256, 12
    stds = {}
    for start in RouterStart:
        config = RouterConfig(
            scorer=Scorer.recurrent, cell=cell, shared_projection=shared, start=start
        )
        sizes = ModelConfig(layers=layers, hidden=hidden, heads=2, num_experts=16, expert_width=1)
        model = build_model(
            sizes,
            config,
            vocab_size=4,
            group=NO_GROUP,
            device=torch.device("cpu"),
            dtype=torch.float32,
            seed=0,
        )
        inputs = [tokens(64, i, width=hidden) for i in range(layers)]
        found = logits_of(model.routers(), inputs)
        stds[start] = float(torch.stack(found).detach().std())
    linear = 0.02 * hidden**0.5
    assert stds[RouterStart.matched] == pytest.approx(linear, rel=0.2)
    assert stds[RouterStart.release] < linear / 4


@pytest.mark.parametrize(
    ("settings", "sizes", "want"),
    [
        ({}, (8, 352, 16), 475_904),
        ({"scorer": Scorer.linear}, (8, 352, 16), 45_056),
        ({}, (24, 1280, 16), 4_080_384),
        ({"scorer": Scorer.linear}, (24, 1280, 16), 491_520),
        ({"scorer": Scorer.mlp}, (8, 352, 16), 753_664),
        ({"cell": Cell.rnn}, (8, 352, 16), 409_856),
        ({"cell": Cell.lstm}, (8, 352, 16), 508_928),
        ({"shared_projection": True}, (8, 352, 16), 201_472),
        ({"recurrence": Recurrence.none}, (8, 352, 16), 475_904),
    ],
)
def test_t13_router_parameters_are_the_published_numbers(
    settings: dict[str, object], sizes: tuple[int, int, int], want: int
) -> None:
    layers, hidden, num_experts = sizes
    config = RouterConfig(**{"scorer": Scorer.recurrent, "state_dim": 128, **settings})  # type: ignore[arg-type]
    count = router_parameters(config, hidden=hidden, num_experts=num_experts, layers=layers)
    assert count == want
    model_config = ModelConfig(
        layers=layers, hidden=hidden, heads=8, num_experts=num_experts, expert_width=8
    )
    assert count_parameters(model_config, 256, config).router == want
    with torch.device("meta"):
        model = Decoder(model_config, config, 256)
    specs = parameter_specs(model)
    assert sum(s.parameter.numel() for s in specs if s.label == "router") == want


def test_t13b_true_means_padding() -> None:
    x_BPD = tokens(12).view(2, 6, D)
    padding_BP = torch.zeros(2, 6, dtype=torch.bool)
    padding_BP[:, 4:] = True
    spoilt_BPD = x_BPD.masked_fill(padding_BP.unsqueeze(2), float("nan"))
    for name in FAMILY:
        torch.manual_seed(0)
        layer = MoE(D, 4, E, K, router=name, vocab_size=VOCAB).eval()
        ids_BP = torch.arange(12).view(2, 6)
        y_BPD = layer(spoilt_BPD, padding_BP, ids_BP)
        assert torch.isfinite(y_BPD).all(), name
        assert not y_BPD[padding_BP].any(), name
        assert y_BPD[~padding_BP].any() or name == "remoe", name


# --- T14: state


@pytest.mark.parametrize("name", FAMILY)
def test_t14_a_state_dict_gives_the_same_bits_back(name: str) -> None:
    model = decoder(name, layers=2)
    for router in model.routers():
        for tensor in router.state().values():
            tensor.add_(torch.rand(tensor.shape))
    other = decoder(name, layers=2)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    one, two = model.eval()(token_ids()), other.eval()(token_ids())
    assert torch.equal(one.hidden_BSD, two.hidden_BSD)


# --- T15: top-p, hash, MoE-X


@pytest.mark.parametrize("top_p", [0.1, 0.4, 0.8, 1.0])
def test_t15_top_p_reaches_its_mass_with_the_fewest_experts(top_p: float) -> None:
    share_TE = (3 * tokens(200, width=E)).double().softmax(-1)
    expert_TK = top_p_choice(share_TE, top_p)
    for share_E, chosen_K in zip(share_TE.tolist(), expert_TK.tolist(), strict=True):
        mine = [share_E[e] for e in chosen_K if e >= 0]
        assert mine == sorted(share_E, reverse=True)[: len(mine)]
        assert sum(mine) >= top_p - 1e-12
        assert sum(mine[:-1]) < top_p


def test_t15_a_larger_top_p_never_takes_fewer_experts() -> None:
    share_TE = tokens(100, width=E).softmax(-1)
    sizes = [(top_p_choice(share_TE, p) >= 0).sum(1) for p in (0.2, 0.5, 0.9)]
    assert (sizes[0] <= sizes[1]).all()
    assert (sizes[1] <= sizes[2]).all()


def test_t15_hash_layers_look_at_token_ids_alone_and_need_them() -> None:
    router = make("hash")
    one = router(tokens(20), context_of(20), 0)[0]
    two = router(tokens(20, 5), context_of(20), 0)[0]
    assert torch.equal(one.expert_TK, two.expert_TK)
    assert (one.weight_TK == 1 / K).all()
    half = router(tokens(10), replace(context_of(20), token_ids=context_of(20).token_ids[10:]), 0)
    assert torch.equal(half[0].expert_TK, one.expert_TK[10:])  # a shard of the tokens
    with pytest.raises(ValueError, match="got none"):
        router(tokens(20), RoutingContext(), 0)
    with pytest.raises(ValueError, match="vocab_size is not given"):
        build_router(preset("hash"), D, E, K)


def test_t15_the_first_layers_of_deepseek_v4_hash_with_weights_from_their_scores() -> None:
    first, fourth = (
        build_router(preset("deepseek_v4"), D, E, K, index=index, vocab_size=VOCAB)
        for index in (2, 3)
    )
    x_TD, context = tokens(20), context_of(20)
    hashed, scored = first(x_TD, context, 0)[0], fourth(x_TD, context, 0)[0]
    assert torch.equal(hashed.expert_TK, first.table_VK[context.token_ids])
    assert hashed.logits_TE is not None
    score_TK = torch.nn.functional.softplus(hashed.logits_TE).sqrt().gather(1, hashed.expert_TK)
    torch.testing.assert_close(hashed.weight_TK, 1.5 * score_TK / score_TK.sum(1, keepdim=True))
    assert not first.moves
    assert fourth.moves
    assert scored.losses.keys() == {"balance"}
    assert not hashed.losses


def test_t15_tables_are_fixed_even_and_checked(tmp_path: object) -> None:
    table_VK = expert_table(5000, E, K, layer=1)
    assert torch.equal(table_VK, expert_table(5000, E, K, layer=1))
    assert not torch.equal(table_VK, expert_table(5000, E, K, layer=2))
    assert (table_VK[:, 0] != table_VK[:, 1]).all()
    share_E = torch.bincount(table_VK.flatten(), minlength=E) / (5000 * K)
    assert (share_E - 1 / E).abs().max() < 0.02
    count_V = (1000 / torch.arange(1, VOCAB + 1)).long()
    load_E = torch.zeros(E, dtype=torch.int64)
    load_E.index_add_(0, balanced_table(count_V, E, 1)[:, 0], count_V)
    assert float(load_E[1:].max() - load_E[1:].min()) < 0.1 * float(load_E.sum()) / E


def test_t15_a_table_for_another_vocabulary_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import numpy as np

    path = tmp_path / "table.npy"
    np.save(path, expert_table(40, E, K, layer=0).numpy())
    assert read_table(str(path), 40, E, K).shape == (40, K)
    with pytest.raises(ValueError, match=r"router.hash_table is .* shape \(40, 2\); .*\(50, 2\)"):
        read_table(str(path), VOCAB, E, K)
    with pytest.raises(ValueError, match="different experts from 0 to 3"):
        read_table(str(path), 40, 4, K)
    with pytest.raises(ValueError, match="cannot be read"):
        read_table(str(tmp_path / "none.npy"), 40, E, K)


def test_t15_moe_x_logits_are_the_share_of_active_units_of_drawn_weights() -> None:
    mean_ED, variance_ED = 0.3 * tokens(3, 1), tokens(3, 2).square() + 0.1
    x_TD = tokens(4)
    logits_TE = sparsity_logits(x_TD, ExpertColumns(mean_ED, variance_ED))
    active_TE = (1 - logits_TE) / 2  # logit = -erf(m / (sqrt(2) s)) and P = (1 + erf) / 2
    draws, generator = 20000, torch.Generator().manual_seed(0)
    for expert in range(3):
        noise_ND = torch.randn(draws, D, generator=generator)
        weight_ND = mean_ED[expert] + variance_ED[expert].sqrt() * noise_ND
        share_T = ((weight_ND @ x_TD.T) > 0).double().mean(0)
        sigma_T = (share_T * (1 - share_T) / draws).sqrt()
        assert ((active_TE[:, expert] - share_T).abs() < 3 * sigma_T + 1e-4).all()
    assert torch.equal(
        sparsity_logits(torch.zeros(1, D), ExpertColumns(mean_ED, variance_ED)), torch.zeros(1, 3)
    )


def test_t15_moe_x_takes_gradients_to_the_experts_weights() -> None:
    torch.manual_seed(0)
    layer = MoE(D, 8, E, K, activation="relu", router="moe_x")
    layer(tokens(20))
    (grad,) = torch.autograd.grad(layer.losses["balance"], layer.experts.w_in_eGD)
    assert grad.any()
