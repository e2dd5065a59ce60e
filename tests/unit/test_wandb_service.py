"""Runs and dashboards against a stand-in of the W&B service: taken, refused, gone in mid-run."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_runs import make_text, run, tiny
from wandb_logs import finished_log
from wandb_service import KEY, WandbService

from gatewise.launch import dashboard
from gatewise.launch.cli import main
from gatewise.launch.compress import tracked_numbers
from gatewise.launch.dashboard import SECTIONS, DashboardConfig, definition
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import EvaluationConfig, WandbConfig
from gatewise.training.sinks import JsonlSink, close_all, read_records
from gatewise.training.wandb_files import find_wandb_files, read_wandb_file
from gatewise.training.wandb_sink import WandbSink

GOLDEN = Path(__file__).parents[1] / "golden" / "dashboard.json"
# what only some settings or commands log
SOMETIMES = {"moe/ahead_recall"}
SUMMARY = {"val/loss_best", "experts/load_layer_00", "experts/load_map_table"}


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[WandbService], None]]:
    """Return a function that lets the client find a service."""
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    wandb.teardown()  # the client keeps the environment of its first use
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def set_up(service: WandbService) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)

    yield set_up
    wandb.teardown()


def train(folder: Path, *, after_second: Callable[[], None] = lambda: None) -> None:
    """Write the records of three steps to the file and to W&B."""
    config = WandbConfig(finish_seconds=1.0)
    view = WandbSink(config, name="x", folder=folder, settings={"a": 1}, offline=False)
    sinks = [JsonlSink(folder / "metrics.jsonl"), view]
    for sink in sinks:
        sink.resume(0)
    for step in (1, 2, 3):
        for sink in sinks:
            sink.write({"step": step, "train/loss": 1 / step})
        if step == 2:
            after_second()
    close_all(sinks)
    assert [record["step"] for record in read_records(folder / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_reaches_the_service(reach: Callable[[WandbService], None], tmp_path: Path) -> None:
    with WandbService() as service:
        reach(service)
        train(tmp_path)
    assert [(row["train/step"], row["train/loss"]) for row in service.rows] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]
    assert service.runs[0]["jobType"] == "train"


def test_a_refused_key_is_one_line_and_the_records_are_kept_offline(
    reach: Callable[[WandbService], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with WandbService(refuses=True) as service, caplog.at_level(logging.WARNING):
        reach(service)
        train(tmp_path)
    lines = [record.message for record in caplog.records if record.name.startswith("gatewise")]
    assert len(lines) == 1
    assert "W&B does not take this run" in lines[0]
    assert "invalid API key" in lines[0]
    assert f"wandb sync {tmp_path / 'wandb'}" in lines[0]
    rows = finished_log(find_wandb_files(tmp_path)[-1]).rows
    assert [row["train/step"] for row in rows] == [1, 2, 3]


def test_a_service_that_goes_away_does_not_hold_up_the_end(
    reach: Callable[[WandbService], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    with WandbService() as service, caplog.at_level(logging.WARNING):
        reach(service)
        train(tmp_path, after_second=service.go_away)
    lines = [record.message for record in caplog.records if record.name.startswith("gatewise")]
    assert len(lines) == 1
    assert "W&B did not answer within 1 s (wandb.finish_seconds)" in lines[0]
    wandb.teardown()  # as at the end of the process: the client writes out its log
    rows = read_wandb_file(find_wandb_files(tmp_path)[0]).rows
    assert [row["train/step"] for row in rows] == [1, 2, 3]


def needs_workspaces() -> None:
    pytest.importorskip("wandb", reason="needs the extra dashboard")
    if dashboard.importlib.util.find_spec("wandb_workspaces") is None:
        pytest.skip("needs the extra dashboard")


def test_the_dashboard_is_the_stored_one() -> None:
    needs_workspaces()
    assert definition(DashboardConfig()) == json.loads(GOLDEN.read_text(encoding="utf-8")), (
        "write it anew with `gatewise dashboard`, look at the difference and commit it"
    )


def test_the_dashboard_shows_what_runs_log(tmp_path: Path) -> None:
    shown = {
        key
        for name, panels in SECTIONS.items()
        if name != "Compression"
        for panel in panels
        for key in panel.keys
        if not key.startswith("config:") and panel.kind != "pattern"
    }
    config = tiny(2, evaluation=EvaluationConfig(every=1, tokens=400, micro=4))
    records = run(config, make_text(tmp_path), tmp_path / "run").records
    logged = {key for record in records for key in record}
    assert shown - logged == SOMETIMES | SUMMARY
    patterns = [p.keys[0] for panels in SECTIONS.values() for p in panels if p.kind == "pattern"]
    layers = {key.replace("layer_00", "layer_.*") for key in logged if "layer_00" in key}
    assert set(patterns) <= layers


def test_the_dashboard_shows_what_compressing_logs() -> None:
    report = {
        "bits": {"experts": 2.25, "paper": 2.5, "all_parameters": 7.3},
        "bytes": {"experts": 10, "experts_bf16": 60, "on_disk": 40},
        "evaluation": {"loss_before": 4.0, "loss_after": 4.1, "delta_nats": 0.1},
    }
    numbers = tracked_numbers(report)
    assert {key for panel in SECTIONS["Compression"] for key in panel.keys} <= numbers.keys()
    assert numbers["compress/delta_nats"] == 0.1
    assert "compress/loss_after" not in tracked_numbers({**report, "evaluation": None})


def test_pushing_saves_the_dashboard_in_the_service(
    reach: Callable[[WandbService], None], tmp_path: Path
) -> None:
    needs_workspaces()
    with WandbService() as service:
        reach(service)
        arguments = ["dashboard", "--push", "project=moe", f"run.dir={tmp_path}"]
        assert main(arguments) == 0
    view = service.views[0]
    assert (view["entityName"], view["projectName"], view["displayName"]) == (
        "team",
        "moe",
        "gatewise",
    )
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["url"].startswith("http")
    assert result["panels"] == sum(len(section["panels"]) for section in sections)


def test_a_push_that_is_refused_is_one_line(
    reach: Callable[[WandbService], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_workspaces()
    with WandbService(refuses=True) as service:
        reach(service)
        assert main(["dashboard", "--push", f"run.dir={tmp_path}"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1
    assert "W&B did not take the dashboard" in error[0]
    assert (tmp_path / "dashboard.json").exists()


def test_pushing_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_workspaces()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    with pytest.raises(ConfigError, match="--push needs a key"):
        dashboard.run(["--push"])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[dashboard\]'"):
        dashboard.run([])


def test_the_definition_is_written_without_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_workspaces()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["dashboard", f"run.dir={tmp_path}"]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "dashboard.json").read_text())
    assert found["project"] == "gatewise"
    assert "--push saves it in W&B" in capsys.readouterr().out
