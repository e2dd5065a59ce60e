"""Degrees of parallelism as process groups; every collective of the project uses one of these.

Ranks are numbered so that ranks that split experts are consecutive, and so are those that share
one set of experts. Example, 8 ranks with `expert=2`, `expert_shard=2`: ranks (0, 1) split the
width of the same experts, (2, 3) of the others; rows travel among (0, 2) and among (1, 3), and
ranks 4 to 7 hold another copy; ranks (0, 4) hold the same weights and sum their gradients; dense
gradients are summed over all 8. `docs/parallel.md` has the table.

Read `collectives.py` for `Group`.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from gatewise.parallel.collectives import NO_GROUP, Group
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.parameters import Owner

__all__ = ["ExpertGroups", "Groups", "ReduceGroups", "make_groups"]


@dataclass(frozen=True, slots=True)
class ReduceGroups:
    """Who sums one class of gradients: `shard` ranks share the state, `replicate` repeats it."""

    shard: Group
    replicate: Group


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The ranks that share one set of experts, and how rows travel among them."""

    rows: Group  # equal places of the shard groups: rows travel here, rank p to experts of p
    shard: Group = NO_GROUP  # ranks of a node that split the width of the same experts
    everyone: Group = NO_GROUP  # all of them: counts; shards of experts 0 first
    local: Group = NO_GROUP  # members of `rows` on this node, where `dispatch` has two stages
    across: Group = NO_GROUP  # members of `rows` with this one's place in their nodes
    dispatch: str = "direct"

    @staticmethod
    def of(group: Group) -> "ExpertGroups":
        """Spread whole experts over one group."""
        return ExpertGroups(rows=group, everyone=group)

    @property
    def size(self) -> int:
        """Number of ranks that share one set of experts."""
        return self.rows.size * self.shard.size


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of this rank. Each has a communicator of its own, so none delays another."""

    control: Group  # all ranks: metrics, decisions
    experts: ExpertGroups  # the ranks that share one set of experts
    dense: ReduceGroups  # gradients of parameters that every rank holds
    expert_data: ReduceGroups  # gradients of experts: the ranks that hold the same ones
    checkpoint: dist.ProcessGroup | None  # all ranks, gloo: saves in the background
    ranks: int = 1
    tensor: Group = NO_GROUP  # ranks that split attention and read the same sequences
    tensor_data: ReduceGroups = ReduceGroups(NO_GROUP, NO_GROUP)  # of attention heads

    def members(self) -> dict[str, list[int]]:
        """Return the ranks of each group of this rank, by the name that reports use."""
        experts, tensors = self.experts, self.tensor_data
        parts = [self.control, experts.rows, experts.shard, experts.everyone, experts.local]
        parts += [experts.across, self.dense.shard, self.dense.replicate, self.tensor]
        parts += [self.expert_data.shard, self.expert_data.replicate]
        parts += [tensors.shard, tensors.replicate]
        handles = [part.handle for part in parts] + [self.checkpoint]
        return {
            handle.group_desc: dist.get_process_group_ranks(handle)
            for handle in handles
            if handle is not None
        }

    @property
    def readers(self) -> int:
        """How many groups of ranks read different sequences."""
        return self.ranks // self.tensor.size

    def reduced_by(self, owner: Owner) -> ReduceGroups:
        """Return who sums the gradients of parameters with that owner."""
        return {"all": self.dense, "expert": self.expert_data, "tensor": self.tensor_data}[owner]


def make_groups(config: ParallelConfig) -> Groups:
    """Create the groups; with more than one rank, torch.distributed must be initialised.

    Args:
        config: its `ranks` equals the world size.
    """
    ranks = config.ranks
    if ranks == 1:
        alone = ReduceGroups(NO_GROUP, NO_GROUP)
        return Groups(NO_GROUP, ExpertGroups(NO_GROUP), alone, alone, None)
    timeout = timedelta(seconds=config.timeout)
    everyone = [list(range(ranks))]
    same_experts = [list(range(p, ranks, config.expert_ranks)) for p in range(config.expert_ranks)]
    tensor_data = ReduceGroups(NO_GROUP, NO_GROUP)
    if config.tensor > 1:  # else attention is summed with everything else
        same_heads = [list(range(t, ranks, config.tensor)) for t in range(config.tensor)]
        heads_shard = max(1, config.shard // config.tensor)
        tensor_data = _reduce_groups(same_heads, heads_shard, timeout, "attention")
    return Groups(
        control=_group(everyone, timeout, "control"),
        experts=_expert_groups(config, timeout),
        dense=_reduce_groups(everyone, config.shard, timeout, "dense"),
        expert_data=_reduce_groups(
            same_experts, max(1, config.shard // config.expert_ranks), timeout, "expert"
        ),
        checkpoint=dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint"),
        ranks=ranks,
        tensor=_group(_runs(everyone[0], config.tensor), timeout, "attention heads"),
        tensor_data=tensor_data,
    )


def _expert_groups(config: ParallelConfig, timeout: timedelta) -> ExpertGroups:
    shard, together = config.expert_shard, config.expert_ranks
    starts = range(0, config.ranks, together)
    row_ranks = [
        list(range(start + place, start + together, shard))
        for start in starts
        for place in range(shard)
    ]
    rows = _group(row_ranks, timeout, "expert rows")
    shards = _group(_runs(list(range(config.ranks)), shard), timeout, "expert shards")
    local = across = NO_GROUP
    if config.dispatch != "direct":
        near = max(1, min(config.expert, config.ranks_per_node // shard))  # members on a node
        local = _group(
            [part for ranks in row_ranks for part in _runs(ranks, near)], timeout, "near"
        )
        across = _group(
            [ranks[place::near] for ranks in row_ranks for place in range(near)], timeout, "far"
        )
    return ExpertGroups(
        rows=rows,
        shard=shards,
        everyone=rows
        if shard == 1
        else _group(
            [list(range(start, start + together)) for start in starts], timeout, "expert counts"
        ),
        local=local,
        across=across,
        dispatch=config.dispatch,
    )


def _reduce_groups(
    members: list[list[int]], shard: int, timeout: timedelta, name: str
) -> ReduceGroups:
    """Split each list of ranks into consecutive shards, and into replicas of each shard."""
    shards = [part for ranks in members for part in _runs(ranks, shard)]
    replicas = [ranks[i::shard] for ranks in members for i in range(shard)]
    return ReduceGroups(
        _group(shards, timeout, f"{name} shards"), _group(replicas, timeout, f"{name} gradients")
    )


def _runs(ranks: list[int], length: int) -> list[list[int]]:
    """Cut a list into runs of equal length."""
    return [ranks[start : start + length] for start in range(0, len(ranks), length)]


def _group(partition: list[list[int]], timeout: timedelta, name: str) -> Group:
    """Create the groups of a partition of all ranks, and return ours; `name` is for reports."""
    if len(partition[0]) == 1:
        return NO_GROUP
    # Every rank creates every group, in the same order, as torch requires.
    mine = None
    for ranks in partition:
        handle = dist.new_group(ranks, timeout=timeout, group_desc=name)
        if dist.get_rank() in ranks:
            mine = handle
    return Group.of(mine)
