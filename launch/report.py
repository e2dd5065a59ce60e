"""`gatewise report RUN...`: one self-contained HTML file of a run, or of several side by side."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch import report_figures as draw
from gatewise.launch import report_maps as maps
from gatewise.launch.report_figures import Figure
from gatewise.launch.report_page import Missing, Section, Table, render
from gatewise.launch.report_runs import StoredRun, flatten, read_run
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig

__all__ = ["ReportConfig", "compare_runs", "describe_run", "run", "split_runs", "usage"]

_SUMMARY = """Write one HTML file that needs no network: of one run RUN/report.html, of several
report.html in run.dir. RUN is a run's folder (run.dir), finished or not."""
_OLD = "the run was made by a version that did not record it"


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Fields of the command."""

    output: str | None = None  # file to write; null: as above
    title: str | None = None  # of the page
    run: RunConfig = field(default_factory=RunConfig)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text("report RUN...", _SUMMARY, field_table(ReportConfig))


def split_runs(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Part the folders of runs from the settings: a word with `=` that is no folder is a setting.

    Raises:
        ConfigError: if no run is named, or one twice.
    """
    folders = [word for word in arguments if "=" not in word or Path(word).is_dir()]
    if not folders:
        raise ConfigError("no RUN is given; give the folder of a run: gatewise report runs/...")
    paths = [Path(word).expanduser() for word in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"RUN is given twice: {', '.join(folders)}; give each run once")
    return paths, [word for word in arguments if word not in folders]


def run(arguments: Sequence[str]) -> int:
    """Write the report that the command line asks for and return the exit code."""
    paths, settings = split_runs(arguments)
    config = load_settings(ReportConfig, settings)
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError("the package plotly is not installed; pip install -e '.[report]'")
    runs = [read_run(path) for path in paths]
    _make_unique(runs)
    folder = RunFolder.choose(config.run.dir, "report")
    return run_session("report", folder, lambda: _make(runs, config, folder.path))


def _make(runs: Sequence[StoredRun], config: ReportConfig, folder: Path) -> Mapping[str, Any]:
    from plotly.offline import get_plotlyjs

    one = runs[0] if len(runs) == 1 else None
    default = (one.folder if one else folder) / "report.html"
    path = Path(config.output).expanduser() if config.output else default
    title = config.title or (one.name if one else f"Comparison of {len(runs)} runs")
    sections = describe_run(one) if one else compare_runs(runs)
    notes = [f"{run.name}: {note}" if not one else note for run in runs for note in run.notes]
    facts = _facts(one) if one else [("runs", ", ".join(run.name for run in runs))]
    text = render(title, facts, notes, sections, plotly_js=get_plotlyjs())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writable(path.parent):
            path.write_bytes(text.encode("utf-8", errors="replace"))
    except (OSError, ConfigError) as error:
        raise ConfigError(
            f"{path} cannot be written ({error}); choose another file with output=..."
        ) from error
    items = [item for section in sections for item in section.items]
    missing = [item.what for item in items if isinstance(item, Missing)]
    plots = sum(isinstance(item, Figure) for item in items)
    for note in notes:
        print(f"note: {note}")
    if missing:
        print(f"not shown: {', '.join(missing)}")
    print(f"{path}: {plots} plots")
    return {"report": str(path), "plots": plots, "notes": notes, "missing": missing}


def describe_run(run: StoredRun) -> list[Section]:
    """Return the sections of one run's report."""
    if not run.records:  # of a compression
        return [_compression([run]), *_tables(run)]
    has_experts = run.config.get("model.num_experts") != 0
    training = Section("Training")
    _add(training, "Loss", "no record holds a loss", lambda: draw.losses(run, over_tokens=False))
    _add(training, "Loss over tokens", _OLD, lambda: draw.losses(run, over_tokens=True))
    for key, title, unit in (
        ("train/lr", "Learning rate", "learning rate"),
        ("train/tokens_per_second", "Throughput of all ranks", "tokens per second"),
        ("val/bits_per_byte", "Validation, comparable between tokenizers", "bits per byte"),
    ):
        _add(
            training,
            title,
            "no record holds it",
            partial(draw.curve, [run], key, title, unit, marks=key.startswith("val/")),
        )
    _add(training, "Gradient norms", _OLD, lambda: draw.gradient_norms(run))
    sections = [training]
    if has_experts:
        sections += [_experts(run), _routers(run)]
    else:
        dense = Missing("Experts and routers", "the model is dense (model.num_experts=0)")
        sections.append(Section("Experts", [dense]))
    times = Section("Time")
    _add(times, "Time of a step", _OLD, lambda: draw.step_time([run]))
    _add(
        times,
        "Timeline",
        "no step was traced: schedule.trace=STEP writes one",
        lambda: maps.timeline(run),
    )
    times.items.append(_restarts(run))
    return [*sections, times, _compression([run]), *_tables(run)]


