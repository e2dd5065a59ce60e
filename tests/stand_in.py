"""A stand-in for the interpreter that a sweep's points would train with: it notes each call."""

import json
import stat
from pathlib import Path
from typing import Any

__all__ = ["calls", "stand_in", "sweep_result"]


def stand_in(folder: Path, script: str) -> tuple[str, str]:
    """Return the settings that let points run a shell script, whose `{log}` takes the calls."""
    folder.mkdir(exist_ok=True)
    file = folder / "python"
    file.write_text(script.format(log=folder / "calls"))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return f"submit.python={file}", "submit.launcher=local"


def calls(folder: Path) -> list[str]:
    """Return the lines that were noted since the last look."""
    file = folder / "calls"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def sweep_result(folder: Path) -> dict[str, Any]:
    """Return the summary of a sweep."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
