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
    return {
        "model": "m",
        "model_seed": seed,
        "method": method,
        "bits_target": bits,
        "deal": deal,
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
    assert "- 2 bits: `fisher_global` loses 0.38 of what `pmq_release` loses" in text
    assert "`fisher_global` less `uniform` is -0.0100" in text
    assert json.loads((tmp_path / "compression.json").read_text())["rows"] == rows
    ET.parse(tmp_path / "compression_m.svg")


def test_a_report_without_results_says_what_comes_first(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--records", str(tmp_path / "none.jsonl"), "report"])
    assert stop.value.code == 2
    assert "`run` comes first" in capsys.readouterr().err
