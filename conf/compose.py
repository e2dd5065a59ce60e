"""Compose the configuration of a training run: defaults <- experiment <- command line.

Hydra puts the groups together (`experiment=`, `router=`); single fields are then set and checked
one by one, so that a mistake ends in one line that names the field. Every check of the settings
themselves runs in the dataclasses' `__post_init__`, before any rank starts.
"""

import copy
import functools
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gatewise.conf.fields import (
    Field,
    field_table,
    nearest,
    parse_override,
    split_overrides,
    unknown_name,
)
from gatewise.conf.schemas import GROUPS, ROUTER_KINDS, register
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig

__all__ = [
    "config_from_yaml",
    "config_to_yaml",
    "group_choices",
    "load_beside",
    "load_settings",
    "load_train_config",
    "override_config",
]

Settings = TypeVar("Settings")
_Own = TypeVar("_Own")


def load_train_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """Compose and check the settings of a training run.

    Args:
        overrides: `group=choice` and `field=value`, as on the command line; a later one of the
            same field wins, and all of them win over the experiment's file.

    Raises:
        ConfigError: one line with the field, its value, what is allowed and the nearest name.
    """
    groups, rest = _split_groups(overrides)
    tree = copy.deepcopy(_compose_groups(tuple(groups.items())))
    table = _table(tree.router.kind)
    for text in rest:
        name, value = parse_override(text, table, groups=GROUPS)
        _set_field(tree, table[name], value)
    _check_kind(tree.router.kind)
    config = _to_object(tree)
    assert isinstance(config, TrainConfig)
    return config


def load_beside(
    schema: type[_Own], arguments: Sequence[str], defaults: Sequence[str] = ()
) -> tuple[_Own, TrainConfig]:
    """Load a command's own settings, and those of the run that it is about.

    Args:
        schema: dataclass of the command's own fields, all with defaults.
        arguments: of the command line.
        defaults: of the run, unless the command line names the field.
    """
    own, rest = split_overrides(schema, arguments)
    named = {text.lstrip("+").partition("=")[0] for text in rest}
    kept = [text for text in defaults if text.partition("=")[0] not in named]
    return own, load_train_config([*kept, *rest])


def override_config(
    config: TrainConfig, overrides: Sequence[str], *, sections: Sequence[str]
) -> TrainConfig:
    """Return a run's settings with single fields changed, for a command that reuses them.

    Args:
        config: settings of the run.
        overrides: `field=value`, as on the command line.
        sections: names of the fields that may change, and of sections whose fields may.

    Raises:
        ConfigError: as `load_train_config`, or if another field is named.
    """
    table = _table(config.router.kind)
    changeable = {
        name: field
        for name, field in table.items()
        if name in sections or name.partition(".")[0] in sections
    }
    tree = OmegaConf.structured(config)
    for text in overrides:
        name, value = parse_override(text, table)
        if name not in changeable:
            raise ConfigError(
                f"{name} is the checkpoint's and cannot be changed here; these fields can: "
                + ", ".join(changeable)
            )
        _set_field(tree, table[name], value)
    changed = _to_object(tree)
    assert isinstance(changed, TrainConfig)
    return changed


def load_settings(schema: type[Settings], overrides: Sequence[str] = ()) -> Settings:
    """Read the settings of a command without groups from `field=value` arguments.

    Args:
        schema: a dataclass with a default for every field.
        overrides: as on the command line; a later one of the same field wins. Where a section has
            a field `rule`, the section's name alone means it: `prune=ratio`.

    Raises:
        ConfigError: as `load_train_config`.
    """
    table = field_table(schema)
    tree = OmegaConf.structured(schema)
    for text in overrides:
        section, equals, rest = text.partition("=")
        if equals and f"{section}.rule" in table:
            text = f"{section}.rule={rest}"  # noqa: PLW2901
        name, value = parse_override(text, table)
        _set_field(tree, table[name], value)
    settings = _to_object(tree)
    assert isinstance(settings, schema)
    return settings


