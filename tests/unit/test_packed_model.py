"""Compressed models that compute with their codes: same results, less memory, clear errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import PLANS, compressed, settings, trained

from gatewise.compression.artefact import read_parts, read_plan
from gatewise.compression.config import PruneConfig, PruneRule, Weights
from gatewise.compression.load import load_compressed
from gatewise.compression.plan import Plan
from gatewise.compression.runtime import load_packed, to_panels, weight_bytes
from gatewise.compression.work import Source
from gatewise.launch import restore
from gatewise.launch.restore import (
    check_weights,
    choose_weights,
    open_checkpoint,
    restore_model,
)
from gatewise.moe.attention import KeyValueCache
from gatewise.moe.model import Decoder
from gatewise.moe.ops.packed import unpack_weight_reference
from gatewise.moe.packed import PackedLinear
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.routers.presets import preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("model")
    return trained(folder, expert_width=20, shared_experts=1, layers=3, dense_layers=1)[0]


@pytest.fixture(scope="module")
def artefact(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(source, settings(bits=2.8), tmp_path_factory.mktemp("artefact"))[0]


def both(source: Source, path: Path) -> tuple[Decoder, Decoder]:
    plan = read_plan(path)
    arguments = (source.config, 257, path, plan, CPU)
    return load_packed(*arguments), load_compressed(*arguments)


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(257, (rows, columns), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Decoder, token_BS: torch.Tensor) -> torch.Tensor:
    return model.logits(model(token_BS).hidden_BSD)


@torch.no_grad()
def decoded(model: Decoder, token_S: torch.Tensor) -> torch.Tensor:
    """Return the logits of tokens that are given one by one."""
    cache = KeyValueCache()
    rows = [model(token.view(1, 1), cache=cache).hidden_BSD[0, 0] for token in token_S]
    return model.logits(torch.stack(rows))


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
def test_a_packed_model_gives_what_the_dequantised_one_gives(
    changes: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    path, _ = compressed(source, settings(**changes), tmp_path)
    packed, plain = both(source, path)
    token_BS = tokens(2, 40)
    wanted = logits(plain, token_BS)
    assert float((logits(packed, token_BS) - wanted).norm() / wanted.norm()) < 0.02
    wanted = decoded(plain, token_BS[0, :12])
    assert float((decoded(packed, token_BS[0, :12]) - wanted).norm() / wanted.norm()) < 0.05


def test_every_matrix_of_the_plan_is_packed_and_nothing_else(
    source: Source, artefact: Path
) -> None:
    packed, plain = both(source, artefact)
    plan = read_plan(artefact)
    held = {name for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert held == {part.source for part in plan.parts if part.expert is None}
    names = {name for name, parameter in packed.named_parameters() if parameter.numel()}
    assert names == {name for name, _ in plain.named_parameters()} - {p.source for p in plan.parts}
    for layer in (1, 2):
        layer_packed = packed.moe_layers()[layer - 1].packed
        assert layer_packed is not None
        parts, _ = read_parts(artefact, plan, layer + 1)
        for part in plan.of_layer(layer, "expert"):
            table = layer_packed.w_in if part.projection == "in" else layer_packed.w_out
            assert part.expert is not None
            value_NK = unpack_weight_reference(table.weights[part.expert])
            assert torch.equal(value_NK, parts[part.name].dequantise())


def test_memory_is_that_of_codes_and_what_is_kept(source: Source, artefact: Path) -> None:
    packed, plain = both(source, artefact)
    plan = read_plan(artefact)
    parameters = [item for item in plan.kept if item.name.startswith("model/")]
    kept = sum(4 * torch.Size(item.shape).numel() for item in parameters)
    codes = 0
    for number in range(1, plan.layers + 1):
        codes += sum(to_panels(m).nbytes for m in read_parts(artefact, plan, number)[0].values())
    assert weight_bytes(packed) == kept + codes
    assert weight_bytes(plain) == sum(p.nbytes for p in plain.parameters())
    quantised = weight_bytes(plain) - kept
    assert codes < quantised / 3  # groups of 16 columns: half of it are scales and zeros


def test_routers_that_read_weights_read_the_dequantised_ones(tmp_path: Path) -> None:
    source, _, _ = trained(tmp_path, router=preset("moe_x"), layers=1)
    path, _ = compressed(source, settings(bits=2.8), tmp_path / "small")
    packed, plain = both(source, path)
    columns = [
        layer.columns(layer.experts, 1.0)
        for model in (packed, plain)
        for layer in model.moe_layers()
    ]
    assert all(layer.reads_columns for layer in packed.moe_layers())
    torch.testing.assert_close(columns[0].mean_ED, columns[1].mean_ED)
    torch.testing.assert_close(columns[0].variance_ED, columns[1].variance_ED)
    token_BS = tokens(2, 40)
    wanted = logits(plain, token_BS)
    assert float((logits(packed, token_BS) - wanted).norm() / wanted.norm()) < 0.02


def test_pruning_takes_experts_out_of_packed_layers_too(source: Source, tmp_path: Path) -> None:
    config = settings(bits=2.8, prune=PruneConfig(rule=PruneRule.ratio))
    path, _ = compressed(source, config, tmp_path / "pruned")
    stored = open_checkpoint(str(path))
    packed, plain = (restore_model(stored, device=CPU, weights=weights) for weights in Weights)
    token_BS = tokens(2, 40)
    with torch.no_grad():
        routings = packed(token_BS).routings
    assert any(bool((routing.expert_TK < 0).any()) for routing in routings)
    wanted = logits(plain, token_BS)
    assert float((logits(packed, token_BS) - wanted).norm() / wanted.norm()) < 0.05


def test_how_weights_are_held_can_be_chosen_for_compressed_models_only(
    source: Source, artefact: Path
) -> None:
    stored = open_checkpoint(str(artefact))
    check_weights(stored, None)
    check_weights(stored, Weights.dequantised)
    assert choose_weights(stored, Weights.dequantised, CPU) is Weights.dequantised
    packed = restore_model(stored, device=CPU, weights=Weights.packed)
    assert weight_bytes(packed) < weight_bytes(restore_model(stored, device=CPU)) / 2
    with pytest.raises(
        ConfigError, match=r"weights is packed, but checkpoint .* is not compressed"
    ):
        check_weights(open_checkpoint(str(source.path)), Weights.packed)


def test_weights_are_packed_only_where_kernels_multiply_them(
    source: Source,
    artefact: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = open_checkpoint(str(artefact))
    monkeypatch.setattr(restore, "load_packed_kernels", object)
    assert choose_weights(stored, None, CPU) is Weights.packed
    assert choose_weights(open_checkpoint(str(source.path)), None, CPU) is Weights.dequantised
    assert not caplog.records
    monkeypatch.setattr(restore, "load_packed_kernels", lambda: None)
    assert choose_weights(stored, None, CPU) is Weights.dequantised
    assert "no kernels multiply packed weights on this machine" in caplog.text
    assert choose_weights(stored, Weights.packed, CPU) is Weights.packed
    assert choose_weights(stored, None, torch.device("cuda")) is Weights.dequantised
    assert "on this cuda" in caplog.text


def test_an_artefact_that_does_not_fit_is_an_error(source: Source, artefact: Path) -> None:
    plan = read_plan(artefact)
    fewer = Plan(plan.layers, plan.parts[1:], plan.kept)
    with pytest.raises(CheckpointError, match="lacks"):
        load_packed(source.config, 257, artefact, fewer, CPU)
    file = artefact / "model-00002.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=r"model-00002\.safetensors"):
            load_packed(source.config, 257, artefact, plan, CPU)
    finally:
        file.write_bytes(whole)
