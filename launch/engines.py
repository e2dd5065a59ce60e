"""Look before ranks start whether what an engine of training needs is installed."""

import importlib.metadata
import os
import re
import shutil
import sysconfig
from pathlib import Path

from gatewise.moe.ops.build import find_compiler
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig
from gatewise.training.deepspeed_config import EngineKind

__all__ = ["check_engine"]

_OLDEST = (0, 19)
_INSTALL = "pip install -e '.[deepspeed]'"


def check_engine(config: TrainConfig) -> None:
    """Raise `ConfigError` where `engine` asks for packages or tools that are missing.

    DeepSpeed compiles a part of itself at its first start, with ninja and a C++ compiler. A ninja
    of this Python that is not on the path is put there, for the ranks.
    """
    if config.engine is not EngineKind.deepspeed:
        return
    remedy = f"{_INSTALL}, or set engine=gatewise"
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"engine is deepspeed, but the package deepspeed is not installed; {remedy}"
        ) from None
    if _numbers(version) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(
            f"engine is deepspeed, but deepspeed {version} is installed, which is older than "
            f"{oldest}; {remedy}"
        )
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None:
        if not (Path(scripts) / "ninja").is_file():
            raise ConfigError(
                "engine is deepspeed, which needs ninja to compile a part of itself, and there is "
                f"none; {remedy}"
            )
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", "")))
    if find_compiler() is None:
        raise ConfigError(
            "engine is deepspeed, which compiles a part of itself, and no C++ compiler was found; "
            "install g++, or set engine=gatewise"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:2])
