"""The view in Weights & Biases; the package is an extra and imported here only.

`step=` is never passed, because W&B drops what does not grow: `train/step` is the axis instead,
so that a resumed run may write over the steps it does again. Whatever fails in W&B is logged
once and ends this view, not the training.
"""

import importlib.util
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatewise.parallel.errors import ConfigError
from gatewise.training.config import WandbConfig, WandbMode

__all__ = ["WandbSink", "check_wandb", "is_installed"]

_logger = logging.getLogger(__name__)


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
        """Start or continue the run.

        Args:
            config: project, entity and group.
            name: of the run, as it is shown.
            folder: the run's own; offline files and the run's identity are kept there.
            settings: the resolved configuration.
            offline: keep the records in `folder` for a later `wandb sync`.
        """
        self._run: Any = None  # wandb's types are not installed where this is checked
        try:
            import wandb

            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                name=name,
                id=_identity(folder),
                resume="allow",
                dir=str(folder),
                config=dict(settings),
                mode="offline" if offline else "online",
                job_type="train",
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("train/step")
            self._run.define_metric("*", step_metric="train/step")
        except Exception as error:  # any failure of a view is only worth a warning
            self._give_up(error)

    def resume(self, step: int) -> None:
        """Nothing: the axis `train/step` lets steps be written again."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of one record."""
        if self._run is None:
            return
        values = {
            key: value
            for key, value in record.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        try:
            self._run.log({**values, "train/step": record["step"]})
        except Exception as error:  # as above
            self._give_up(error)

    def close(self) -> None:
        """Finish the run and wait for its files."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        text = " ".join(str(error).split())
        _logger.warning(
            "W&B is off for the rest of this run (%s: %s); metrics.jsonl has every record",
            type(error).__name__,
            text,
        )


def _identity(folder: Path) -> str:
    """Return the id of the folder's run, the same after a restart."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()
