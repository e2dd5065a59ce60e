"""`gatewise dashboard`: the W&B workspace of a project as code, written down or pushed.

`SECTIONS` is the definition: panels by the names of metrics that runs log, as docs/training.md
explains them. The package wandb-workspaces (extra `dashboard`) turns it into W&B's own form.
"""

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.session import one_line, run_session
from gatewise.launch.tracking import has_key
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig

__all__ = ["SECTIONS", "DashboardConfig", "Panel", "build", "definition", "run", "usage"]

_SUMMARY = """Write the W&B workspace of a project (routing, experts, schedule, compression, sweeps)
to dashboard.json in run.dir; with --push also save it in W&B (WANDB_BASE_URL, WANDB_API_KEY)."""


@dataclass(kw_only=True, slots=True)
class DashboardConfig:
    """Where the workspace belongs."""

    entity: str | None = None  # user or team; null: the key's own, known only with --push
    project: str = "gatewise"
    name: str = "gatewise"  # of the view
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: `keys` are metrics, or with `pattern` one regular expression."""

    title: str
    keys: tuple[str, ...]
    unit: str = ""  # of the vertical axis
    kind: Literal["lines", "pattern", "number", "media", "points", "parallel"] = "lines"
    log: bool = False  # scale of the vertical axis


SECTIONS: Mapping[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Loss", ("train/loss_mean", "val/loss"), "nats per token"),
        Panel("Bits per byte of validation text", ("val/bits_per_byte",), "bits per byte"),
        Panel("Least validation loss", ("val/loss_best",), kind="number"),
        Panel("Learning rate", ("train/lr",)),
        Panel("Gradient norm before clipping", ("train/grad_norm",), log=True),
        Panel(
            "Gradient norm by kind of parameter",
            ("grad/dense_norm", "grad/embedding_norm", "grad/router_norm", "grad/expert_norm"),
            log=True,
        ),
        Panel("Tokens per second, all ranks", ("train/tokens_per_second",), "tokens per second"),
        Panel("Memory of rank 0", ("train/memory_mb",), "MiB"),
        Panel("Skipped steps", ("train/skipped_steps",), "steps"),
    ),
    "Routing": (
        Panel("Entropy of a token's scores", ("moe/router_entropy",), "nats"),
        Panel(
            "Entropy of a token's scores by layer",
            (r"moe/layer_.*/router_entropy",),
            "nats",
            kind="pattern",
        ),
        Panel("Best score", ("moe/router_confidence",)),
        Panel("Largest absolute logit", ("moe/router_max_logit",)),
        Panel("Churn: pairs with another expert than before", ("val/router_churn",), "share"),
        Panel("Router losses", ("train/balance_loss", "train/z_loss"), "nats, weighted"),
        Panel(
            "Pre-gate: recall of the layers' own choice", ("moe/ahead_recall",), "share of pairs"
        ),
    ),
    "Experts": (
        Panel("Max violation, worst layer", ("moe/max_violation",), "max / mean - 1"),
        Panel(
            "Max violation by layer",
            (r"moe/layer_.*/max_violation",),
            "max / mean - 1",
            kind="pattern",
        ),
        Panel("Entropy of the load", ("moe/load_entropy",), "over ln E"),
        Panel("Dead experts, worst layer", ("moe/dead_frac",), "share of experts"),
        Panel("Dropped pairs", ("moe/drop_frac",), "share of pairs"),
        Panel("Experts per token, drops left out", ("moe/effective_k",), "experts"),
        Panel(
            "Gradient norm of single experts",
            ("grad/expert_norm_min", "grad/expert_norm_median", "grad/expert_norm_max"),
            log=True,
        ),
        Panel("Load of each expert over steps", ("experts/load_layer_00",), kind="media"),
        Panel("Load of all experts", ("experts/load_map_table",), kind="media"),
    ),
    "Schedule": (
        Panel(
            "Exposed communication of rank 0 per step",
            ("schedule/exposed_communication_ms",),
            "ms",
        ),
        Panel("Tokens per second, all ranks", ("train/tokens_per_second",), "tokens per second"),
    ),
    "Compression": (
        Panel(
            "Loss added by compression over bits per weight",
            ("compress/bits_paper", "compress/delta_nats"),
            kind="points",
        ),
        Panel("Validation loss after", ("compress/loss_after",), kind="number"),
        Panel("Bytes of the experts after", ("compress/experts_bytes",), kind="number"),
    ),
    "Sweeps": (
        Panel(
            "Settings against the least validation loss",
            (
                "config:router.kind",
                "config:router.scorer",
                "config:model.num_experts",
                "config:optim.lr",
                "config:seed",
                "val/loss_best",
            ),
            kind="parallel",
        ),
        Panel(
            "Learning rate against the least validation loss",
            ("config:optim.lr", "val/loss_best"),
            kind="points",
        ),
    ),
}


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    config = load_settings(DashboardConfig, without_push(arguments))
    return usage_text("dashboard [--push]", _SUMMARY, field_table(config))


def without_push(arguments: Sequence[str]) -> list[str]:
    """Return the settings among the arguments."""
    return [word for word in arguments if word != "--push"]


def run(arguments: Sequence[str]) -> int:
    """Write the definition, push it if asked to, and return the exit code."""
    settings = without_push(arguments)
    push = len(settings) < len(arguments)
    config = load_settings(DashboardConfig, settings)
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError(
            "the package wandb-workspaces is not installed; pip install -e '.[dashboard]'"
        )
    if push and not has_key(os.environ):
        raise ConfigError(
            "--push needs a key: set WANDB_API_KEY or run `wandb login`; without --push the "
            "definition is only written down"
        )
    folder = RunFolder.choose(config.run.dir, "dashboard")
    return run_session("dashboard", folder, lambda: _make(config, folder.path, push=push))


def build(config: DashboardConfig) -> Any:  # a Workspace of the package, which has no types here
    """Return the workspace that `SECTIONS` defines."""
    with _old_style_allowed():
        import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=config.entity or "",
        project=config.project,
        name=config.name,
        sections=[
            ws.Section(name=name, is_open=index < 3, panels=list(_panels(panels)))
            for index, (name, panels) in enumerate(SECTIONS.items())
        ],
        settings=ws.WorkspaceSettings(x_axis="train/step", max_runs=20),
        auto_generate_panels=False,
    )


def definition(config: DashboardConfig) -> dict[str, Any]:
    """Return the workspace as W&B stores it; the panels' random ids become their numbers."""
    # the package shows its model by this method only
    text = build(config)._to_model().model_dump_json(by_alias=True, exclude_none=True)
    found: dict[str, Any] = json.loads(text)
    number = 0
    for section in found["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            panel["__id__"] = f"panel_{number:02d}"
            number += 1
    return found


def _make(config: DashboardConfig, folder: Path, *, push: bool) -> Mapping[str, Any]:
    path = folder / "dashboard.json"
    with writable(folder):
        path.write_text(json.dumps(definition(config), indent=2) + "\n", encoding="utf-8")
    found = {"dashboard": str(path), "panels": sum(map(len, SECTIONS.values())), "url": None}
    if not push:
        print(f"{path}: {found['panels']} panels; --push saves it in W&B")
        return found
    import wandb

    try:
        workspace = build(config)
        workspace.entity = config.entity or wandb.Api().default_entity
        found["url"] = str(workspace.save().url)
    except Exception as error:  # whatever the client raises, W&B did not take it
        raise ConfigError(
            f"W&B did not take the dashboard ({type(error).__name__}: {one_line(error)}); check "
            f"WANDB_API_KEY, WANDB_BASE_URL, entity ({config.entity or 'the default'}) and "
            f"project ({config.project}); the definition is in {path}"
        ) from error
    print(f"pushed {found['panels']} panels: {found['url']}")
    return found


def _panels(panels: Sequence[Panel]) -> Iterator[Any]:  # panels of the package
    """Yield the package's panels, three in a row."""
    import wandb_workspaces.reports.v2 as wr

    for number, panel in enumerate(panels):
        place = wr.Layout(x=8 * (number % 3), y=6 * (number // 3), w=8, h=6)
        first, last = panel.keys[0], panel.keys[-1]
        lines = {"title": panel.title, "x": "train/step", "log_y": panel.log or None}
        lines |= {"title_x": "step", "title_y": panel.unit or None, "layout": place}
        if panel.kind == "lines":
            yield wr.LinePlot(y=list(panel.keys), **lines)
        elif panel.kind == "pattern":
            yield wr.LinePlot(metric_regex=first, **lines)
        elif panel.kind == "number":
            yield wr.ScalarChart(title=panel.title, metric=_summary(first), layout=place)
        elif panel.kind == "media":
            yield wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), layout=place)
        elif panel.kind == "points":
            yield wr.ScatterPlot(
                title=panel.title, x=_summary(first), y=_summary(last), layout=place
            )
        else:
            columns = [wr.ParallelCoordinatesPlotColumn(_summary(key)) for key in panel.keys]
            yield wr.ParallelCoordinatesPlot(title=panel.title, columns=columns, layout=place)


def _summary(key: str) -> Any:  # a metric of the package
    """Return a run's setting (`config:name`) or its final value."""
    import wandb_workspaces.reports.v2 as wr

    kind, _, name = key.rpartition("config:")
    return wr.Config(name) if kind or key.startswith("config:") else wr.SummaryMetric(key)


@contextmanager
def _old_style_allowed() -> Iterator[None]:
    """The package uses what pydantic deprecates, and says so when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
