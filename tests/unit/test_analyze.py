"""`gatewise analyze` on a small run, and the probe that it looks through."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import LENGTH, Run, make_text, run, tiny

from gatewise.launch.cli import main
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.moe.capacity import keep_within_capacity
from gatewise.moe.config import CapacityConfig
from gatewise.moe.model import Decoder
from gatewise.training.config import CheckpointConfig
from gatewise.training.data import PreparedData
from gatewise.training.measures.probe import choices, collect, cut_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("analyze"))


@pytest.fixture(scope="module")
def trained(data: PreparedData) -> Run:
    config = tiny(6, checkpoint=CheckpointConfig(every=3))
    return run(config, data, data.folder.parent.parent / "run")


def analyze(trained: Run, data: PreparedData, folder: Path, *more: str) -> dict[str, Any]:
    text = data.folder.parent.parent
    arguments = [f"data.path={text / 'text'}", f"data.cache={text / 'cache'}", f"run.dir={folder}"]
    assert main(["analyze", f"checkpoint={trained.folder}", *arguments, *more]) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def found(
    trained: Run, data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return analyze(trained, data, tmp_path_factory.mktemp("found"), "tokens=640")


def model_of(trained: Run) -> Decoder:
    return restore_model(open_checkpoint(str(trained.folder)), device=CPU)


def test_the_load_is_that_of_the_model_on_the_first_sequences(
    found: dict[str, Any], trained: Run, data: PreparedData
) -> None:
    model = model_of(trained)
    count_LE = torch.zeros(2, 4)
    for sequence in range(640 // LENGTH):
        tokens = data.validation.tokens[sequence * LENGTH : (sequence + 1) * LENGTH]
        with torch.no_grad():
            routings = model(torch.from_numpy(tokens.astype(np.int64))[None]).routings
        for layer, routing in enumerate(routings):
            count_LE[layer] += torch.bincount(routing.expert_TK.flatten(), minlength=4)
    for layer in range(2):
        want = count_LE[layer] / count_LE[layer].mean()
        assert found["layers"][layer]["load"]["ratio"] == pytest.approx(want.tolist())
        assert found["layers"][layer]["load"]["effective_k"] == 2
    assert found["tokens"] == 640
    assert found["step"] == 6


def test_every_layer_and_pair_of_layers_has_its_values(found: dict[str, Any]) -> None:
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert set(layer) == {"layer", "load", "scores", "experts", "context"}
        assert 0 < layer["scores"]["entropy"] <= np.log(4)
        assert sum(layer["scores"]["entropy_histogram"]) == 640
        assert len(layer["experts"]["similarity"]) == 4
        assert 0 < layer["context"]["by_token"]["corrected"] < 1
        assert len(layer["context"]["top_texts"]) == 4
    across = found["across_layers"]
    for name in ("information", "information_shuffled", "information_binned"):
        assert np.array(across[name]).shape == (2, 2)
    assert across["information_far"] is None
    assert across["paths"]["entropy"] <= across["paths"]["ceiling"]
    assert set(found["gradients"]["norms"]) == {"language", "balance", "z"}
    assert all(norm > 0 for norm in found["gradients"]["norms"].values())


def test_earlier_checkpoints_show_how_early_the_routing_was_there(found: dict[str, Any]) -> None:
    history = found["over_checkpoints"]
    assert history["steps"] == [3, 6]
    assert history["chance"] == 0.5
    for row in (*history["saturation"], *history["agreement"]):
        assert 0 < row[0] < 1
        assert row[1] == pytest.approx(1)


def test_the_report_shows_every_picture_and_every_picture_is_one(found: dict[str, Any]) -> None:
    report = Path(found["report"])
    text = report.read_text()
    shown = re.findall(r"\]\((pictures/\w+\.svg)\)", text)
    assert {str(report.parent / name) for name in shown} == set(found["pictures"])
    assert len(shown) == len(found["pictures"]) == 5
    for picture in found["pictures"]:
        ET.parse(picture)
    for line in text.splitlines():  # cells of every table row, whatever the tokens were
        if line.startswith("| ") and "---" not in line:
            assert len(re.findall(r"(?<!\\)\|", line)) >= 3


def test_fields_of_its_own_and_a_short_summary(
    trained: Run, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = analyze(trained, data, tmp_path, "tokens=64", "history=false", "training_split=true")
    assert result["over_checkpoints"] is None
    assert (result["tokens"], result["split"]) == (64, "training")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "result.json")
    assert len(lines) == 5
    assert "saturation.svg" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "checkpoint is not set"),
        (["checkpoint=/nonexistent"], "/nonexistent"),
        (["checkpoint={run}", "tokens=0"], "tokens is 0; it must be at least 1"),
        (["checkpoint={run}", "token=5"], "unknown setting 'token'"),
        (["checkpoint={run}", "model.layers=5"], "model.layers is the checkpoint's"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *(text.format(run=trained.folder) for text in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_dense_model_has_no_routers(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(1, model={"num_experts": 0}), data, tmp_path / "dense")
    assert main(["analyze", f"checkpoint={tmp_path / 'dense'}"]) == 2
    assert "a dense model" in capsys.readouterr().err


def test_text_is_cut_into_whole_sequences_with_the_next_tokens() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    text = cut_text(tokens, sequence_length=8, limit=30)
    assert text.input_WS.tolist() == [list(range(i, i + 8)) for i in (0, 8, 16)]
    assert torch.equal(text.next_WS, text.input_WS + 1)
    assert cut_text(tokens, sequence_length=8, limit=1).input_WS.shape == (1, 8)
    assert cut_text(tokens, sequence_length=8, limit=1000).input_WS.shape == (12, 8)
    assert cut_text(tokens[:5], sequence_length=8, limit=1000).next_WS.tolist() == [[1, 2, 3, 4]]


def test_a_probe_does_not_depend_on_its_passes_and_leaves_the_model_as_it_was(
    trained: Run, data: PreparedData
) -> None:
    model = model_of(trained).train()
    text = cut_text(data.validation.tokens, sequence_length=LENGTH, limit=10 * LENGTH)
    one, many = (collect(model, text, batch=batch, device=CPU) for batch in (10, 3))
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.moe_layers())
    assert torch.equal(one.expert_LTK(), many.expert_LTK())
    assert torch.equal(choices(model, text, batch=4, device=CPU), one.expert_LTK())
    torch.testing.assert_close(one.binned_LL, many.binned_LL)
    for a, b in zip(one.layers, many.layers, strict=True):
        torch.testing.assert_close(a.entropy_T, b.entropy_T)
        torch.testing.assert_close(a.outputs.square_E, b.outputs.square_E)
        assert torch.equal(a.first_T, a.expert_TK[:, 0])
        assert a.largest_logit == pytest.approx(b.largest_logit, rel=1e-5)
        assert int(a.dropped_T.sum()) == 0


def test_the_probe_counts_what_the_capacity_of_training_would_drop(
    trained: Run, data: PreparedData
) -> None:
    model = model_of(trained)
    for layer in model.moe_layers():
        layer.capacity = CapacityConfig(factor=0.5)
    text = cut_text(data.validation.tokens, sequence_length=LENGTH, limit=4 * LENGTH)
    probe = collect(model, text, batch=4, device=CPU)
    for part in probe.layers:
        keep_TK = keep_within_capacity(
            part.expert_TK, torch.rand(part.expert_TK.shape), num_experts=4, capacity=LENGTH
        )  # 0.5 * 2 * 4 * LENGTH / 4; how many are dropped does not depend on which
        assert int(part.dropped_T.sum()) == int((~keep_TK).sum()) > 0
