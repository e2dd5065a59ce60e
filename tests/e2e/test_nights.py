"""Faults of `gatewise train` at 4 ranks, as a user meets them."""

import json
import re
from pathlib import Path

import pytest
from commands import gatewise, losses_of, write_text

pytestmark = pytest.mark.dist

FOUR = ["experiment=tiny", "parallel.ranks=4", "parallel.expert=2", "evaluation.tokens=64"]
RUN = [*FOUR, "steps=7", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a text: this project's own sources."""
    return write_text(tmp_path_factory.mktemp("text"), "routers")


def test_a_killed_rank_is_named_with_its_step_and_the_same_command_loses_nothing(
    text: list[str], tmp_path: Path
) -> None:
    undisturbed = gatewise("train", *RUN, *text, "run.dir=whole", cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    command = [*RUN, *text, "run.dir=run", "faults=[{step: 6, rank: 2, kind: kill}]"]
    killed = gatewise("train", *command, cwd=tmp_path)
    assert killed.returncode == 1
    assert re.match(
        r"gatewise: error: rank 2: killed by SIGKILL .* in step 6 \(train\)",
        killed.stderr.splitlines()[-1],
    )
    resumed = gatewise("train", *command, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 4" in resumed.stdout
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def test_a_hanging_rank_is_reported_within_the_timeout(text: list[str], tmp_path: Path) -> None:
    done = gatewise(
        "train",
        *(*RUN, *text, "run.dir=run", "parallel.timeout=6"),
        "faults=[{step: 3, rank: 1, kind: hang}]",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    pattern = (
        r"rank 1: did not go on in step 3; ranks? .* for it at \w+ .*of group '.*report: (.*)\)"
    )
    found = re.search(pattern, line)
    assert found is not None, done.stderr
    report = Path(found[1]).read_text(encoding="utf-8")
    stacks = report.partition("\nrank 1: step 3 (train)")[2].partition("\nrank 2:")[0]
    assert "faults.py" in stacks  # where it hangs
    assert len(re.findall(r"^rank \d: step 3", report, re.MULTILINE)) == 4
    waited = [
        json.loads((tmp_path / "run" / "logs" / "stuck" / f"rank_{rank}.json").read_text())
        for rank in range(4)
    ]
    assert all(known["still_seconds"] < 30 for known in waited)
