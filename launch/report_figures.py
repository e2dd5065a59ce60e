"""The plots of a report as plain figures of plotly.js: data, layout and a sentence about them.

A function returns None where a run has nothing to draw; `report.py` then says what is missing.
Each plot has a title, axes with units, and a caption that tells its main numbers in words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gatewise.launch.report_runs import StoredRun

__all__ = [
    "COLOURS",
    "Figure",
    "base_layout",
    "churn",
    "curve",
    "dead_experts",
    "gradient_norms",
    "layer_lines",
    "losses",
    "shown",
    "step_time",
]

# Okabe and Ito's palette: told apart also without full colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#555555")
_DASHES = ("solid", "dash", "dot")
_MOST_POINTS = 1500  # of a line
_INK = "#1f2328"


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot; `frames` are further tables that a slider puts in place of the first trace's."""

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    caption: str
    is_wide: bool = False  # takes the page's whole width
    frames: Sequence[tuple[str, Sequence[Sequence[float]]]] = ()


def curve(
    runs: Sequence[StoredRun],
    key: str,
    title: str,
    unit: str,
    *,
    over_tokens: bool = False,
    log: bool = False,
    marks: bool = False,
) -> Figure | None:
    """Draw one metric of every run over steps, or over tokens."""
    traces, ends = [], []
    for index, run in enumerate(runs):
        steps, values = run.series(key)
        if log:
            kept = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
            steps, values = [s for s, _ in kept], [v for _, v in kept]
        scale = run.tokens_per_step() if over_tokens else 1
        if not steps or scale is None:
            continue
        x, y = _thinned([step * scale for step in steps], values)
        traces.append(_line(run.name, x, y, index, marks=marks or len(x) < 3))
        least = min(range(len(values)), key=values.__getitem__)
        words = f"{run.name + ': ' if len(runs) > 1 else ''}{shown(values[-1])} at step {steps[-1]}"
        if values[least] < values[-1]:
            words += f", least {shown(values[least])} at step {steps[least]}"
        ends.append(words)
    if not traces:
        return None
    x_title = "tokens" if over_tokens else "step"
    layout = base_layout(title, x_title, unit)
    if log:
        _use_log(layout, traces)
    if len(runs) == 1:
        layout["showlegend"], layout["margin"]["t"] = False, 50
    if not over_tokens:
        _mark_restarts(layout, runs)
    return Figure(title, traces, layout, "; ".join(ends) + ".")


def losses(run: StoredRun, *, over_tokens: bool) -> Figure | None:
    """Draw training and validation loss of one run."""
    scale = run.tokens_per_step() if over_tokens else 1
    rows = (
        ("train/loss_mean", "training, mean of the window", 0, False),
        ("val/loss", "validation", 1, True),
    )
    traces, words = [], []
    for key, name, index, marks in rows:
        steps, values = run.series(key)
        if not steps or scale is None:
            continue
        x, y = _thinned([step * scale for step in steps], values)
        traces.append(_line(name, x, y, index, marks=marks))
        words.append(f"{name}: {values[-1]:.4f} at step {steps[-1]}, least {min(values):.4f}")
    if not traces:
        return None
    title = "Loss over tokens" if over_tokens else "Loss over steps"
    layout = base_layout(title, "tokens" if over_tokens else "step", "nats per token")
    if not over_tokens:
        _mark_restarts(layout, [run])
    return Figure(title, traces, layout, "; ".join(words) + ".")


def gradient_norms(run: StoredRun) -> Figure | None:
    """Draw the norms of the gradients by kind of parameter, logarithmic."""
    rows = [("train/grad_norm", "all, before clipping")]
    rows += [(f"grad/{kind}_norm", kind) for kind in ("dense", "embedding", "router", "expert")]
    traces = []
    for index, (key, name) in enumerate(rows):
        steps, values = run.series(key)
        kept = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
        if kept:
            x, y = _thinned([s for s, _ in kept], [v for _, v in kept])
            traces.append(_line(name, x, y, index, marks=False))
    if not traces:
        return None
    _, total = run.series("train/grad_norm")
    layout = base_layout("Gradient norms", "step", "norm (log scale)")
    _use_log(layout, traces)
    _mark_restarts(layout, [run])
    clip = run.config.get("optim.clip")
    over = sum(value > clip for value in total) if isinstance(clip, (int, float)) and clip else None
    words = f"Largest of all: {max(total, default=0):.3g}."
    if over is not None:
        words += f" {over} of {len(total)} recorded steps were clipped at {clip:g} (optim.clip)."
    return Figure("Gradient norms", traces, layout, words)


