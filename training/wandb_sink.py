"""The view in Weights & Biases; the package is an extra and imported here only.

Read first: `sinks.py`; `wandb_files.py` reads back what the client keeps on disk.

A row holds all records of one step and `train/step`, the axis of every number. Rows cannot be
taken back, so a step that is done again after a restart keeps its first row: `resume` reads which
steps the folder's earlier starts have told, and sends only what is missing. W&B's own `_step` is
the number of the row, not the step of the training; offline it is counted on over the starts,
because a service drops rows whose number does not grow.

Whatever fails in W&B is logged in a line and ends this view, not the training.
"""

import importlib.util
import json
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewise.parallel.errors import ConfigError
from gatewise.training.config import Artifacts, WandbConfig, WandbMode
from gatewise.training.sinks import read_records
from gatewise.training.wandb_files import WandbFile, find_wandb_files, read_wandb_file

__all__ = ["WandbSink", "check_wandb", "is_installed"]

_logger = logging.getLogger(__name__)
_AXIS = "train/step"
_LOAD = "experts/load_ratio"
_MOST_BINS = 512  # of a histogram
_MOST_CELLS = 10_000  # rows of a table
_START_SECONDS = 30.0
_SUMMARY = ("val/loss", "val/bits_per_byte")  # of which the least is the result


def is_installed() -> bool:
    """Tell whether the package can be imported."""
    return importlib.util.find_spec("wandb") is not None


def check_wandb(config: WandbConfig) -> None:
    """Raise `ConfigError` where the settings ask for a package that is not there."""
    if config.mode in (WandbMode.online, WandbMode.offline) and not is_installed():
        raise ConfigError(
            f"wandb.mode is {config.mode.name} but the package wandb is not installed; "
            "pip install -e '.[wandb]', or set wandb.mode=off"
        )


