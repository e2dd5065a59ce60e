"""Timelines as an SVG picture: a panel for each schedule, a row for each lane.

Read `timeline.py` first. All panels share one time axis, so that a shorter schedule looks shorter.
"""

from collections.abc import Sequence
from html import escape

from gatewise.parallel.schedule.plan import LANES
from gatewise.parallel.schedule.timeline import Interval, Timeline

__all__ = ["timelines_svg"]

_WIDTH = 1000  # of the time axis, in pixels
_LEFT = 90  # room for the names of the lanes
_ROW = 24
_PANEL = _ROW * (len(LANES) + 1) + 14
_AXIS = 30
_LETTER = 6.2  # width of a letter
_TICKS = (1, 2, 5)
# neighbouring hues are far apart; text on them is black
_COLOURS = ("#8ecae6", "#ffb703", "#95d5b2", "#f4a3b5", "#cdb4db", "#ffd6a5", "#a0c4ff", "#d4d4aa")


def timelines_svg(panels: Sequence[tuple[str, Timeline]]) -> str:
    """Return a picture of several timelines under each other.

    Args:
        panels: title and timeline of each; at least one, not all empty.

    Raises:
        ValueError: if there is nothing to draw.
    """
    total = max((line.total_ms for _, line in panels), default=0.0)
    if total <= 0:
        raise ValueError("there is no timeline with tasks to draw; give at least one")
    scale = _WIDTH / total
    colours: dict[str, str] = {}
    body: list[str] = []
    for number, (title, line) in enumerate(panels):
        body += _panel(title, line, number * _PANEL, scale, colours)
    bottom = len(panels) * _PANEL
    body += _axis(total, scale, bottom)
    legend, height = _legend(colours, bottom + _AXIS)
    width = _LEFT + _WIDTH + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
    )
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, background, *body, *legend, "</svg>"]) + "\n"


def _panel(
    title: str, line: Timeline, top: int, scale: float, colours: dict[str, str]
) -> list[str]:
    shown = f"{escape(title)}: {line.total_ms:.2f} ms"
    parts = [f'<text x="4" y="{top + 16}" font-weight="bold">{shown}</text>']
    for row, lane in enumerate(LANES, 1):
        y = top + row * _ROW
        parts.append(f'<text x="4" y="{y + 15}">{lane}</text>')
        parts.append(
            f'<line x1="{_LEFT}" y1="{y + _ROW - 2}" x2="{_LEFT + _WIDTH}" y2="{y + _ROW - 2}" '
            'stroke="#ccc"/>'
        )
        parts += [_box(i, y, scale, colours) for i in line.intervals if i.resource == lane]
    return parts


def _box(interval: Interval, y: int, scale: float, colours: dict[str, str]) -> str:
    stage = interval.task.stage.rpartition(".")[2]
    colour = colours.setdefault(stage, _COLOURS[len(colours) % len(_COLOURS)])
    x = _LEFT + interval.start_ms * scale
    width = max((interval.end_ms - interval.start_ms) * scale, 0.4)
    label = str(interval.task.chunk + 1)
    text = ""
    if width > _LETTER * len(label) + 2:
        text = f'<text x="{x + width / 2:.1f}" y="{y + 14}" text-anchor="middle">{label}</text>'
    tip = f"{interval.task}: {interval.start_ms:.3f} to {interval.end_ms:.3f} ms"
    return (
        f'<g><title>{escape(tip)}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}" '
        f'height="{_ROW - 4}" fill="{colour}" stroke="#555" stroke-width="0.5"/>{text}</g>'
    )


def _axis(total: float, scale: float, y: int) -> list[str]:
    power = 1e-6
    while not any(total / (power * tick) <= 10 for tick in _TICKS):
        power *= 10
    tick = next(power * tick for tick in _TICKS if total / (power * tick) <= 10)
    parts = []
    for number in range(int(total / tick) + 1):
        x = _LEFT + number * tick * scale
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{y}" stroke="#eee"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y + 12}" text-anchor="middle">{number * tick:g}</text>'
        )
    parts.append(f'<text x="4" y="{y + 12}">ms</text>')
    return parts


def _legend(colours: dict[str, str], y: int) -> tuple[list[str], int]:
    parts = []
    x = 4.0
    for stage, colour in colours.items():
        width = 22 + _LETTER * len(stage) + 12
        if x + width > _LEFT + _WIDTH:
            x, y = 4.0, y + 18
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="14" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18:.0f}" y="{y + 10}">{escape(stage)}</text>')
        x += width
    return parts, y + 24