def dead_experts(run: StoredRun) -> Figure | None:
    """Draw how many experts no token chose, layer by layer."""
    keys = run.layers("dead_frac")
    experts = run.config.get("model.num_experts")
    if not keys or not isinstance(experts, int) or not experts:
        return None
    traces, worst, all_steps = [], 0.0, 0
    for index, key in enumerate(keys):
        steps, shares = run.series(key)
        if not steps:
            continue
        counts = [share * experts for share in shares]
        x, y = _thinned(steps, counts)
        traces.append(_line(f"layer {index}", x, y, index, marks=len(x) < 3))
        worst, all_steps = max(worst, *counts), steps[-1]
    if not traces:
        return None
    title = "Dead experts"
    layout = base_layout(title, "step", f"experts without a token, of {experts}")
    layout["yaxis"]["range"] = [-0.04 * max(1.0, worst), max(1.0, worst * 1.1)]
    _mark_restarts(layout, [run])
    words = f"Experts that no token chose between two records, of {experts} in each layer. "
    words += f"At most {worst:.0f} in a layer" if worst else f"None up to step {all_steps}"
    return Figure(title, traces, layout, words + ".")


def layer_lines(
    run: StoredRun, name: str, title: str, unit: str, *, reference: tuple[float, str] | None = None
) -> Figure | None:
    """Draw one value of every MoE layer, with a line for what it is compared with."""
    traces = []
    for index, key in enumerate(run.layers(name)):
        steps, values = run.series(key)
        if steps:
            x, y = _thinned(steps, values)
            traces.append(_line(f"layer {index}", x, y, index, marks=len(x) < 3))
    if not traces:
        return None
    ends = [f"{trace['name']} {shown(trace['y'][-1])}" for trace in traces[:12]]
    layout = base_layout(title, "step", unit)
    if reference is not None:
        value, words = reference
        layout["shapes"] = [_rule(value)]
        layout["annotations"] = [
            {
                "xref": "paper",
                "x": 0.995,
                "xanchor": "right",
                "y": value,
                "yanchor": "bottom",
                "showarrow": False,
                "text": words,
            }
        ]
    _mark_restarts(layout, [run])
    return Figure(title, traces, layout, f"At the end: {', '.join(ends)}.")


def churn(runs: Sequence[StoredRun]) -> Figure | None:
    """Draw how much of the choice of experts changed since the evaluation before."""
    figure = curve(
        runs,
        "val/router_churn",
        "Churn of the router",
        "share of pairs with another expert",
        marks=True,
    )
    if figure is not None:
        figure.layout["yaxis"]["rangemode"] = "tozero"
    return figure


def step_time(runs: Sequence[StoredRun]) -> Figure | None:
    """Draw what a step's time consists of: over the steps of one run, or side by side."""
    parts = [_split_time(run) for run in runs]
    kept = [(run, part) for run, part in zip(runs, parts, strict=True) if part is not None]
    if not kept:
        return None
    title = "Time of a step"
    if len(kept) == 1 and len(runs) == 1:
        steps, rest, exposed = kept[0][1]
        names = (("computing and all else", rest, 0), ("exposed communication", exposed, 1))
        traces = [
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "time",
                "name": name,
                "x": _thinned(steps, values)[0],
                "y": _thinned(steps, values)[1],
                "line": {"width": 0.8, "color": COLOURS[index]},
            }
            for name, values, index in names
        ]
        layout = base_layout(title, "step", "ms per step")
        _mark_restarts(layout, runs)
    else:
        means = [(run.name, _mean(part[1]), _mean(part[2])) for run, part in kept]
        traces = [
            {
                "type": "bar",
                "name": name,
                "x": [row[0] for row in means],
                "y": [row[place] for row in means],
                "marker": {"color": COLOURS[place - 1]},
            }
            for place, name in ((1, "computing and all else"), (2, "exposed communication"))
        ]
        layout = base_layout(title, "run", "ms per step, mean over records")
        layout["barmode"] = "stack"
    layout["yaxis"]["rangemode"] = "tozero"
    words = []
    for run, (_, rest, exposed) in kept:
        whole, share = _mean(rest) + _mean(exposed), _mean(exposed)
        owner = f"{run.name}: " if len(runs) > 1 else ""
        words.append(
            f"{owner}{shown(whole)} ms, of which {100 * share / max(whole, 1e-9):.0f} % "
            "are exposed communication"
        )
    note = ". Exposed is what rank 0 waits for while its MoE layers compute nothing."
    caption = "Mean over the records: " + "; ".join(words) + note
    return Figure(title, traces, layout, caption, is_wide=len(runs) == 1)


