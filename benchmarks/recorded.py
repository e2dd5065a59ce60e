"""Records of long experiments: a line per finished run, and pages that show what they say."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_record", "fill_page", "read_records"]

_END = "<!-- end of results -->"


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, also behind one that a kill tore."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(("\n" if torn else "") + json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records; a line that a kill tore is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def fill_page(path: Path, script: str, text: str) -> None:
    """Put results between the marks of a page, where there is one.

    Args:
        path: the page.
        script: name of the file that its first mark names.
        text: what stands between the marks afterwards.
    """
    if not path.exists():
        return
    mark = f"<!-- results: written by {script} report -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(_END)
    if not (found and end):
        raise ValueError(f"{path} has no place for results: {mark} and {_END}")
    path.write_text(f"{before}{mark}\n{text}\n{_END}{after}", encoding="utf-8")
