"""The console script: help, mistakes, exit codes, the last line."""

import json
from pathlib import Path

import pytest

from gatewise.launch import doctor, session
from gatewise.launch.cli import COMMANDS, main
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.spawn import RankFailure
from gatewise.moe.ops.build import find_compiler
from gatewise.parallel.errors import DataError


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_fields(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: gatewise {command}")


def test_help_of_train_shows_what_the_overrides_lead_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "experiment=tiny", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  model.hidden=32" in text
    assert "experiment=quickstart|reference|reference_dense|tiny" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "stpes=3"], "did you mean 'steps'"),
        (["train", "experiment=tiny", "parallel.ranks=3"], "batch.sequences is 8"),
        (["evaluate"], "checkpoint is not set"),
        (["evaluate", "checkpoint=/nonexistent"], "/nonexistent"),
        (["generate", "prompt=x"], "checkpoint is not set"),
        (["doctor", "verbose=1"], "unknown setting 'verbose'"),
        (["doctor", "run.dir=/proc/nowhere"], "run.dir leads to /proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gatewise: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_doctor_reports_and_ends_with_the_path_of_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"run.dir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "doctor"
    assert result["backends"]["gloo"] is True
    assert result["versions"]["torch"] is not None
    assert set(result["optional"]) >= {"wandb", "deepspeed", "apex"}


def test_doctor_builds_the_kernels_when_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert main(["doctor", "--build", f"run.dir={tmp_path}"]) == 0
    kernels = json.loads((tmp_path / "result.json").read_text())["kernels"]
    assert Path(kernels["library"]).is_file()
    assert "kernels         built; products with packed weights: " in capsys.readouterr().out


def test_doctor_that_cannot_build_says_why_and_ends_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    assert main(["doctor", "--build", f"run.dir={tmp_path}"]) == 1
    assert "the kernels were not built: no C++ compiler found" in capsys.readouterr().err
    assert main(["doctor", f"run.dir={tmp_path / 'look'}"]) == 0


def test_doctor_knows_the_unrelated_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor", f"run.dir={tmp_path / 'run'}"]) == 0
    apex = json.loads((tmp_path / "run" / "result.json").read_text())["optional"]["apex"]
    assert apex["importable"] is False
    assert "unrelated" in apex["problem"]
    assert "pip uninstall apex" in capsys.readouterr().out


def fail_with(error: BaseException) -> object:
    def body() -> dict[str, object]:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("data.path is x,\nwhich is empty"), 2, "data.path is x, which is empty"),
        (RankFailure("rank 1: it broke", details="its last line"), 1, "rank 1: it broke"),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
        (KeyboardInterrupt(), 130, "stopped by a signal"),
    ],
)
def test_a_failure_still_leaves_a_result(
    error: BaseException,
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = RunFolder.choose(str(tmp_path), "x")
    assert run_session("train", folder, fail_with(error), world_size=2) == code
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["exit"] == code
    assert words in result["error"]
    assert result["world_size"] == 2
    assert {"command", "seconds", "peak_rss_mb"} <= set(result)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(tmp_path / "result.json")
    assert captured.err.splitlines()[-1].startswith("gatewise: error: ")


def test_a_result_that_cannot_be_stored_is_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.choose(str(tmp_path), "x")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run_session("train", folder, dict) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "No space left on device" in captured.err


def test_the_exit_codes_are_the_published_ones() -> None:
    assert (session.EXIT_OK, session.EXIT_CRASH, session.EXIT_CONFIG, session.EXIT_REQUEUE) == (
        0,
        1,
        2,
        85,
    )