def base_layout(title: str, x_title: str, y_title: str, *, height: int = 350) -> dict[str, Any]:
    """Return the layout that all plots share.

    Args:
        title: of the plot.
        x_title: of the horizontal axis, with the unit.
        y_title: of the vertical axis, with the unit.
        height: in pixels.
    """
    axis = {
        "gridcolor": "#e3e3e0",
        "linecolor": "#8c8c8c",
        "zerolinecolor": "#cfcfca",
        "automargin": True,
        "ticks": "outside",
    }
    return {
        "title": {
            "text": title,
            "x": 0.01,
            "xanchor": "left",
            "y": 0.97,
            "yanchor": "top",
            "font": {"size": 17},
        },
        "height": height,
        "font": {"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "color": _INK},
        "paper_bgcolor": "#fcfcfa",
        "plot_bgcolor": "#fcfcfa",
        "margin": {"l": 70, "r": 24, "t": 76, "b": 60},
        "xaxis": {**axis, "title": {"text": x_title}},
        "yaxis": {**axis, "title": {"text": y_title, "standoff": 14}},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
        "hovermode": "closest",
    }


def _line(
    name: str, x: Sequence[float], y: Sequence[float], index: int, *, marks: bool
) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines+markers" if marks else "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {
            "color": colour,
            "width": 1.8,
            "dash": _DASHES[index // len(COLOURS) % len(_DASHES)],
        },
        "marker": {"size": 6, "color": colour},
        "showlegend": True,
    }


def _mark_restarts(layout: dict[str, Any], runs: Sequence[StoredRun]) -> None:
    """Draw where runs went on after a stop or a kill."""
    for run in runs:
        for step, _ in run.restarts:
            layout.setdefault("shapes", []).append(
                {
                    "type": "line",
                    "x0": step,
                    "x1": step,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"color": "#555555", "width": 1, "dash": "dot"},
                }
            )
            layout.setdefault("annotations", []).append(
                {
                    "x": step,
                    "yref": "paper",
                    "y": 0.98,
                    "yanchor": "top",
                    "xanchor": "left",
                    "text": " restart" if len(runs) == 1 else f" restart of {run.name}",
                    "showarrow": False,
                    "font": {"size": 11, "color": "#555555"},
                }
            )


def _use_log(layout: dict[str, Any], traces: Sequence[Mapping[str, Any]]) -> None:
    """Make the vertical axis logarithmic, with ticks at 1, 2 and 5 times the powers of ten."""
    values = [value for trace in traces for value in trace["y"]]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    factors = (1, 2, 5) if high - low < 4 else (1,)
    ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
    layout["yaxis"] |= {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def _rule(value: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": {"color": "#8c8c8c", "width": 1, "dash": "dash"},
    }


def _split_time(run: StoredRun) -> tuple[list[int], list[float], list[float]] | None:
    """Return steps, and the ms of each that is not and that is exposed communication."""
    per_step = run.tokens_per_step()
    exposed = dict(zip(*run.series("schedule/exposed_communication_ms"), strict=True))
    steps, rates = run.series("train/tokens_per_second")
    found = [
        (step, 1e3 * per_step / rate, exposed[step])
        for step, rate in zip(steps, rates, strict=True)
        if per_step and rate > 0 and step in exposed
    ]
    if not found:
        return None
    rest = [max(0.0, whole - part) for _, whole, part in found]
    return [step for step, _, _ in found], rest, [part for _, _, part in found]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Leave points out evenly above a number; the last one stays."""
    every = math.ceil(len(x) / _MOST_POINTS) or 1
    return list(x)[::-1][::every][::-1], [_short(v) for v in list(y)[::-1][::every][::-1]]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def shown(value: float) -> str:
    """Return a number for a sentence."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
