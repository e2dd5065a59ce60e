"""Losses, recomputation, edges and precision of every router: T5, T7 to T9.

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
from router_cases import (
    FAMILY,
    ROWWISE,
    VOCAB,
    D,
    E,
    K,
    context_of,
    decoder,
    make,
    route,
    token_ids,
    tokens,
)
from slow_moe import slow_expert

from gatewise.moe import MoE
from gatewise.moe.config import Activation
from gatewise.routers import losses
from gatewise.routers.api import NoiseKey, RoutingContext
from gatewise.routers.balance import (
    balance_loss,
    count_per_expert,
    sequence_balance_loss,
    z_loss,
)
from gatewise.routers.choice import stable_topk, top_p_choice
from gatewise.routers.presets import preset
from gatewise.routers.router import build_cell, build_router

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
        # The table of a hash layer is the one piece of state that holds indices.
        assert tensor.dtype == (torch.float32 if before[name_].is_floating_point() else torch.int64)
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