class WandbSink:
    """Sends records to one W&B run, which a resumed run continues."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        name: str,
        folder: Path,
        settings: Mapping[str, Any],
        offline: bool,
    ) -> None:
        """Prepare; the run starts, or goes on, in `resume`.

        Args:
            config: project, entity, group and limits.
            name: of the run, as it is shown.
            folder: the run's own; offline files and the run's identity are kept there.
            settings: the resolved configuration.
            offline: keep the records in `folder` for a later `wandb sync`.
        """
        self._config, self._name, self._folder = config, name, folder
        self._settings, self._offline = dict(settings), offline
        self._run: Any = None  # wandb's types are not installed where this is checked
        self._is_off = False
        self._told: dict[int, set[str]] = {}  # step: groups of numbers that W&B has
        self._row: dict[str, Any] = {}  # the newest step's, not sent yet
        self._row_number = 0
        self._load: Sequence[Sequence[float]] = ()
        self._last: dict[str, float] = {}
        self._least: dict[str, float] = {}

    def resume(self, step: int) -> None:
        """Start the run or go on with it; send what the file of records has and W&B has not."""
        if self._is_off:
            return
        if self._run is None:
            before = self._read_before()
            # another training in this folder is another run; a start from 0 may be a restart
            old_settings = before[-1].config if before else {}
            is_new = step == 0 and bool(before) and _known(old_settings) != _known(self._settings)
            identity = _identity(self._folder, renew=is_new)
            for file in before:
                if file.run_id == identity:
                    self._learn(file)
            self._start(identity)
        records = self._folder / "metrics.jsonl"
        if records.exists():
            for record in read_records(records):
                self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record; it is sent when the next step's arrives."""
        if self._run is None:
            return
        step = int(record["step"])
        numbers = self._numbers(record)
        self._last |= numbers
        for key in _SUMMARY:
            if math.isfinite(value := numbers.get(key, math.nan)):
                self._least[key] = min(value, self._least.get(key, math.inf))
        if self._row and self._row[_AXIS] != step:
            self._send()
        known = self._told.get(step, set())
        new = {key: value for key, value in numbers.items() if _group(key) not in known}
        if not new:
            return
        self._row |= {_AXIS: step, **new}
        try:
            self._row |= self._pictures(record, known)
        except Exception as error:  # any failure of a view is only worth a warning
            self._give_up(error)

    def close(self) -> None:
        """Send what is left, finish the run and wait for its files as long as was set."""
        if self._run is None:
            return
        self._send()
        run, self._run = self._run, None
        if run is None or self._is_off:
            return
        try:
            best = {f"{key}_best": value for key, value in self._least.items()}
            run.summary.update({**self._last, **best})
            self._keep_checkpoint(run)
            run.finish()
        except TimeoutError:
            _logger.warning(
                "W&B did not answer within %g s (wandb.finish_seconds); the records are kept: "
                "`wandb sync %s` sends them",
                self._config.finish_seconds,
                self._folder / "wandb",
            )
        except Exception as error:  # as above
            self._give_up(error)

    def _start(self, identity: str) -> None:
        """Start online if that was asked for and works, else offline."""
        if not self._offline:
            try:
                self._run = self._init(identity, "online")
            except Exception as error:  # a refused key, no service, no network
                self._offline = True
                _logger.warning(
                    "W&B does not take this run (%s); training goes on and the records are kept "
                    "offline: `wandb sync %s` sends them",
                    _told_by(error),
                    self._folder / "wandb",
                )
                _forget_failed_start()
        try:
            if self._run is None:
                self._run = self._init(identity, "offline")
            self._run.define_metric(_AXIS)
            self._run.define_metric("*", step_metric=_AXIS)
        except Exception as error:  # as above
            self._give_up(error)

    def _init(self, identity: str, mode: str) -> Any:  # a run of the package's
        import wandb

        config = self._config
        tags = [tag.strip() for tag in (config.tags or "").split(",") if tag.strip()]
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=tags or None,
            name=self._name,
            id=identity,
            resume="allow",
            dir=str(self._folder),
            config=self._settings,
            allow_val_change=True,  # a run may go on with more steps or on other ranks
            mode=mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_START_SECONDS,
                login_timeout=_START_SECONDS,
                finish_timeout=config.finish_seconds,
                finish_timeout_raises=True,
            ),
        )

    def _read_before(self) -> list[WandbFile]:
        """Read what earlier starts told, the oldest first."""
        found = []
        for path in find_wandb_files(self._folder):
            try:
                found.append(read_wandb_file(path))
            except Exception as error:  # damaged, or of another version of the client
                _logger.warning(
                    "%s cannot be read (%s); steps that it holds may stand in W&B twice",
                    path,
                    _told_by(error),
                )
        return found

    def _learn(self, file: WandbFile) -> None:
        for row in file.rows:
            self._row_number = max(self._row_number, int(row.get("_step", -1)) + 1)
            if isinstance(row.get(_AXIS), int):
                self._told.setdefault(row[_AXIS], set()).update(_group(key) for key in row)

    def _numbers(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return the single numbers of a record, layers left out evenly where there are many."""
        values = {
            key: value
            for key, value in record.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        layers = sorted({key.split("/")[1] for key in values if key.startswith("moe/layer_")})
        if not layers or len(values) <= self._config.max_keys:
            return values
        of_one = sum(key.startswith(f"moe/{layers[0]}/") for key in values)
        room = max(0, self._config.max_keys - (len(values) - of_one * len(layers))) // of_one
        kept = {layers[i * (len(layers) - 1) // max(room - 1, 1)] for i in range(room)}
        return {
            key: value
            for key, value in values.items()
            if not key.startswith("moe/layer_") or key.split("/")[1] in kept
        }

    def _pictures(self, record: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
        """Return the experts' load: a histogram of each layer, and with evaluations one map."""
        import wandb

        pictures: dict[str, Any] = {}
        self._load = record.get(_LOAD, self._load)
        if _LOAD in record and _group(_LOAD) not in known:
            for layer, load_E in enumerate(self._load[: self._config.max_keys]):
                bins = _merged(load_E, _MOST_BINS)
                edges = [len(load_E) * place / len(bins) for place in range(len(bins) + 1)]
                pictures[f"experts/load_layer_{layer:02d}"] = wandb.Histogram(
                    np_histogram=(bins, edges)
                )
        if "val/loss" in record and self._load:
            across = max(1, _MOST_CELLS // len(self._load))
            rows = [
                [f"layer {layer:02d}", expert, ratio]
                for layer, load_E in enumerate(self._load[:_MOST_CELLS])
                for expert, ratio in enumerate(_merged(load_E, across))
            ]
            table = wandb.Table(columns=["layer", "expert", "load"], data=rows)
            fields = {"Actual": "layer", "Predicted": "expert", "nPredictions": "load"}
            pictures["experts/load_map"] = wandb.plot_table(
                "wandb/confusion_matrix/v1", table, fields, {"title": "load over the layer's mean"}
            )
        return pictures

    def _send(self) -> None:
        row, self._row = self._row, {}
        if self._run is None or not row:
            return
        self._told.setdefault(row[_AXIS], set()).update(_group(key) for key in row)
        try:
            if self._offline:
                self._run.log(row, step=self._row_number, commit=True)
            else:
                self._run.log(row)
        except Exception as error:  # as above
            self._give_up(error)
        self._row_number += 1

    def _keep_checkpoint(self, run: Any) -> None:  # a run of the package's
        """Log the newest complete checkpoint as an artifact, if that was asked for."""
        if self._config.checkpoints is Artifacts.off:
            return
        from gatewise.training.checkpoint_folder import find_latest  # imports torch

        path = find_latest(self._folder / "checkpoints")
        if path is None:
            return
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=dict(self._last))
        if self._config.checkpoints is Artifacts.reference:
            artifact.add_reference(path.as_uri())
        else:
            artifact.add_dir(str(path), policy="immutable")
        run.log_artifact(artifact, aliases=["latest", path.name])

    def _give_up(self, error: Exception) -> None:
        self._run, self._is_off = None, True
        kept = ""
        if find_wandb_files(self._folder):
            kept = f", and `wandb sync {self._folder / 'wandb'}` sends those until now"
        _logger.warning(
            "W&B is off for the rest of this run (%s); metrics.jsonl has every record%s",
            _told_by(error),
            kept,
        )


def _forget_failed_start() -> None:
    """End the client's own process, which still holds the identity of the failed run."""
    import wandb

    try:
        wandb.teardown()
    except Exception as error:  # it may be gone already
        _logger.debug("the client of W&B did not end in order: %s", error)


def _group(key: str) -> str:
    """Return the part of a name by which W&B has or has not a step's numbers."""
    return key.partition("/")[0] if key != _AXIS else ""


def _merged(values: Sequence[float], most: int) -> list[float]:
    """Return at most `most` means of neighbours."""
    size = math.ceil(len(values) / most)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as W&B gives them back, without its own entries."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return {key: value for key, value in plain.items() if not key.startswith("_wandb")}


def _told_by(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _identity(folder: Path, *, renew: bool) -> str:
    """Return the id of the folder's run, the same after a restart."""
    file = folder / "wandb_id"
    if renew or not file.exists():
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()
