"""`gatewise verify` and `gatewise drill`: what is right passes, what is wrong is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
TWO = ["experiment=tiny", "parallel.ranks=2", "parallel.expert=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a short text."""
    folder = tmp_path_factory.mktemp("text")
    for number, path in enumerate(sorted((ROOT / "routers").glob("*.py"))):
        (folder / f"{number:02d}.txt").write_text(path.read_text(encoding="utf-8"))
    return [f"data.path={folder}", f"data.cache={folder.parent / 'cache'}"]


def gatewise(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gatewise.launch.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_a_layout_is_one_rank_in_gradients_steps_resume_and_other_layouts(
    text: list[str], tmp_path: Path
) -> None:
    done = gatewise("verify", *TWO, *text, "run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(tmp_path / "run")
    assert result["passed"] is True
    names = {check["name"] for check in result["checks"]}
    assert names == {"gradients", "norms", "losses", "five steps", "resume", "reshard"}
    exact = [check for check in result["checks"] if check["name"] == "resume"]
    assert all(check["difference"] == 0.0 for check in exact)


def test_what_differs_is_named_and_the_exit_code_is_one(text: list[str], tmp_path: Path) -> None:
    flip = "faults=[{step: 1, rank: 1, kind: bitflip}]"
    done = gatewise("verify", *TWO, *text, "max_layers=1", flip, "run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    result = result_of(tmp_path / "run")
    failed = {check["name"] for check in result["checks"] if not check["passed"]}
    assert "gradients" in failed
    assert "checks failed: gradients against 2 ranks and 1 rank differs by" in result["error"]


def test_kills_at_random_moments_lose_nothing(text: list[str], tmp_path: Path) -> None:
    settings = [*TWO, *text, "steps=6", "kills=3", "draw=1", "run.dir=run"]
    done = gatewise("drill", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(tmp_path / "run")
    assert result["problems"] == []
    assert result["kills"] == result["resumed"] == 3
