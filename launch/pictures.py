"""Pictures of tables of numbers as SVG text: heat maps, histograms, lines and points.

Needs nothing but the standard library; a picture loads nothing from elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Panel", "Series", "heat_maps", "histograms", "lines", "scatter"]

# Okabe and Ito's palette: told apart also without full colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#555555")
_LIGHT, _DARK = (247, 250, 252), (8, 69, 124)  # ends of the heat maps' scale
_MARGIN, _TOP = 64, 58
_HEIGHT_OF_TEXT = 13
_TITLE, _LETTER = 9.4, 7.6  # widths of a letter in titles and in bold labels, from above


@dataclass(frozen=True, slots=True)
class Panel:
    """One heat map."""

    label: str
    rows: Sequence[Sequence[float]]  # all equally long


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together."""

    label: str
    points: Sequence[tuple[float, float, float]]  # x, y, half of the error bar
    joined: bool = True  # by a line


def heat_maps(
    title: str,
    panels: Sequence[Panel],
    *,
    row_label: str,
    column_label: str,
    low: float | None = None,
    high: float | None = None,
    row_names: Sequence[int] = (),
    column_names: Sequence[int] = (),
) -> str:
    """Draw matrices side by side on one scale.

    Args:
        title: of the picture.
        panels: at least one.
        row_label: what the rows are.
        column_label: what the columns are.
        low: value of the lightest colour; None is the least value.
        high: value of the darkest colour; None is the largest value.
        row_names: numbers of the rows; by default from 0.
        column_names: numbers of the columns; by default from 0.

    Returns:
        The text of an SVG file.
    """
    values = [value for panel in panels for row in panel.rows for value in row]
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    number = max(len(row) for panel in panels for row in panel.rows)
    cell = max(6, min(46, 720 // max(number, 1)))
    rows = max(len(panel.rows) for panel in panels)
    longest = max(len(panel.label) for panel in panels)
    wide = max(cell * number, round(_LETTER * longest)) + _MARGIN
    across = max(1, min(len(panels), 900 // wide))
    width = max(_MARGIN + across * wide, 40 + round(_TITLE * len(title)))
    step = cell * rows + 74
    height = _TOP + math.ceil(len(panels) / across) * step + 12
    parts = _open(title, max(width, 420), height)
    for index, panel in enumerate(panels):
        left = _MARGIN + (index % across) * wide
        top = _TOP + (index // across) * step + 22
        names = (row_names or range(len(panel.rows)), column_names or range(number))
        parts += _cells(panel, left, top, cell, scale=(low, high), names=names)
        bottom = top + cell * len(panel.rows)
        parts += [
            f'<text x="{left}" y="{top - 8}" font-weight="600">{escape(panel.label)}</text>',
            f'<text x="{left + cell * number / 2:.0f}" y="{bottom + 30}" text-anchor="middle">'
            f"{escape(column_label)}</text>",
            f'<text transform="translate({left - 34},{(top + bottom) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(row_label)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def histograms(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], *, end: float, x_label: str
) -> str:
    """Draw histograms below each other, each as shares of its own sum.

    Args:
        title: of the picture.
        rows: label and counts in equal bins from 0 to `end`.
        end: right end of the last bin.
        x_label: what is counted.

    Returns:
        The text of an SVG file.
    """
    width, band = 760, 64
    left, span = 110, 620
    height = _TOP + band * len(rows) + 46
    parts = _open(title, width, height)
    for index, (label, counts) in enumerate(rows):
        bottom = _TOP + band * (index + 1) - 8
        highest = max(counts, default=0) or 1.0
        bar = span / max(len(counts), 1)
        parts.append(
            f'<text x="{left - 12}" y="{bottom - 14}" text-anchor="end">{escape(label)}</text>'
        )
        for place, count in enumerate(counts):
            tall = (band - 16) * count / highest
            parts.append(
                f'<rect x="{left + place * bar:.1f}" y="{bottom - tall:.1f}" '
                f'width="{bar * 0.92:.1f}" height="{tall:.1f}" fill="{_COLOURS[0]}"/>'
            )
        parts.append(f'<path d="M{left},{bottom}h{span}" stroke="#8c8c8c"/>')
    bottom = _TOP + band * len(rows) - 8
    for value in _ticks(0.0, end):
        x = left + span * value / end
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<text x="{left + span / 2}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def lines(
    title: str,
    x: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Draw values in [0, 1] against x, one line for each label.

    Args:
        title: of the picture.
        x: at least one place, rising.
        series: label and a value for each place.
        x_label: what x is.
        y_label: what the values are.

    Returns:
        The text of an SVG file.
    """
    width, tall = 760, 300
    left, top, span = 84, _TOP, 520
    bottom = top + tall
    start, end = x[0], max(x[-1], x[0] + 1e-9)
    parts = _open(title, width, bottom + 56 + max(0, 18 * len(series) - tall))
    for value in _ticks(0.0, 1.0):
        y = bottom - tall * value
        parts += [
            f'<path d="M{left},{y:.1f}h{span}" stroke="#e3e3e0"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    for value in x:
        place = left + span * (value - start) / (end - start)
        parts.append(
            f'<text x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
        )
    for index, (label, values) in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        pixels = [
            (left + span * (place - start) / (end - start), bottom - tall * value)
            for place, value in zip(x, values, strict=True)
        ]
        dashes = ("", "6 3", "2 3")[index // len(_COLOURS) % 3]
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in pixels)
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dashes or "none"}"/>',
            *(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2" fill="{colour}"/>'
                for px, py in pixels
            ),
            f'<text x="{left + span + 16}" y="{top + 12 + 18 * index}" fill="{colour}">'
            f"{escape(label)}</text>",
        ]
    parts += _axis_labels(x_label, y_label, left=left, top=top, span=span, tall=tall)
    return "\n".join([*parts, "</svg>", ""])


def scatter(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, is_log: bool = True
) -> str:
    """Draw points with error bars.

    Args:
        title: of the picture.
        series: at least one point in all.
        x_label: what x is.
        y_label: what y is.
        is_log: whether y, then above 0, is on a logarithmic scale.

    Returns:
        The text of an SVG file.
    """
    left, top, span, tall = 84, _TOP, 560, 380
    bottom = top + tall
    points = [point for one in series for point in one.points]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    margin = 0.04 * (x_high - x_low) or 0.5
    x_low, x_high = x_low - margin, x_high + margin
    lowest, highest = min(p[1] for p in points), max(p[1] + p[2] for p in points)
    if is_log:
        y_low, y_high = math.log10(lowest) - 0.08, math.log10(highest) + 0.08
        marks = _log_ticks(y_low, y_high)
    else:
        margin = 0.05 * (highest - lowest) or 0.5
        y_low, y_high = lowest - margin, highest + margin
        marks = _round_ticks(y_low, y_high)

    def place(x: float, y: float) -> tuple[float, float]:
        if is_log:
            y = math.log10(y) if y > 0 else y_low
        height = (max(y, y_low) - y_low) / (y_high - y_low)
        return left + span * (x - x_low) / (x_high - x_low), bottom - tall * height

    label = max(len(one.label) for one in series)
    width = left + span + 50 + round(_LETTER * label)
    width = max(width, 40 + round(_TITLE * len(title)))
    parts = _open(title, width, bottom + 56)
    for value in marks:
        _, y = place(x_low, value)
        parts += [
            f'<path d="M{left},{y:.1f}h{span}" stroke="#e3e3e0"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    for value in _ticks(0.0, x_high):
        if value >= x_low:
            x, _ = place(value, 1.0)
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
            )
    parts.append(
        f'<rect x="{left}" y="{top}" width="{span}" height="{tall}" fill="none" stroke="#8c8c8c"/>'
    )
    for index, one in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        dashes = ("", "6 3", "2 3")[index // len(_COLOURS) % 3]
        pixels = [(*place(x, y), *place(x, y - e), *place(x, y + e)) for x, y, e in one.points]
        if one.joined:
            text = " ".join(f"{pixel[0]:.1f},{pixel[1]:.1f}" for pixel in pixels)
            parts.append(
                f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="1.8" '
                f'stroke-dasharray="{dashes or "none"}"/>'
            )
        for px, py, _, lower, _, upper in pixels:
            parts += [
                f'<path d="M{px:.1f},{lower:.1f}V{upper:.1f}" stroke="{colour}"/>',
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.4" fill="{colour}"/>',
            ]
        y = top + 14 + 20 * index
        parts += [
            f'<path d="M{left + span + 12},{y - 4}h20" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dashes or "none"}"/>',
            f'<text x="{left + span + 38}" y="{y}" fill="{colour}">{escape(one.label)}</text>',
        ]
    parts += _axis_labels(x_label, y_label, left=left, top=top, span=span, tall=tall)
    return "\n".join([*parts, "</svg>", ""])


def _axis_labels(
    x_label: str, y_label: str, *, left: float, top: float, span: float, tall: float
) -> list[str]:
    """Return what the axes of a frame are, below it and at its left."""
    return [
        f'<text x="{left + span / 2}" y="{top + tall + 40}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text transform="translate({left - 56},{top + tall / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between 10**low and 10**high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [float(f"{value:.6g}") for value in values if 10**low <= value <= 10**high]


def _open(title: str, width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
        f'font-size="{_HEIGHT_OF_TEXT}" fill="#1f2328">',
        f"<title>{escape(title)}</title>",
        # an opaque ground of its own: the picture looks the same on a dark page
        f'<rect width="{width}" height="{height}" rx="8" fill="#fcfcfa"/>',
        f'<text x="20" y="32" font-size="17" font-weight="600">{escape(title)}</text>',
    ]


def _cells(
    panel: Panel,
    left: float,
    top: float,
    cell: int,
    *,
    scale: tuple[float, float],
    names: tuple[Sequence[int], Sequence[int]],
) -> list[str]:
    """Return the squares of a heat map; with their numbers where these fit."""
    low, high = scale
    every = max(1, math.ceil(20 / cell))
    parts = []
    for i, row in enumerate(panel.rows):
        y = top + i * cell
        if i % every == 0:
            parts.append(
                f'<text x="{left - 6}" y="{y + cell / 2 + 4:.1f}" text-anchor="end" '
                f'font-size="11">{names[0][i]}</text>'
            )
        for j, value in enumerate(row):
            share = (value - low) / (high - low) if high > low else 0.0
            share = min(max(share, 0.0), 1.0)
            x = left + j * cell
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{_shade(share)}" '
                f'stroke="#fcfcfa"><title>{value:.4g}</title></rect>'
            )
            if cell >= 34:
                ink = "#ffffff" if share > 0.55 else "#1f2328"
                parts.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" font-size="11" '
                    f'text-anchor="middle" fill="{ink}">{value:.2f}</text>'
                )
    bottom = top + cell * len(panel.rows)
    parts += [
        f'<text x="{left + (j + 0.5) * cell:.1f}" y="{bottom + 14}" text-anchor="middle" '
        f'font-size="11">{names[1][j]}</text>'
        for j in range(0, len(panel.rows[0]), every)
    ]
    return parts


def _shade(share: float) -> str:
    mixed = (round(a + (b - a) * share) for a, b in zip(_LIGHT, _DARK, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round values within [low, high]."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [round(low + i * step, 10) for i in range(math.floor((high - low) / step + 1e-9) + 1)]


def _round_ticks(low: float, high: float) -> list[float]:
    """Return about five multiples of a round number within [low, high]."""
    step = _ticks(0.0, high - low)[1]
    first = math.ceil(low / step)
    return [round(step * (first + i), 10) for i in range(math.floor(high / step) - first + 1)]
