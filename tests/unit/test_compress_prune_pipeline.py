"""Pruning as a stage of a compression: calibrated on what was quantised, kept, and in force."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import compressed, settings, trained
from training_runs import tiny

from gatewise.compression import pipeline
from gatewise.compression.config import (
    Allocation,
    CompressConfig,
    Method,
    Protect,
    PruneConfig,
    PruneRule,
    Weights,
)
from gatewise.compression.prune_stage import check_prunable
from gatewise.compression.pruning import Pruning, apply_pruning, read_pruning
from gatewise.compression.work import Source
from gatewise.conf.compose import load_settings
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.moe.attention import KeyValueCache
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.routers.presets import preset

TOKENS = 12 * 32  # of the calibration


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return trained(tmp_path_factory.mktemp("model"), top_k=2)[0]


def quick(**prune: Any) -> CompressConfig:
    """Return settings without costs, gradients and feedback."""
    return settings(
        allocation=Allocation.uniform, method=Method.rtn, bits=2.6, prune=PruneConfig(**prune)
    )


def pruned(source: Source, folder: Path, **prune: Any) -> tuple[Path, dict[str, Any]]:
    return compressed(source, quick(**prune), folder)


def model_of(path: Path) -> Decoder:
    return restore_model(open_checkpoint(str(path)), device=torch.device("cpu"))


def kept_by_layer(model: Decoder, token_BS: torch.Tensor) -> list[int]:
    routings = model(token_BS).routings
    return [int((routing.expert_TK >= 0).sum()) for routing in routings]


def test_c30_the_median_keeps_three_of_four_in_the_first_layer(
    source: Source, tmp_path: Path
) -> None:
    path, report = pruned(source, tmp_path, rule=PruneRule.ratio)
    found = report["prune"]
    assert found["kept_by_layer"]["0"] * 2 * TOKENS == pytest.approx(1.5 * TOKENS, abs=1)
    assert found["kept_activations"] == pytest.approx(0.75, abs=0.05)
    before = report["bits"]["activated_bytes_per_token"]
    saved = found["activated_bytes_of_experts_before"]
    saved -= found["activated_bytes_of_experts_per_token"]
    assert found["activated_bytes_per_token"] == pytest.approx(before - saved)
    assert 0 < saved < 0.4 * found["activated_bytes_of_experts_before"]
    evaluation = report["evaluation"]["pruned"]
    assert 0.6 < evaluation["kept_activations"] < 0.9
    assert evaluation["loss"] == pytest.approx(
        report["evaluation"]["loss_after"] + evaluation["delta_nats"]
    )
    assert (path / "prune.json").exists()


def test_c25_a_threshold_of_zero_changes_nothing_in_the_whole_model(
    source: Source, tmp_path: Path
) -> None:
    path, report = pruned(source, tmp_path, rule=PruneRule.ratio, mu=0.0, protect=Protect.col)
    assert report["evaluation"]["pruned"]["delta_nats"] == 0
    assert report["prune"]["kept_activations"] == 1
    model = model_of(path)
    token_BS = torch.arange(64).view(2, 32)
    with torch.no_grad():
        found = model(token_BS).hidden_BSD
        for layer in model.moe_layers():
            layer.prune = None
        assert torch.equal(model(token_BS).hidden_BSD, found)


@pytest.mark.parametrize("keep", [0.6, 0.85])
def test_the_budget_is_kept_on_the_calibration_tokens(
    keep: float, source: Source, tmp_path: Path
) -> None:
    _, report = pruned(source, tmp_path, rule=PruneRule.budget, keep=keep)
    # the second layer's routing moves a little, once the first is pruned
    assert keep - 0.06 < report["prune"]["kept_activations"] < keep + 0.02


def test_pruning_is_in_force_in_prefill_and_decode(source: Source, tmp_path: Path) -> None:
    path, _ = pruned(source, tmp_path, rule=PruneRule.ratio, mu=2.0, protect=Protect.col, share=0.2)
    model = model_of(path)
    token_BS = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    assert kept_by_layer(model, token_BS) == [30 + 6, 30 + 6]
    cache, decoded = KeyValueCache(), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        for token_11 in token_BS.split(1, 1):
            routings = model(token_11, cache=cache).routings
            decoded += torch.tensor([int((part.expert_TK >= 0).sum()) for part in routings])
    assert all(30 <= count < 60 for count in decoded.tolist())
    packed = restore_model(
        open_checkpoint(str(path)), device=torch.device("cpu"), weights=Weights.packed
    )
    with torch.no_grad():
        assert kept_by_layer(packed, token_BS) == [30 + 6, 30 + 6]
    rules = read_pruning(path)
    assert rules is not None
    assert all(rule.decode_norm > 0 for rule in rules.layers)


@pytest.mark.parametrize("rule", [PruneRule.saliency, PruneRule.ser, PruneRule.top_p])
def test_every_rule_is_calibrated_and_read_back(
    rule: PruneRule, source: Source, tmp_path: Path
) -> None:
    path, report = pruned(source, tmp_path, rule=rule, protect=Protect.l1)
    assert 0.5 < report["prune"]["kept_activations"] < 1
    token_BS = torch.arange(64).view(2, 32)
    assert sum(kept_by_layer(model_of(path), token_BS)) < 4 * 64


def test_c36_pruning_that_was_killed_goes_on_to_the_same_files(
    source: Source, tmp_path: Path
) -> None:
    config = quick(rule=PruneRule.budget, protect=Protect.col)

    class Killed(Exception):
        """As if the process had ended here."""

    def kill(name: str, _done: int, _total: int) -> None:
        if name == "prune":
            raise Killed

    (tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        pipeline.compress(source, config, tmp_path / "killed", kill)
    with pytest.raises(CheckpointError, match="did not finish"):
        open_checkpoint(str(tmp_path / "killed"))
    resumed, _ = compressed(source, config, tmp_path / "killed")
    whole, _ = compressed(source, config, tmp_path / "whole")
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
        for path in (resumed, whole)
    ]
    assert digests[0] == digests[1]
    assert "prune.json" in digests[0]


def test_models_with_nothing_to_drop_are_refused() -> None:
    prune = PruneConfig(rule=PruneRule.ratio)
    with pytest.raises(ConfigError, match=r"model\.top_k is 1"):
        check_prunable(tiny(model={"top_k": 1}), prune)
    with pytest.raises(ConfigError, match=r"router\.selector=soft"):
        check_prunable(tiny(router=replace(preset("soft"), allow_noncausal=True)), prune)
    check_prunable(tiny(router=preset("top_p"), model={"top_k": 1}), prune)
    with pytest.raises(ConfigError, match=r"prune\.keep is 0\.4, .* at least 0\.5"):
        check_prunable(tiny(), PruneConfig(rule=PruneRule.budget, keep=0.4))
    check_prunable(tiny(model={"top_k": 1}), PruneConfig())


def test_a_rule_of_other_layers_is_refused(source: Source, tmp_path: Path) -> None:
    path, _ = pruned(source, tmp_path, rule=PruneRule.ratio)
    pruning = read_pruning(path)
    assert pruning is not None
    fewer = Pruning(pruning.rule, pruning.protect, 0.0, 1, False, pruning.layers[:1])
    with pytest.raises(CheckpointError, match=r"of layers \[0\], but the model has"):
        apply_pruning(model_of(path), fewer)


def test_the_name_of_the_section_means_its_rule() -> None:
    config = load_settings(CompressConfig, ["prune=budget", "prune.keep=0.7", "repair=topk_mse"])
    assert config.prune == PruneConfig(rule=PruneRule.budget, keep=0.7)
    assert config.repair.rule.name == "topk_mse"
    with pytest.raises(ConfigError, match=r"prune\.rule is 'ratoi'; .*did you mean 'ratio'"):
        load_settings(CompressConfig, ["prune=ratoi"])
