"""From a checkpoint to a compressed one: repeatable, resumable, and close at eight bits."""

import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import compressed, settings, trained

from gatewise.compression import pipeline, work
from gatewise.compression.compare import Scores, compare_scores, score_windows
from gatewise.compression.config import Allocation, CalibrationConfig, Method, TextConfig
from gatewise.compression.cover import choose_sequences
from gatewise.compression.load import build_empty
from gatewise.compression.stream import check_names
from gatewise.compression.work import Source
from gatewise.launch.compress import comparison_table
from gatewise.launch.restore import open_checkpoint, restore_model, restore_tokenizer
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError, DataError
from gatewise.training.state import model_ranges


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return trained(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def reference(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artefact with the settings of the tests, made without interruption."""
    return compressed(source, settings(), tmp_path_factory.mktemp("reference"))[0]


def hashes(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())
    }


def model_of(path: Path) -> Decoder:
    return restore_model(open_checkpoint(str(path)), device=torch.device("cpu"))


def test_c35_the_same_settings_give_the_same_files(
    source: Source, reference: Path, tmp_path: Path
) -> None:
    again, _ = compressed(source, settings(), tmp_path)
    assert hashes(again) == hashes(reference)


def test_c35_another_number_of_threads_gives_the_same_plan(
    source: Source, reference: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again, _ = compressed(source, settings(), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (again / "plan.json").read_bytes() == (reference / "plan.json").read_bytes()


@pytest.mark.parametrize("stage", ["gradients", "cost", "quantize", "evaluate before"])
def test_c36_a_run_killed_after_a_layer_goes_on_to_the_same_files(
    stage: str, source: Source, reference: Path, tmp_path: Path
) -> None:
    class Killed(Exception):
        """As if the process had ended here."""

    def kill(name: str, _done: int, _total: int) -> None:
        if name == stage:
            raise Killed

    with pytest.raises(Killed):
        pipeline.compress(source, settings(), tmp_path, kill)
    assert not (tmp_path / "compressed").exists()
    with pytest.raises(CheckpointError, match="did not finish"):
        open_checkpoint(str(tmp_path))
    done: list[tuple[str, int]] = []
    path, _ = pipeline.compress(
        source, settings(), tmp_path, lambda name, step, _: done.append((name, step))
    )
    assert hashes(path) == hashes(reference)
    if stage == "quantize":
        assert ("cost", 1) not in done


def test_c37_eight_bits_change_the_loss_by_less_than_a_thousandth(
    source: Source, tmp_path: Path
) -> None:
    wide = settings(widths="8", bits=8.0, attention_bits=8.0, allocation=Allocation.uniform)
    _, report = compressed(source, wide, tmp_path)
    found = report["evaluation"]
    assert abs(math.expm1(found["delta_nats"])) < 1e-3
    assert found["delta_nats"] == pytest.approx(found["loss_after"] - found["loss_before"])


def test_c9_one_width_to_choose_from_gives_the_codes_of_the_uniform_plan(
    source: Source, tmp_path: Path
) -> None:
    found = []
    for number, (allocation, widths) in enumerate(
        [
            (Allocation.uniform, "2"),
            (Allocation.fisher_global, "2"),
            (Allocation.fnorm2, "1,2"),  # with room for the wider one everywhere
        ]
    ):
        config = settings(
            widths=widths, bits=2.6, allocation=allocation, text=TextConfig(evaluate=False)
        )
        found.append(hashes(compressed(source, config, tmp_path / str(number))[0]))
    for name in found[0]:
        if name.startswith("model-"):
            assert found[0][name] == found[1][name] == found[2][name]


def test_the_report_says_what_was_measured(source: Source, tmp_path: Path) -> None:
    _, rounded = compressed(source, settings(method=Method.rtn, bits=1.8), tmp_path / "a")
    _, fed_back = compressed(source, settings(bits=1.8), tmp_path / "b")
    for report in (rounded, fed_back):
        assert report["bits"]["paper"] <= 1.8
        assert report["bits"]["with_metadata"] > report["bits"]["paper"]
        assert report["bits"]["activated_bytes_per_token"] < report["bytes"]["payload"]
        assert [row["layer"] for row in report["coverage"]] == [0, 1]
        assert all(sum(row["tokens_per_expert"]) == 2 * 12 * 32 for row in report["coverage"])
    error = "relative_output_error"
    assert fed_back[error]["median"] < rounded[error]["median"]


@torch.no_grad()
def test_a_compressed_model_loads_like_any_checkpoint(source: Source, reference: Path) -> None:
    stored = open_checkpoint(str(reference.parent))
    assert stored.is_compressed
    assert stored.path == reference
    assert stored.step == 8
    assert restore_tokenizer(stored).fingerprint == source.meta["tokenizer"]
    model = model_of(reference)
    token_BS = torch.arange(64).view(2, 32)
    out = model(token_BS).hidden_BSD
    exact = model_of(source.path)(token_BS).hidden_BSD
    assert torch.isfinite(out).all()
    assert 0 < float((out - exact).norm() / exact.norm()) < 0.7


def test_calibration_that_is_too_small_is_refused(source: Source, tmp_path: Path) -> None:
    few = settings(calibration=CalibrationConfig(sequences=100000))
    with pytest.raises(DataError, match=r"has only .* sequences of 32 tokens"):
        compressed(source, few, tmp_path)
    wide, _, _ = trained(tmp_path, hidden=48)
    few = settings(calibration=CalibrationConfig(sequences=1))
    with pytest.raises(DataError, match="is 32 tokens; the widest matrix has 48 inputs"):
        compressed(wide, few, tmp_path / "few")


def test_activations_that_are_not_finite_are_named(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil("model/blocks.1.norm_feed_forward.gain", 3e38, monkeypatch)  # finite, its products not
    with pytest.raises(DataError, match="layer 1: the inputs of its feed-forward matrices"):
        compressed(source, settings(allocation=Allocation.fnorm2), tmp_path / "fnorm2")
    assert not (tmp_path / "fnorm2" / "compressed").exists()


def spoil(wanted: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tensor of the checkpoint be read as other numbers."""
    fill = work.fill_ranges

    def fill_spoilt(path: Path, ranges: dict[str, Any]) -> None:
        fill(path, ranges)
        if wanted in ranges:
            ranges[wanted].data.fill_(value)

    monkeypatch.setattr(work, "fill_ranges", fill_spoilt)


def test_weights_that_are_not_finite_are_named_before_anything_is_measured(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil("model/blocks.1.feed_forward.experts.w_out_eDF", math.nan, monkeypatch)
    with pytest.raises(
        DataError, match=r"of 'model/blocks\.1\.feed_forward\.experts\.w_out_eDF' are"
    ):
        compressed(source, settings(), tmp_path)
    assert not list((tmp_path / "calibration").iterdir())


def test_an_expert_without_a_token_is_quantised_on_all_and_reported(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill = work.fill_ranges

    def close_expert(path: Path, ranges: dict[str, Any]) -> None:
        """Give expert 2 of layer 1 the logits of expert 3: ties go to the lower index."""
        fill(path, ranges)
        found = ranges.get("model/blocks.1.feed_forward.router.weight")
        if found is not None:
            weight_ED = found.data.view(4, -1)
            weight_ED[0] = weight_ED[1] = weight_ED[3]
            weight_ED[2] = weight_ED[3]

    monkeypatch.setattr(work, "fill_ranges", close_expert)
    text = TextConfig(evaluate=False)
    path, report = compressed(source, settings(text=text), tmp_path)
    starved = report["coverage"][1]
    assert starved["without_a_token"] == [2, 3]
    assert [starved["borrowed"][name][3] for name in ("in", "out")] == [1.0, 1.0]
    assert "layer 1: no calibration token reached experts 2, 3; they are quantised" in caplog.text
    model = restore_model(open_checkpoint(str(path)), device=torch.device("cpu"))
    assert bool(model.moe_layers()[1].experts.w_in_eGD[2:].any())


def test_unknown_and_missing_tensors_of_a_checkpoint_are_named(source: Source) -> None:
    model = build_empty(source.config, 257)
    saved = {name: part.shape for name, part in model_ranges(model).items()}
    check_names(model, saved, source="x")
    with pytest.raises(CheckpointError, match="holds 'model/extra'"):
        check_names(model, {**saved, "model/extra": (3,)}, source="x")
    name = "model/blocks.0.attention.w_out"
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' is \\[1\\]"):
        check_names(model, {**saved, name: (1,)}, source="x")
    del saved[name]
    with pytest.raises(CheckpointError, match=f"lacks '{re.escape(name)}'"):
        check_names(model, saved, source="x")


def test_sequences_are_chosen_for_the_experts_that_lack_tokens() -> None:
    import numpy as np

    count_PLE = np.zeros((5, 1, 3), dtype=np.int64)
    count_PLE[:, 0, 0] = 10
    count_PLE[3, 0] = [4, 6, 0]
    count_PLE[4, 0] = [5, 0, 5]
    assert choose_sequences(count_PLE, 3, target=10) == [0, 3, 4]
    assert choose_sequences(count_PLE, 5, target=10) == [0, 1, 2, 3, 4]
    assert choose_sequences(count_PLE, 2, target=1) in ([3, 4], [0, 3])


def test_pairs_of_windows_give_the_difference_and_its_error(source: Source) -> None:
    before = score_windows(model_of(source.path), source.data, sequence_length=32, tokens=300)
    assert int(before.targets_W.sum()) == 300
    shift_W = torch.tensor([0.01, 0.03] * (len(before.nats_W) // 2 + 1))[: len(before.nats_W)]
    after = replace(before, nats_W=before.nats_W + shift_W * before.targets_W)
    found = compare_scores(before, after)
    assert found.delta_nats == pytest.approx(0.02, abs=0.002)
    assert 0 < found.standard_error < 0.01
    same = compare_scores(before, before)
    assert (same.delta_nats, same.standard_error) == (0, 0)
    one = torch.tensor([8])
    half = Scores(torch.tensor([1.0]).double(), torch.tensor([4]), one)
    assert compare_scores(
        half, replace(half, right_W=torch.tensor([3]))
    ).accuracy_loss_relative == (0.25)


def test_the_table_puts_before_beside_after() -> None:
    found = {
        "loss_before": 4.0,
        "loss_after": 4.25,
        "delta_nats": 0.25,
        "standard_error": 0.01,
        "accuracy_before": 0.5,
        "accuracy_after": 0.4,
        "accuracy_loss_relative": 0.2,
    }
    sizes = {"experts": 1000, "experts_bf16": 6000, "on_disk": 2345}
    loss, accuracy, experts, every = comparison_table({"bytes": sizes, "evaluation": found})[1:]
    assert loss.split()[-5:] == ["4.0000", "4.2500", "+0.2500", "+-", "0.0100"]
    assert accuracy.split()[-4:] == ["0.5000", "0.4000", "-20.00", "%"]
    assert experts.split()[-5:] == ["6,000", "1,000", "6.00", "times", "smaller"]
    assert every.split()[-1] == "2,345"
    assert len(comparison_table({"bytes": sizes})) == 3  # where nothing was evaluated
