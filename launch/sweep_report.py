"""The summary of a sweep: a table as Markdown and JSON, and the curves of its points."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gatewise.launch.pictures import Series, scatter
from gatewise.launch.run_folder import json_value, writable
from gatewise.training.sinks import read_records

__all__ = ["PointResult", "table", "write_summary"]

_COLUMNS = {
    "state": "state",
    "steps": "steps",
    "train_loss": "train loss",
    "val_loss": "val loss",
    "val_bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
}
_MOST_CURVES = 12  # of the best points; more cannot be told apart
_MOST_MARKS = 60  # of a curve


@dataclass(frozen=True, slots=True)
class PointResult:
    """What a point has to show."""

    values: Mapping[str, str]  # what is swept
    folder: str
    state: str  # finished, queued, stopped, failed or waiting
    steps: int
    total_steps: int
    train_loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    error: str | None = None

    @staticmethod
    def read(values: Mapping[str, str], path: Path, state: str, *, steps: int) -> "PointResult":
        """Read a point's result file, as far as there is one.

        Args:
            values: of the point.
            path: folder of the point.
            state: where it stands.
            steps: that it is to train.
        """
        try:
            result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = {}
        measured = ("train_loss", "val_loss", "val_bits_per_byte", "tokens_per_second", "seconds")
        return PointResult(
            values=dict(values),
            folder=str(path),
            state=state,
            steps=int(result.get("steps") or 0),
            total_steps=steps,
            error=result.get("error"),
            **{name: _number(result.get(name)) for name in measured},
        )

    @property
    def label(self) -> str:
        """Return the point as it is written on the command line."""
        return " ".join(f"{name}={value}" for name, value in self.values.items())


def write_summary(rows: Sequence[PointResult], folder: Path, *, name: str) -> dict[str, Any]:
    """Write `sweep.md`, `sweep.json` and `sweep.svg`; return keys of the result, and `lines`.

    Args:
        rows: one per point, in the order of the sweep.
        folder: of the sweep.
        name: of the sweep, for titles.
    """
    ordered = sorted(rows, key=lambda row: (row.val_loss is None, row.val_loss or 0.0))
    best = next((row for row in ordered if row.val_loss is not None), None)
    lines = table(ordered)
    drawing = _draw(ordered, name)
    with writable(folder):
        text = json.dumps([json_value(asdict(row)) for row in ordered], indent=2)
        (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")
        parts = [f"# Sweep {name}", "", *lines, ""]
        if drawing is not None:
            (folder / "sweep.svg").write_text(drawing, encoding="utf-8")
            parts += ["![Training loss of the points](sweep.svg)", ""]
        parts += [f"- {row.label}: {row.error}" for row in ordered if row.error]
        (folder / "sweep.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    return {
        "lines": lines,
        "points": len(rows),
        "states": counts,
        "best": None if best is None else best.values,
        "best_val_loss": None if best is None else best.val_loss,
        "rows": [asdict(row) for row in ordered],
        "table": str(folder / "sweep.md"),
        "picture": None if drawing is None else str(folder / "sweep.svg"),
    }


def table(rows: Sequence[PointResult]) -> list[str]:
    """Return the lines of a Markdown table, its columns aligned for a terminal too."""
    swept = list(rows[0].values)
    cells = [[*swept, *_COLUMNS.values()]]
    for row in rows:
        shown = [_shown(name, row) for name in _COLUMNS]
        cells.append([*(row.values[name].replace("|", "\\|") for name in swept), *shown])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    numbers = len(swept) + 1  # the first column that holds numbers
    lines = []
    for line in cells:
        padded = [
            text.rjust(width) if i >= numbers else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (w - 1) + ":" if i >= numbers else "-" * w for i, w in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return lines


def _shown(name: str, row: PointResult) -> str:
    value = getattr(row, name)
    if name == "steps":
        return f"{value}/{row.total_steps}"
    if value is None:
        return "-"
    if name == "state":
        return str(value)
    return f"{value:,.0f}" if name in ("tokens_per_second", "seconds") else f"{value:.4f}"


def _draw(rows: Sequence[PointResult], name: str) -> str | None:
    """Return a picture of the points' training losses; None where nothing was logged."""
    series = []
    for row in rows:
        points = _curve(Path(row.folder) / "metrics.jsonl")
        if points:
            label = row.label
            if row.val_loss is not None:
                label += f" (val {row.val_loss:.3f})"
            series.append(Series(label, points))
    if not series:
        return None
    more = f", the best {_MOST_CURVES} of {len(series)}" if len(series) > _MOST_CURVES else ""
    return scatter(
        f"Sweep {name}{more}",
        series[:_MOST_CURVES],
        x_label="step",
        y_label="training loss (nats per token)",
        is_log=False,
    )


def _curve(file: Path) -> list[tuple[float, float, float]]:
    """Return step, mean loss since the last record, and no error bar, at evenly spread records."""
    if not file.exists():
        return []
    found = [
        (float(record["step"]), loss, 0.0)
        for record in read_records(file)
        if (loss := _number(record.get("train/loss_mean"))) is not None and loss > 0
    ]
    every = -(-len(found) // _MOST_MARKS) or 1
    return found[(len(found) - 1) % every :: every] if found else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
