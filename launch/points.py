"""The points of a sweep: what is swept, in Hydra's grammar, and the folder of each point.

A point's folder is named after its values, so that the same command finds it again, also after the
grid has grown.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from gatewise.launch.jobs import layout
from gatewise.launch.submit_config import SubmitConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig

__all__ = ["Combination", "Point", "check_point", "expand", "label", "make_point", "part_swept"]

_LONGEST = 120  # characters of a folder's name
Combination = tuple[dict[str, str], list[str]]  # values of what is swept, and all arguments


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of the swept values."""

    values: Mapping[str, str]  # what is swept, in the order of the command line
    config: TrainConfig
    arguments: Sequence[str]  # of `gatewise train`, without run.dir
    path: Path


def part_swept(overrides: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Part the arguments that sweep nothing, as they stand, from those that do.

    Raises:
        ConfigError: for a list that Hydra's grammar does not have, or if nothing is swept.
    """
    parser = OverridesParser.create()
    kept, swept = [], []
    for text in overrides:
        name, _, value = text.partition("=")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            if re.search(r"[,(]", value):
                line = str(error).strip().splitlines()[0]
                raise ConfigError(
                    f"{text!r} is no list of values to sweep ({line}); quote texts with commas, "
                    f"as \"{name}='a,b'\""
                ) from error
            kept.append(text)
            continue
        if override.is_sweep_override():
            swept.append(override)
        else:
            kept.append(text)
    if not swept:
        raise ConfigError(
            "-m sweeps nothing: give a field several values, as optim.lr=1e-3,3e-3, or leave -m out"
        )
    if any(override.get_key_element() == "run.dir" for override in swept):
        raise ConfigError("run.dir is swept; it is the folder of the whole sweep, give one")
    return kept, swept


def expand(overrides: Sequence[str]) -> list[Combination]:
    """Return the points of a grid, by Hydra's own grid sweeper.

    Raises:
        ConfigError: as `part_swept`, or for a sweep that is not a grid's.
    """
    kept, swept = part_swept(overrides)
    try:
        (grid,) = BasicSweeper.split_arguments(swept, None)
    except HydraException as error:
        raise ConfigError(
            f"{' '.join(str(error).split())}; a grid takes lists and ranges, "
            "submit.trials=N takes intervals too"
        ) from None
    points = []
    for texts in grid:
        values = dict(text.split("=", 1) for text in texts)
        points.append((values, [*kept, *texts]))
    if len({tuple(values.items()) for values, _ in points}) < len(points):
        raise ConfigError("the sweep names a point twice; give every value once")
    return points


def check_point(
    submit: SubmitConfig, values: Mapping[str, str], overrides: Sequence[str]
) -> tuple[TrainConfig, list[str]]:
    """Compose a point as `layout` does, and name it where it is wrong."""
    try:
        return layout(submit, overrides)
    except ConfigError as error:
        raise ConfigError(f"point {label(values)}: {error}") from error


def make_point(
    submit: SubmitConfig, values: Mapping[str, str], overrides: Sequence[str], folder: Path
) -> Point:
    """Compose and check a point.

    Args:
        submit: who starts its ranks.
        values: what is swept.
        overrides: all arguments, with those values among them.
        folder: of the sweep.

    Raises:
        ConfigError: naming the point, for every mistake in its settings.
    """
    names = {text.lstrip("+").partition("=")[0] for text in overrides}
    path = folder / _folder_name(label(values))
    own = [f"run.dir={path}"]
    if "name" not in names:
        own.append(f"name={label(values)}")
    if "wandb.group" not in names:
        own.append(f"wandb.group={folder.name}")
    config, arguments = check_point(submit, values, [*overrides, *own])
    return Point(values, config, arguments, path)


def label(values: Mapping[str, str]) -> str:
    """Return values as they are written on the command line."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def _folder_name(text: str) -> str:
    """Return a name without what shells, sbatch and lists of mounts take apart."""
    plain = re.sub(r"[^\w.=+-]+", "_", text.replace(" ", "__"))
    if plain == text.replace(" ", "__") and len(plain) <= _LONGEST:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{plain[:_LONGEST]}_{digest}"
