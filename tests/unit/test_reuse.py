import copy
import pickle

import pytest
import torch

from gatewise.moe import MoE
from gatewise.moe.ops.native import load_kernels
from gatewise.moe.ops.reuse import ReusedMemory

LIKE = torch.empty(3, 4)


def test_memory_is_used_again_when_its_last_holder_goes() -> None:
    memory = ReusedMemory()
    first = memory.take(LIKE)
    address = first.data_ptr()
    view = first[1]
    del first
    other = memory.take(LIKE)
    assert other.data_ptr() != address  # a view holds it
    del view
    assert memory.take(LIKE).data_ptr() == address


def test_an_array_of_numpy_holds_the_memory() -> None:
    memory = ReusedMemory()
    array = memory.take(LIKE).numpy()
    array[:] = 5
    memory.take(LIKE).zero_()
    assert (array == 5).all()


def test_shapes_and_dtypes_are_kept_apart() -> None:
    memory = ReusedMemory()
    address = memory.take(LIKE).data_ptr()
    held = [memory.take(LIKE.bfloat16()), memory.take(LIKE.T)]
    assert address not in [tensor.data_ptr() for tensor in held]
    assert held[0].dtype == torch.bfloat16
    assert held[1].shape == (4, 3)
    assert held[1].is_contiguous()


def test_copies_and_pickles_are_empty() -> None:
    memory = ReusedMemory()
    memory.take(LIKE)
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other._kept == []


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
def test_a_layer_writes_its_next_gradient_where_the_last_one_was() -> None:
    layer = MoE(8, 8, 4)
    weight = layer.experts.w_in_eGD
    x = torch.randn(16, 8)
    layer(x).sum().backward()
    assert weight.grad is not None
    address, wanted = weight.grad.data_ptr(), weight.grad.clone()
    layer.zero_grad(set_to_none=True)
    layer(x).sum().backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == address
    assert torch.equal(weight.grad, wanted)


def test_gradients_that_are_kept_add_up_and_stay_apart() -> None:
    layer = MoE(8, 8, 4)
    weight = layer.experts.w_in_eGD
    x = torch.randn(16, 8)
    layer(x).sum().backward()
    assert weight.grad is not None
    held, once = weight.grad, weight.grad.clone()
    for _ in range(2):
        layer(x).sum().backward()
    torch.testing.assert_close(held, 3 * once)
    layer.zero_grad(set_to_none=True)
    layer(x).sum().backward()
    assert weight.grad.data_ptr() != held.data_ptr()
    torch.testing.assert_close(held, 3 * once)
    (gradient,) = torch.autograd.grad(layer(x).sum(), [weight])
    layer(2 * x).sum().backward()
    torch.testing.assert_close(gradient, once)
