"""The comparison of allocations: its arithmetic on rows that are known."""

import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from gatewise.compression.config import Allocation


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("compression")


def row(method: str, bits: float, delta: float, *, deal: int = 0, seed: int = 0) -> dict[str, Any]:
    """Return a row of two windows of 500 tokens, which differ by 0.01 nats per token."""
    return {
        "model": "m",
        "model_seed": seed,
        "method": method,
        "bits_target": bits,
        "deal": deal,
        "prune": None,
        "tokens": 1000,
        "moved_nats": [500 * (delta - 0.005), 500 * (delta + 0.005)],
        "bits_with_metadata": bits + 0.3,
        "loss_before": 4.0,
        "delta_nats": delta,
        "standard_error": 0.001,
    }


def test_a_model_is_named_by_label_seed_and_folder(bench: ModuleType) -> None:
    model = bench.parse_model("ref:3=runs/a=b")
    assert (model.label, model.seed, str(model.folder)) == ("ref", 3, "runs/a=b")
    for text in ("ref=runs/a", "ref:x=runs/a", ":0=runs/a", "ref:0="):
        with pytest.raises(argparse.ArgumentTypeError, match="LABEL:SEED=RUN"):
            bench.parse_model(text)


def test_every_method_is_an_allocation_of_the_command(bench: ModuleType) -> None:
    assert set(bench.METHODS) <= {allocation.value for allocation in Allocation}


def test_deals_are_averaged_and_their_spread_is_the_error(bench: ModuleType) -> None:
    rows = [row("random", 2.0, delta, deal=deal) for deal, delta in enumerate((0.1, 0.2, 0.3))]
    assert bench.loss_of(rows, "random", 2.0) == pytest.approx((0.2, 0.1))
    assert bench.loss_of(rows, "random", 1.5) is None


def test_the_report_holds_what_was_expected_against_what_was_found(
    bench: ModuleType, tmp_path: Path
) -> None:
    rows = [
        row("fisher_global", 2.0, 0.03),
        row("pmq_release", 2.0, 0.08),
        row("uniform", 2.0, 0.04),
        row("uniform", 3.0, -0.001),  # below the model itself: not on a logarithmic scale
        row("fisher_global", 2.54, 0.01)
        | {
            "prune": "budget",
            "experts_smaller_than_bf16": 5.96,
            "accuracy_before": 0.45,
            "accuracy_after": 0.441,
            "accuracy_loss_relative": 0.02,
            "accuracy_standard_error": 0.003,
            "kept_activations": 0.84,
            "pruned_accuracy_loss_relative": 0.004,
            "pruned_accuracy_standard_error": 0.001,
        },
    ]
    records = tmp_path / "compression.jsonl"
    records.write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = tmp_path / "compression.md"
    page.write_text(
        "before\n<!-- results: written by compression.py report -->\n"
        "<!-- end of results -->\nafter\n"
    )
    assert bench.main(["--records", str(records), "report"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (
        "- 2 bits: `fisher_global` loses 0.38 of what `pmq_release` loses; less half of that it is "
        "-0.0100 (0.0025)" in text
    )
    assert "`fisher_global` less `uniform` is -0.0100 (0.0000)" in text
    assert (
        "| m, seed 0 | 5.96 times | 0.4500 | 0.4410 | 2.00 % (0.30) | `budget` | 16.0 % |" in text
    )
    content = json.loads((tmp_path / "compression.json").read_text())
    kept = [{key: value for key, value in one.items() if key != "moved_nats"} for one in rows]
    assert content == {"rows": kept[:4], "pruned": kept[4:]}
    ET.parse(tmp_path / "compression_m.svg")


def test_deals_are_averaged_before_they_are_compared(bench: ModuleType) -> None:
    rows = [row("random", 2.0, delta, deal=deal) for deal, delta in enumerate((0.1, 0.3))]
    rows.append(row("uniform", 2.0, 0.04))
    assert bench.difference(rows, "uniform", "random", 2.0) == pytest.approx((-0.16, 0.0))
    assert bench.difference(rows, "uniform", "random", 2.0, 0.5) == pytest.approx((-0.06, 0.0025))
    assert bench.difference(rows, "uniform", "pmq_paper", 2.0) is None


def test_a_model_is_measured_once_and_what_is_recorded_is_not_done_again(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, list[str]]] = []  # method, what was there already

    def compress(_model: Any, cell: Any, folder: Path) -> None:
        runs.append((cell.method, sorted(path.name for path in folder.rglob("*.*"))))
        calibration = folder / "calibration"
        for name in ("sequences", "layer_000", "quantized_000", "before", "after"):
            (calibration / f"{name}.json").write_text('{"nats_W": [1.0, 2.0]}')
        (folder / "compressed").mkdir()
        (folder / "compressed" / "model-00000.safetensors").touch()
        scores = dict.fromkeys(
            (
                "loss_before",
                "delta_nats",
                "standard_error",
                "accuracy",
                "accuracy_before",
                "accuracy_after",
                "accuracy_loss_relative",
                "accuracy_standard_error",
                "kept_activations",
                "tokens",
            ),
            1.0,
        )
        found = {
            "bits": {"experts": 2.0, "paper": 2.2, "with_metadata": 2.4},
            "bytes": {"on_disk": 10, "experts": 2, "experts_bf16": 16},
            "evaluation": {**scores, "pruned": scores},
        }
        (folder / "compressed" / "report.json").write_text(json.dumps(found))

    monkeypatch.setattr(bench, "_compress", compress)
    records = tmp_path / "records.jsonl"
    model = bench.Model("m", 0, tmp_path)
    bench.run_missing(records, model)
    assert len(runs) == len(bench.cells()) == 3 + 9 + 6 * 3 + len(bench.PRUNED)
    assert runs[0][0].startswith("fisher")
    assert not runs[0][1]
    measured = ["before.json", "layer_000.json", "sequences.json"]
    assert [there for _, there in runs].count(measured) == len(runs) - 2
    quantised = [".compressed.partial", *measured, "model-00000.safetensors", "quantized_000.json"]
    assert [there for _, there in runs].count(sorted(quantised)) == len(bench.PRUNED) - 1
    bench.run_missing(records, model)
    assert len(runs) == len(bench.cells())
    lines = records.read_text().splitlines()
    records.write_text("\n".join(line for line in lines if "fisher_block" not in line) + "\n")
    bench.run_missing(records, model)
    assert [method for method, _ in runs[len(lines) :]] == ["fisher_block"] * 3


def test_a_report_without_results_says_what_comes_first(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--records", str(tmp_path / "none.jsonl"), "report"])
    assert stop.value.code == 2
    assert "`run` comes first" in capsys.readouterr().err
