"""State, top-p, hash layers and MoE-X: T14 and T15.

The properties of routers are numbered: T0 to T4 in `test_router_choice.py`, T5 and T7 to T9 in
`test_router_losses.py`, T10 to T12 in `test_router_balancing.py`, T13 in
`test_router_recurrence.py`, T14 and T15 in `test_router_state.py`, T6 in
`tests/distributed/test_router_ranks.py`.

Shapes:  T tokens   E experts   K experts per token   D width
"""

import copy
from dataclasses import replace

import pytest
import torch
from router_cases import FAMILY, VOCAB, D, E, K, context_of, decoder, make, token_ids, tokens

from gatewise.moe import MoE
from gatewise.routers.api import ExpertColumns, RoutingContext
from gatewise.routers.choice import top_p_choice
from gatewise.routers.hashing import balanced_table, expert_table, read_table
from gatewise.routers.presets import preset
from gatewise.routers.router import build_router
from gatewise.routers.scorers import sparsity_logits

# --- T14: state


@pytest.mark.parametrize("name", FAMILY)
def test_t14_a_state_dict_gives_the_same_bits_back(name: str) -> None:
    model = decoder(name, layers=2)
    for router in model.routers():
        for tensor in router.state().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape))
            else:  # another table than the one that the settings make
                tensor.copy_(tensor.flip(0))
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
