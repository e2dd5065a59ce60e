"""The files of a compressed model: exact sizes, what is refused, what comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import PLANS, compressed, settings, trained, weights
from safetensors import safe_open

from gatewise.compression.artefact import find_artefact, read_parts, read_plan, verify_artefact
from gatewise.compression.config import Allocation, CompressConfig, Granularity
from gatewise.compression.load import load_compressed
from gatewise.compression.work import Source
from gatewise.parallel.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("model")
    return trained(folder, expert_width=20, shared_experts=1, layers=3, dense_layers=1)[0]


@pytest.fixture(scope="module")
def artefact(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(source, settings(bits=2.8), tmp_path_factory.mktemp("artefact"))[0]


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
def test_c13_computed_bytes_are_those_on_the_disk(
    changes: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    path, report = compressed(source, settings(**changes), tmp_path)
    files = sorted(path.glob("model-*.safetensors"))
    on_disk = sum(file.stat().st_size for file in files)
    assert len(files) == 4
    assert report["bytes"]["computed"] == report["bytes"]["on_disk"] == on_disk
    payload = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            payload += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert report["bytes"]["payload"] == payload
    assert report["matrices"]["planned"] == report["matrices"]["quantised"]


def test_what_is_kept_stays_as_it_was(source: Source, artefact: Path) -> None:
    plan = read_plan(artefact)
    model = load_compressed(source.config, 257, artefact, plan, torch.device("cpu"))
    found = weights(model)
    exact = _original(source)
    for name, weight in found.items():
        if "router" in name or "norm" in name:
            assert torch.equal(weight, exact[name]), name
    assert torch.equal(found["embedding"], exact["embedding"].bfloat16().float())
    name = "blocks.2.feed_forward.experts.w_in_eGD"
    assert not torch.equal(found[name], exact[name])
    for part in plan.of_layer(2, "expert"):
        matrix = read_parts(artefact, plan, 3)[0][part.name]
        assert part.expert is not None
        assert torch.equal(found[part.source][part.expert], matrix.dequantise())


@pytest.mark.parametrize("name", ["model-00002.safetensors", "plan.json", "report.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_a_damaged_file_is_named(name: str, damage: str, artefact: Path) -> None:
    file = artefact / name
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 1
    try:
        file.unlink() if damage == "gone" else file.write_bytes(
            whole[:-1] if damage == "cut" else bytes(changed)
        )
        with pytest.raises(CheckpointError, match=f"is damaged: .*{name}"):
            verify_artefact(artefact)
    finally:
        file.write_bytes(whole)
    verify_artefact(artefact)


def test_a_planned_tensor_that_is_not_there_is_an_error(artefact: Path, tmp_path: Path) -> None:
    plan = read_plan(artefact)
    record = json.loads((artefact / "plan.json").read_text())
    first = record["parts"][0]
    record["parts"].append({**first, "name": "blocks.0.attention.w_new"})
    more = type(plan).from_json(json.dumps(record), source="plan.json")
    with pytest.raises(CheckpointError, match=r"planned tensor 'blocks\.0\.attention\.w_new"):
        read_parts(artefact, more, 1)
    record["parts"] = record["parts"][1:-1]
    fewer = type(plan).from_json(json.dumps(record), source="plan.json")
    with pytest.raises(CheckpointError, match="unknown tensor"):
        read_parts(artefact, fewer, 1)
    del tmp_path


def test_an_unfinished_compression_is_no_checkpoint(tmp_path: Path) -> None:
    assert find_artefact(tmp_path) is None
    (tmp_path / ".compressed.partial").mkdir()
    with pytest.raises(CheckpointError, match="did not finish"):
        find_artefact(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": "1,5"}, "widths is '1,5'"),
        ({"attention_bits": 5.0}, "attention_bits is 5"),
        ({"allocation": Allocation.random, "widths": "2"}, "one width"),
        (
            {"allocation": Allocation.pmq_paper, "granularity": Granularity.layer},
            "ranks whole experts",
        ),
        ({"damp": 0.0}, "damp is 0.0"),
        ({"bits": 0.0}, "bits is 0.0"),
    ],
)
def test_a_setting_that_cannot_work_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressConfig(**changes)


def _original(source: Source) -> dict[str, torch.Tensor]:
    from gatewise.launch.restore import open_checkpoint, restore_model

    stored = open_checkpoint(str(source.path))
    return weights(restore_model(stored, device=torch.device("cpu")))
