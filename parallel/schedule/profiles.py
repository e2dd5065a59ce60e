"""Profiles: the cost models of one layout, as a JSON file that a planner reads.

Read `cost.py` first. A profile belongs to the layout that it was measured on (or computed for):
the same all-to-all costs something else among other ranks. A profile of another layout is
refused.

    {"format": "gatewise-profile", "version": 1, "source": "...",
     "layout": {"ranks": 48, "ranks_per_node": 8, "expert": 6, "shard": 8, ...},
     "costs": {"all_to_all": {"alpha_ms": 0.287, "beta_ms": 4.5e-07, "r2": 0.9999}, ...},
     "interference": {"inter": {"intra": 0.5}, "intra": {"inter": 0.5}}}

Sizes: bytes in and out of one rank for the collectives (the gathered size for all_gather and
reduce_scatter), multiply-adds for `experts` (one matrix product) and `attention`, bytes touched
for `memory`. `experts_data` and `experts_weights` may stand beside `experts` for its backward pass.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Cost, Interference, cost_from_json

__all__ = ["OPERATIONS", "OPTIONAL", "Layout", "Profile", "read_profile", "write_profile"]

OPERATIONS = (
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "experts",
    "attention",
    "memory",
)
# Parts of the experts' backward pass, where they do not cost what `experts` does.
OPTIONAL = ("experts_data", "experts_weights")
_FORMAT = "gatewise-profile"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a job are used; consecutive ranks share a node.

    `shard` ranks of a node split every expert and every attention layer (tensor parallel);
    `expert` such groups share one set of experts; `pipeline` stages follow each other; what is
    left are copies that share nothing but gradients.
    """

    ranks: int
    ranks_per_node: int
    expert: int = 1
    shard: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value < 1:
                raise ValueError(f"{item.name} is {value}; it must be at least 1")
        if self.ranks % self.ranks_per_node and self.ranks > self.ranks_per_node:
            raise ValueError(
                f"ranks is {self.ranks}, which is no multiple of the {self.ranks_per_node} ranks "
                "of a node"
            )
        if self.ranks_per_node % self.shard:
            raise ValueError(
                f"shard is {self.shard}, which does not divide the {self.ranks_per_node} ranks of "
                "a node; its collectives stay within one"
            )
        product = self.expert * self.shard * self.pipeline
        if self.ranks % product:
            raise ValueError(
                f"expert x shard x pipeline is {self.expert} x {self.shard} x {self.pipeline} = "
                f"{product}, which does not divide the {self.ranks} ranks"
            )

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.ranks // self.ranks_per_node)

    @property
    def copies(self) -> int:
        """Number of ranks that hold the same experts of the same pipeline stage."""
        return self.ranks // (self.expert * self.shard * self.pipeline)

    @property
    def data(self) -> int:
        """Number of groups that read different sequences."""
        return self.ranks // (self.shard * self.pipeline)

    @property
    def expert_ranks_per_node(self) -> int:
        """Number of members of an all-to-all that share a node."""
        return min(self.expert, max(1, self.ranks_per_node // self.shard))

    @property
    def expert_spans_nodes(self) -> bool:
        """Whether an all-to-all leaves the node."""
        return self.expert > self.expert_ranks_per_node

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks in {self.nodes} nodes, expert={self.expert} shard={self.shard} "
            f"pipeline={self.pipeline}"
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """What each operation costs in one layout."""

    layout: Layout
    costs: Mapping[str, Cost]
    interference: Interference
    source: str = ""  # where it comes from, in words

    def __post_init__(self) -> None:
        missing = [name for name in OPERATIONS if name not in self.costs]
        if missing:
            raise ValueError(f"costs of {', '.join(missing)} are missing; measure them too")

    def require(self, layout: Layout, *, name: str = "profile") -> None:
        """Raise `ConfigError` unless the profile is of this layout."""
        for item in fields(layout):
            mine, wanted = getattr(self.layout, item.name), getattr(layout, item.name)
            if mine != wanted:
                raise ConfigError(
                    f"{name} is of another layout: its {item.name} is {mine}, this job's is "
                    f"{wanted}; make a profile for this layout"
                )


def write_profile(profile: Profile, path: Path) -> None:
    """Store a profile as JSON."""
    value = {
        "format": _FORMAT,
        "version": _VERSION,
        "source": profile.source,
        "layout": asdict(profile.layout),
        "costs": {name: cost.to_json() for name, cost in profile.costs.items()},
        "interference": {lane: dict(row) for lane, row in profile.interference.extra.items()},
    }
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_profile(path: Path) -> Profile:
    """Read a profile and check it.

    Raises:
        ConfigError: one line that names the file and what is wrong in it.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"profile {path} cannot be read ({reason}); give a file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path} is not JSON ({error}); make it again") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ConfigError(f"profile {path} is no profile: its `format` is not {_FORMAT!r}")
    if value.get("version") != _VERSION:
        raise ConfigError(
            f"profile {path} has version {value.get('version')!r}; this program reads {_VERSION}"
        )
    try:
        return Profile(
            Layout(**{name: int(number) for name, number in value["layout"].items()}),
            {name: _cost(name, cost) for name, cost in value["costs"].items()},
            Interference(value.get("interference", {})),
            str(value.get("source", "")),
        )
    except KeyError as error:
        raise ConfigError(f"profile {path} has no {error.args[0]!r}; make it again") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"profile {path} cannot be used: {error}") from error


def _cost(name: str, value: Mapping[str, Any]) -> Cost:
    known = (*OPERATIONS, *OPTIONAL)
    if name not in known:
        raise ValueError(f"cost of {name!r} is none of {', '.join(known)}")
    try:
        return cost_from_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cost of {name}: {error}") from error
