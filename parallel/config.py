"""Degrees of parallelism and their checks, which run before any rank starts."""

from dataclasses import dataclass

__all__ = ["ParallelConfig"]


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How many ranks there are and what they split.

    Every rank holds its own sequences (data parallel). Consecutive `expert` ranks share one set
    of experts; consecutive `shard` ranks share one set of optimizer states (ZeRO-1).
    """

    ranks: int = 1  # processes; under torchrun or Slurm this must equal their world size
    expert: int = 1  # expert degree: ranks over which a layer's experts are spread
    shard: int = 1  # optimizer-state shards; 1 keeps a full copy on every rank
    threads: int | None = None  # compute threads per rank; None: the cores divided by the ranks
    timeout: float = 300.0  # seconds after which a collective that hangs ends the run

    def __post_init__(self) -> None:
        for name in ("ranks", "expert", "shard"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"parallel.{name} is {value}; it must be at least 1")
        for name in ("expert", "shard"):
            value = getattr(self, name)
            if self.ranks % value:
                raise ValueError(
                    f"parallel.{name} is {value}, which does not divide parallel.ranks "
                    f"({self.ranks}); choose one of {divisors(self.ranks)}"
                )
        if self.expert % self.shard and self.shard % self.expert:
            raise ValueError(
                f"parallel.shard is {self.shard} and parallel.expert is {self.expert}; "
                "one must divide the other"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"parallel.threads is {self.threads}; it must be at least 1 or null")
        if not self.timeout > 0:
            raise ValueError(f"parallel.timeout is {self.timeout}; it must be above 0 seconds")


def divisors(number: int) -> list[int]:
    """Return the positive divisors of `number`, in order."""
    return [value for value in range(1, number + 1) if number % value == 0]
