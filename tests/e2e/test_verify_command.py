"""`gatewise verify` and `gatewise drill`: what is right passes, what is wrong is named."""

from pathlib import Path

import pytest
from commands import gatewise, result_of, write_text

pytestmark = pytest.mark.dist

TWO = ["experiment=tiny", "parallel.ranks=2", "parallel.expert=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a text: this project's own sources."""
    return write_text(tmp_path_factory.mktemp("text"), "routers")


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
