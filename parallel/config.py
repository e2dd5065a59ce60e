"""Degrees of parallelism and their checks, which run before any rank starts."""

from dataclasses import dataclass

__all__ = ["DISPATCHES", "ParallelConfig", "divisors"]

DISPATCHES = ("direct", "1dh", "2dh")  # `exchange.py` says what they are


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How many ranks there are and what they split.

    Every rank has its own sequences (data parallel), but consecutive `tensor` ranks share them, and
    split attention. Consecutive `expert_shard` ranks split the width of every expert, and `expert`
    such groups in a row share one set of experts. Consecutive `shard` ranks share one set of
    optimizer states (ZeRO-1).
    """

    ranks: int = 1  # processes; under torchrun or Slurm this must equal their world size
    expert: int = 1  # expert degree: groups of ranks over which a layer's experts are spread
    expert_shard: int = 1  # ranks of a node that split the width of each expert
    tensor: int = 1  # ranks of a node that split attention heads and the positions of a sequence
    shard: int = 1  # optimizer-state shards; 1 keeps a full copy on every rank
    dispatch: str = "direct"  # how rows travel to experts on other nodes: direct, 1dh or 2dh
    node: int | None = None  # ranks of a node; None: as the launcher says, else all
    threads: int | None = None  # compute threads per rank; None: the cores divided by the ranks
    timeout: float = 300.0  # seconds after which a collective that hangs ends the run

    def __post_init__(self) -> None:
        for name in ("ranks", "expert", "expert_shard", "tensor", "shard"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"parallel.{name} is {value}; it must be at least 1")
        if self.node is not None and self.node < 1:
            raise ValueError(f"parallel.node is {self.node}; it must be at least 1 or null")
        for name in ("expert", "expert_shard", "tensor", "shard", "node"):
            value = getattr(self, name)
            if value is not None and self.ranks % value:
                raise ValueError(
                    f"parallel.{name} is {value}, which does not divide parallel.ranks "
                    f"({self.ranks}); choose one of {divisors(self.ranks)}"
                )
        if self.ranks % self.expert_ranks:
            raise ValueError(
                f"parallel.expert x parallel.expert_shard is {self.expert} x {self.expert_shard} = "
                f"{self.expert_ranks}, which does not divide parallel.ranks ({self.ranks}); "
                f"choose parallel.expert from {divisors(self.ranks // self.expert_shard)}"
            )
        if self.expert_ranks % self.shard and self.shard % self.expert_ranks:
            also = " x parallel.expert_shard" if self.expert_shard > 1 else ""
            raise ValueError(
                f"parallel.shard is {self.shard} and parallel.expert{also} is {self.expert_ranks}; "
                "one must divide the other"
            )
        if self.tensor % self.shard and self.shard % self.tensor:
            raise ValueError(
                f"parallel.shard is {self.shard} and parallel.tensor is {self.tensor}; one must "
                "divide the other"
            )
        if self.dispatch not in DISPATCHES:
            raise ValueError(
                f"parallel.dispatch is {self.dispatch!r}; it must be one of {', '.join(DISPATCHES)}"
            )
        self._check_nodes()
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"parallel.threads is {self.threads}; it must be at least 1 or null")
        if not self.timeout > 0:
            raise ValueError(f"parallel.timeout is {self.timeout}; it must be above 0 seconds")

    def _check_nodes(self) -> None:
        node = self.ranks_per_node
        for name in ("expert_shard", "tensor"):
            value = getattr(self, name)
            if node % value:
                raise ValueError(
                    f"parallel.{name} is {value}, which does not divide the {node} ranks of a node "
                    f"(parallel.node); choose one of {divisors(node)}"
                )
        uneven = self.expert_ranks % node and node % self.expert_ranks
        if uneven and self.dispatch != "direct":
            raise ValueError(
                f"parallel.dispatch is {self.dispatch}, but the {self.expert_ranks} ranks "
                f"that share one set of experts do not fill nodes of {node} ranks evenly; use "
                "parallel.dispatch=direct, or degrees whose product divides parallel.node or is "
                "a multiple of it"
            )

    @property
    def expert_ranks(self) -> int:
        """Number of ranks that share one set of experts."""
        return self.expert * self.expert_shard

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks of a node."""
        return self.node or self.ranks


def divisors(number: int) -> list[int]:
    """Return the positive divisors of `number`, in order."""
    return [value for value in range(1, number + 1) if number % value == 0]
