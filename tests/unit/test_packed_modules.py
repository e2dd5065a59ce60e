"""Modules with packed weights: few rows and many, layers without gradients, copies."""

import copy
import pickle

import pytest
import torch
from packed_weights import made_up, mixed_experts, relative

from gatewise.moe import MoE
from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.ops.packed import unpack_weight_reference
from gatewise.moe.packed import _MOST_ROWS, PackedExperts, PackedLinear

INT8_ERROR = 0.02  # relative, of the outputs


@torch.no_grad()
def layers(activation: Activation, top_k: int = 2) -> tuple[MoE, MoE]:
    """Return a layer that computes with codes, and one with the same weights dequantised."""
    w_in, w_out = mixed_experts(activation)
    torch.manual_seed(0)
    plain = MoE(96, 72, 5, top_k, activation=activation.value)
    for table, target in ((w_in, plain.experts.w_in_eGD), (w_out, plain.experts.w_out_eDF)):
        for weight, out_NK in zip(table.weights, target, strict=True):
            out_NK.copy_(unpack_weight_reference(weight))
    packed = MoE(96, 72, 5, top_k, activation=activation.value, router=plain.layer.router)
    packed.layer.experts = GroupedExperts(0, 96, 72, activation)
    packed.layer.packed = PackedExperts(w_in.weights, w_out.weights, activation)
    return packed.eval(), plain.eval()


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("tokens", [0, 1, _MOST_ROWS, 15, 100])
@torch.no_grad()
def test_a_packed_layer_gives_what_its_dequantised_weights_give(
    activation: Activation, tokens: int
) -> None:
    packed, plain = layers(activation)
    x_TD = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(6)) / 20
    found_TD, wanted_TD = packed(x_TD), plain(x_TD)
    assert found_TD.shape == wanted_TD.shape
    if tokens:
        assert relative(found_TD, wanted_TD.double()) < INT8_ERROR


@torch.no_grad()
def test_experts_with_many_rows_round_no_activation() -> None:
    packed, plain = layers(Activation.swiglu, top_k=5)  # every expert gets every token
    x_TD = torch.randn(_MOST_ROWS + 1, 96, generator=torch.Generator().manual_seed(7)) / 20
    assert relative(packed(x_TD), plain(x_TD).double()) < 1e-5
    assert relative(packed(x_TD[:-1]), plain(x_TD[:-1]).double()) > 1e-4


@torch.no_grad()
def test_padding_and_bf16_pass_through_a_packed_layer() -> None:
    packed, plain = layers(Activation.gelu)
    x_TD = torch.randn(30, 96, generator=torch.Generator().manual_seed(8)).bfloat16() / 20
    padding_T = torch.arange(30) % 7 == 0
    found_TD = packed(x_TD, padding_T)
    assert found_TD.dtype == torch.bfloat16
    assert not bool(found_TD[padding_T].any())
    assert relative(found_TD, plain(x_TD.float(), padding_T).double()) < INT8_ERROR


@torch.no_grad()
def test_a_packed_matrix_stands_in_the_place_of_a_parameter() -> None:
    torch.manual_seed(0)
    network = FeedForward(96, 72, Activation.swiglu).eval()
    first, second = made_up(144, 96, 32, 4), made_up(96, 72, 24, 3)
    network.w_in_GD.copy_(unpack_weight_reference(first))
    network.w_out_DF.copy_(unpack_weight_reference(second))
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(9)) / 20
    wanted = network(x)
    del network.w_in_GD, network.w_out_DF
    network.w_in_GD, network.w_out_DF = PackedLinear(first), PackedLinear(second)  # type: ignore[assignment]  # as a loader does
    assert relative(network(x), wanted.double()) < 1e-5
    assert relative(network(x[:1]), wanted[:1].double()) < INT8_ERROR
    assert network(x[0, 0]).shape == (96,)


def test_packed_weights_have_no_gradients() -> None:
    packed, _ = layers(Activation.relu)
    with pytest.raises(ValueError, match="packed weights have no gradients"):
        packed(torch.randn(2, 96, requires_grad=True))


@torch.no_grad()
def test_a_copy_computes_the_same_from_memory_of_its_own() -> None:
    packed, _ = layers(Activation.swiglu)
    x_TD = torch.randn(4, 96)
    wanted_TD = packed(x_TD)
    twins = copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))
    del packed
    assert all(torch.equal(twin(x_TD), wanted_TD) for twin in twins)


def test_experts_that_do_not_belong_together_are_refused() -> None:
    first, second = made_up(32, 16, 16, 2), made_up(32, 16, 8, 2)
    with pytest.raises(ValueError, match="w_in: the matrices have different"):
        PackedExperts([first, second], [made_up(16, 16, 16, 2)] * 2, Activation.swiglu)
    with pytest.raises(ValueError, match="w_out: the matrices have different"):
        PackedExperts([first], [], Activation.swiglu)
    with pytest.raises(ValueError, match="w_in is of 2 experts, but w_out of 1"):
        PackedExperts([first] * 2, [made_up(16, 16, 16, 2)], Activation.swiglu)
    with pytest.raises(ValueError, match=r"w_in is \[32, 16\]; .* and gelu it must be \[16, 16\]"):
        PackedExperts([first], [made_up(16, 16, 16, 2)], Activation.gelu)


@pytest.mark.parametrize("tokens", [2, _MOST_ROWS + 1])
@torch.no_grad()
def test_what_a_packed_layer_cannot_compute_is_refused(tokens: int) -> None:
    layer = PackedExperts(*(t.weights for t in mixed_experts(Activation.swiglu)), Activation.swiglu)
    x_TD, expert_TK, weight_TK = torch.zeros(tokens, 96), torch.zeros(tokens, 2), torch.ones(1)
    weight_TK = weight_TK.expand(tokens, 2)
    with pytest.raises(ValueError, match="expert_TK goes from 0 to 7; with 5 experts"):
        layer(x_TD, expert_TK.long() + torch.tensor([0, 7]), weight_TK)
    with pytest.raises(ValueError, match=r"x is \[.*, 90\]"):
        layer(x_TD[:, :90], expert_TK.long(), weight_TK)
    with pytest.raises(ValueError, match=r"expert_TK is torch\.float32"):
        layer(x_TD, expert_TK, weight_TK)
    matrix = PackedLinear(made_up(16, 32, 16, 2))
    with pytest.raises(ValueError, match="rows of 32 numbers"):
        matrix(x_TD)
