"""Choose the sinks of a run: the file always, the console, W&B where it is installed."""

import importlib.util
import netrc
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from gatewise.parallel.errors import ConfigError
from gatewise.training.config import Artifacts, TrainConfig, WandbConfig, WandbMode
from gatewise.training.console import ConsoleSink
from gatewise.training.sinks import AttemptLog, JsonlSink, MetricSink
from gatewise.training.wandb_sink import WandbSink, check_wandb

__all__ = ["check_tracking", "has_key", "make_sinks", "track_outcome", "wandb_mode"]


def check_tracking(config: TrainConfig) -> None:
    """Raise `ConfigError` for a sink that was asked for and cannot be had."""
    check_wandb(config.wandb)
    if config.wandb.mode is WandbMode.online and not has_key(os.environ):
        raise ConfigError(
            "wandb.mode is online but there is no key: set WANDB_API_KEY, run `wandb login`, or "
            "set wandb.mode=offline"
        )


def make_sinks(config: TrainConfig, folder: Path) -> list[MetricSink]:
    """Return the sinks of rank 0.

    Args:
        config: the whole settings.
        folder: of the run.
    """
    sinks: list[MetricSink] = [
        JsonlSink(folder / "metrics.jsonl"),
        AttemptLog(folder / "attempts.jsonl"),
        ConsoleSink(config.steps),
    ]
    mode = wandb_mode(config.wandb.mode, os.environ)
    if mode is not WandbMode.off:
        settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        assert isinstance(settings, dict)
        sinks.append(
            WandbSink(
                config.wandb,
                name=config.name,
                folder=folder,
                settings={str(key): value for key, value in settings.items()},
                offline=mode is WandbMode.offline,
            )
        )
    return sinks


def track_outcome(
    command: str,
    config: WandbConfig,
    folder: Path,
    settings: Mapping[str, Any],
    numbers: Mapping[str, float],
    *,
    step: int,
) -> None:
    """Log what a command found as a W&B run of its own, beside the trainings of its project.

    Args:
        command: becomes the job type.
        config: of the training that the command worked on.
        folder: of the command's run.
        settings: its resolved configuration.
        numbers: by name of the metric.
        step: of the checkpoint.
    """
    mode = wandb_mode(config.mode, os.environ)
    if mode is WandbMode.off or not importlib.util.find_spec("wandb"):
        return
    sink = WandbSink(
        replace(config, job_type=command, checkpoints=Artifacts.off),
        name=f"{command} {folder.name}",
        folder=folder,
        settings=settings,
        offline=mode is WandbMode.offline,
    )
    sink.resume(0)
    sink.write({"step": step, **numbers})
    sink.close()


def wandb_mode(setting: WandbMode, environ: Mapping[str, str]) -> WandbMode:
    """Resolve `auto`: off without the package, online with a key, offline without one.

    WANDB_MODE in the environment (online, offline, disabled) decides before a key does.
    """
    if setting is not WandbMode.auto:
        return setting
    if importlib.util.find_spec("wandb") is None:
        return WandbMode.off
    asked = environ.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun"):
        return WandbMode.offline
    if asked == "disabled":
        return WandbMode.off
    return WandbMode.online if asked == "online" or has_key(environ) else WandbMode.offline


def has_key(environ: Mapping[str, str]) -> bool:
    """Tell whether there is a key for the W&B service that the environment names."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
