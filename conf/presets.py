"""Clusters and model shapes by name (a file of `conf/cluster`, `conf/model_shape`) or by path.

Every field is checked against the dataclass; a mistake is one line with the file and the field.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf

from gatewise.conf.compose import group_choices
from gatewise.conf.fields import nearest
from gatewise.moe.planning.shapes import ModelShape
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cluster import Cluster

__all__ = ["load_cluster", "load_model_shape"]

_Preset = TypeVar("_Preset", Cluster, ModelShape)


def load_cluster(name: str) -> Cluster:
    """Return a cluster.

    Args:
        name: of a file of `conf/cluster`, or the path of a YAML file.

    Raises:
        ConfigError: if there is none, or a field is missing, unknown or impossible.
    """
    return _load(Cluster, "cluster", "cluster", name)


def load_model_shape(name: str) -> ModelShape:
    """Return the shape of a model.

    Args:
        name: of a file of `conf/model_shape`, or the path of a YAML file.

    Raises:
        ConfigError: as `load_cluster`.
    """
    return _load(ModelShape, "model", "model_shape", name)


def _load(schema: type[_Preset], field: str, group: str, name: str) -> _Preset:
    source, text = _text(field, group, name)
    try:
        value = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # PyYAML's errors share no public base with OmegaConf's
        reason = " ".join(str(error).split())
        raise ConfigError(f"{field} {source} is not readable YAML: {reason}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{field} {source} does not hold settings; it must map fields to values")
    settings = {str(key): item for key, item in value.items()}
    _check(schema, settings, f"{field} {source}")
    try:
        return schema(**settings)
    except ValueError as error:
        raise ConfigError(f"{field} {source}: {error}") from error


def _text(field: str, group: str, name: str) -> tuple[str, str]:
    """Return the name to show and the content of a preset."""
    if not name.endswith((".yaml", ".yml")):
        choices = group_choices(group)
        if name not in choices:
            raise ConfigError(
                f"{field} is {name!r}{nearest(name, choices)}; it must be one of "
                f"{', '.join(choices)}, or the path of a .yaml file"
            )
        file = files("gatewise.conf") / group / f"{name}.yaml"
        return name, file.read_text(encoding="utf-8")
    try:
        return name, Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field} {name} cannot be read ({error}); give another file") from error


def _check(schema: type[Any], value: Mapping[str, Any], where: str) -> None:
    known = {item.name: item for item in fields(schema)}
    hints = get_type_hints(schema)
    for name in value:
        if name not in known:
            raise ConfigError(f"{where} has the unknown field {name!r}{nearest(name, known)}")
    for name, item in known.items():
        kind = hints[name]
        if name not in value:
            if item.default is MISSING:
                words = {int: "a whole number", float: "a number"}.get(kind, "text")
                raise ConfigError(f"{where} has no {name}; add it: {words}")
            continue
        given = value[name]
        fits = isinstance(given, kind) or (kind is float and isinstance(given, int))
        if not fits or (isinstance(given, bool) and kind is not bool):
            raise ConfigError(f"{where}: {name} is {given!r}; it must be of type {kind.__name__}")
