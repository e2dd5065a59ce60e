"""The tables of numbers, timelines and compressions of a report as figures of plotly.js.

Read `report_figures.py` first: what a figure is, and what all have in common.
"""

import math
from collections.abc import Sequence
from typing import Any

from gatewise.launch.report_figures import COLOURS, Figure, base_layout
from gatewise.launch.report_runs import Compression, StoredRun

__all__ = ["compression_widths", "load_over_time", "pareto", "timeline", "violation_map"]

_MOST_FRAMES = 80  # of a slider
_MOST_SPANS = 4000  # of a timeline
# 0 (dead) is orange, 1 (balance) white, from there on ever darker blue
_DEAD, _EVEN, _FULL = "#b45309", "#fdfdfb", "#0a4a85"


def load_over_time(run: StoredRun) -> Figure | None:
    """Draw the load of each expert of each layer, with a slider over the records."""
    loads = run.loads()
    if not loads:
        return None
    every = math.ceil(len(loads) / _MOST_FRAMES)
    kept = loads[::-1][::every][::-1]  # with the last one
    step, last = kept[-1]
    layers, experts = len(last), len(last[0])
    most = max(2.0, *(value for _, load in kept for row in load for value in row))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": last,
        "x": list(range(experts)),
        "y": [f"layer {index}" for index in range(layers)],
        "zmin": 0,
        "zmax": min(most, 4.0),
        "colorscale": _load_scale(min(most, 4.0)),
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "load /<br>mean"}, "thickness": 14},
        "hovertemplate": "%{y}, expert %{x}: %{z:.2f} of the mean<extra></extra>",
    }
    if experts <= 24:
        trace |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 11}}
    title = "Load of each expert"
    layout = base_layout(title, "expert", "", height=max(260, 130 + 34 * min(layers, 24)))
    layout["margin"]["t"] = 50
    layout["yaxis"] |= {"autorange": "reversed", "title": {"text": "MoE layer", "standoff": 14}}
    layout["xaxis"] |= {"dtick": max(1, experts // 16), "zeroline": False}
    ratios = [value for row in last for value in row]
    words = (
        f"At step {step} the fullest expert takes {max(ratios):.2f} times its layer's mean, the "
        f"emptiest {min(ratios):.2f}; 1 is balance, 0 a dead expert. The slider goes through "
        f"{len(kept)} records, each of the steps since the one before."
    )
    frames = [(f"step {number}", load) for number, load in kept]
    return Figure(title, [trace], layout, words, is_wide=True, frames=frames)


def violation_map(run: StoredRun) -> Figure | None:
    """Draw the imbalance of each layer over the steps."""
    keys = run.layers("max_violation")
    if not keys:
        return None
    columns = [run.series(key) for key in keys]
    steps = columns[0][0]
    if any(column[0] != steps for column in columns) or not steps:
        return None
    every = math.ceil(len(steps) / 300)
    rows = [values[::every] for _, values in columns]
    high = max(max(row) for row in rows)
    trace = {
        "type": "heatmap",
        "x": steps[::every],
        "y": [f"layer {index}" for index in range(len(rows))],
        "z": rows,
        "zmin": 0,
        "zmax": min(high, 4.0) or 1.0,
        "colorscale": [[0, "#f7fafc"], [1, "#08457c"]],
        "colorbar": {"title": {"text": "max/mean<br>- 1"}, "thickness": 14},
        "hovertemplate": "%{y}, step %{x}: %{z:.2f}<extra></extra>",
    }
    title = "Imbalance of each layer over the steps"
    layout = base_layout(title, "step", "", height=max(240, 130 + 26 * min(len(rows), 24)))
    layout["margin"]["t"] = 50
    layout["yaxis"] |= {"autorange": "reversed", "title": {"text": "MoE layer", "standoff": 14}}
    last = [row[-1] for row in rows]
    worst = max(range(len(last)), key=last.__getitem__)
    words = (
        f"Largest demand of an expert over the mean, minus 1 (0 is balance). At the end layer "
        f"{worst} is worst with {last[worst]:.2f}; over the run the worst was {high:.2f}."
    )
    return Figure(title, [trace], layout, words, is_wide=True)


def timeline(run: StoredRun) -> Figure | None:
    """Draw the lanes of each rank in the step that was traced."""
    if not run.spans:
        return None
    spans = sorted(run.spans, key=lambda span: -span.length_ms)[:_MOST_SPANS]
    tracks = sorted({span.track for span in spans}, key=_track_order)
    stages = sorted({_stage(span.name) for span in spans})
    traces = []
    for index, stage in enumerate(stages):
        mine = [span for span in spans if _stage(span.name) == stage]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": stage,
                "y": [span.track for span in mine],
                "x": [span.length_ms for span in mine],
                "base": [span.start_ms for span in mine],
                "text": [span.name for span in mine],
                "textposition": "none",
                "hovertemplate": "%{text}: %{x:.2f} ms from %{base:.2f} ms<extra>%{y}</extra>",
                "marker": {
                    "color": COLOURS[index % len(COLOURS)],
                    "pattern": {"shape": ("", "/", "x")[index // len(COLOURS) % 3]},
                },
            }
        )
    title = f"Timeline of step {run.trace_step}"
    layout = base_layout(title, "ms since the step began", "", height=150 + 40 * len(tracks))
    layout |= {"barmode": "overlay", "bargap": 0.25}
    layout["yaxis"] |= {
        "title": {"text": "rank and lane", "standoff": 14},
        "categoryorder": "array",
        "categoryarray": tracks[::-1],
    }
    end = max(span.start_ms + span.length_ms for span in run.spans)
    words = f"{len(run.spans)} tasks in {end:.1f} ms"
    if len(spans) < len(run.spans):
        words += f"; the {len(spans)} longest are drawn"
    words += ". Perfetto opens the files in trace/ with what was predicted."
    return Figure(title, traces, layout, words, is_wide=True)


def pareto(compressions: Sequence[tuple[str, Compression]]) -> Figure | None:
    """Draw what compression costs over the bits it leaves; the best for their bits are joined."""
    points = []
    for owner, one in compressions:
        bits, delta = one.bits.get("paper"), one.evaluation.get("delta_nats")
        if bits is not None and delta is not None:
            error = one.evaluation.get("standard_error", 0.0)
            points.append((bits, delta, error, f"{owner} {one.name}".strip()))
    if not points:
        return None
    points.sort()
    front: list[tuple[float, float]] = []
    for bits, delta, _, _ in points:
        if not front or delta < front[-1][1]:
            front.append((bits, delta))
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": "compressions",
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "error_y": {"type": "data", "array": [point[2] for point in points], "thickness": 1},
            "text": [point[3] for point in points],
            "textposition": "top center",
            "marker": {"size": 9, "color": COLOURS[0]},
        }
    ]
    if len(front) > 1:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "best for their bits",
                "x": [point[0] for point in front],
                "y": [point[1] for point in front],
                "line": {"color": COLOURS[1], "dash": "dash", "shape": "hv"},
            }
        )
    title = "Loss added by compression over bits"
    layout = base_layout(title, "bits per weight of the experts' budget", "nats per token added")
    layout["xaxis"]["range"] = [points[0][0] - 0.5, points[-1][0] + 0.5]
    words = "; ".join(f"{name}: {b:.2f} bits, {d:+.4f} +- {e:.4f}" for b, d, e, name in points)
    return Figure(title, traces, layout, words + " nats per token.")


