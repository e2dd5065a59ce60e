"""What the real client writes offline, read back: settings, rows, histograms, summary, restarts."""

import contextlib
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from wandb_logs import finished_log

from gatewise.training.config import Artifacts, WandbConfig
from gatewise.training.sinks import JsonlSink, close_all
from gatewise.training.wandb_files import (
    WandbFile,
    find_wandb_files,
    read_fragments,
    read_wandb_file,
)
from gatewise.training.wandb_sink import WandbSink

SETTINGS = {"name": "x", "steps": 6, "optim": {"lr": 1e-3}, "data": {"path": None}}
LOADS = [[1.5, 0.5], [0.25, 1.75]]


@pytest.fixture
def quiet_client(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


class Training:
    """Writes the records of a run whose numbers follow from the step, in starts that may die."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.config = WandbConfig(group="sweep", tags="a, b", job_type="drill", **settings)

    def start(self, first: int, last: int, *, settings: Any = SETTINGS, killed: bool) -> None:
        sinks = [
            JsonlSink(self.folder / "metrics.jsonl"),
            WandbSink(self.config, name="x", folder=self.folder, settings=settings, offline=True),
        ]
        for sink in sinks:
            sink.resume(first - 1)
        for step in range(first, last + 1):
            record = {"step": step, "train/loss": 1 / step, "experts/load_ratio": LOADS}
            for sink in sinks:
                sink.write(record)
                if step % 2 == 0:
                    sink.write({"step": step, "val/loss": 2 / step})
        if killed:  # what is not sent yet is lost, and the run not finished
            sinks[1]._row = {}  # type: ignore[attr-defined]
            sinks[1]._run.finish()  # type: ignore[attr-defined]
            sinks.pop()
        close_all(sinks)
        finished_log(find_wandb_files(self.folder)[-1])

    def files(self) -> list[WandbFile]:
        return [read_wandb_file(path) for path in find_wandb_files(self.folder)]

    def rows(self) -> list[dict[str, Any]]:
        return [row for file in self.files() for row in file.rows]


@pytest.mark.usefixtures("quiet_client")
def test_after_a_kill_each_step_is_there_once_and_nothing_is_missing(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.start(1, 4, killed=True)  # step 4 was not sent, the checkpoint is of step 2
    training.start(3, 6, killed=False)
    rows = training.rows()
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5]  # a service drops what falls back
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(1, 7)]
    assert [row["val/loss"] for row in rows if "val/loss" in row] == [1.0, 0.5, 1 / 3]
    assert len({file.run_id for file in training.files()}) == 1


def test_of_one_second_the_start_that_was_refused_comes_first(tmp_path: Path) -> None:
    names = ["offline-run-20261122_120001-a", "run-20261122_120001-a", "run-20261122_120000-a"]
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-a.wandb").touch()
    found = [path.parent.name for path in find_wandb_files(tmp_path)]
    assert found == names[::-1]


DYING = """
import os, signal, sys
from pathlib import Path
from test_wandb_files import SETTINGS
from gatewise.training.config import WandbConfig
from gatewise.training.sinks import JsonlSink
from gatewise.training.wandb_sink import WandbSink

folder = Path(sys.argv[1])
view = WandbSink(WandbConfig(), name="x", folder=folder, settings=SETTINGS, offline=True)
sinks = [JsonlSink(folder / "metrics.jsonl"), view]
for sink in sinks:
    sink.resume(0)
for step in range(1, 5):
    for sink in sinks:
        sink.write({"step": step, "train/loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_for_client(pid: int) -> None:
    """Wait until the client's own process has noticed that its parent was killed."""
    deadline = time.monotonic() + 60
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            is_client = words[0].endswith(b"wandb-core") and str(pid).encode() in words
            while is_client and path.exists() and path.read_bytes():
                assert time.monotonic() < deadline
                time.sleep(0.05)


@pytest.mark.usefixtures("quiet_client")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_after_sigkill_each_step_is_there_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING, str(tmp_path)]
    unit = Path(__file__).parent
    path = os.pathsep.join((str(unit), str(unit.parent), os.environ.get("PYTHONPATH", "")))
    environ = {**os.environ, "PYTHONPATH": path}
    environ.pop("WANDB_SERVICE", None)  # the client's process of this process's own runs
    process = subprocess.Popen(command, env=environ)
    assert process.wait(timeout=300) == -signal.SIGKILL
    wait_for_client(process.pid)
    training = Training(tmp_path)
    training.start(3, 6, killed=False)  # from the checkpoint of step 2
    assert [row["train/step"] for row in training.rows()] == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for row in training.rows()] == [0, 1, 2, 3, 4, 5]
    assert not training.files()[0].is_finished


@pytest.mark.usefixtures("quiet_client")
def test_config_histograms_maps_summary_and_group_come_back(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.start(1, 2, killed=False)
    file = training.files()[0]
    assert {key: file.config[key] for key in SETTINGS} == SETTINGS
    assert (file.project, file.name, file.group) == ("gatewise", "x", "sweep")
    assert (file.job_type, file.tags) == ("drill", ("a", "b"))
    assert file.metrics == {"train/step": "", "*": "train/step"}
    assert file.rows[0]["experts/load_layer_01"] == {
        "_type": "histogram",
        "values": LOADS[1],
        "bins": [0, 1, 2],
    }
    table = tmp_path.glob(f"wandb/*/files/{file.rows[1]['experts/load_map_table']['path']}")
    assert json.loads(next(table).read_text())["data"][-1] == ["layer 01", 1, 1.75]
    assert file.summary["train/loss"] == 0.5
    assert file.summary["val/loss_best"] == 1.0
    assert file.is_finished


@pytest.mark.usefixtures("quiet_client")
def test_another_training_in_the_folder_is_another_run(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.start(1, 2, killed=False)
    training.start(1, 2, settings={**SETTINGS, "steps": 2}, killed=False)
    first, second = training.files()
    assert first.run_id != second.run_id
    assert [row["train/step"] for row in second.rows] == [1, 2]


@pytest.mark.usefixtures("quiet_client")
def test_a_log_that_cannot_be_read_is_named_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(tmp_path)
    training.start(1, 1, killed=False)
    path = find_wandb_files(tmp_path)[0]
    path.write_bytes(b"something else")
    with caplog.at_level(logging.WARNING):
        training.start(2, 2, killed=False)
    assert f"{path} cannot be read (ValueError: not a log of the wandb client)" in caplog.text
    rows = read_wandb_file(find_wandb_files(tmp_path)[1]).rows
    assert [row["train/step"] for row in rows] == [1, 2]


@pytest.mark.usefixtures("quiet_client")
@pytest.mark.parametrize("kind", [Artifacts.reference, Artifacts.upload])
def test_the_last_checkpoint_becomes_an_artifact(
    kind: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"weights")
    monkeypatch.setattr("gatewise.training.checkpoint_folder.find_latest", lambda _: checkpoint)
    training = Training(tmp_path, checkpoints=kind)
    training.start(1, 1, killed=False)
    file = training.files()[0]
    assert f"checkpoint-{file.run_id}" in file.artifacts


def fragment(kind: int, data: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes((kind,)) + data), len(data), kind) + data


HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)


def test_records_are_put_together_over_blocks_and_a_torn_one_ends_the_log() -> None:
    first = fragment(1, b"a" * 100)
    part = 32768 - len(HEADER) - len(first) - 7
    log = HEADER + first + fragment(2, b"b" * part) + fragment(4, b"c")
    assert list(read_fragments(log)) == [b"a" * 100, b"b" * part + b"c"]
    assert list(read_fragments(log[:-1])) == [b"a" * 100]
    filled = 32768 - len(HEADER) - len(first)
    assert list(read_fragments(HEADER + first + bytes(filled) + fragment(1, b"d")))[1] == b"d"
    changed = bytearray(log)
    changed[-1] ^= 1
    assert list(read_fragments(bytes(changed))) == [b"a" * 100]


def test_another_file_is_no_log() -> None:
    for data in (b"", b":W&", b"PK\x03\x04 and more bytes"):
        with pytest.raises(ValueError, match="not a log of the wandb client"):
            list(read_fragments(data))
