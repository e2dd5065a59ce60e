"""The file of records: complete, resumable, valid JSON; other views never stop a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gatewise.training.sinks import AttemptLog, JsonlSink, close_all, read_records


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def fill(path: Path, numbers: range) -> None:
    sink = JsonlSink(path, resume_step=0)
    for step in numbers:
        sink.write({"step": step, "train/loss": 1.0 / step})
    sink.close()


def test_each_record_is_on_disk_before_the_sink_closes(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write({"step": 1, "train/loss": 2.5})
    assert steps(tmp_path / "m.jsonl") == [1]
    sink.close()


def test_on_resume_later_records_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 7))
    with open(path, "a") as stream:
        stream.write('{"step": 7, "train/lo')
    sink = JsonlSink(path, resume_step=4)
    assert steps(path) == [1, 2, 3, 4]
    sink.write({"step": 5})
    sink.close()
    assert steps(path) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_without_a_word_on_resume_the_first_record_decides(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 7))
    sink = JsonlSink(path)
    for step in (5, 6):
        sink.write({"step": step, "train/loss": 0.0})
    sink.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert read_records(path)[-2]["train/loss"] == 0.0


def test_a_new_start_in_an_old_folder_forgets_its_records(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 7))
    sink = JsonlSink(path)
    sink.resume(0)
    sink.write({"step": 1})
    sink.close()
    assert steps(path) == [1]


def test_truncation_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 7))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    sink = JsonlSink(path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sink.resume(2)
    assert path.read_bytes() == before


def test_every_line_is_json_also_with_nan_and_numpy_numbers(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write({"step": 1, "train/loss": math.nan, "load": [np.int64(3), np.float32(0.5)]})
    sink.close()

    def refuse(word: str) -> Any:
        raise AssertionError(word)

    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "train/loss": None,
        "load": [3, 0.5],
    }


def test_numbers_come_back_with_all_their_digits(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write({"step": 1, "train/loss": value})
    sink.close()
    assert read_records(tmp_path / "m.jsonl")[0]["train/loss"] == value


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink._is_settled = True  # there is nothing to read back from a device
    with pytest.raises(RuntimeError, match=r"m\.jsonl cannot be written \(No space left"):
        sink.write({"step": 1, "train/loss": 1.0})


def test_every_start_is_kept_with_the_step_it_goes_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (0, 40):
        AttemptLog(tmp_path / "attempts.jsonl").resume(step)
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 0), (2, 40)]
    AttemptLog(tmp_path / "none" / "attempts.jsonl").resume(0)
    assert "attempts.jsonl cannot be written (No such file or directory)" in caplog.text


class Failing:
    closed = False

    def resume(self, step: int) -> None: ...

    def write(self, record: object) -> None: ...

    def close(self) -> None:
        self.closed = True
        raise OSError(28, "No space left on device")


def test_all_sinks_are_closed_even_if_one_fails() -> None:
    first, second = Failing(), Failing()
    with pytest.raises(OSError, match="No space left"):
        close_all([first, second])
    assert first.closed
    assert second.closed