def compression_widths(one: Compression) -> Figure | None:
    """Draw the width that each expert's weights got."""
    if not one.widths:
        return None
    rows = list(one.widths.values())
    widths = sorted({width for row in rows for width in row})
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": rows,
        "y": [f"layer {name}" for name in one.widths],
        "x": list(range(len(rows[0]))),
        "zmin": 0,
        "zmax": max(4, *widths),
        "colorscale": [[0, "#f7fafc"], [1, "#08457c"]],
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "bits"}, "thickness": 14, "dtick": 1},
        "hovertemplate": "%{y}, matrix %{x}: %{z} bits<extra></extra>",
    }
    if len(rows[0]) <= 32:
        trace |= {"texttemplate": "%{z}", "textfont": {"size": 11}}
    title = f"Bits of each matrix, {one.name}"
    layout = base_layout(title, "matrix of the layer's experts", "", height=130 + 34 * len(rows))
    layout["margin"]["t"] = 50
    layout["yaxis"] |= {"autorange": "reversed", "title": {"text": "layer", "standoff": 14}}
    counts = ", ".join(f"{sum(row.count(width) for row in rows)} at {width:g}" for width in widths)
    words = f"Matrices by width in bits: {counts}."
    return Figure(title, [trace], layout, words, is_wide=len(rows[0]) > 24)


def _load_scale(high: float) -> list[list[Any]]:
    """Return a colour scale whose middle colour stands at 1 of [0, high]."""
    return [[0, _DEAD], [1 / high, _EVEN], [1, _FULL]]


def _stage(name: str) -> str:
    """Return what kind of task a span is: its name without layer, slice and chunk."""
    return name.partition(":")[0].rpartition(".")[2]


def _track_order(track: str) -> tuple[int, int, str]:
    _, rank, lane = track.split(" ", 2)
    lanes = ("compute", "intra", "inter")
    return int(rank), lanes.index(lane) if lane in lanes else len(lanes), lane
