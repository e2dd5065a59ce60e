"""Every family of routers can be measured: all values are numbers that JSON can hold."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import small_model

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder, parameter_specs
from gatewise.parallel.errors import ConfigError
from gatewise.routers.balance import global_balance_loss
from gatewise.routers.config import RouterConfig
from gatewise.routers.presets import preset
from gatewise.training.measures.analysis import across_layers, layer_measures
from gatewise.training.measures.gradients import gradient_split, router_gradients
from gatewise.training.measures.probe import ProbeText, collect
from gatewise.training.step import language_loss

VOCAB = 32


def build(router: RouterConfig, top_k: int = 2) -> Decoder:
    sizes = ModelConfig(
        layers=3, hidden=16, heads=2, num_experts=4, top_k=top_k, expert_width=8, init_std=0.2
    )
    return small_model(sizes, router, vocab_size=VOCAB)


def text() -> ProbeText:
    ids_N = torch.randint(VOCAB, (6 * 16 + 1,), generator=torch.Generator().manual_seed(0))
    return ProbeText(ids_N[:-1].view(6, 16), ids_N[1:].view(6, 16))


def measure(model: Decoder) -> dict[str, Any]:
    probe = collect(model, text(), batch=4, device=torch.device("cpu"))
    gradients = router_gradients(model, text().input_WS, text().next_WS)
    found = {
        "layers": layer_measures(probe, model, vocab_size=VOCAB, seed=0),
        "across": across_layers(probe, num_experts=4, seed=0),
        "gradients": dataclasses.asdict(gradients),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return plain


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif value is not None:
        yield float(value)


@pytest.mark.parametrize(
    ("name", "top_k"),
    [
        ("mixtral", 2),
        ("switch", 1),
        ("deepseek_v3", 2),
        ("rmoe", 2),
        ("xmoe", 2),
        ("sigma_moe", 2),
        ("remoe", 2),
        ("top_p", 2),
        ("moe_x", 2),
        ("hash", 2),
        ("readme_pregate", 2),
        ("gru_pregate", 2),
    ],
)
def test_all_values_are_finite(name: str, top_k: int) -> None:
    model = build(preset(name), top_k).train()
    found = measure(model)
    assert model.training
    assert all(math.isfinite(number) for number in numbers(found))
    assert len(found["layers"]) == 3
    for layer in found["layers"]:
        assert 0 <= layer["scores"]["outer_balance"] <= 1 + 1e-6
        assert 0 <= layer["load"]["entropy"] <= 1 + 1e-6
    fixed = name not in ("remoe", "top_p")
    ks = [layer["load"]["effective_k"] for layer in found["layers"]]
    assert (ks == [top_k] * 3) == fixed
    if name == "hash":  # the id decides which two: ln 4 - ln 2 of ln 4 nats
        plain = [layer["context"]["by_token"]["plain"] for layer in found["layers"]]
        assert plain == pytest.approx([0.5] * 3, abs=0.05)


def test_a_router_that_mixes_all_tokens_chooses_nothing_to_measure() -> None:
    model = build(dataclasses.replace(preset("soft"), allow_noncausal=True))
    with pytest.raises(ConfigError, match="mixes all tokens and chooses no experts"):
        collect(model, text(), batch=4, device=torch.device("cpu"))


def test_gradients_are_those_of_each_loss_alone() -> None:
    config = RouterConfig(balance_loss=0.5, z_loss=0.25)
    model = build(config).eval()
    split = router_gradients(model, text().input_WS, text().next_WS)
    assert list(split.norms) == ["language", "z", "balance"]
    output = model(text().input_WS)
    loads = [routing.load for routing in output.routings]
    balance = 0.5 * global_balance_loss(
        torch.stack([load.score_E for load in loads if load]),
        torch.stack([load.count_E for load in loads if load]),
        tokens=torch.tensor(96.0),
        top_k=2,
        ranks=1,
    )
    z = sum(0.25 * r.logits_TE.logsumexp(1).square().mean() for r in output.routings)
    language = language_loss(model, output, text().next_WS) / 96
    parameters = [spec.parameter for spec in parameter_specs(model) if spec.label == "router"]
    for name, loss in (("language", language), ("balance", balance), ("z", z)):
        alone = gradient_split({name: loss}, parameters)
        assert split.norms[name] == pytest.approx(alone.norms[name], rel=1e-5)
    assert split.cosines["language"] == pytest.approx(1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_router_without_parameters_has_no_gradient_to_split() -> None:
    split = router_gradients(build(preset("hash")), text().input_WS, text().next_WS)
    assert split.norms == {}
