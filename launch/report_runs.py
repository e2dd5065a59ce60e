"""Read a run's folder for a report, whatever state it is in.

Every part may be missing or damaged; what could not be read is said in `notes`, in words for the
reader of the report, and the rest is used. Nothing here needs a plot package or torch.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewise.parallel.errors import ConfigError

__all__ = ["Compression", "Span", "StoredRun", "flatten", "read_run"]

LOAD = "experts/load_ratio"


@dataclass(frozen=True, slots=True)
class Span:
    """One task of a timeline."""

    track: str  # rank and lane
    name: str
    start_ms: float
    length_ms: float


@dataclass(frozen=True, slots=True)
class Compression:
    """What one `gatewise compress` left."""

    name: str
    bits: Mapping[str, float]
    sizes: Mapping[str, float]  # bytes
    evaluation: Mapping[str, float]  # empty where none was made
    widths: Mapping[str, list[float]]  # of each layer; empty where the report is not there


@dataclass(slots=True)
class StoredRun:
    """What a run's folder holds."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)  # dotted names
    environment: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)  # by step
    restarts: list[tuple[int, str]] = field(default_factory=list)  # step it went on from, time
    spans: list[Span] = field(default_factory=list)
    trace_step: int | None = None
    compressions: list[Compression] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a metric where both are known."""
        found = [
            (record["step"], record[key]) for record in self.records if _is_finite(record.get(key))
        ]
        return [step for step, _ in found], [value for _, value in found]

    def layers(self, name: str) -> list[str]:
        """Return the keys of a value that each MoE layer has, in order."""
        found = {key for record in self.records for key in record}
        return sorted(
            key for key in found if key.startswith("moe/layer_") and key.endswith(f"/{name}")
        )

    def loads(self) -> list[tuple[int, list[list[float]]]]:
        """Return (step, layers x experts) wherever the load of single experts is known."""
        shape: tuple[int, ...] | None = None
        found = []
        for record in self.records:
            load = record.get(LOAD)
            if not _is_table(load):
                continue
            assert isinstance(load, list)
            here = (len(load), len(load[0]))
            shape = shape or here
            if here == shape:
                found.append((record["step"], load))
        return found

    def tokens_per_step(self) -> float | None:
        """Return tokens of an optimizer step, where the records tell."""
        steps, tokens = self.series("train/tokens")
        if len(steps) > 1 and steps[-1] > steps[0]:
            return (tokens[-1] - tokens[0]) / (steps[-1] - steps[0])
        return tokens[0] / steps[0] if steps and steps[0] else None


def read_run(folder: Path) -> StoredRun:
    """Read what can be read below a run's folder.

    Raises:
        ConfigError: if it is no folder, or holds nothing that can be shown.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"RUN is {str(folder)!r}, which is not a folder; give the folder of a run (run.dir)"
        )
    run = StoredRun(folder, folder.resolve().name)
    run.config = flatten(_read_yaml(run, "config.yaml"))
    run.environment = _read_json(run, folder / "environment.json")
    run.result = _read_json(run, folder / "result.json")
    _read_records(run)
    _read_restarts(run)
    _read_traces(run)
    _read_compressions(run)
    if not run.records and not run.compressions:
        what = "; ".join(run.notes) or "it is empty"
        raise ConfigError(
            f"RUN is {str(folder)!r}, where nothing can be shown: {what}; give the folder of a run "
            "that wrote at least one record"
        )
    if run.records and not (folder / "result.json").exists():
        run.notes.append("without result.json: the run was killed, or is still going on")
    error = run.result.get("error")
    if error:
        run.notes.append(f"the run ended with exit code {run.result.get('exit')}: {error}")
    return run


