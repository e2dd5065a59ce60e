"""Degrees of parallelism as process groups; every collective of the project uses one of these.

Ranks are numbered so that an expert group is consecutive. Example, 8 ranks with `expert=4`,
`shard=2`: ranks 0-3 hold one copy of the experts, ranks 4-7 the other; ranks (0, 4) hold the same
experts and sum their gradients; dense gradients are summed over all 8; ranks (0, 1) share dense
optimizer state.

Read `collectives.py` for `Group`.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from gatewise.parallel.collectives import NO_GROUP, Group
from gatewise.parallel.config import ParallelConfig

__all__ = ["Groups", "ReduceGroups", "make_groups"]


@dataclass(frozen=True, slots=True)
class ReduceGroups:
    """Who sums one class of gradients: `shard` ranks share the state, `replicate` repeats it."""

    shard: Group
    replicate: Group


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of this rank. Each has a communicator of its own, so none delays another."""

    control: Group  # all ranks: metrics, decisions
    expert: Group  # the ranks that share one set of experts: rows travel here
    dense: ReduceGroups  # gradients of parameters that every rank holds
    expert_data: ReduceGroups  # gradients of experts: the ranks that hold the same ones
    checkpoint: dist.ProcessGroup | None  # all ranks, gloo: saves in the background
    ranks: int = 1


def make_groups(config: ParallelConfig) -> Groups:
    """Create the groups; with more than one rank, torch.distributed must be initialised.

    Args:
        config: its `ranks` equals the world size.
    """
    ranks = config.ranks
    if ranks == 1:
        alone = ReduceGroups(NO_GROUP, NO_GROUP)
        return Groups(NO_GROUP, NO_GROUP, alone, alone, None)
    timeout = timedelta(seconds=config.timeout)
    copies = ranks // config.expert
    expert_shard = max(1, config.shard // config.expert)
    everyone = [list(range(ranks))]
    same_experts = [list(range(e, ranks, config.expert)) for e in range(config.expert)]
    return Groups(
        control=_group(everyone, timeout),
        expert=_group(
            [list(range(c * config.expert, (c + 1) * config.expert)) for c in range(copies)],
            timeout,
        ),
        dense=_reduce_groups(everyone, config.shard, timeout),
        expert_data=_reduce_groups(same_experts, expert_shard, timeout),
        checkpoint=dist.new_group(backend="gloo", timeout=timeout),
        ranks=ranks,
    )


def _reduce_groups(members: list[list[int]], shard: int, timeout: timedelta) -> ReduceGroups:
    """Split each list of ranks into consecutive shards, and into replicas of each shard."""
    shards = [ranks[i : i + shard] for ranks in members for i in range(0, len(ranks), shard)]
    replicas = [ranks[i::shard] for ranks in members for i in range(shard)]
    return ReduceGroups(_group(shards, timeout), _group(replicas, timeout))


def _group(partition: list[list[int]], timeout: timedelta) -> Group:
    """Create the groups of a partition of all ranks, and return ours."""
    if len(partition[0]) == 1:
        return NO_GROUP
    # Every rank creates every group, in the same order, as torch requires.
    mine = None
    for ranks in partition:
        handle = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = handle
    return Group.of(mine)
