"""Measures of loads, scores, weights and gradients, against loops and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.ops.reference import ffn_reference
from gatewise.routers.health import health_sums, inner_balance, outer_balance, token_entropy
from gatewise.training.measures.experts import (
    expert_similarity,
    mean_off_diagonal,
    output_squares,
    weight_norms,
)
from gatewise.training.measures.gradients import gradient_split
from gatewise.training.measures.load import (
    dead_share,
    drop_ratio,
    effective_experts,
    effective_k,
    load_cv,
    load_entropy,
    load_ratio,
)


def test_balance_and_collapse_have_known_loads() -> None:
    count_LE = torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])
    assert load_ratio(count_LE).tolist() == [[1, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]]
    assert load_cv(count_LE).tolist() == pytest.approx([0, math.sqrt(3), 1])
    assert load_entropy(count_LE).tolist() == pytest.approx([1, 0, 0.5], abs=1e-6)
    assert effective_experts(count_LE).tolist() == pytest.approx([4, 1, 2])
    assert dead_share(count_LE).tolist() == [0, 0.75, 0.5]


def test_no_tokens_and_one_expert_give_finite_loads() -> None:
    for count_E in (torch.zeros(4), torch.tensor([3.0])):
        for measure in (load_ratio, load_cv, load_entropy, effective_experts, dead_share):
            assert bool(measure(count_E).isfinite().all())


def test_the_effective_k_leaves_drops_out() -> None:
    pairs, dropped, tokens = torch.tensor([20.0, 0]), torch.tensor([5.0, 0]), torch.tensor([10, 0])
    assert effective_k(pairs, dropped, tokens).tolist() == [1.5, 0]
    assert drop_ratio(dropped, pairs).tolist() == [0.25, 0]


def test_scores_are_described_as_in_a_loop() -> None:
    logits_TE = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    share_TE = logits_TE.softmax(-1)
    expert_TK = share_TE.topk(2).indices
    expert_TK[3, 1] = -1
    weight_TK = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))
    padding_T = torch.arange(9) == 7
    entropies, ratios, outers, weights, sums = [], [], [], [], []
    for t in range(9):
        row = share_TE[t].tolist()
        entropies.append(-sum(p * math.log(p) for p in row))
        ordered = sorted(row, reverse=True)
        ratios.append(ordered[0] / ordered[1])
        kept = [k for k in range(2) if expert_TK[t, k] >= 0]
        outers.append(sum(row[int(expert_TK[t, k])] for k in kept))
        weights.append(sum(float(weight_TK[t, k]) for k in kept))
        sums.append(math.log(sum(math.exp(x) for x in logits_TE[t].tolist())))
    assert token_entropy(share_TE).tolist() == pytest.approx(entropies, rel=1e-5)
    assert inner_balance(share_TE).tolist() == pytest.approx(ratios, rel=1e-5)
    assert outer_balance(share_TE, expert_TK).tolist() == pytest.approx(outers, rel=1e-5)
    have = health_sums(logits_TE, share_TE, expert_TK, weight_TK, padding_T=padding_T)
    kept = [t for t in range(9) if t != 7]
    want = {
        "confidence": sum(max(share_TE[t].tolist()) for t in kept),
        "entropy": sum(entropies[t] for t in kept),
        "inner": sum(math.log(ratios[t]) for t in kept),
        "outer": sum(outers[t] for t in kept),
        "weight": sum(weights[t] for t in kept),
        "logsumexp": sum(sums[t] for t in kept),
        "largest_logit": max(abs(x) for t in kept for x in logits_TE[t].tolist()),
    }
    assert {name: float(value) for name, value in have.items()} == pytest.approx(want, rel=1e-5)


def test_flat_and_certain_scores_have_known_values() -> None:
    flat, sure = torch.full((1, 4), 0.25), torch.tensor([[1.0, 0, 0, 0]])
    assert float(token_entropy(flat)) == pytest.approx(math.log(4))
    assert float(token_entropy(sure)) == 0
    assert float(inner_balance(flat)) == 1
    assert float(inner_balance(sure)) > 1e10
    assert float(outer_balance(flat, torch.tensor([[2, 3]]))) == 0.5
    assert float(inner_balance(torch.ones(1, 1))) == 1


def test_padding_that_holds_nan_and_no_token_at_all_give_finite_sums() -> None:
    logits_TE = torch.randn(3, 4)
    logits_TE[1] = math.nan
    expert_TK = torch.zeros(3, 1, dtype=torch.int64)
    padding_T = torch.tensor([False, True, False])
    for rows in (slice(None), slice(0, 0)):
        sums = health_sums(
            logits_TE[rows],
            logits_TE[rows].softmax(-1),
            expert_TK[rows],
            torch.ones(3, 1)[rows],
            padding_T=padding_T[rows],
        )
        assert all(math.isfinite(float(value)) for value in sums.values())


def slow_similarity(w_in: Tensor, w_out: Tensor, parts: int) -> Tensor:
    def direction(vector: Tensor) -> Tensor:
        return vector / vector.norm()

    experts = len(w_in)
    value = torch.zeros(experts, experts, dtype=torch.float64)
    width = w_out.shape[2]
    for a in range(experts):
        for b in range(experts):
            cosines = [float(direction(w_out[a].mean(1)) @ direction(w_out[b].mean(1)))]
            for part in range(parts - 1):
                rows = slice(part * width, (part + 1) * width)
                one, two = w_in[a, rows].mean(0), w_in[b, rows].mean(0)
                cosines.append(float(direction(one) @ direction(two)))
            value[a, b] = sum(cosines) / parts
    return value


@pytest.mark.parametrize("activation", [Activation.swiglu, Activation.relu])
def test_similarity_is_that_of_a_loop_over_pairs(activation: Activation) -> None:
    parts = 3 if activation is Activation.swiglu else 2
    w_in = torch.randn(4, (parts - 1) * 5, 6, dtype=torch.float64)
    w_out = torch.randn(4, 6, 5, dtype=torch.float64)
    have = expert_similarity(w_in, w_out, activation=activation)
    torch.testing.assert_close(have, slow_similarity(w_in, w_out, parts))
    assert have.diagonal().tolist() == pytest.approx([1.0] * 4)
    total = sum(float(have[a, b]) for a in range(4) for b in range(4) if a != b)
    assert mean_off_diagonal(have) == pytest.approx(total / 12)


def test_equal_experts_are_alike_and_unrelated_ones_are_not() -> None:
    one_in, one_out = torch.randn(1, 8, 512), torch.randn(1, 512, 4)
    same = expert_similarity(
        one_in.repeat(3, 1, 1), one_out.repeat(3, 1, 1), activation=Activation.swiglu
    )
    assert mean_off_diagonal(same) == pytest.approx(1)
    other = expert_similarity(
        torch.randn(8, 8, 512), torch.randn(8, 512, 4), activation=Activation.swiglu
    )
    assert abs(mean_off_diagonal(other)) < 0.05  # the mean of all entries would be above 1 / 8
    assert mean_off_diagonal(torch.ones(1, 1)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_weights_of_experts_are_those_of_a_loop(dtype: torch.dtype) -> None:
    experts = GroupedExperts(4, 6, 8, Activation.swiglu).to(dtype)
    for weight in experts.requires_grad_(False).parameters():
        torch.nn.init.normal_(weight)
    x_TD = torch.randn(7, 6, dtype=dtype)
    expert_TK = torch.tensor([[0, 1], [1, 3], [0, -1], [-1, -1], [3, 0], [1, 0], [3, 1]])
    both = output_squares(x_TD[:4], expert_TK[:4], experts)
    both = both + output_squares(x_TD[4:], expert_TK[4:], experts)
    for expert in range(4):
        rows = [t for t in range(7) if expert in expert_TK[t].tolist()]
        end = torch.tensor([len(rows) if e >= expert else 0 for e in range(4)])
        y = ffn_reference(x_TD[rows], end, experts.w_in_eGD, experts.w_out_eDF, Activation.swiglu)
        want = float(y.square().mean().sqrt()) if rows else 0.0
        assert float(both.rms()[expert]) == pytest.approx(want, rel=1e-4)
        norm = torch.cat([weight[expert].flatten() for weight in experts.parameters()]).norm()
        weights = experts.w_in_eGD, experts.w_out_eDF
        assert float(weight_norms(*weights)[expert]) == pytest.approx(float(norm), rel=1e-5)
    assert both.rms()[2] == 0


def test_gradients_of_two_losses_are_told_apart() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    other = torch.tensor([3.0], requires_grad=True)
    split = gradient_split(
        {
            "language": 3 * w[0] + 4 * other[0],
            "balance": -2 * w[0],
            "z": torch.tensor(1.0),
        },
        [w, other],
    )
    assert split.norms == {"language": 5.0, "balance": 2.0, "z": 0.0}
    assert split.cosines == pytest.approx({"language": 1.0, "balance": -0.6, "z": 0.0})
    whole = torch.autograd.grad(3 * w[0] + 4 * other[0] - 2 * w[0], [w, other])
    assert torch.cat(whole).norm() == pytest.approx(math.hypot(1, 4))
