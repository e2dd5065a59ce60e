import pytest
import torch
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops import grouped_ffn, native
from gatewise.moe.ops.grouped_ffn import (
    ffn_backward,
    ffn_backward_data,
    ffn_backward_weights,
    ffn_forward,
)
from gatewise.moe.ops.reference import ffn_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
COUNTS = [[3, 0, 5, 1], [0, 0], [150, 20, 0], [1]]


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the C++ kernels for every dtype, and with torch's operators only."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(native, "load_kernels", lambda: None)
    elif native.load_kernels() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(grouped_ffn, "_has_bf16_units", lambda: False)
    return name


def operands(
    counts: list[int], width: int, expert_width: int, activation: Activation, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, dy, end, w_in, w_out."""
    generator = torch.Generator().manual_seed(0)
    inner = expert_width * (2 if activation is Activation.swiglu else 1)

    def draw(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 3 else 1.0
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    end_e = torch.tensor(counts).cumsum(0).int()
    rows, experts = sum(counts), len(counts)
    return (
        draw(rows, width),
        draw(rows, width),
        end_e,
        draw(experts, inner, width),
        draw(experts, width, expert_width),
    )


def error(found: Tensor | None, wanted: Tensor) -> float:
    """Return the norm of the difference relative to the norm of what is wanted."""
    assert found is not None
    wanted = wanted.detach().double()
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def references(
    x: Tensor, dy: Tensor, end: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation
) -> list[Tensor]:
    """Return the output and the three gradients of the float64 loop."""
    leaves = [value.double().clone().requires_grad_() for value in (x, w_in, w_out)]
    y = ffn_reference(leaves[0], end, leaves[1], leaves[2], activation)
    if y.shape[0]:
        y.backward(dy.double())
    return [y] + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("width", "expert_width"), [(16, 24), (33, 7), (80, 72)])
def test_values_and_gradients_equal_the_float64_loop(
    engine: str,
    activation: Activation,
    dtype: torch.dtype,
    counts: list[int],
    width: int,
    expert_width: int,
) -> None:
    x, dy, end, w_in, w_out = operands(counts, width, expert_width, activation, dtype)
    y, saved = ffn_forward(x, end, w_in, w_out, activation)
    found = (y, *ffn_backward(dy, x, end, w_in, w_out, activation, saved))
    wanted = references(x, dy, end, w_in, w_out, activation)
    for name, ours, theirs in zip(("y", "dx", "dw_in", "dw_out"), found, wanted, strict=True):
        assert ours is not None
        assert ours.dtype == dtype
        assert error(ours, theirs) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradients_overwrite_or_add_to_buffers_and_absent_experts_get_zeros(
    engine: str, dtype: torch.dtype
) -> None:
    activation = Activation.swiglu
    x, dy, end, w_in, w_out = operands([4, 0, 9], 16, 8, activation, dtype)
    _, saved = ffn_forward(x, end, w_in, w_out, activation)
    buffer = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = references(x, dy, end, w_in, w_out, activation)[2:]
    for accumulate in (False, True):
        into = [torch.full_like(weight, 3, dtype=buffer) for weight in (w_in, w_out)]
        _, dw_in, dw_out = ffn_backward(
            dy,
            x,
            end,
            w_in,
            w_out,
            activation,
            saved,
            dw_in_eGD=into[0],
            dw_out_eDF=into[1],
            accumulate=accumulate,
        )
        before = 3.0 if accumulate else 0.0
        for found, given, gradient in zip((dw_in, dw_out), into, wanted, strict=True):
            assert found.data_ptr() == given.data_ptr()
            assert error(given - before, gradient) < TOLERANCE[dtype]
            assert torch.equal(given[1], torch.full_like(given[1], before))


def test_the_gradient_of_the_rows_can_be_left_out(engine: str) -> None:
    activation = Activation.gelu
    x, dy, end, w_in, w_out = operands([4, 9], 16, 8, activation, torch.float32)
    _, saved = ffn_forward(x, end, w_in, w_out, activation)
    dx, work = ffn_backward_data(dy, end, w_in, w_out, activation, saved, need_dx=False)
    assert dx is None
    found = ffn_backward_weights(dy, x, end, w_in, w_out, work)
    wanted = references(x, dy, end, w_in, w_out, activation)[2:]
    assert all(error(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(engine: str) -> None:
    activation = Activation.swiglu
    x, dy, end, w_in, w_out = operands([40, 0, 130, 7], 64, 96, activation, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            y, saved = ffn_forward(x, end, w_in, w_out, activation)
            results.append((y, *ffn_backward(dy, x, end, w_in, w_out, activation, saved)))
    finally:
        torch.set_num_threads(threads)
    exact = engine == "native"  # torch's library may split a product differently
    for one, two in zip(*results, strict=True):
        assert one is not None
        torch.testing.assert_close(one, two, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_that_bypass_the_cache_are_complete(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.load_kernels() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(grouped_ffn, "_has_bf16_units", lambda: False)
    activation = Activation.swiglu
    x, dy, end, w_in, w_out = operands([17] * 64 + [4200], 64, 512, activation, dtype)
    results = []
    for _ in range(2):
        y, saved = ffn_forward(x, end, w_in, w_out, activation)
        fresh = [torch.full_like(weight, 7.0) for weight in (w_in, w_out)]
        gradients = ffn_backward(
            dy,
            x,
            end,
            w_in,
            w_out,
            activation,
            saved,
            dw_in_eGD=fresh[0],
            dw_out_eDF=fresh[1],
        )
        results.append((y, *gradients))
        monkeypatch.setattr(native, "load_kernels", lambda: None)
    assert min(w_in.nbytes, x.shape[0] * 512 * x.element_size()) > 4 << 20
    for ours, theirs in zip(*results, strict=True):
        assert theirs is not None
        assert error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", list(Activation))
def test_activations_keep_their_accuracy_from_small_to_large_inputs(
    engine: str, activation: Activation
) -> None:
    x = torch.cat(
        (torch.linspace(-30, 30, 401), torch.logspace(-8, 1, 50), -torch.logspace(-8, 1, 50))
    )
    x = x.unsqueeze(1)
    one = torch.ones(1, 2 if activation is Activation.swiglu else 1, 1)
    end = torch.tensor([x.shape[0]], dtype=torch.int32)
    out = torch.ones(1, 1, 1)
    y, saved = ffn_forward(x, end, one, out, activation)
    dx, _, _ = ffn_backward(torch.ones_like(y), x, end, one, out, activation, saved)
    wanted = references(x, torch.ones_like(y), end, one, out, activation)
    torch.testing.assert_close(y.double(), wanted[0], rtol=2e-6, atol=2e-6)
    assert dx is not None
    torch.testing.assert_close(dx.double(), wanted[1], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(Activation))
def test_a_nan_or_infinite_row_is_passed_on_and_spoils_no_other_row(
    engine: str, activation: Activation, dtype: torch.dtype
) -> None:
    x, dy, end, w_in, w_out = operands([4, 9], 16, 8, activation, dtype)
    clean, _ = ffn_forward(x, end, w_in, w_out, activation)
    x[5], x[7] = float("nan"), float("inf")
    y, saved = ffn_forward(x, end, w_in, w_out, activation)
    dx, dw_in, _ = ffn_backward(dy, x, end, w_in, w_out, activation, saved)
    assert y[5].isnan().all()
    assert not y[7].isfinite().all()
    rest = [row for row in range(13) if row not in {5, 7}]
    assert torch.equal(y[rest], clean[rest])
    assert dx is not None
    assert dx[rest].isfinite().all()
    assert dw_in[0].isfinite().all()
    assert not dw_in[1].isfinite().all()