def group_choices(group: str) -> list[str]:
    """Return the names of the files in a group's folder."""
    folder = files("gatewise.conf") / group
    names = (item.name for item in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def config_to_yaml(config: TrainConfig) -> str:
    """Return the whole tree as YAML; `config_from_yaml` gives an equal object back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_from_yaml(text: str, *, source: str = "config.yaml") -> TrainConfig:
    """Rebuild the settings of a run from its stored YAML.

    Args:
        text: what `config_to_yaml` wrote; fields it does not name keep their defaults.
        source: name of the file, for messages.

    Raises:
        ConfigError: if the text is not YAML, or names an unknown field or an impossible value.
    """
    try:
        stored = OmegaConf.create(text)
    except Exception as error:  # PyYAML's errors share no public base with OmegaConf's
        raise ConfigError(f"{source} is not readable YAML: {_first_line(error)}") from error
    if not isinstance(stored, DictConfig) or not stored:
        raise ConfigError(f"{source} does not hold settings; it must be a mapping of fields")
    register()
    kind = OmegaConf.select(stored, "router.kind", default="topk")
    _check_kind(kind, f"{source}: ")
    tree = OmegaConf.structured(TrainConfig(router=ROUTER_KINDS[kind]()))
    table = _table(kind)
    for name in _leaves(stored):
        if name not in table:
            raise ConfigError(f"{source}: {unknown_name(name, table)}")
    try:
        merged = OmegaConf.merge(tree, stored)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error
    assert isinstance(merged, DictConfig)
    config = _to_object(merged)
    assert isinstance(config, TrainConfig)
    return config


def _split_groups(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Part `group=choice` from `field=value`, and check the choices."""
    groups: dict[str, str] = {}
    rest: list[str] = []
    for text in overrides:
        name, equals, choice = text.lstrip("+").partition("=")
        if not equals or name not in GROUPS:
            rest.append(text)
            continue
        choices = group_choices(name)
        if choice not in choices and not (GROUPS[name] and choice == "null"):
            raise ConfigError(
                f"{name} is {choice!r}; it must be one of {', '.join(choices)}"
                f"{nearest(choice, choices)}"
            )
        groups[name] = choice
    return groups, rest


@functools.lru_cache(maxsize=64)  # Hydra takes long, and the points of a sweep share their groups
def _compose_groups(chosen: tuple[tuple[str, str], ...]) -> DictConfig:
    """Let Hydra merge the schema, the experiment and the router's preset; not to be changed."""
    register()
    groups = dict(chosen)
    try:
        with initialize_config_module("gatewise.conf", version_base="1.3"):
            tree = compose("train", [f"{name}={choice}" for name, choice in groups.items()])
            if {"experiment", "router"} <= groups.keys():
                # A router that the user names replaces the experiment's with all its settings.
                tree.router = compose("train", [f"router={groups['router']}"]).router
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    return tree


def _check_kind(kind: object, where: str = "") -> None:
    if kind not in ROUTER_KINDS:
        known = ", ".join(ROUTER_KINDS)
        raise ConfigError(f"{where}router.kind is {kind!r}; it must be one of {known}")


def _table(kind: str) -> dict[str, Field]:
    """Return every field of a training run whose router is of `kind`."""
    return field_table(TrainConfig(router=ROUTER_KINDS[kind]()))


def _set_field(tree: DictConfig, field: Field, text: str) -> None:
    try:
        OmegaConf.update(tree, field.name, field.parse(text))
    except OmegaConfBaseException as error:
        mistake = _explain(error)  # within an entry of a list it names the entry's field only
        raise ConfigError(
            mistake if mistake.startswith(field.name) else f"{field.name}: {mistake}"
        ) from error


def _to_object(tree: DictConfig) -> Any:  # whatever dataclass the tree was made from
    """Build the dataclasses, which check themselves."""
    try:
        return OmegaConf.to_object(tree)
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def _leaves(tree: DictConfig, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key!s}"
        names += _leaves(value, f"{name}.") if isinstance(value, DictConfig) else [name]
    return names


def _explain(error: BaseException) -> str:
    """Return one line with the field's name from an error of Hydra's or OmegaConf's."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    field = getattr(cause, "full_key", None)
    text = _first_line(cause)
    return f"{field}: {text}" if field and not text.startswith(str(field)) else text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
