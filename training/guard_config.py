"""Settings of what watches a run and of the faults that are planted to try it (docs/nights.md)."""

from dataclasses import dataclass
from enum import Enum

from gatewise.parallel.errors import ConfigError

__all__ = [
    "FaultConfig",
    "FaultKind",
    "NonfiniteConfig",
    "NonfinitePolicy",
    "ReplicaPolicy",
    "ReplicasConfig",
    "SpikePolicy",
    "SpikesConfig",
    "StragglersConfig",
    "check_faults",
]


class FaultKind(Enum):
    """What goes wrong on a rank."""

    kill = "kill"  # SIGKILL, as when memory runs out
    hang = "hang"  # it never goes on
    nan = "nan"  # its hidden states are NaN
    bitflip = "bitflip"  # one bit of its weights turns over
    slow = "slow"  # it sleeps in each step
    enospc = "enospc"  # its disk is full at the next save
    torn_write = "torn_write"  # half of what it saves next never reaches the disk


@dataclass(kw_only=True, slots=True)
class FaultConfig:
    """One fault; each happens once in a run, restarts included."""

    step: int  # from 1; a save of this step or the next one for faults of the disk
    rank: int
    kind: FaultKind
    steps: int = 1  # in a row, for nan and slow
    seconds: float = 1.0  # a step, for slow

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"faults: steps is {self.steps}; it must be at least 1")
        if not self.seconds > 0:
            raise ConfigError(f"faults: seconds is {self.seconds}; it must be above 0")

    @property
    def name(self) -> str:
        """The fault in one word, also of its marker in the run's folder."""
        return f"step_{self.step:08d}_rank_{self.rank}_{self.kind.name}"


def check_faults(faults: list[FaultConfig], *, ranks: int, steps: int) -> None:
    """Raise `ConfigError` for a fault that could never happen."""
    names = [fault.name for fault in faults]
    for index, fault in enumerate(faults):
        if not 0 <= fault.rank < ranks:
            raise ConfigError(
                f"faults[{index}].rank is {fault.rank}; parallel.ranks is {ranks}, so it must be "
                f"from 0 to {ranks - 1}"
            )
        if not 1 <= fault.step <= steps:
            raise ConfigError(
                f"faults[{index}].step is {fault.step}; the run has steps from 1 to {steps}"
            )
        if fault.kind is FaultKind.hang and ranks == 1:
            raise ConfigError(
                f"faults[{index}].kind is hang, but nobody waits for a single rank; use "
                "parallel.ranks=2 or more"
            )
        if fault.name in names[:index]:
            raise ConfigError(
                f"faults[{index}] repeats step {fault.step}, rank {fault.rank}, "
                f"{fault.kind.name}; each fault happens once, remove one of them"
            )


class NonfinitePolicy(Enum):
    """What follows a step whose loss or gradients are not finite; it changes no weights."""

    stop = "stop"  # end at the first one
    skip = "skip"  # go on; end after max_consecutive in a row
    rollback = "rollback"  # go back to the newest checkpoint after max_consecutive in a row


@dataclass(kw_only=True, slots=True)
class NonfiniteConfig:
    """What happens on a NaN or infinity in the loss or the gradients."""

    policy: NonfinitePolicy = NonfinitePolicy.skip
    max_consecutive: int = 5  # skipped steps in a row after which the run stops or goes back

    def __post_init__(self) -> None:
        if self.max_consecutive < 1:
            raise ConfigError(
                f"nonfinite.max_consecutive is {self.max_consecutive}; it must be at least 1"
            )


class SpikePolicy(Enum):
    """What follows a step whose loss or gradient norm stands out."""

    off = "off"
    warn = "warn"  # say so, update as usual
    skip = "skip"  # change no weights; end after max_consecutive in a row
    rollback = "rollback"  # as skip; go back to the newest checkpoint instead of ending


@dataclass(kw_only=True, slots=True)
class SpikesConfig:
    """Steps that stand out from those before, by median and median deviation."""

    policy: SpikePolicy = SpikePolicy.off
    window: int = 64  # accepted steps that a step is compared with
    sigmas: float = 8.0  # deviations above the median that are too many
    max_consecutive: int = 5  # spikes in a row after which the run stops or goes back

    def __post_init__(self) -> None:
        for name, least in (("window", 8), ("max_consecutive", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"spikes.{name} is {value}; it must be at least {least}")
        if not self.sigmas > 0:
            raise ConfigError(f"spikes.sigmas is {self.sigmas}; it must be above 0")


class ReplicaPolicy(Enum):
    """What follows when ranks that should hold the same weights do not."""

    stop = "stop"
    rollback = "rollback"  # go back to the newest checkpoint


@dataclass(kw_only=True, slots=True)
class ReplicasConfig:
    """Comparison of replicated weights by hashes: silent corruption of memory."""

    every: int | None = None  # steps; then also before every save; None: never
    policy: ReplicaPolicy = ReplicaPolicy.stop

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(f"replicas.every is {self.every}; it must be at least 1 or null")


@dataclass(kw_only=True, slots=True)
class StragglersConfig:
    """Ranks that compute much longer than the others, before they wait for them."""

    ratio: float | None = 2.0  # own work of a step over the others' median; None: no warning
    least_ms: float = 50.0  # beyond the median; shorter delays are not worth a warning

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.ratio > 1:
            raise ConfigError(f"stragglers.ratio is {self.ratio}; it must be above 1 or null")
        if not self.least_ms >= 0:
            raise ConfigError(f"stragglers.least_ms is {self.least_ms}; it must be at least 0")