def compare_runs(runs: Sequence[StoredRun]) -> list[Section]:
    """Return the sections of a report on several runs."""
    results = Section("Results", [_results(runs), _differences(runs)])
    training = Section("Training")
    for key, title, unit, tokens, log in (
        ("val/loss", "Validation loss over tokens", "nats per token", True, False),
        ("val/bits_per_byte", "Bits per byte over tokens", "bits per byte", True, False),
        ("train/loss_mean", "Training loss over tokens", "nats per token", True, False),
        ("train/loss_mean", "Training loss over steps", "nats per token", False, False),
        ("train/lr", "Learning rate", "learning rate", False, False),
        ("train/grad_norm", "Gradient norm before clipping", "norm (log scale)", False, True),
        ("train/tokens_per_second", "Throughput", "tokens per second", False, False),
    ):
        _add(
            training,
            title,
            "no run recorded it",
            partial(
                draw.curve,
                runs,
                key,
                title,
                unit,
                over_tokens=tokens,
                log=log,
                marks=key.startswith("val/"),
            ),
        )
    routing = Section("Experts and routers")
    for key, title, unit in (
        ("moe/max_violation", "Max violation, worst layer", "max / mean - 1"),
        ("moe/dead_frac", "Dead experts, worst layer", "share of experts"),
        ("moe/router_entropy", "Router entropy, mean of layers", "nats"),
    ):
        _add(
            routing,
            title,
            "no run has experts",
            partial(draw.curve, runs, key, title, unit),
        )
    _add(routing, "Churn of the router", "no run evaluated twice", lambda: draw.churn(runs))
    times = Section("Time")
    _add(times, "Time of a step", _OLD, lambda: draw.step_time(runs))
    sections = [results, training, routing, times, _compression(runs)]
    return [section for section in sections if section.items]


def _experts(run: StoredRun) -> Section:
    section = Section("Experts")
    _add(section, "Load of each expert over time", _OLD, lambda: maps.load_over_time(run))
    _add(section, "Imbalance of each layer", _OLD, lambda: maps.violation_map(run))
    _add(section, "Dead experts", _OLD, lambda: draw.dead_experts(run))
    return section


def _routers(run: StoredRun) -> Section:
    section = Section("Routers")
    experts = run.config.get("model.num_experts")
    reference = None
    if isinstance(experts, int) and experts > 1:
        reference = (math.log(experts), f"ln {experts}: all experts alike")
    _add(
        section,
        "Router entropy",
        _OLD,
        lambda: draw.layer_lines(
            run,
            "router_entropy",
            "Entropy of a token's scores by layer",
            "nats",
            reference=reference,
        ),
    )
    _add(
        section,
        "Confidence",
        _OLD,
        lambda: draw.layer_lines(
            run, "router_confidence", "Best score of a token by layer", "mean score"
        ),
    )
    why = "it needs two evaluations after one start: set evaluation.every"
    _add(section, "Churn of the router", why, lambda: draw.churn([run]))
    return section


def _compression(runs: Sequence[StoredRun]) -> Section:
    section = Section("Compression")
    found = [("" if len(runs) == 1 else run.name, one) for run in runs for one in run.compressions]
    if not found:
        why = "no folder in the run holds a compression: gatewise compress run.dir=RUN/NAME"
        section.items.append(Missing("Compression", why))
        return section
    rows = []
    for owner, one in found:
        bits, sizes, loss = one.bits, one.sizes, one.evaluation
        rows.append(
            [
                f"{owner} {one.name}".strip(),
                _number(bits.get("paper")),
                _number(bits.get("all_parameters")),
                _number(sizes.get("experts_bf16")),
                _number(sizes.get("experts")),
                _number(loss.get("loss_before")),
                _number(loss.get("loss_after")),
                _number(loss.get("accuracy_before")),
                _number(loss.get("accuracy_after")),
            ]
        )
    head = ["compression", "bits", "bits of all", "experts, bytes as bf16", "bytes after"]
    head += ["loss before", "loss after", "top-1 before", "top-1 after"]
    section.items.append(Table("Before and after", head, rows))
    _add(section, "Loss over bits", "no compression was evaluated", lambda: maps.pareto(found))
    for _, one in found[:8]:
        why = f"{one.name} holds no compressed/report.json"
        _add(section, "Bits by expert", why, partial(maps.compression_widths, one))
    return section


