"""Where a rank stands: told by torchrun, by Slurm, or by our own start.

The only reader of the launchers' environment variables.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gatewise.launch.machine import available_cores
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError

if TYPE_CHECKING:
    from gatewise.parallel.runtime import Runtime  # imports torch

__all__ = ["Place", "detect_world", "join_ranks", "threads_per_rank"]


@dataclass(frozen=True, slots=True)
class Place:
    """One rank among all ranks."""

    rank: int
    world_size: int
    local_rank: int = 0
    local_world_size: int = 1
    init_method: str = "env://"  # how ranks find each other
    threads: int = 1  # compute threads of this rank
    node: int | None = None  # ranks of every node, where the launcher says


def detect_world(environ: Mapping[str, str]) -> Place | None:
    """Return this process's place if a launcher started it, else None.

    torchrun sets RANK and WORLD_SIZE. Under `srun` every task has SLURM_PROCID; one task alone
    (an interactive shell, a batch script) is no world.

    Raises:
        ConfigError: if the variables contradict each other or the meeting point is missing.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return None
    rank, world_size = _number(environ, names[0]), _number(environ, names[1])
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]} is {rank} but {names[1]} is {world_size}; ranks count from 0 to "
            f"{world_size - 1}"
        )
    if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise ConfigError(
            f"{names[1]} is {world_size} but MASTER_ADDR or MASTER_PORT is not set; start with "
            "torchrun, or export the first node's name and a free port"
        )
    local_rank = _number(environ, names[2], rank)
    local_world_size = max(_number(environ, names[3], 1), local_rank + 1)
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node=_number(environ, names[3]) if names[3] in environ else None,
    )


@contextmanager
def join_ranks(place: Place, parallel: ParallelConfig) -> "Iterator[Runtime]":
    """Join the other ranks; leave them at the end of the block."""
    from gatewise.parallel.runtime import running

    os.environ["LOCAL_RANK"] = str(place.local_rank)  # Slurm says it under another name
    with running(
        replace(parallel, threads=place.threads),
        rank=place.rank,
        world=place.world_size,
        init_method=place.init_method,
    ) as runtime:
        yield runtime


def threads_per_rank(setting: int | None, local_ranks: int, environ: Mapping[str, str]) -> int:
    """Return a rank's compute threads: the setting, OMP_NUM_THREADS, or a share of the cores."""
    if setting is not None:
        return setting
    wish = environ.get("OMP_NUM_THREADS", "")
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    return max(1, available_cores() // local_ranks)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"{name} is {text!r} in the environment; it must be a number") from None
