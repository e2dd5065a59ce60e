"""The folder of a run: chosen once, owned by one process, never half written."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatewise.launch.run_folder import RunFolder, json_value
from gatewise.parallel.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    chosen = RunFolder.choose(str(tmp_path), "x")
    yield chosen
    chosen.release()


def test_two_runs_of_one_second_get_different_folders(tmp_path: Path) -> None:
    folders = [RunFolder.choose(None, "my run/1", root=tmp_path) for _ in range(3)]
    for one in folders:
        one.release()
    assert len({one.path for one in folders}) == 3
    assert {one.path.parent for one in folders} == {tmp_path / "my_run_1"}


def test_a_folder_in_use_is_refused_until_it_is_released(tmp_path: Path) -> None:
    first = RunFolder.choose(str(tmp_path), "x")
    with pytest.raises(ConfigError, match="using"):
        RunFolder.choose(str(tmp_path), "x")
    first.release()
    RunFolder.choose(str(tmp_path), "x").release()


def test_a_place_without_permission_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir leads to .*file/below"):
        RunFolder.choose(str(tmp_path / "file" / "below"), "x")


def test_an_older_different_configuration_is_kept_under_a_number(
    folder: RunFolder, tmp_path: Path
) -> None:
    for text in ("steps: 1\n", "steps: 1\n", "steps: 2\n", "steps: 3\n"):
        folder.write_config(text)
    assert (tmp_path / "config.yaml").read_text() == "steps: 3\n"
    assert (tmp_path / "config.1.yaml").read_text() == "steps: 1\n"
    assert (tmp_path / "config.2.yaml").read_text() == "steps: 2\n"
    assert not (tmp_path / "config.3.yaml").exists()


def test_an_older_result_is_kept_under_a_number(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_result({"exit": 85})
    folder.write_result({"exit": 0})
    assert json.loads((tmp_path / "result.json").read_text()) == {"exit": 0}
    assert json.loads((tmp_path / "result.1.json").read_text()) == {"exit": 85}


def test_a_result_that_cannot_be_written_leaves_the_old_one(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_config("steps: 1\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        folder.write_environment(["gatewise"])
    assert not (tmp_path / "environment.json").exists()
    assert [path.name for path in tmp_path.glob(".*") if path.name != ".lock"] == []


def test_the_environment_tells_versions_and_command(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_environment(["gatewise", "train", "steps=3"])
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["command_line"] == ["gatewise", "train", "steps=3"]
    assert found["versions"]["torch"]
    assert found["cores"] >= 1


def test_values_that_json_cannot_hold_are_made_plain() -> None:
    value = {"loss": math.nan, "path": Path("x"), "parts": (1, math.inf)}
    assert json_value(value) == {"loss": "nan", "path": "x", "parts": [1, "inf"]}