def _add(section: Section, what: str, why: str, make: Callable[[], Figure | None]) -> None:
    """Append a plot, or the note that it is missing."""
    figure = make()
    section.items.append(figure if figure is not None else Missing(what, why))


def _facts(run: StoredRun) -> list[tuple[str, str]]:
    """Return the main results of a run in the order of interest."""
    result, config = run.result, run.config
    facts: list[tuple[str, Any]] = [
        ("exit code", result.get("exit")),
        (
            "steps",
            f"{run.records[-1]['step']} of {config.get('steps', '?')}" if run.records else None,
        ),
        ("tokens", result.get("tokens")),
        ("validation loss, nats per token", result.get("val_loss")),
        ("bits per byte", result.get("val_bits_per_byte")),
        ("tokens per second", result.get("tokens_per_second")),
        ("parameters", result.get("parameters")),
        ("active", result.get("active_parameters")),
        ("ranks", result.get("world_size")),
        ("peak memory, MB", result.get("peak_rss_mb")),
        ("seconds", result.get("seconds")),
        ("restarts", len(run.restarts) or None),
    ]
    return [(name, _number(value)) for name, value in facts if value is not None]


def _restarts(run: StoredRun) -> Table | Missing:
    if not run.restarts:
        return Missing("Restarts", "the run has one start, or none is noted in attempts.jsonl")
    rows = [[str(number), str(step), when] for number, (step, when) in enumerate(run.restarts, 2)]
    return Table("Restarts", ["start", "went on after step", "when (UTC)"], rows)


def _tables(run: StoredRun) -> list[Section]:
    """Return settings, machine and raw results, folded."""
    section = Section("Settings and machine")
    for title, values, name in (
        ("Settings", run.config, "config.yaml"),
        ("Machine and versions", flatten(run.environment), "environment.json"),
        ("Result", flatten(run.result), "result.json"),
    ):
        if values:
            rows = [[key, _text(value)] for key, value in values.items()]
            section.items.append(Table(title, ["name", "value"], rows, is_folded=True))
        else:
            section.items.append(Missing(title, f"{name} is missing or cannot be read"))
    return [section]


def _results(runs: Sequence[StoredRun]) -> Table:
    head = ["run", "router", "steps", "tokens", "val loss", "bits/byte", "least val loss"]
    head += ["tokens/s", "parameters", "active", "exit", "restarts"]
    rows = []
    for run in runs:
        _, losses = run.series("val/loss")
        result, last = run.result, run.records[-1] if run.records else {}
        kind = f"{run.config.get('router.kind', '')} {run.config.get('router.scorer', '')}".strip()
        cells = [
            last.get("step", result.get("steps")),
            result.get("tokens"),
            result.get("val_loss", losses[-1] if losses else None),
            result.get("val_bits_per_byte"),
            min(losses, default=None),
            result.get("tokens_per_second"),
            result.get("parameters"),
            result.get("active_parameters"),
            result.get("exit", "no result.json"),
            len(run.restarts),
        ]
        dense = run.config.get("model.num_experts") == 0
        rows.append([run.name, "dense" if dense else kind, *map(_number, cells)])
    return Table("Results", head, rows)


def _differences(runs: Sequence[StoredRun]) -> Table | Missing:
    """Return the settings in which the runs differ."""
    names = list(dict.fromkeys(key for run in runs for key in run.config if key != "run.dir"))
    rows = [
        [name, *(_text(run.config.get(name, "")) for run in runs)]
        for name in names
        if len({_text(run.config.get(name, "")) for run in runs}) > 1
    ]
    if not rows:
        return Missing("Settings that differ", "all are equal, or config.yaml is missing")
    return Table("Settings that differ", ["setting", *(run.name for run in runs)], rows)


def _make_unique(runs: Sequence[StoredRun]) -> None:
    """Put the parent's name before runs of one name, as times of one second are."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 4
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:,}" if isinstance(value, int) else str(value)
