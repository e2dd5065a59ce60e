"""The commands as a user gives them, on a text of this project's own sources."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gatewise.training.sinks import read_records

__all__ = [
    "CLI",
    "ROOT",
    "environment",
    "gatewise",
    "losses_of",
    "ranks_of",
    "result_of",
    "write_text",
]

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "gatewise.launch.cli"]


def environment() -> dict[str, str]:
    """Return the variables of a user without a key for Weights & Biases."""
    without_key = {"WANDB_API_KEY": "", "NETRC": "/nonexistent"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **without_key}


def gatewise(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*CLI, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,  # a busy machine is slow, not stuck
        check=False,
    )


def write_text(folder: Path, package: str) -> list[str]:
    """Write the sources of one of our folders as texts; return the settings that read them."""
    text = folder / "text"
    text.mkdir()
    for number, path in enumerate(sorted((ROOT / package).glob("*.py"))):
        (text / f"{number:02d}.txt").write_text(path.read_text(encoding="utf-8"))
    return [f"data.path={text}", f"data.cache={folder / 'cache'}"]


def result_of(folder: Path) -> dict[str, Any]:
    """Return the result file of a run."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def losses_of(folder: Path) -> dict[int, float]:
    """Return the training loss of each recorded step."""
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def ranks_of(folder: Path) -> list[int]:
    """Return the processes that torchrun started for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"run.dir={folder}" in words and "-u" in words:  # as torchrun starts its ranks
            found.append(int(path.parent.name))
    return found
