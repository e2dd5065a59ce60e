"""What `gatewise bench schedule` reports: rows, choices, errors of prediction, and pictures.

Read `schedule_trials.py` first.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.schedule_trials import Cell, Measured, Trials
from gatewise.launch.testbed import Links
from gatewise.launch.trials import median_interval, paired_speedup
from gatewise.moe.planning.whole import choose
from gatewise.parallel.schedule.picture import timelines_svg
from gatewise.parallel.schedule.recorder import split_waits
from gatewise.parallel.schedule.timeline import Timeline, chrome_events, joined

__all__ = ["make_report"]

_NEAR = 0.03  # a choice this near to the best one is as good
_Row = dict[str, Any]  # JSON's own types


def make_report(
    folder: RunFolder,
    measured: Sequence[tuple[Links, Sequence[Trials]]],
    *,
    ranks_per_node: int,
) -> _Row:
    """Print the tables, draw the pictures and return the keys of the result.

    Args:
        folder: of the run.
        measured: for each kind of links, what each rank reports.
        ranks_per_node: to tell which ranks talk to which.
    """
    rows: list[_Row] = []
    answers: list[_Row] = []
    pictures: list[str] = []
    traces: list[str] = []
    for links, ranks in measured:
        for number, cell in enumerate(ranks[0].cells):
            of_ranks = [trials.cells[number] for trials in ranks]
            found = _cell_rows(links, of_ranks)
            rows += found
            answers.append(_answer(links, cell, found))
            _print_cell(links, cell, found)
            name = f"{str(links).replace('/', '_')}_{cell.compute}_{cell.tokens}"
            pictures.append(str(_draw(folder, name, cell, found)))
            traces.append(str(_trace(folder, name, of_ranks, ranks_per_node)))
    errors = [abs(row["prediction_error"]) for row in rows]
    near = [answer["loss"] <= _NEAR for answer in answers]
    loads = [load for _, ranks in measured for load in ranks[0].loads]
    summary = {
        "cells": len(rows),
        "prediction_error_median": statistics.median(errors),
        "prediction_error_worst": max(errors),
        "choices_near_best": sum(near) / len(near),
        "load_median": statistics.median(loads),
        "load_most": max(loads),
    }
    print(
        f"{len(rows)} cells: prediction off by {summary['prediction_error_median']:.1%} in the "
        f"median, {summary['prediction_error_worst']:.1%} at worst; the predicted best is within "
        f"{_NEAR:.0%} of the measured best in {sum(near)} of {len(near)}; load "
        f"{summary['load_median']:.1f}, at most {summary['load_most']:.1f}"
    )
    return {"rows": rows, "choices": answers, **summary, "pictures": pictures, "traces": traces}


def _totals(measured: Measured) -> list[float]:
    """Return the time of all passes, trial by trial, in ms."""
    return [sum(times) for times in zip(*measured.ms.values(), strict=True)]


def _cell_rows(links: Links, ranks: Sequence[Cell]) -> list[_Row]:
    cell = ranks[0]
    serial = _totals(cell.candidates[0])
    rows = []
    for index, candidate in enumerate(cell.candidates):
        times, proposal = _totals(candidate), candidate.proposal
        predicted_ms, bound_ms = (
            cell.blocks * ms for ms in (proposal.predicted_ms, proposal.bound_ms)
        )
        middle, low, high = median_interval(times)
        speedup, speedup_low, speedup_high = paired_speedup(serial, times)
        passes = {f"{name}_ms": statistics.median(ms) for name, ms in candidate.ms.items()}
        predicted = {
            f"predicted_{name}_ms": proposal.passes[name].total_ms(cell.interference)
            * cell.blocks
            / proposal.blocks
            for name in candidate.ms
        }
        differences = [rank.candidates[index].difference for rank in ranks]
        rows.append(
            {
                "policy": proposal.policy,
                "compute": cell.compute,
                "links": "shaped" if links.shaped else "unshaped",
                "inter_mbit": links.inter_mbit,
                "intra_mbit": links.intra_mbit,
                "tokens": cell.tokens,
                "blocks": cell.blocks,
                "measured_ms": middle,
                "ci95_ms": [low, high],
                "least_ms": min(times),
                "trials_ms": times,
                "predicted_ms": predicted_ms,
                "prediction_error": predicted_ms / middle - 1,
                "bound_ms": bound_ms,
                "speedup_vs_serial": speedup,
                "speedup_ci95": [speedup_low, speedup_high],
                "chunks_forward": proposal.chunks("forward") if "forward" in candidate.ms else 0,
                "chunks_backward": proposal.chunks("backward") if "backward" in candidate.ms else 0,
                **passes,
                **predicted,
                "gradient_bytes": candidate.gradient_bytes,
                "inter_bytes": candidate.sent_bytes.get("inter"),
                "intra_bytes": candidate.sent_bytes.get("intra"),
                "difference": max((d for d in differences if d is not None), default=None),
            }
        )
    return rows


def _answer(links: Links, cell: Cell, rows: Sequence[_Row]) -> _Row:
    """Return what the planner would have chosen, and what was best."""
    asked = cell.candidates[0].gradient_bytes
    same = [c for c in cell.candidates if c.gradient_bytes == asked]
    chosen = choose([candidate.proposal for candidate in same]).policy
    ms = {row["policy"]: row["measured_ms"] for row in rows if row["gradient_bytes"] == asked}
    best = min(ms, key=lambda policy: ms[policy])
    return {
        "links": str(links),
        "compute": cell.compute,
        "tokens": cell.tokens,
        "auto": chosen,
        "best": best,
        "loss": ms[chosen] / ms[best] - 1,
    }


def _print_cell(links: Links, cell: Cell, rows: Sequence[_Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"links {links}, {cell.compute} compute, {cell.tokens} rows a rank; by these "
        f"costs the fullest lane needs {rows[0]['bound_ms']:.0f} ms"
    )
    names = ("policy", "chunks", "ms", "95 %", "predicted", "speed-up", "95 %", "results")
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in rows:
        without = rows[0]["gradient_bytes"] and not row["gradient_bytes"]
        table.add_row(
            row["policy"] + (", no sum" if without else ""),
            f"{row['chunks_forward'] or '-'}/{row['chunks_backward'] or '-'}",
            f"{row['measured_ms']:.1f}",
            "{:.1f}-{:.1f}".format(*row["ci95_ms"]),
            f"{row['predicted_ms']:.1f} ({row['prediction_error']:+.1%})",
            f"{row['speedup_vs_serial']:.2f}",
            "{:.2f}-{:.2f}".format(*row["speedup_ci95"]),
            _results_text(row["difference"]),
        )
    Console().print(table)


def _results_text(difference: float | None) -> str:
    if difference is None:
        return "-"
    return "equal" if difference == 0 else f"off {difference:.0e}"


def _draw(folder: RunFolder, name: str, cell: Cell, rows: Sequence[_Row]) -> Path:
    """Draw serial, fsmoe and the best schedule: measured on rank 0, and predicted."""
    times = [row["measured_ms"] for row in rows]
    best = times.index(min(times))
    wanted = [i for i, row in enumerate(rows) if i in (0, best) or row["policy"] == "fsmoe"]
    panels = []
    for index in wanted:
        candidate = cell.candidates[index]
        policy = candidate.proposal.policy
        panels += [
            (f"{policy}, measured", joined(list(candidate.timelines.values()))),
            (f"{policy}, predicted", joined(_predicted(cell, candidate))),
        ]
    path = folder.path / f"timeline_{name}.svg"
    with writable(folder.path):
        path.write_text(timelines_svg(panels), encoding="utf-8")
    return path


def _predicted(cell: Cell, candidate: Measured) -> list[Timeline]:
    passes, repeats = candidate.proposal.passes, cell.blocks // candidate.proposal.blocks
    lines = {name: passes[name].timeline(cell.interference) for name in candidate.timelines}
    return [line for name in lines for line in [lines[name]] * repeats]


def _trace(folder: RunFolder, name: str, ranks: Sequence[Cell], ranks_per_node: int) -> Path:
    """Store predicted and measured timelines of every rank as a Chrome trace."""
    events: list[_Row] = []
    process = 0
    for index, candidate in enumerate(ranks[0].candidates):
        policy = candidate.proposal.policy
        predicted = joined(_predicted(ranks[0], candidate))
        events += chrome_events(predicted, f"{policy}, predicted", process=process)
        process += 1
        for rank in range(len(ranks)):
            lines = []
            for part in candidate.timelines:
                of_ranks = [cell.candidates[index].timelines[part] for cell in ranks]
                node = rank // ranks_per_node * ranks_per_node
                within = of_ranks[node : node + ranks_per_node]
                across = of_ranks[rank % ranks_per_node :: ranks_per_node]
                line = split_waits(of_ranks[rank], within, lambda i: i.resource == "intra")
                lines.append(split_waits(line, across, lambda i: i.resource == "inter"))
            track = f"{policy}, rank {rank}"
            events += chrome_events(joined(lines), track, process=process)
            process += 1
    path = folder.path / "trace" / f"{name}.json"
    with writable(folder.path):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events}) + "\n", encoding="utf-8")
    return path
