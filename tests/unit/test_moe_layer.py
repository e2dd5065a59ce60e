"""The MoE layer on one rank, against a slow loop, and the public layer as an ordinary module."""

import copy
import io
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest
import torch
from slow_moe import slow_moe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewise.moe import MoE
from gatewise.moe.config import Activation
from gatewise.moe.dispatch import LocalDispatcher, cut_pieces
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.layer import MoELayer
from gatewise.moe.stages import BACKWARD, FORWARD, Schedule
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import staged_plan
from gatewise.parallel.schedule.recorder import Recorder
from gatewise.routers.api import RoutingContext
from gatewise.routers.balance import max_violation
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction
from gatewise.routers.router import ComposedRouter

HIDDEN, WIDTH = 12, 8
SIZES = [(1, 1), (2, 1), (2, 2), (5, 3), (5, 5), (8, 1), (8, 2), (8, 5), (8, 8)]


def staged(chunks: int) -> Schedule:
    """Return the schedule that finishes each stage of all chunks before the next stage."""
    return Schedule(staged_plan(FORWARD, chunks), staged_plan(BACKWARD, chunks))


def recut(forward: int | tuple[float, ...], backward: int | tuple[float, ...]) -> Schedule:
    """Return a staged schedule whose passes have their own chunks: a number, or shares."""
    plans = []
    for graph, cut in ((FORWARD, forward), (BACKWARD, backward)):
        if isinstance(cut, int):
            plans.append(staged_plan(graph, cut))
        else:
            plans.append(replace(staged_plan(graph, len(cut)), shares=cut))
    return Schedule(*plans)


SCHEDULES = {
    "serial": Schedule.serial(),
    "serial in 2": Schedule.serial(2),
    "serial in 5": Schedule.serial(5),
    "staged in 2": staged(2),
    "staged in 3": staged(3),
    "staged, more chunks than tokens": staged(7),
}
RECUT = {
    "1 forward, 3 backward": recut(1, 3),
    "3 forward, 1 backward": recut(3, 1),
    "2 forward, 4 backward": recut(2, 4),
    "3 forward, 2 backward": recut(3, 2),
    "unequal alike": recut((0.2, 0.5, 0.3), (0.2, 0.5, 0.3)),
    "unequal, and others backward": recut((0.2, 0.5, 0.3), (0.6, 0.4)),
    "unequal in 2 forward, 3 backward": recut((0.7, 0.3), 3),
}


