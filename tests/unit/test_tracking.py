"""Weights & Biases as a view: chosen by package, key and settings; its failures are harmless."""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gatewise.launch.tracking import check_tracking, make_sinks, wandb_mode
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
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool = False) -> None:
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
    module.Histogram = lambda np_histogram: np_histogram  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    return run


def start(folder: Path, **settings: Any) -> WandbSink:
    config = WandbConfig(**settings)
    sink = WandbSink(config, name="x", folder=folder, settings={"a": 1}, offline=True)
    sink.resume(0)
    return sink


def test_a_row_holds_all_of_a_step_on_an_axis_of_its_own(
    recorder: Recorder, tmp_path: Path
) -> None:
    sink = start(tmp_path)
    sink.write({"step": 3, "train/loss": 2.0, "list": [1, 2]})
    sink.write({"step": 3, "val/loss": 2.5})
    sink.write({"step": 4, "train/loss": 1.0})
    sink.close()
    assert recorder.defined == [("train/step", None), ("*", "train/step")]
    assert recorder.records == [
        {"train/step": 3, "train/loss": 2.0, "val/loss": 2.5},
        {"train/step": 4, "train/loss": 1.0},
    ]
    assert recorder.summary == {"train/loss": 1.0, "val/loss": 2.5, "val/loss_best": 2.5}
    assert recorder.started["mode"] == "offline"
    assert recorder.is_finished


def test_above_the_budget_of_keys_layers_are_left_out_evenly(
    recorder: Recorder, tmp_path: Path
) -> None:
    record: dict[str, Any] = {"step": 1, "train/loss": 2.0, "moe/cv": 0.5}
    record |= {f"moe/layer_{i:02d}/{name}": 0.0 for i in range(9) for name in ("cv", "drop_frac")}
    sink = start(tmp_path, max_keys=8)
    sink.write(record)
    sink.close()
    layers = {key.split("/")[1] for key in recorder.records[0] if "layer" in key}
    assert layers == {"layer_00", "layer_04", "layer_08"}
    assert {"train/loss", "moe/cv"} <= recorder.records[0].keys()


def test_many_experts_share_the_bins_of_a_histogram(recorder: Recorder, tmp_path: Path) -> None:
    sink = start(tmp_path)
    sink.write({"step": 1, "train/loss": 2.0, "experts/load_ratio": [[1.0, 3.0] * 512, [1.0] * 4]})
    sink.close()
    values, edges = recorder.records[0]["experts/load_layer_00"]
    assert values == [2.0] * 512
    assert (len(edges), edges[0], edges[-1]) == (513, 0.0, 1024.0)
    assert recorder.records[0]["experts/load_layer_01"] == ([1.0] * 4, [0.0, 1.0, 2.0, 3.0, 4.0])


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
            sink.write({"step": step, "train/loss": 1.0})
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


@pytest.mark.usefixtures("recorder")
def test_online_without_a_key_is_refused_before_ranks_start() -> None:
    with pytest.raises(ConfigError, match=r"wandb\.mode is online but there is no key"):
        check_tracking(TrainConfig(wandb=WandbConfig(mode=WandbMode.online)))


@pytest.mark.parametrize(("field", "value"), [("max_keys", 0), ("finish_seconds", 0.0)])
def test_impossible_limits_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"wandb\.{field} is {value}; it must be"):
        WandbConfig(**{field: value})  # type: ignore[arg-type]


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
    sinks = make_sinks(config, tmp_path)
    names = [type(sink).__name__ for sink in sinks]
    assert names == ["JsonlSink", "AttemptLog", "ConsoleSink", "WandbSink"]
    sinks[-1].resume(0)
    assert recorder.started["config"]["precision"] == "auto"
    config.wandb.mode = WandbMode.off
    assert len(make_sinks(config, tmp_path)) == 3
