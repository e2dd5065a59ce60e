"""RTN and GPTQ: against plain loops, each other, and hostile inputs."""

import math

import pytest
import torch
from torch import Tensor

from gatewise.compression.formats import TERNARY, ZeroPoint
from gatewise.compression.grids import GridSearch, fit_grid, fit_grid_reference
from gatewise.compression.quantize import (
    GptqSettings,
    gptq,
    gptq_reference,
    hessian_loss,
    round_to_nearest,
)

WIDE = GridSearch.wide(low=0.3, high=1.05, steps=26, refine=2, zero=ZeroPoint.float)
WIDTHS = [1.0, TERNARY, 2.0, 3.0, 4.0, 8.0]


def weights(matrices: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(matrices, rows, columns, generator=generator, dtype=torch.float64)


def hessians(matrices: int, columns: int, seed: int = 1) -> Tensor:
    """Return correlated inputs' Hessians."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(matrices, columns, columns, generator=generator, dtype=torch.float64)
    scale = torch.rand(matrices, 1, columns, generator=generator, dtype=torch.float64) + 0.1
    x = torch.randn(matrices, 4 * columns, columns, generator=generator, dtype=torch.float64)
    x = (x + 0.3 * x @ mix) * scale
    return x.transpose(1, 2) @ x


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zero", list(ZeroPoint))
def test_the_grid_is_that_of_plain_loops(bits: float, zero: ZeroPoint) -> None:
    search = GridSearch.wide(low=0.3, high=1.05, steps=9, refine=0, zero=zero)
    w_ENg = weights(2, 3, 24)
    importance_Eg = hessians(2, 24).diagonal(dim1=1, dim2=2)
    scale_EN, zero_EN = fit_grid(w_ENg, importance_Eg, bits, search)
    for matrix in range(2):
        for row in range(3):
            scale, place = fit_grid_reference(
                w_ENg[matrix, row].tolist(), importance_Eg[matrix].tolist(), bits, search
            )
            assert float(scale_EN[matrix, row]) == scale
            assert float(zero_EN[matrix, row]) == place


@pytest.mark.parametrize("bits", WIDTHS)
def test_gptq_gives_the_values_of_the_textbook_update(bits: float) -> None:
    w_ENK, hessian_EKK = weights(1, 5, 40), hessians(1, 40)
    found = gptq(w_ENK, hessian_EKK, [bits], group=16, search=WIDE)[0]
    want = gptq_reference(w_ENK[0], hessian_EKK[0], bits, group=16, search=WIDE)
    torch.testing.assert_close(found.dequantise(torch.float64), want, rtol=0, atol=1e-9)


def test_c15_more_bits_never_lose_more_on_the_calibration_inputs() -> None:
    w_ENK, hessian_EKK = weights(6, 16, 64), hessians(6, 64)
    for quantise in (
        lambda bits: round_to_nearest(w_ENK, [bits] * 6, group=32, search=WIDE),
        lambda bits: gptq(w_ENK, hessian_EKK, [bits] * 6, group=32, search=WIDE),
    ):
        losses = [
            sum(
                hessian_loss(w_NK, q.dequantise(), hessian_KK)
                for w_NK, q, hessian_KK in zip(w_ENK, quantise(bits), hessian_EKK, strict=True)
            )
            for bits in WIDTHS
        ]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0])
def test_c16_gptq_loses_less_than_rounding_on_the_same_grid(bits: float) -> None:
    count = 20
    w_ENK, hessian_EKK = weights(count, 16, 64), hessians(count, 64)
    importance_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
    rounded = round_to_nearest(
        w_ENK, [bits] * count, group=32, search=WIDE, importance_EK=importance_EK
    )
    fed_back = gptq(w_ENK, hessian_EKK, [bits] * count, group=32, search=WIDE)
    losses = [
        [hessian_loss(w_NK, q.dequantise(), h_KK) for q in (near, fed)]
        for w_NK, near, fed, h_KK in zip(w_ENK, rounded, fed_back, hessian_EKK, strict=True)
    ]
    assert sum(fed for _, fed in losses) < sum(near for near, _ in losses)
    assert sum(fed <= near for near, fed in losses) >= 0.95 * count


@pytest.mark.parametrize("bits", WIDTHS)
def test_c17_gptq_with_uncorrelated_even_inputs_is_rounding(bits: float) -> None:
    w_ENK = weights(2, 8, 80)
    eye_EKK = torch.eye(80, dtype=torch.float64).expand(2, -1, -1)
    fed_back = gptq(w_ENK, eye_EKK, [bits] * 2, group=32, search=WIDE)
    rounded = round_to_nearest(w_ENK, [bits] * 2, group=32, search=WIDE)
    for one, other in zip(fed_back, rounded, strict=True):
        assert torch.equal(one.code_NK, other.code_NK)
        assert torch.equal(one.scale_NG, other.scale_NG)


def test_c18_permuted_rows_give_permuted_codes_and_scaled_weights_the_same() -> None:
    w_ENK, hessian_EKK = weights(1, 8, 64), hessians(1, 64)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    plain = gptq(w_ENK, hessian_EKK, [2.0], group=32, search=WIDE)[0]
    permuted = gptq(w_ENK[:, order], hessian_EKK, [2.0], group=32, search=WIDE)[0]
    scaled = gptq(4 * w_ENK, hessian_EKK, [2.0], group=32, search=WIDE)[0]
    assert torch.equal(permuted.code_NK, plain.code_NK[order])
    assert torch.equal(scaled.code_NK, plain.code_NK)
    assert torch.equal(scaled.dequantise(), 4 * plain.dequantise())


@pytest.mark.parametrize("kind", ["dead", "none", "nan", "twins", "infinite"])
def test_c19_hostile_inputs_do_not_crash(kind: str) -> None:
    w_ENK, hessian_EKK = weights(2, 8, 48), hessians(2, 48)
    if kind == "dead":
        hessian_EKK[0, 5] = hessian_EKK[0, :, 5] = 0
    elif kind == "none":
        hessian_EKK[0] = 0
    elif kind == "nan":
        hessian_EKK[0, 3, 4] = math.nan
    elif kind == "infinite":
        hessian_EKK[0, 3, 3] = math.inf
    else:
        hessian_EKK[0] = 1.0  # all columns the same input
    alone = gptq(w_ENK[1:], hessian_EKK[1:], [2.0], group=16, search=WIDE)[0]
    found = gptq(w_ENK, hessian_EKK, [2.0, 2.0], group=16, search=WIDE)
    assert torch.isfinite(found[0].dequantise()).all()
    assert bool(found[0].note) == (kind in ("none", "nan", "infinite"))
    assert torch.equal(found[1].code_NK, alone.code_NK)


def test_c20_signs_stand_for_the_mean_magnitude() -> None:
    w_ENK = weights(1, 6, 64)
    found = round_to_nearest(w_ENK, [1.0], group=64, search=WIDE)[0]
    mean_N1 = w_ENK[0].abs().mean(1, keepdim=True)
    value_NK = found.dequantise(torch.float64)
    assert torch.equal(value_NK.abs(), (found.scale_NG.double() / 2).expand(-1, 64))
    torch.testing.assert_close(value_NK.abs(), mean_N1.expand(-1, 64), rtol=1e-3, atol=0)
    assert torch.equal(value_NK > 0, w_ENK[0] >= 0)
    assert found.zero_NG is None


def test_c21_a_batch_of_mixed_widths_gives_what_each_matrix_gives_alone() -> None:
    w_ENK, hessian_EKK = weights(6, 12, 72), hessians(6, 72)
    together = gptq(w_ENK, hessian_EKK, WIDTHS, group=32, search=WIDE)
    for index, bits in enumerate(WIDTHS):
        one = slice(index, index + 1)
        alone = gptq(w_ENK[one], hessian_EKK[one], [bits], group=32, search=WIDE)[0]
        assert torch.equal(together[index].code_NK, alone.code_NK)
        assert torch.equal(together[index].scale_NG, alone.scale_NG)
        assert together[index].format == alone.format


@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_c22_a_wider_search_of_the_same_kind_is_never_worse(bits: float) -> None:
    w_ENg, importance_Eg = weights(1, 64, 64), torch.ones(1, 64, dtype=torch.float64)

    def error(shares: tuple[float, ...]) -> float:
        search = GridSearch(shares=shares)
        q = round_to_nearest(w_ENg, [bits], group=64, search=search)[0]
        return float((w_ENg[0] - q.dequantise(torch.float64)).square().sum())

    del importance_Eg
    errors = [error((1.0,)), error((1.0, 0.9, 0.8)), error((1.0, 0.9, 0.8, 0.7, 0.6, 0.5))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_the_ways_of_the_release_lose_more_below_four_bits() -> None:
    w_ENK, hessian_EKK = weights(8, 16, 128), hessians(8, 128)
    losses = []
    for search, settings in (
        (GridSearch.mcmoe(), GptqSettings(mcmoe_compat=True)),
        (WIDE, GptqSettings()),
    ):
        found = gptq(w_ENK, hessian_EKK, [2.0] * 8, group=128, search=search, settings=settings)
        losses.append(
            sum(
                hessian_loss(w_NK, q.dequantise(), h_KK)
                for w_NK, q, h_KK in zip(w_ENK, found, hessian_EKK, strict=True)
            )
        )
    assert losses[1] < 0.9 * losses[0]
