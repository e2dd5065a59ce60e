"""Draw the curves of training runs into one self-contained SVG.

    python benchmarks/plot_curves.py LABEL=RUN_FOLDER [LABEL=RUN_FOLDER ...] --output FILE.svg

Reads `metrics.jsonl` of each run: the training loss (`train/loss_mean`, nats per token) as a line
and the validation loss (`val/bits_per_byte`) with a marker at each evaluation, both against the
tokens and against the minutes of training. Minutes are the tokens since the last record over
`train/tokens_per_second`, summed: evaluation, saving and waiting between two starts are left out.
Needs nothing but the standard library.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["Curve", "Point", "draw", "main", "read_curve", "ticks"]

# Okabe and Ito's palette: told apart also without full colour vision; a shape helps further.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#555555")
_SHAPES = (
    "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
    "M-4,-4h8v8h-8z",
    "M0,-5.5L5,4H-5z",
    "M0,-5.5L5,0L0,5.5L-5,0z",
)
_WIDTH = 980
_LEFT, _RIGHT, _GAP = 78, 20, 80  # left of, right of and between the frames
_FRAME_WIDTH = (_WIDTH - _LEFT - _RIGHT - _GAP) // 2
_FRAME_HEIGHT = 222
_ROW_HEIGHT = _FRAME_HEIGHT + 74  # with the labels of the x axis
_LEGEND_LINE = 22
_WARM_UP_SHARE = 0.04  # of a curve; its first, steep part may leave the frame


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a run."""

    tokens: float
    minutes: float
    value: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One run."""

    label: str
    training: tuple[Point, ...]  # nats per token
    validation: tuple[Point, ...]  # bits per byte


@dataclass(frozen=True, slots=True)
class _Frame:
    """One pair of axes: a linear map from values to pixels."""

    left: float
    top: float
    x_end: float  # the x axis starts at 0
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return self.left + _FRAME_WIDTH * value / self.x_end

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.top + _FRAME_HEIGHT * (1 - share)


def read_curve(label: str, folder: Path) -> Curve:
    """Read one run.

    Args:
        label: its name in the legend.
        folder: the run's folder.

    Raises:
        ValueError: if the folder has no records of training.
    """
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{label}: {path} cannot be read ({error.strerror or error})") from error
    place: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}  # step -> tokens, minutes
    training: list[Point] = []
    scores: list[tuple[int, float]] = []
    for record in _records(text):
        step = record["step"]
        if record.get("train/tokens") is not None:
            tokens, minutes = place[max(place)]
            passed = record["train/tokens"] - tokens
            rate = record.get("train/tokens_per_second") or math.inf
            place[step] = (record["train/tokens"], minutes + passed / rate / 60)
            if record.get("train/loss_mean") is not None:
                training.append(Point(*place[step], record["train/loss_mean"]))
        if record.get("val/bits_per_byte") is not None:
            scores.append((step, record["val/bits_per_byte"]))
    if not training:
        raise ValueError(f"{label}: {path} has no record with train/loss_mean")
    validation = tuple(Point(*_place_of(step, place), value) for step, value in scores)
    return Curve(label, tuple(training), validation)


def _records(text: str) -> list[dict[str, Any]]:
    """Return the records; a last line that a kill tore is left out."""
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def _place_of(step: int, place: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Return tokens and minutes of a step, between those of its neighbours or beyond the last."""
    if step in place:
        return place[step]
    before = max(known for known in place if known < step)
    after = min((known for known in place if known > step), default=before)
    if after == before:
        return place[before]
    share = (step - before) / (after - before)
    (tokens, minutes), (tokens_after, minutes_after) = place[before], place[after]
    return tokens + share * (tokens_after - tokens), minutes + share * (minutes_after - minutes)


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Return round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def draw(curves: Sequence[Curve]) -> str:
    """Return the picture of at least one curve as the text of an SVG file."""
    top = 66 + _LEGEND_LINE * len(curves)
    height = top + 2 * _ROW_HEIGHT - 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
        'font-size="13" fill="#1f2328">',
        "<title>Training and validation loss</title>",
        f"<desc>{escape('; '.join(_summary(curve) for curve in curves))}</desc>",
        # an opaque ground of its own: the picture looks the same on a dark page
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#fcfcfa"/>',
        f'<text x="{_LEFT}" y="32" font-size="18" font-weight="600">'
        "Training and validation loss</text>",
        *_legend(curves),
    ]
    columns: list[tuple[str, Callable[[Point], float]]] = [
        ("tokens", lambda point: point.tokens),
        ("minutes of training", lambda point: point.minutes),
    ]
    rows = [
        ("training loss, nats per token", [curve.training for curve in curves], False),
        ("validation, bits per byte", [curve.validation for curve in curves], True),
    ]
    for row, (y_label, series, marked) in enumerate(rows):
        for column, (x_label, place) in enumerate(columns):
            left = _LEFT + column * (_FRAME_WIDTH + _GAP)
            panel_top = top + row * _ROW_HEIGHT
            x_end = max(place(point) for curve in curves for point in curve.training) or 1.0
            frame = _Frame(left, panel_top, x_end * 1.02, *_range(series))
            parts += _axes(frame, x_label, y_label)
            parts += _lines(frame, series, place, marked=marked, name=f"frame{row}{column}")
    return "\n".join([*parts, "</svg>", ""])


