"""Weights & Biases as a view: chosen by package, key and settings; its failures are harmless."""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gatewise.launch.tracking import make_sinks, wandb_mode
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig, WandbConfig, WandbMode
from gatewise.training.wandb_sink import WandbSink, check_wandb


class Recorder:
    """Stands in for a run of the package, which is an extra."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.defined: list[tuple[str, str | None]] = []
        self.records: list[dict[str, Any]] = []
        self.is_broken = False
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if self.is_broken:
            raise ConnectionError("the network\nis gone")
        self.records.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    run = Recorder()

    def init(**options: Any) -> Recorder:
        run.started = options
        return run

    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]  # only its presence is asked
    module.init = init  # type: ignore[attr-defined]
    module.Settings = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    return run


def start(folder: Path) -> WandbSink:
    return WandbSink(WandbConfig(), name="x", folder=folder, settings={"a": 1}, offline=True)


def test_steps_go_on_an_axis_of_their_own(recorder: Recorder, tmp_path: Path) -> None:
    sink = start(tmp_path)
    sink.write({"step": 3, "train/loss": 2.0, "load": [1, 2]})
    sink.close()
    assert recorder.defined == [("train/step", None), ("*", "train/step")]
    assert recorder.records == [{"train/step": 3, "train/loss": 2.0}]
    assert recorder.started["mode"] == "offline"
    assert recorder.is_finished


def test_a_resumed_run_keeps_its_identity(recorder: Recorder, tmp_path: Path) -> None:
    start(tmp_path)
    first = recorder.started["id"]
    start(tmp_path)
    assert recorder.started["id"] == first
    assert recorder.started["resume"] == "allow"


def test_a_failure_is_logged_once_and_training_goes_on(
    recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = start(tmp_path)
    recorder.is_broken = True
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            sink.write({"step": step})
        sink.close()
    assert len(caplog.records) == 1
    assert "the network is gone" in caplog.text


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, WandbMode.offline),
        ({"WANDB_API_KEY": "k"}, WandbMode.online),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, WandbMode.offline),
        ({"WANDB_MODE": "disabled"}, WandbMode.off),
    ],
)
@pytest.mark.usefixtures("recorder")
def test_auto_follows_the_key_and_the_environment(environ: dict[str, str], mode: WandbMode) -> None:
    assert wandb_mode(WandbMode.auto, {"NETRC": "/nonexistent", **environ}) is mode


@pytest.mark.usefixtures("recorder")
def test_a_key_in_netrc_counts(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    environ = {"NETRC": str(tmp_path / "netrc")}
    assert wandb_mode(WandbMode.auto, environ) is WandbMode.online


def test_without_the_package_auto_is_off_and_a_wish_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert wandb_mode(WandbMode.auto, {"WANDB_API_KEY": "k"}) is WandbMode.off
    check_wandb(WandbConfig(mode=WandbMode.auto))
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[wandb\]'"):
        check_wandb(WandbConfig(mode=WandbMode.offline))


def test_a_run_has_the_file_and_the_console_and_wandb_if_it_is_there(
    recorder: Recorder, tmp_path: Path
) -> None:
    config = TrainConfig()
    names = [type(sink).__name__ for sink in make_sinks(config, tmp_path)]
    assert names == ["JsonlSink", "ConsoleSink", "WandbSink"]
    assert recorder.started["config"]["precision"] == "auto"
    config.wandb.mode = WandbMode.off
    assert len(make_sinks(config, tmp_path)) == 2
