"""Estimates of memory: sizes that are known exactly, and how they follow the settings."""

import dataclasses
from typing import Any

import pytest
import torch
from training_runs import tiny

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder, parameter_specs
from gatewise.routers.config import RouterConfig, Scorer
from gatewise.training.config import DataConfig, Tokenizer
from gatewise.training.memory import MemoryEstimate, estimate_memory, vocabulary

V = 257
MB = 2**20


def estimate(number_bytes: int = 4, imbalance: float = 1.0, **settings: Any) -> MemoryEstimate:
    return estimate_memory(tiny(**settings), V, number_bytes=number_bytes, imbalance=imbalance)


def parameters(router: RouterConfig | None = None) -> int:
    config = tiny()
    model = Decoder(config.model, router or config.router, V)
    return sum(spec.parameter.numel() for spec in parameter_specs(model))


@pytest.mark.parametrize("router", [RouterConfig(), RouterConfig(scorer=Scorer.mlp)])
def test_the_state_of_one_rank_is_four_numbers_a_parameter(router: RouterConfig) -> None:
    found = estimate(router=router)
    size = 4 * parameters(router) / MB
    assert found.parameters == pytest.approx(size)
    assert found.gradients == pytest.approx(size)
    assert found.optimizer == pytest.approx(2 * size)
    assert found.snapshot == pytest.approx(3 * size)


def test_bf16_has_master_weights_and_small_parameters() -> None:
    small, wide = estimate(2), estimate(4)
    assert small.gradients == wide.gradients
    assert wide.parameters / 2 < small.parameters < 0.6 * wide.parameters  # routers, norms: fp32
    assert small.optimizer > 1.4 * wide.optimizer
    assert small.activations < wide.activations


def test_spread_experts_and_sharded_state_take_less_of_each_rank() -> None:
    one = estimate(ranks=4)
    spread = estimate(ranks=4, expert=4)
    assert spread.parameters < one.parameters
    assert estimate(ranks=4, shard=4).optimizer == pytest.approx(one.optimizer / 4)
    assert estimate(ranks=4, expert=4, imbalance=2.0).receive == pytest.approx(2 * spread.receive)
    assert one.receive == 0


def test_sharded_state_receives_the_gradients_of_all_that_is_sharded() -> None:
    assert estimate(ranks=4).exchange == 0
    whole = estimate(ranks=4, shard=4)
    assert whole.exchange == pytest.approx(whole.gradients)
    alone = estimate(ranks=4, expert=4, shard=2)  # nobody else holds a rank's experts
    assert 0 < alone.exchange < alone.gradients
    assert whole.state == pytest.approx(whole.gradients * 3 + whole.optimizer)


def test_recomputation_and_micro_batches_keep_less() -> None:
    model = {"layers": 8}
    assert estimate(model=model).activations > 2 * estimate(model=model, recompute=True).activations
    assert estimate(micro=2).activations == pytest.approx(estimate().activations / 4)


def test_nothing_is_allocated_for_a_model_that_no_machine_holds() -> None:
    config = tiny()
    config.model = ModelConfig(
        layers=64, hidden=8192, heads=64, num_experts=256, top_k=8, expert_width=4096
    )
    found = estimate_memory(config, 128_000, number_bytes=2)
    assert found.parameters > 1e6
    assert found.total > found.state > found.parameters


def test_the_vocabulary_is_known_before_the_text_is_read() -> None:
    config = tiny()
    assert vocabulary(config) == 257
    config.data = dataclasses.replace(DataConfig(), tokenizer=Tokenizer.bpe, vocab_size=999)
    assert vocabulary(config) == 999


def test_what_autograd_keeps_is_what_is_counted() -> None:
    """Counts the bytes that a forward pass leaves for the backward pass."""
    config = tiny(model={"hidden": 64, "expert_width": 64, "layers": 3, "heads": 4})
    torch.manual_seed(0)
    model = Decoder(config.model, config.router, V)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, V, (8, config.data.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens)
    assert output.hidden_BSD.requires_grad
    counted = estimate_memory(config, V, number_bytes=4).activations
    assert counted == pytest.approx(sum(kept.values()) / MB, rel=0.15)