def _range(series: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Return the ends of the y axis; a long curve's first, steep part may lie above."""
    values = [
        point.value
        for points in series
        for point in points
        if len(points) < 50 or point.tokens >= _WARM_UP_SHARE * points[-1].tokens
    ]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(0.05 * abs(high), 0.05)
    return max(low - margin, 0.0), high + margin


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts = []
    for index, curve in enumerate(curves):
        y, colour = 60 + _LEGEND_LINE * index, _colour(index)
        parts += [
            f'<path d="M{_LEFT},{y - 4}h30" stroke="{colour}" stroke-width="2.2"/>',
            _marker(_LEFT + 15, y - 4, index),
            f'<text x="{_LEFT + 40}" y="{y}"><tspan font-weight="600">{escape(curve.label)}</tspan>'
            f"<tspan>{escape(_summary(curve).removeprefix(curve.label))}</tspan></text>",
        ]
    return parts


def _summary(curve: Curve) -> str:
    last = curve.training[-1]
    text = f"{curve.label}: training loss {last.value:.3f}"
    if curve.validation:
        text += f", validation {curve.validation[-1].value:.3f} bits per byte"
    return f"{text}, {_short(last.tokens)} tokens, {last.minutes:.3g} minutes"


def _axes(frame: _Frame, x_label: str, y_label: str) -> list[str]:
    bottom, right = frame.top + _FRAME_HEIGHT, frame.left + _FRAME_WIDTH
    parts = [
        f'<rect x="{frame.left}" y="{frame.top}" width="{_FRAME_WIDTH}" height="{_FRAME_HEIGHT}" '
        'fill="#ffffff" stroke="#8c8c8c"/>'
    ]
    values = ticks(frame.y_low, frame.y_high)
    digits = max((len(f"{value:.6g}".partition(".")[2]) for value in values), default=0)
    for value in values:
        y = frame.y(value)
        parts += [
            f'<path d="M{frame.left},{y:.1f}H{right}" stroke="#e3e3e0"/>',
            f'<text x="{frame.left - 8}" y="{y + 4.5:.1f}" text-anchor="end">'
            f"{value:.{digits}f}</text>",
        ]
    for value in ticks(0.0, frame.x_end, most=8):
        x = frame.x(value)
        parts += [
            f'<path d="M{x:.1f},{bottom}v5" stroke="#8c8c8c"/>',
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{_short(value)}</text>',
        ]
    middle = frame.top + _FRAME_HEIGHT / 2
    parts += [
        f'<text x="{frame.left + _FRAME_WIDTH / 2}" y="{bottom + 41}" text-anchor="middle">'
        f"{x_label}</text>",
        f'<text transform="translate({frame.left - 56},{middle}) rotate(-90)" '
        f'text-anchor="middle">{y_label}</text>',
    ]
    return parts


def _lines(
    frame: _Frame,
    series: Sequence[Sequence[Point]],
    place: Callable[[Point], float],
    *,
    marked: bool,
    name: str,
) -> list[str]:
    """Return one line per curve, cut at the frame, and with `marked` its points."""
    parts = [
        f'<clipPath id="{name}"><rect x="{frame.left}" y="{frame.top}" width="{_FRAME_WIDTH}" '
        f'height="{_FRAME_HEIGHT}"/></clipPath>'
    ]
    for index, points in enumerate(series):
        pixels = [(frame.x(place(point)), frame.y(point.value)) for point in points]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(
            f'<polyline clip-path="url(#{name})" points="{text}" fill="none" '
            f'stroke="{_colour(index)}" stroke-width="{1.4 if marked else 1.8}" '
            'stroke-linejoin="round"/>'
        )
        if marked:
            parts += [_marker(x, y, index) for x, y in pixels]
    return parts


def _marker(x: float, y: float, index: int) -> str:
    shape = _SHAPES[index % len(_SHAPES)]
    return (
        f'<path transform="translate({x:.1f},{y:.1f})" d="{shape}" fill="{_colour(index)}" '
        'stroke="#ffffff"/>'
    )


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _short(value: float) -> str:
    """Write 1500000 as 1.5M; tokens and minutes alike."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _labelled_folder(text: str) -> tuple[str, Path]:
    label, equals, folder = text.partition("=")
    if not (equals and label and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=RUN_FOLDER")
    return label, Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=_labelled_folder, metavar="LABEL=RUN_FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="the SVG file to write")
    options = parser.parse_args(arguments)
    try:
        curves = [read_curve(label, folder) for label, folder in options.runs]
        options.output.write_text(draw(curves), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for curve in curves:
        print(_summary(curve))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
