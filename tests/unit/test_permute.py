import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops import native, permute
from gatewise.moe.ops.grouped_ffn import ffn_forward
from gatewise.moe.ops.permute import (
    combine_rows,
    combine_rows_backward,
    gather_rows,
    gather_rows_backward,
    sort_pairs,
)
from gatewise.moe.ops.reference import combine_reference, layer_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the C++ kernels, and with torch's operators only."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(native, "load_kernels", lambda: None)
        monkeypatch.setattr(permute, "load_kernels", lambda: None)
    elif native.load_kernels() is None:
        pytest.skip("no C++ compiler")
    return name


def draw_pairs(tokens: int, top_k: int, experts: int, seed: int, *, drop: float = 0.2) -> Tensor:
    """Return distinct experts per token; some pairs are dropped."""
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    return torch.where(torch.rand(expert_TK.shape, generator=generator) < drop, -1, expert_TK)


def sorted_pairs(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `sort_pairs` without the dropped pairs."""
    order, token, inverse, count = sort_pairs(expert_TK, experts)
    kept = int(count.sum())
    return order[:kept], token[:kept], inverse, count


def check_sorting(expert_TK: Tensor, experts: int) -> None:
    """Hold `sort_pairs` to its words."""
    top_k = expert_TK.shape[1]
    order, token, inverse, count = sort_pairs(expert_TK, experts)
    kept = int(count.sum())
    flat = expert_TK.flatten()
    assert kept == int((flat >= 0).sum())
    assert order.sort().values.tolist() == list(range(flat.numel()))  # none lost, none doubled
    by_expert = flat[order]
    assert (by_expert[kept:] == -1).all()
    pairs = list(zip(by_expert[:kept].tolist(), order[:kept].tolist(), strict=True))
    assert pairs == sorted(pairs)  # by expert, then by token, then by choice
    assert torch.equal(token, order // max(top_k, 1))
    assert torch.equal(inverse.flatten()[order[:kept]], torch.arange(kept))
    assert (inverse[expert_TK < 0] == -1).all()
    assert count.tolist() == [int((flat == expert).sum()) for expert in range(experts)]


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 999),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_no_pair_is_lost_or_doubled(
    tokens: int, experts: int, top_k: int, seed: int, drop: float
) -> None:
    expert_TK = draw_pairs(tokens, min(top_k, experts), experts, seed, drop=drop)
    check_sorting(expert_TK, experts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "load_kernels", lambda: None)
        check_sorting(expert_TK, experts)


def test_an_expert_that_does_not_exist_is_refused(engine: str) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        sort_pairs(torch.tensor([[0, 9]]), 4)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(13, 2, 24), (5, 1, 7), (130, 3, 150)])
def test_rows_go_there_and_back_with_the_gradients_of_the_loop(
    engine: str, dtype: torch.dtype, tokens: int, top_k: int, width: int
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    expert_TK = draw_pairs(tokens, top_k, 4, seed=1)
    order, token, inverse, _ = sorted_pairs(expert_TK, 4)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    dy = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.rand(tokens, top_k, generator=generator).to(wide)
    rows = gather_rows(x, token)
    assert torch.equal(rows, x[token])

    leaves = [value.double().clone().requires_grad_() for value in (rows, weight)]
    wanted = combine_reference(leaves[0], inverse, leaves[1])
    wanted.backward(dy.double())
    y = combine_rows(rows, inverse, weight)
    dy_rows, dweight = combine_rows_backward(dy, rows, order, inverse, weight)
    assert (y.dtype, dy_rows.dtype, dweight.dtype) == (dtype, dtype, wide)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    for found, loop in ((y, wanted), (dy_rows, leaves[0].grad), (dweight, leaves[1].grad)):
        assert (found.double() - loop).norm() <= TOLERANCE[dtype] * loop.norm()
    assert (dweight[expert_TK < 0] == 0).all()

    dx = gather_rows_backward(dy_rows, inverse)
    loop = torch.zeros(tokens, width, dtype=torch.float64).index_add(0, token, dy_rows.double())
    assert (dx.double() - loop).norm() <= TOLERANCE[dtype] * loop.norm()


def test_tokens_without_any_pair_become_zero(engine: str) -> None:
    inverse = torch.full((3, 2), -1)
    nothing = torch.empty(0, 5)
    weight = torch.ones(3, 2)
    assert torch.equal(combine_rows(nothing, inverse, weight), torch.zeros(3, 5))
    assert torch.equal(gather_rows_backward(nothing, inverse), torch.zeros(3, 5))
    dy_rows, dweight = combine_rows_backward(
        torch.ones(3, 5), nothing, torch.empty(0, dtype=torch.int64), inverse, weight
    )
    assert dy_rows.shape == (0, 5)
    assert torch.equal(dweight, torch.zeros(3, 2))


def test_no_tokens_are_no_error(engine: str) -> None:
    order, token, inverse, count = sort_pairs(torch.empty(0, 2, dtype=torch.int64), 3)
    assert order.numel() == token.numel() == 0
    assert count.tolist() == [0, 0, 0]
    x = torch.empty(0, 5)
    assert gather_rows(x, token).shape == (0, 5)
    assert combine_rows(x, inverse, torch.empty(0, 2)).shape == (0, 5)


def test_a_dropped_row_that_is_nan_adds_nothing(engine: str) -> None:
    rows = torch.tensor([[float("nan")], [2.0]])
    inverse = torch.tensor([[-1, 1]])
    assert combine_rows(rows, inverse, torch.tensor([[0.5, 0.5]])).tolist() == [[1.0]]


@given(tokens=st.integers(1, 20), top_k=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_sort_apply_and_combine_equal_the_loop_over_tokens(
    tokens: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    expert_TK = draw_pairs(tokens, top_k, 4, seed)
    x, weight = draw(tokens, 8), draw(tokens, top_k)
    w_in, w_out = draw(4, 12, 8), draw(4, 8, 6)
    _, token, inverse, count = sorted_pairs(expert_TK, 4)
    y, _ = ffn_forward(gather_rows(x, token), count.cumsum(0).int(), w_in, w_out, Activation.swiglu)
    wanted = layer_reference(x, expert_TK, weight, w_in, w_out, Activation.swiglu)
    torch.testing.assert_close(
        combine_rows(y, inverse, weight).double(), wanted, rtol=1e-4, atol=1e-4
    )