def _read_text(run: StoredRun, path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        run.notes.append(f"{_name(run, path)} cannot be read: {reason}")
        return None


def _read_json(run: StoredRun, path: Path) -> dict[str, Any]:
    text = _read_text(run, path)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.notes.append(f"{_name(run, path)} is damaged: {error}")
        return {}
    if not isinstance(found, dict):
        run.notes.append(f"{_name(run, path)} is damaged: it holds no object")
        return {}
    return found


def _read_yaml(run: StoredRun, name: str) -> Mapping[Any, Any]:
    from omegaconf import OmegaConf

    text = _read_text(run, run.folder / name)
    if text is None:
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # whatever YAML finds wrong with damaged text
        run.notes.append(f"{name} is damaged: {' '.join(str(error).split())}")
        return {}
    if not isinstance(found, dict):
        run.notes.append(f"{name} is damaged: it holds no settings")
        return {}
    return found


def _read_records(run: StoredRun) -> None:
    """Read metrics.jsonl line by line; later records of a step replace its earlier ones."""
    path = run.folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        run.notes.append("metrics.jsonl is missing")
        return
    except OSError as error:
        run.notes.append(f"metrics.jsonl cannot be read: {error.strerror or error}")
        return
    by_step: dict[int, dict[str, Any]] = {}
    bad: list[int] = []
    odd: set[str] = set()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(record, dict) or type(step) is not int or not 0 <= step < 2**53:
            bad.append(number)
            continue
        odd |= {key for key, value in record.items() if not _is_metric(value)}
        good = {key: value for key, value in record.items() if _is_metric(value)}
        by_step.setdefault(record["step"], {}).update(good)
    run.records = [by_step[step] for step in sorted(by_step)]
    if bad:
        where = f"{len(bad)} of {len(lines)} lines cannot be read (the first is {bad[0]})"
        if bad == [len(lines)]:
            where = f"the last of {len(lines)} lines, torn by a kill, cannot be read"
        shown = "the others are shown" if by_step else "no record is left"
        run.notes.append(f"metrics.jsonl is damaged: {where}; {shown}")
    if odd:
        run.notes.append(f"metrics.jsonl is damaged: no numbers in {', '.join(sorted(odd)[:5])}")
    if not lines:
        run.notes.append("metrics.jsonl is empty: the run wrote no record")


def _read_restarts(run: StoredRun) -> None:
    text = _read_text(run, run.folder / "attempts.jsonl")
    torn = 0
    for number, line in enumerate((text or "").splitlines()):
        try:
            start = json.loads(line)
            step, when = int(start["step"]), str(start.get("time", ""))
            if not 0 <= step < 2**53:
                raise ValueError(step)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            torn += 1
            continue
        if number:
            run.restarts.append((step, when))
    if torn:
        run.notes.append(f"attempts.jsonl is damaged: {torn} lines cannot be read")


def _read_traces(run: StoredRun) -> None:
    """Read the measured lanes of one step, the last one that was traced."""
    paths = sorted((run.folder / "trace").glob("step_*_rank_*.json"))
    by_step: dict[int, list[tuple[int, Path]]] = {}
    for path in paths:
        parts = path.stem.split("_")
        if parts[1].isdigit() and parts[-1].isdigit():
            by_step.setdefault(int(parts[1]), []).append((int(parts[-1]), path))
    if not by_step:
        return
    run.trace_step = max(by_step)
    for rank, path in sorted(by_step[run.trace_step]):
        events = _read_json(run, path).get("traceEvents")
        for span in _spans(events if isinstance(events, list) else [], rank):
            run.spans.append(span)


def _spans(events: Sequence[Any], rank: int) -> Iterator[Span]:
    names: dict[tuple[str, str], str] = {}
    measured: set[str] = set()
    good = [event for event in events if isinstance(event, dict)]
    for event in good:
        details = event.get("args")
        name = str(details.get("name", "")) if isinstance(details, dict) else ""
        process, thread = str(event.get("pid")), str(event.get("tid"))
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            names[process, thread] = name
        elif event.get("ph") == "M" and "measured" in name:
            measured.add(process)
    for event in good:
        start, length = event.get("ts"), event.get("dur")
        process, thread = str(event.get("pid")), str(event.get("tid"))
        if event.get("ph") != "X" or process not in measured:
            continue
        if isinstance(start, (int, float)) and isinstance(length, (int, float)):
            lane = names.get((process, thread), thread)
            if _is_finite(start) and _is_finite(length):
                yield Span(f"rank {rank} {lane}", str(event.get("name")), start / 1e3, length / 1e3)


def _read_compressions(run: StoredRun) -> None:
    """Read the results of compressions: of this folder itself or of folders in it."""
    for path in [run.folder, *sorted(p for p in run.folder.iterdir() if p.is_dir())]:
        if not (path / "result.json").exists():
            continue
        result = run.result if path == run.folder else _read_json(run, path / "result.json")
        if result.get("command") != "compress" or result.get("exit") != 0:
            continue
        report = _read_json(run, path / "compressed" / "report.json")
        widths = report.get("widths")
        by_layer = widths.get("by_layer") if isinstance(widths, dict) else None
        rows = by_layer if isinstance(by_layer, dict) else {}
        run.compressions.append(
            Compression(
                path.resolve().name,
                bits=_numbers(result.get("bits")),
                sizes=_numbers(result.get("bytes")),
                evaluation=_numbers(result.get("evaluation")),
                widths=rows if _is_table(list(rows.values())) else {},
            )
        )


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _numbers(value: Any) -> dict[str, float]:
    """Return what of an object are finite numbers; nothing of anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return {key: number for key, number in items if _is_finite(number)}


def _is_finite(value: Any) -> bool:
    """Tell whether a value is a number that a plot can show."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _is_metric(value: Any) -> bool:
    return value is None or isinstance(value, float) or _is_finite(value) or _is_table(value)


def _is_table(value: Any) -> bool:
    """Tell whether a value is rows of numbers, all equally long."""
    if not isinstance(value, list) or not value:
        return False
    if not all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value):
        return False
    return all(_is_finite(item) for row in value for item in row)


def _name(run: StoredRun, path: Path) -> str:
    return str(path.relative_to(run.folder))
