"""Settings of `gatewise submit`: who starts the ranks, where, and what happens to the job."""

import re
from dataclasses import dataclass, field
from enum import Enum

from gatewise.parallel.errors import ConfigError

__all__ = ["Container", "Launcher", "StopSignal", "SubmitConfig", "SubmitSettings"]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"\d+[KMGT]?")
_DEFAULT_PORT = 29400


class Launcher(Enum):
    """Who starts the ranks."""

    torchrun = "torchrun"  # here, and on every other node where the same command is given
    slurm = "slurm"  # torchrun on the nodes of a Slurm job
    local = "local"  # `gatewise train` with its own ranks


class StopSignal(Enum):
    """What a job is sent before its time limit; some versions of NCCL take USR1 for themselves."""

    USR1 = "USR1"
    USR2 = "USR2"


class Container(Enum):
    """What runs the ranks inside an image."""

    none = "none"
    pyxis = "pyxis"  # a plugin of Slurm's srun
    apptainer = "apptainer"


# Fields that one launcher alone knows; set for another they would be silently without effect.
_SLURM_ONLY = (
    *("partition", "account", "qos", "time_limit", "cores_per_rank", "gpus_per_node"),
    *("memory", "sbatch", "wait"),
)


@dataclass(kw_only=True, slots=True)
class SubmitConfig:
    """One job, or every job of a sweep."""

    launcher: Launcher = Launcher.torchrun
    nodes: int = 1
    ranks_per_node: int | None = None  # None: parallel.ranks / nodes
    restarts: int = 0  # times that torchrun starts all ranks again after a crash
    head: str | None = None  # address where the ranks meet; None: the first node of a Slurm job
    port: int = _DEFAULT_PORT  # there, with torchrun on several nodes; Slurm jobs derive their own
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None  # as sbatch takes it: 90 (minutes), 12:00:00, 2-00:00:00
    signal_lead: int = 120  # seconds before the time limit at which the ranks save
    signal: StopSignal = StopSignal.USR2
    max_requeues: int = 100  # 0: after a save the job ends with 85
    cores_per_rank: int | None = None
    gpus_per_node: int | None = None
    memory: str | None = None  # of a node, as 64G
    sbatch: str | None = None  # more options, as '--constraint=a100 --exclusive'
    setup: str | None = None  # a shell command before the ranks start, as 'module load cuda'
    python: str | None = None  # None: the interpreter of this command; in a container python
    container: Container = Container.none
    image: str | None = None  # of the container
    mounts: str | None = None  # further folders for the container, as /data:/data,/scratch
    env: str | None = None  # variables to pass on, as 'HOME,WANDB_*'; all; None: see the docs
    snapshot: bool = True  # run a copy of the code in run.dir, which later edits do not reach
    parallel: int | None = None  # points of a sweep at a time; None: 1 here, all under Slurm
    trials: int | None = None  # points of a sweep that Optuna chooses; None: the whole grid
    draw: int = 0  # seed of its choice
    wait: bool = False  # for the end of a Slurm job

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_texts()
        self._check_launcher()
        self._check_container()

    @property
    def limit_seconds(self) -> int | None:
        """Return the time limit in seconds."""
        return None if self.time_limit is None else _seconds(self.time_limit)

    @property
    def passed_names(self) -> list[str] | None:
        """Return the names and patterns of `env`; None for its default."""
        if self.env is None:
            return None
        return [name.strip() for name in self.env.split(",") if name.strip()]

    def _check_numbers(self) -> None:
        least = {"nodes": 1, "ranks_per_node": 1, "restarts": 0, "signal_lead": 10}
        least |= {"max_requeues": 0, "cores_per_rank": 1, "gpus_per_node": 1, "parallel": 1}
        least |= {"trials": 1, "draw": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"submit.{name} is {value}; it must be at least {low}")
        if not 1024 <= self.port <= 65535:
            raise ConfigError(f"submit.port is {self.port}; it must be from 1024 to 65535")

    def _check_texts(self) -> None:
        for name in ("head", "partition", "account", "qos", "python", "image", "mounts"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"\s", value)):
                raise ConfigError(f"submit.{name} is {value!r}; it must be a word without spaces")
        if self.setup is not None and "\n" in self.setup:
            raise ConfigError("submit.setup has several lines; put them into a file and source it")
        if self.memory is not None and not _MEMORY.fullmatch(self.memory):
            raise ConfigError(
                f"submit.memory is {self.memory!r}; write a number with K, M, G or T, as 64G"
            )
        for word in (self.sbatch or "").split():
            if not word.startswith("--"):
                raise ConfigError(
                    f"submit.sbatch has {word!r}; its words are options of sbatch, as "
                    "'--constraint=a100 --exclusive'"
                )
        for name in self.passed_names or ():
            if not re.fullmatch(r"[A-Za-z_*?][\w*?]*", name):
                raise ConfigError(
                    f"submit.env has {name!r}; it takes names of variables without values, as "
                    "HOME,WANDB_*"
                )

    def _check_launcher(self) -> None:
        here = self.launcher.name
        if self.launcher is not Launcher.slurm:
            for name in _SLURM_ONLY:
                value = getattr(self, name)
                if value not in (None, False):
                    raise ConfigError(
                        f"submit.{name} is {value}, which only Slurm knows, but submit.launcher "
                        f"is {here}; set submit.launcher=slurm or leave it out"
                    )
        elif self.trials is not None and not self.wait:
            raise ConfigError(
                f"submit.trials is {self.trials} but submit.wait is false; later points depend on "
                "the losses of earlier ones, set submit.wait=true"
            )
        elif self.time_limit is not None:
            limit = _seconds(self.time_limit)
            if limit <= self.signal_lead:
                raise ConfigError(
                    f"submit.time_limit is {self.time_limit} ({limit} s), not more than "
                    f"submit.signal_lead ({self.signal_lead} s); no time would be left to train"
                )
        if self.launcher is Launcher.local and (self.nodes > 1 or self.restarts):
            name = "nodes" if self.nodes > 1 else "restarts"
            raise ConfigError(
                f"submit.{name} is {getattr(self, name)}, but submit.launcher=local starts the "
                "ranks once, on this machine; set submit.launcher=torchrun"
            )
        if self.launcher is Launcher.torchrun and self.nodes > 1 and self.head is None:
            raise ConfigError(
                f"submit.nodes is {self.nodes} but submit.head is not set; give the address of "
                "one of the nodes, and start the same command on each"
            )

    def _check_container(self) -> None:
        kind = self.container
        if (kind is Container.none) != (self.image is None):
            raise ConfigError(
                f"submit.container is {kind.name} and submit.image is {self.image}; set both, or "
                "none of them"
            )
        if kind is Container.none and self.mounts is not None:
            raise ConfigError("submit.mounts is set without submit.container; leave it out")
        if kind is Container.pyxis and self.launcher is not Launcher.slurm:
            raise ConfigError(
                f"submit.container=pyxis needs submit.launcher=slurm, not {self.launcher.name}; "
                "use apptainer"
            )
        if kind is not Container.none and self.launcher is Launcher.local:
            raise ConfigError(
                "submit.launcher=local starts no container; set submit.launcher=torchrun"
            )


@dataclass(kw_only=True, slots=True)
class SubmitSettings:
    """The section `submit` of the command line."""

    submit: SubmitConfig = field(default_factory=SubmitConfig)


def _seconds(text: str) -> int:
    """Return the seconds of a time limit in Slurm's notation.

    Raises:
        ConfigError: for anything else.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"submit.time_limit is {text!r}; write minutes (90), 12:00:00 or days as 2-00:00:00"
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
