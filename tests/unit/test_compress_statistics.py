"""Costs from routed tokens only are those of the whole layer; what is borrowed, and from whom."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gatewise.compression.costs import FISHER_KINDS, CostKind, costs_of_layer
from gatewise.compression.formats import MatrixFormat, ZeroPoint
from gatewise.compression.grids import GridSearch
from gatewise.compression.observe import Seen, blend
from gatewise.compression.quantize import Quantized, round_to_nearest
from gatewise.compression.statistics import measure_layer
from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.ops.reference import layer_reference

TOKENS, HIDDEN, WIDTH, EXPERTS = 90, 24, 16, 4


def rounding(w_ENK: Tensor, hessian_EKK: Tensor, bits: Sequence[float]) -> list[Quantized]:
    del hessian_EKK
    return round_to_nearest(w_ENK, bits, group=16, search=GridSearch())


@pytest.fixture
def layer() -> tuple[Seen, GroupedExperts, Tensor]:
    """Return inputs that never reach expert 3, its experts, and squared gradients."""
    generator = torch.Generator().manual_seed(0)
    experts = GroupedExperts(EXPERTS, HIDDEN, WIDTH, Activation.swiglu)
    for weight in experts.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator)
    logits_TE[:, 3] = -50
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(2)
    weight_TK = (weight_TK / weight_TK.sum(1, keepdim=True)).double()
    seen = Seen(x_TD, (32, 64, TOKENS), expert_TK, weight_TK, logits_TE)
    return seen, experts, torch.rand(TOKENS, HIDDEN, generator=generator)


def whole_layer(seen: Seen, w_in_EGD: Tensor, w_out_EDF: Tensor) -> Tensor:
    assert seen.expert_TK is not None
    assert seen.weight_TK is not None
    return layer_reference(
        seen.x_TD, seen.expert_TK, seen.weight_TK, w_in_EGD, w_out_EDF, Activation.swiglu
    )


def test_c23_errors_of_routed_tokens_are_those_of_the_whole_layer(
    layer: tuple[Seen, GroupedExperts, Tensor],
) -> None:
    seen, experts, gradient_TD = layer
    found = measure_layer(
        0,
        seen,
        experts,
        widths=[1.0, 2.0],
        what=("both", "in", "out"),
        quantiser=rounding,
        gradient_TD=gradient_TD,
    )
    w_in, w_out = experts.w_in_eGD.detach(), experts.w_out_eDF.detach()
    exact_TD = whole_layer(seen, w_in, w_out)
    for width in (1.0, 2.0):
        new_in = rounding(w_in, w_in, [width] * EXPERTS)
        new_out = rounding(w_out, w_out, [width] * EXPERTS)
        for what, use_in, use_out in (("both", 1, 1), ("in", 1, 0), ("out", 0, 1)):
            for expert in range(EXPERTS):
                one_in, one_out = w_in.clone(), w_out.clone()
                if use_in:
                    one_in[expert] = new_in[expert].dequantise()
                if use_out:
                    one_out[expert] = new_out[expert].dequantise()
                square_TD = (exact_TD - whole_layer(seen, one_in, one_out)).square()
                key = f"{what}/{width:g}"
                want = float(square_TD.sum())
                assert found.squared[key][expert] == pytest.approx(want, rel=1e-5)
                step_TD = exact_TD - whole_layer(seen, one_in, one_out)
                want = float((gradient_TD.double() * step_TD).sum(1).square().sum())
                assert found.fisher[key][expert] == pytest.approx(want, rel=1e-4)
                want = float((gradient_TD.double().square() * square_TD).sum())
                assert found.diagonal[key][expert] == pytest.approx(want, rel=1e-5)
                parts = torch.tensor_split(square_TD.sum(1), [32, 64])
                want = sum(float(part.sum()) ** 0.5 for part in parts)
                assert found.norms[key][expert] == pytest.approx(want, rel=1e-5)


def test_c24_unchanged_weights_and_unused_experts_cost_nothing(
    layer: tuple[Seen, GroupedExperts, Tensor],
) -> None:
    seen, experts, _ = layer

    class Exact(Quantized):
        """A matrix that is not rounded at all, as at 16 bits."""

        def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
            return self.code_NK.to(dtype)

    def keep(w_ENK: Tensor, hessian_EKK: Tensor, bits: Sequence[float]) -> list[Quantized]:
        del hessian_EKK, bits
        shape = MatrixFormat(w_ENK.shape[1], w_ENK.shape[2], 8.0, 16, ZeroPoint.float)
        return [Exact(shape, w_NK, w_NK, None) for w_NK in w_ENK]

    found = measure_layer(0, seen, experts, widths=[8.0], what=("both",), quantiser=keep)
    assert found.squared["both/8"] == [0.0] * EXPERTS
    found = measure_layer(0, seen, experts, widths=[1.0], what=("both",), quantiser=rounding)
    assert found.count[3] == 0
    assert found.squared["both/1"][3] == 0
    assert found.borrowed["in"][3] == found.borrowed["out"][3] == 1
    for kind in CostKind:
        if kind not in FISHER_KINDS:
            assert costs_of_layer(kind, found, [1.0])[3] == [0.0]


def test_a_wider_code_never_costs_more(layer: tuple[Seen, GroupedExperts, Tensor]) -> None:
    seen, experts, _ = layer
    found = measure_layer(0, seen, experts, widths=[1.0, 2.0], what=("both",), quantiser=rounding)
    found.squared["both/2"][0] = 2 * found.squared["both/1"][0]  # as noise may have it
    for row in costs_of_layer(CostKind.fnorm2, found, [1.0, 2.0]):
        assert row[1] <= row[0]


def test_an_expert_with_few_tokens_borrows_and_one_with_many_does_not() -> None:
    own_KK, prior_KK = 30 * torch.eye(8).double(), torch.ones(8, 8).double()
    few_KK, few = blend(own_KK, 8, prior_KK, 100)
    many_KK, many = blend(own_KK, 8000, prior_KK, 100)
    none_KK, none = blend(torch.zeros_like(own_KK), 0, prior_KK, 100)
    assert (few, none) == (0.5, 1.0)
    assert many < 0.001
    assert float(few_KK.trace()) == pytest.approx(float(own_KK.trace()) / 8)
    torch.testing.assert_close(none_KK, prior_KK / 100)
    torch.testing.assert_close(many_KK, own_KK / 8000, rtol=0.01, atol=1e-5)