def make_layer(
    num_experts: int,
    top_k: int,
    activation: Activation,
    *,
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
) -> MoELayer:
    torch.manual_seed(num_experts * 100 + top_k)
    layer = MoELayer(
        ComposedRouter(HIDDEN, num_experts, top_k, RouterConfig()),
        GroupedExperts(num_experts, HIDDEN, WIDTH, activation),
        LocalDispatcher(num_experts),
        shared=FeedForward(HIDDEN, 2 * WIDTH, activation) if shared else None,
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.to(dtype)


def run(layer: MoELayer, x_TD: Tensor, mix_TD: Tensor) -> dict[str, Tensor]:
    """Return output and all gradients of `(y * mix).sum()`."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD, _, _ = layer(x_TD, RoutingContext(), 0)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((y_TD * mix_TD).sum(), (x_TD, *parameters))
    return dict(zip(("y", "x", *names), (y_TD.detach(), *gradients), strict=True))


def run_slowly(layer: MoELayer, x_TD: Tensor, mix_TD: Tensor) -> dict[str, Tensor]:
    """Do the same with the loop, in float64."""
    x_TD = x_TD.double().clone().requires_grad_()
    copies = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    router = layer.router
    assert isinstance(router, ComposedRouter)
    y_TD = slow_moe(
        x_TD,
        copies["router.weight"],
        copies["experts.w_in_eGD"],
        copies["experts.w_out_eDF"],
        top_k=router.top_k,
        activation=layer.experts.activation,
    )
    if layer.shared is not None:
        for place in ("w_in_GD", "w_out_DF"):
            assert f"shared.{place}" in copies
        y_TD = y_TD + torch.func.functional_call(
            layer.shared, {n[7:]: p for n, p in copies.items() if n.startswith("shared.")}, (x_TD,)
        )
    gradients = torch.autograd.grad(
        (y_TD * mix_TD.double()).sum(), (x_TD, *copies.values()), allow_unused=True
    )
    names = ("x", *copies)
    values = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for name, value, gradient in zip(names, (x_TD, *copies.values()), gradients, strict=True)
    }
    return {"y": y_TD.detach(), **values}


def assert_equal(have: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].shape == value.shape, name
        if value.numel():
            scale = max(float(value.abs().max()), 1.0)
            error = float((have[name].double() - value).abs().max()) / scale
            assert error <= tolerance, f"{name} is off by {error:.1e}"


def tokens(num_tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return x_TD, torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)


@lru_cache
def _slow_case(
    num_experts: int, top_k: int, activation: Activation, num_tokens: int
) -> dict[str, Tensor]:
    layer = make_layer(num_experts, top_k, activation)
    return run_slowly(layer, *tokens(num_tokens))


def hold_to_slow_loop(
    schedules: Mapping[str, Schedule],
    num_experts: int,
    top_k: int,
    activation: Activation,
    num_tokens: int,
) -> None:
    want = _slow_case(num_experts, top_k, activation, num_tokens)
    layer = make_layer(num_experts, top_k, activation)
    for name, schedule in schedules.items():
        layer.schedule = schedule
        have = run(layer, *tokens(num_tokens))
        try:
            assert_equal(have, want, 1e-10)
        except AssertionError as error:
            raise AssertionError(f"{activation.name}, {name}") from error


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 64])
def test_outputs_and_all_gradients_are_those_of_the_slow_loop(
    num_experts: int, top_k: int, num_tokens: int
) -> None:
    kinds = list(Activation)
    if num_tokens == 64:  # the slow loop takes its time: one kind per size
        kinds = [kinds[(num_experts + top_k) % 3]]
    for activation in kinds:
        hold_to_slow_loop(SCHEDULES, num_experts, top_k, activation, num_tokens)


@pytest.mark.parametrize("num_tokens", [0, 3, 17])
def test_passes_may_cut_the_tokens_differently(num_tokens: int) -> None:
    for (num_experts, top_k), activation in zip([(5, 3), (8, 2), (2, 2)], Activation, strict=True):
        hold_to_slow_loop(RECUT, num_experts, top_k, activation, num_tokens)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("schedule", ["serial", "staged in 3", "3 forward, 2 backward"])
def test_fp32_is_within_rounding_of_the_slow_loop(activation: Activation, schedule: str) -> None:
    layer = make_layer(8, 2, activation, dtype=torch.float32)
    layer.schedule = (SCHEDULES | RECUT)[schedule]
    x_TD, mix_TD = (t.float() for t in tokens(64))
    assert_equal(run(layer, x_TD, mix_TD), run_slowly(layer, x_TD, mix_TD), 1e-5)


def test_lanes_give_the_bits_of_the_calling_thread() -> None:
    layer = make_layer(8, 3, Activation.swiglu)
    for name, schedule in (SCHEDULES | RECUT).items():
        layer.schedule, layer.execution = schedule, Execution()
        want = run(layer, *tokens(64))
        layer.execution = Execution(ThreadLanes(), Recorder())
        have = run(layer, *tokens(64))
        assert all(torch.equal(have[key], want[key]) for key in want), name


def test_no_thread_is_started_for_one_chunk() -> None:
    layer = make_layer(8, 3, Activation.swiglu)
    layer.execution = Execution(ThreadLanes())
    before = set(threading.enumerate())
    run(layer, *tokens(64))
    assert set(threading.enumerate()) <= before


def test_fp32_chunks_give_the_bits_of_the_serial_layer() -> None:
    # rows of a product do not depend on its other rows; sums over tokens do, hence not weights
    layer = make_layer(8, 3, Activation.swiglu, dtype=torch.float32)
    x_TD, mix_TD = (t.float() for t in tokens(64))
    whole = run(layer, x_TD, mix_TD)
    layer.schedule = SCHEDULES["staged in 3"]
    parts = run(layer, x_TD, mix_TD)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["serial", "staged in 2"])
def test_a_shared_expert_adds_its_output_and_gradients(schedule: str) -> None:
    layer = make_layer(5, 2, Activation.swiglu, shared=True)
    layer.schedule = (SCHEDULES | RECUT)[schedule]
    assert_equal(run(layer, *tokens(9)), run_slowly(layer, *tokens(9)), 1e-10)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    "schedule", ["serial", "serial in 5", "staged in 3", "3 forward, 2 backward"]
)
def test_all_tokens_may_choose_the_same_experts(top_k: int, schedule: str) -> None:
    layer = make_layer(8, top_k, Activation.swiglu)
    layer.schedule = (SCHEDULES | RECUT)[schedule]
    x_TD, mix_TD = tokens(20)
    x_TD[:, 0] = 1.0
    with torch.no_grad():
        layer.router.weight[:, 0] = -30.0 * torch.arange(8)  # type: ignore[union-attr, index]
    have = run(layer, x_TD, mix_TD)
    assert_equal(have, run_slowly(layer, x_TD, mix_TD), 1e-10)
    # experts that nobody chose have gradients of exactly zero, not none
    assert not have["experts.w_in_eGD"][top_k:].any()
    assert not have["experts.w_out_eDF"][top_k:].any()
    assert have["experts.w_in_eGD"][:top_k].any()


def test_all_experts_at_once_are_the_dense_mixture() -> None:
    layer = make_layer(5, 5, Activation.gelu)
    x_TD, _ = tokens(7)
    y_TD, _, _ = layer(x_TD, RoutingContext(), 0)
    weight_TE = (x_TD @ layer.router.weight.T).softmax(-1)  # type: ignore[union-attr]
    w_in, w_out = layer.experts.w_in_eGD, layer.experts.w_out_eDF
    outputs_ETD = torch.stack([nn.functional.gelu(x_TD @ w_in[e].T) @ w_out[e].T for e in range(5)])
    torch.testing.assert_close(y_TD, torch.einsum("te,etd->td", weight_TE, outputs_ETD))


def test_a_row_of_nan_changes_no_other_token() -> None:
    for capacity in (None, 0.5):
        torch.manual_seed(0)
        layer = MoE(HIDDEN, WIDTH, 4, 2, capacity_factor=capacity).double()
        x_TD = torch.randn(12, HIDDEN, dtype=torch.float64)
        clean_TD = layer(x_TD)
        x_TD[0] = float("nan")
        y_TD = layer(x_TD)
        assert y_TD[0].isnan().any() or capacity is not None
        assert torch.isfinite(y_TD[1:]).all()
        if capacity is None:
            torch.testing.assert_close(y_TD[1:], clean_TD[1:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dropped_pair_reads_nothing_of_the_row_that_stands_in_for_it(dtype: torch.dtype) -> None:
    from gatewise.moe.ops.permute import combine_rows, gather_rows_backward

    y_ND = torch.ones(2, 4, dtype=dtype)
    y_ND[0] = float("nan")
    inverse_TK = torch.tensor([[0, -1], [-1, 1], [-1, -1]])
    weight_TK = torch.ones(3, 2, dtype=dtype)
    for total_TD in (
        combine_rows(y_ND, inverse_TK, weight_TK),
        gather_rows_backward(y_ND, inverse_TK),
    ):
        assert total_TD[0].isnan().all()
        assert total_TD[1:].tolist() == [[1.0] * 4, [0.0] * 4]


# --- the public layer


def test_the_public_layer_keeps_any_leading_shape() -> None:
    layer = MoE(HIDDEN, WIDTH, 4)
    flat = layer(torch.ones(6, HIDDEN))
    for shape in [(HIDDEN,), (6, HIDDEN), (2, 3, HIDDEN), (1, 2, 3, HIDDEN), (0, HIDDEN)]:
        y = layer(torch.ones(shape))
        assert y.shape == shape
        if y.numel():
            torch.testing.assert_close(y.reshape(-1, HIDDEN)[0], flat[0])
    assert layer(torch.ones(2, 0, HIDDEN)).shape == (2, 0, HIDDEN)


def test_the_public_layer_is_the_slow_loop_with_its_losses_beside() -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 5, 2, activation="gelu", shared_experts=2).double()
    x, mix = tokens(12)
    y = layer(x.view(3, 4, HIDDEN))
    want = run_slowly(layer.layer, x, mix)
    torch.testing.assert_close(y.detach().view(12, HIDDEN), want["y"], rtol=0, atol=1e-12)
    assert set(layer.losses) == {"balance", "z"}
    assert all(loss.requires_grad and loss.shape == () for loss in layer.losses.values())
    config = RouterConfig()
    assert float(layer.losses["balance"].detach()) == pytest.approx(config.balance_loss, rel=0.5)


@pytest.mark.parametrize("scope", list(BalanceScope))
def test_balance_losses_of_one_rank_and_one_sequence_are_equal_in_all_scopes(
    scope: BalanceScope,
) -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 5, 2, router=RouterConfig(balance_scope=scope)).double()
    layer(tokens(12)[0])
    want = MoE(
        HIDDEN, WIDTH, 5, 2, router=RouterConfig(balance_scope=BalanceScope.micro_batch)
    ).double()
    want.load_state_dict(layer.state_dict())
    want(tokens(12)[0])
    torch.testing.assert_close(layer.losses["balance"], want.losses["balance"])


@pytest.mark.parametrize("router", ["mixtral", "switch", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_padding_gives_zeros_and_changes_nothing_else(router: str, value: float) -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 4, 2, router=router, shared_experts=1).double()
    layer.router.eval()  # type: ignore[attr-defined]  # no jitter
    x, mix = tokens(12)
    padded = torch.full((3, 6, HIDDEN), value, dtype=torch.float64)
    padded[:, 1:5] = x.view(3, 4, HIDDEN)
    padding = torch.ones(3, 6, dtype=torch.bool)
    padding[:, 1:5] = False
    results = []
    for inputs, mask in ((x.view(3, 4, HIDDEN), None), (padded, padding)):
        layer.zero_grad()
        y = layer(inputs, mask)
        real = y if mask is None else y[:, 1:5]
        loss = (real * mix.view(3, 4, HIDDEN)).sum()
        sum(layer.losses.values(), loss).backward()
        results.append([real.detach(), *(p.grad.clone() for p in layer.parameters())])
        if mask is not None:
            assert not y[mask].any()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-11)


def test_the_public_layer_trains_inside_a_larger_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, HIDDEN), MoE(HIDDEN, WIDTH, 4), nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(64, 4)
    target = x[:, :1] * x[:, 1:2]
    losses = []
    for step in range(60):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = nn.functional.mse_loss(model(x), target)
        (loss + sum(model[1].losses.values())).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_copy_and_a_saved_state_compute_the_same_also_after_a_call() -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 4, shared_experts=1)
    x = torch.randn(5, HIDDEN)
    y = layer(x)
    twin = copy.deepcopy(layer)  # with the losses of a call in it
    assert torch.equal(twin(x), y)
    twin.experts.w_in_eGD.data.zero_()
    assert torch.equal(layer(x), y)
    fresh = MoE(HIDDEN, WIDTH, 4, shared_experts=1)
    assert not torch.equal(fresh(x), y)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    assert set(layer.losses) == {"balance", "z"}  # the copy did not take them away


def test_the_public_layers_bias_balances_when_it_is_updated() -> None:
    torch.manual_seed(0)
    router = RouterConfig(score=ScoreFunction.sigmoid, bias_rate=0.02, balance_loss=0, z_loss=0)
    layer = MoE(HIDDEN, WIDTH, 8, 2, router=router)
    layer.router.weight.data.normal_()  # type: ignore[attr-defined]
    x = torch.randn(500, HIDDEN) + 0.5
    bias_E = layer.router.bias_E  # type: ignore[attr-defined]

    def violation() -> float:
        _, routing, _ = layer.layer(x, RoutingContext(), 0)
        assert routing.load is not None
        return float(max_violation(routing.load.count_E))

    before = violation()
    for _ in range(40):
        for part in x.split(250):
            layer(part)
        layer.update_router()
    assert before > 0.5
    assert violation() < 0.5 * before
    trained_E = bias_E.clone()
    layer.eval()
    layer(x)
    layer.update_router()  # calls in evaluation do not count
    assert torch.equal(bias_E, trained_E)
    plain = MoE(HIDDEN, WIDTH, 4)
    plain(x)
    plain.update_router()
    assert not plain.router.bias_E.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_two_backward_passes_add_up(set_to_none: bool) -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 4).double()
    x, mix = tokens(12)
    layer.zero_grad(set_to_none=set_to_none)
    for part in (slice(0, 5), slice(5, 12)):
        (layer(x[part]) * mix[part]).sum().backward()
    want = run(layer.layer, x, mix)
    for name, parameter in layer.layer.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])
    layer.zero_grad(set_to_none=set_to_none)
    (layer(x) * mix).sum().backward()
    for name, parameter in layer.layer.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])


def test_a_layer_used_twice_in_one_graph_adds_both_gradients() -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 4).double()
    x, mix = tokens(6)
    loss = (layer(layer(x)) * mix).sum()
    gradient = torch.autograd.grad(loss, layer.experts.w_out_eDF)[0]
    twin = copy.deepcopy(layer)
    twice = (twin(layer(x)) * mix).sum()
    inner = torch.autograd.grad(twice, (layer.experts.w_out_eDF, twin.experts.w_out_eDF))
    torch.testing.assert_close(gradient, inner[0] + inner[1])


def test_frozen_parts_and_inputs_get_no_gradient_and_change_none() -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 4).double()
    x, mix = tokens(12)
    want = run(layer.layer, x, mix)
    names = ["x", *(name for name, _ in layer.layer.named_parameters())]
    for live in product([False, True], repeat=len(names)):
        wants = dict(zip(names, live, strict=True))
        inputs = x.clone().requires_grad_(wants["x"])
        leaves = {"x": inputs, **dict(layer.layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(wants[name])
            leaf.grad = None
        y = layer(inputs)
        assert y.requires_grad == any(live)
        if any(live):
            (y * mix).sum().backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == wants[name]
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, want[name])


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    layer = MoE(HIDDEN, WIDTH, 4).double()
    x = tokens(4)[0].requires_grad_()
    gradient = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_recomputation_gives_the_same_bits_with_noise() -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, WIDTH, 8, 2, router=RouterConfig(jitter=0.2))
    x = torch.randn(20, HIDDEN)
    results = []
    for recompute in (False, True):
        torch.manual_seed(7)
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        y = checkpoint(layer, inputs, use_reentrant=False) if recompute else layer(inputs)
        (y.square().sum() + sum(layer.losses.values())).backward()
        after = torch.rand(3)  # the generator stands at the same place
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), inputs.grad, after, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_is_near_fp32_and_routes_in_fp32() -> None:
    torch.manual_seed(0)
    layer = MoE(64, 32, 8, 2)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    small = copy.deepcopy(layer).bfloat16()
    x = torch.randn(100, 64).bfloat16()
    y = small(x)
    assert y.dtype == torch.bfloat16
    assert small.router.weight.dtype == torch.float32  # type: ignore[attr-defined]
    want = layer(x.float()).detach()
    assert float((y.detach().float() - want).norm() / want.norm()) < 0.01
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in small.parameters())


def test_tokens_of_another_type_than_the_weights_are_refused() -> None:
    layer = MoE(HIDDEN, WIDTH, 4)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=f"the tokens are {dtype} and the experts' weights"):
            layer(torch.ones(3, HIDDEN, dtype=dtype))


def test_autocast_casts_as_it_does_around_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, HIDDEN), MoE(HIDDEN, WIDTH, 4, shared_experts=1))
    x = torch.randn(20, 4)
    want = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        losses = model[1].losses
    assert y.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert float((y.detach().float() - want).norm() / want.norm()) < 0.02
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_inputs_need_not_be_contiguous_and_neither_need_gradients() -> None:
    layer = MoE(HIDDEN, WIDTH, 4).double()
    x = tokens(12)[0]
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(layer(strided), layer(x))
    inputs = x.clone().requires_grad_()
    expanded = torch.autograd.grad(layer(inputs).sum(), inputs)[0]  # an expanded gradient
    inputs = x.clone().requires_grad_()
    dense = torch.autograd.grad((layer(inputs) * torch.ones_like(x)).sum(), inputs)[0]
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden is 0"),
        ({"expert_width": -1}, "expert_width is -1"),
        ({"top_k": 9}, "top_k is 9; it must be from 1 to model.num_experts \\(8\\)"),
        ({"activation": "tanh"}, "activation is 'tanh'; it must be one of swiglu, gelu, relu"),
        ({"router": "mistral"}, "known presets"),
        ({"capacity_factor": 0.0}, "capacity.factor is 0.0"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"hidden": 8, "expert_width": 8, "num_experts": 8}
    with pytest.raises(ValueError, match=message):
        MoE(**{**good, **arguments})  # type: ignore[arg-type]


def test_chunks_cover_all_tokens_once_in_nearly_equal_parts() -> None:
    for num_tokens, chunks in product((0, 1, 5, 64), (1, 2, 3, 7)):
        pieces = cut_pieces(torch.zeros(num_tokens, 1, dtype=torch.int64), chunks)
        parts = [piece.tokens for piece in pieces]
        assert len(parts) == chunks
        covered = [token for part in parts for token in range(num_tokens)[part]]
        assert covered == list(range(num_tokens))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
