"""The routers' experiment: its statistics on numbers that are known."""

import json
import math
import random
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from gatewise.conf.compose import load_train_config

pytest.importorskip("scipy", reason="the experiment's statistics need scipy")
MARK = "<!-- results: written by routers.py report -->"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("routers")


def record(bench: ModuleType, arm: str, seed: int, loss: float) -> dict[str, Any]:
    names = ("entropy", "inner_balance", "outer_balance", "max_violation", "near", "far")
    return {
        "arm": arm,
        "seed": seed,
        "settings": bench._settings(arm),
        "val_loss": loss,
        "parameters": 1000,
        "router_parameters": 10,
        "cpu_seconds": 1.0,
        **dict.fromkeys(names, 0.5),
    }


def test_a_paired_difference_has_the_interval_of_the_table_of_t(bench: ModuleType) -> None:
    """Five differences -1 .. +3: mean 1, sd sqrt(2.5), t(0.975, 4) = 2.776, t = sqrt(2)."""
    linear = {seed: 10.0 * seed for seed in range(5)}
    gru = {seed: loss + seed - 1 for seed, loss in linear.items()}
    (contrast,) = bench.compare({"gru": gru, "linear_arithmetic": linear})
    assert (contrast.first, contrast.second, contrast.seeds) == ("gru", "linear_arithmetic", 5)
    assert contrast.mean == pytest.approx(1)
    assert contrast.deviation == pytest.approx(math.sqrt(2.5))
    reach = 2.7764451 * math.sqrt(2.5 / 5)
    assert (contrast.low, contrast.high) == pytest.approx((1 - reach, 1 + reach))
    # two-sided p of t = sqrt(2) with 4 degrees: 1 - (x + x^3 / 3) at ... = 0.2302 (tables)
    assert contrast.p == pytest.approx(0.2302, abs=2e-4)
    assert contrast.better == 1


def test_pairing_removes_what_seeds_share(bench: ModuleType) -> None:
    generator = random.Random(0)
    linear = {seed: generator.gauss(2, 0.5) for seed in range(6)}
    gru = {seed: loss - 0.01 + generator.gauss(0, 0.001) for seed, loss in linear.items()}
    (contrast,) = bench.compare({"gru": gru, "linear_arithmetic": linear})
    assert contrast.high < 0
    assert contrast.p_adjusted < 0.001
    assert contrast.better == 6


def test_only_seeds_of_both_arms_count(bench: ModuleType) -> None:
    losses = {"gru": {0: 1.0, 1: 2.0, 2: 9.0}, "np": {0: 1.5, 1: 2.0, 3: 0.0}, "bias": {0: 1.0}}
    (contrast,) = bench.compare(losses)
    assert contrast.seeds == 2
    assert contrast.mean == -0.25


def test_equal_losses_are_no_difference(bench: ModuleType) -> None:
    (contrast,) = bench.compare({"gru": {0: 1.0, 1: 2.0}, "np": {0: 1.0, 1: 2.0}})
    assert (contrast.mean, contrast.low, contrast.high, contrast.p) == (0, 0, 0, 1)


def test_holm_multiplies_and_never_falls(bench: ModuleType) -> None:
    assert bench.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bench.holm([0.9, 0.8]) == [1.0, 1.0]
    assert bench.holm([]) == []


def test_false_findings_are_rare_among_six_nulls(bench: ModuleType) -> None:
    """Without any effect, a family of six contrasts has an adjusted p below 0.05 in 5 % at most."""
    generator = random.Random(1)
    families, wrong = 400, 0
    for _ in range(families):
        losses = {arm: {s: generator.gauss(0, 1) for s in range(5)} for arm in bench.ARMS}
        wrong += any(contrast.p_adjusted < 0.05 for contrast in bench.compare(losses))
    assert wrong / families < 0.08


def test_the_report_has_every_arm_and_contrast(bench: ModuleType) -> None:
    records = [
        record(bench, arm, seed, 2.0 + seed + number / 100)
        for number, arm in enumerate(bench.ARMS)
        for seed in range(5)
    ]
    stale = {**record(bench, "gru", 7, 99.0), "settings": "other"}
    found, text = bench.report([*records, stale])
    json.dumps(found)
    assert list(found["arms"]) == list(bench.ARMS)
    assert found["arms"]["gru"]["seeds"] == [0, 1, 2, 3, 4]
    assert found["arms"]["linear"]["val_loss"] == pytest.approx(4.0)
    assert len(found["contrasts"]) == len(bench.CONTRASTS) == 6
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 2 + len(bench.ARMS) + len(bench.CONTRASTS)
    assert "| gru - np |" in text


def test_a_difference_is_claimed_only_below_the_adjusted_level(bench: ModuleType) -> None:
    values = (5, -0.01, 0.001, -0.011, -0.009, 0.001)
    shown = bench.Contrast("gru", "np", *values, 0.006, 5)
    assert bench.verdict(shown).startswith("- gru against np: better, between -0.0110 and -0.0090")
    unshown = bench.Contrast("gru", "np", *values, 0.06, 5)
    assert "no difference shown" in bench.verdict(unshown)


def test_the_report_replaces_the_results_of_the_page_only(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routers.jsonl"
    losses = {"gru": (2.0, 2.1, 2.3), "np": (2.1, 2.0, 2.2)}
    for arm, values in losses.items():
        for seed, loss in enumerate(values):
            bench.append_record(path, record(bench, arm, seed, loss))
    page = tmp_path / "routers.md"
    page.write_text(f"above\n{MARK}\nold\n<!-- end of results -->\nbelow\n")
    for _ in range(2):
        assert bench.main(["--records", str(path), "report"]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert text.count("| gru - np |") == 1
    assert json.loads((tmp_path / "routers.json").read_text())["arms"].keys() == losses.keys()
    assert "gru against np" in capsys.readouterr().out


def test_recorded_runs_are_not_repeated(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, int]] = []

    class Pool:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, _: object, arm: str, seed: int) -> Future[dict[str, Any]]:
            started.append((arm, seed))
            future: Future[dict[str, Any]] = Future()
            future.set_result(record(bench, arm, seed, 2.0))
            return future

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "records.jsonl"
    bench.run_missing(path, ["linear"], [0, 1])
    with open(path, "a") as stream:
        stream.write('{"arm": "lin')  # a kill while writing
    bench.run_missing(path, ["linear"], [0, 1, 2])
    assert started == [("linear", 0), ("linear", 1), ("linear", 2)]
    assert [found["seed"] for found in bench.read_records(path)] == [0, 1, 2]


@pytest.mark.parametrize("pair", [("linear", "linear_parameters"), ("linear", "linear_arithmetic")])
def test_the_matched_arms_differ_in_the_experts_width_only(
    bench: ModuleType, pair: tuple[str, str]
) -> None:
    one, two = (load_train_config([*bench.COMMON, *bench.ARMS[arm]]) for arm in pair)
    assert two.model.expert_width > one.model.expert_width
    two.model.expert_width = one.model.expert_width
    assert one == two


def test_all_arms_are_possible_and_differ_in_the_router_and_the_experts_width_only(
    bench: ModuleType,
) -> None:
    configs = {arm: load_train_config([*bench.COMMON, *bench.ARMS[arm]]) for arm in bench.ARMS}
    linear = configs["linear"]
    for arm, config in configs.items():
        assert arm == "linear" or config != linear
        config.model.expert_width, config.router = linear.model.expert_width, linear.router
        assert config == linear
