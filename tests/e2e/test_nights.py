"""Faults of `gatewise train` at 4 ranks, as a user meets them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gatewise.training.sinks import read_records

pytestmark = pytest.mark.dist

FOUR = ["experiment=tiny", "parallel.ranks=4", "parallel.expert=2", "evaluation.tokens=64"]
RUN = [*FOUR, "steps=7", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a short text."""
    folder = tmp_path_factory.mktemp("text")
    sources = Path(__file__).parents[2] / "routers"
    for number, path in enumerate(sorted(sources.glob("*.py"))):
        (folder / f"{number:02d}.txt").write_text(path.read_text(encoding="utf-8"))
    return [f"data.path={folder}", f"data.cache={folder.parent / 'cache'}"]


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gatewise.launch.cli", "train", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def losses_of(folder: Path) -> dict[int, Any]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_a_killed_rank_is_named_with_its_step_and_the_same_command_loses_nothing(
    text: list[str], tmp_path: Path
) -> None:
    undisturbed = train(*RUN, *text, "run.dir=whole", cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    command = [*RUN, *text, "run.dir=run", "faults=[{step: 6, rank: 2, kind: kill}]"]
    killed = train(*command, cwd=tmp_path)
    assert killed.returncode == 1
    assert re.match(
        r"gatewise: error: rank 2: killed by SIGKILL .* in step 6 \(train\)",
        killed.stderr.splitlines()[-1],
    )
    resumed = train(*command, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 4" in resumed.stdout
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def test_a_hanging_rank_is_reported_within_the_timeout(text: list[str], tmp_path: Path) -> None:
    done = train(
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
