"""Rows travel the same whatever way they take; shards of experts gather and add them up."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.moe.dispatch import AllToAllDispatcher, cut_pieces
from gatewise.parallel.collectives import NO_GROUP, Group, RowSum, gather_uneven
from gatewise.parallel.config import DISPATCHES, ParallelConfig
from gatewise.parallel.dims import ExpertGroups, make_groups
from ranks import run_ranks

EXPERTS, TOP_K, WIDTH = 8, 2, 3
TOKENS = {
    "uneven": [9, 4, 13, 6],
    "a rank without tokens": [5, 0, 7, 3],
    "nobody has a token": [0, 0, 0, 0],
}


def routed(tokens: int, rank: int, *, experts: int = EXPERTS) -> Tensor:
    """Choose among the first `experts` experts; every fourth pair is dropped."""
    generator = torch.Generator().manual_seed(rank)
    expert_TK = torch.rand(tokens, experts, generator=generator).topk(TOP_K).indices
    return expert_TK.masked_fill(torch.rand(tokens, TOP_K, generator=generator) < 0.25, -1)


def both_ways(groups: ExpertGroups, expert_TK: Tensor, chunks: int) -> list[Tensor]:
    """Send numbered rows to their experts and back, and return all that was ever received."""
    dispatcher = AllToAllDispatcher(EXPERTS, groups)
    tickets = dispatcher.prepare(cut_pieces(expert_TK, chunks), may_drop=True)()
    sent = [
        dist.get_rank() * 1e4 + ticket.order_N[:, None] + torch.arange(WIDTH) / 8
        for ticket in tickets
    ]
    arrived = [
        handle.wait()
        for handle in [dispatcher.send(x, t) for x, t in zip(sent, tickets, strict=True)]
    ]
    returned = [
        handle.wait()
        for handle in [dispatcher.give_back(x, t) for x, t in zip(arrived, tickets, strict=True)]
    ]
    assert all(torch.equal(x, y) for x, y in zip(sent, returned, strict=True))
    assert [len(x) for x in arrived] == [sum(ticket.receive) for ticket in tickets]
    return arrived


def _all_ways_give_the_same_rows(rank: int, world: int, node: int, shards: int) -> None:
    config = ParallelConfig(ranks=world, node=node, expert_shard=shards, expert=world // shards)
    groups = {
        way: make_groups(dataclasses.replace(config, dispatch=way)).experts for way in DISPATCHES
    }
    for case, shares in TOKENS.items():
        for experts in (EXPERTS, 2):  # with 2 the ranks of the others get nothing
            expert_TK = routed(shares[rank], rank, experts=experts)
            for chunks in (1, 3):
                direct = both_ways(groups["direct"], expert_TK, chunks)
                for way in ("1dh", "2dh"):
                    found = both_ways(groups[way], expert_TK, chunks)
                    same = [torch.equal(x, y) for x, y in zip(direct, found, strict=True)]
                    assert all(same), (case, way, chunks)
    if node > 1 and world > node and shards == 1:
        for way in ("1dh", "2dh"):
            leaves_the_node = groups[way].across.traffic.calls > 0
            assert leaves_the_node == (way == "2dh" or rank % node == 0)


@pytest.mark.dist
@pytest.mark.parametrize(("node", "shards"), [(2, 1), (1, 1), (4, 1), (2, 2)])
def test_three_ways_between_nodes_give_equal_rows_forth_and_back(node: int, shards: int) -> None:
    run_ranks(_all_ways_give_the_same_rows, 4, (node, shards))


def _gathers_and_adds_up(rank: int, world: int) -> None:
    group = Group.of(dist.group.WORLD)
    generator = torch.Generator().manual_seed(7)
    for sizes in ([3, 5, 1, 2], [0, 4, 0, 1], [0, 0, 0, 0]):
        shape = (world, sum(sizes[:world]), WIDTH)
        whole_PRD = torch.randn(shape, generator=generator, dtype=torch.float64)
        own = torch.arange(sum(sizes[:world])).split(sizes[:world])[rank]
        # rank p has its rows of the first part; a gather shows all of them to everybody
        x_RD = whole_PRD[0, own]
        gathered = gather_uneven(x_RD, sizes[:world], group)
        assert torch.equal(gathered.wait(), whole_PRD[0])
        assert gathered.wait() is gathered.wait()
        total = RowSum(whole_PRD[rank], sizes[:world], group)
        summed = whole_PRD[0, own]
        for part_RD in whole_PRD[1:, own]:
            summed = summed + part_RD  # in rank order, bit for bit
        assert torch.equal(total.wait(), summed)
        assert total.wait() is total.wait()
        # one is the adjoint of the other: <gather x, y> = <x, sum y>
        left = (gathered.wait() * whole_PRD[rank]).sum()
        right = (x_RD * total.wait()).sum()
        both = torch.stack((left, right))
        dist.all_reduce(both)
        torch.testing.assert_close(both[0], both[1])
        small = RowSum(whole_PRD[rank].bfloat16(), sizes[:world], group).wait()
        exact = whole_PRD[:, own].bfloat16().float().sum(0).bfloat16()
        torch.testing.assert_close(small, exact, rtol=2**-7, atol=0)
        assert small.dtype == torch.bfloat16


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_a_gather_of_uneven_rows_and_the_sum_that_is_its_adjoint(world: int) -> None:
    run_ranks(_gathers_and_adds_up, world)


def test_one_rank_alone_hands_rows_on_without_a_copy() -> None:
    x_RD = torch.randn(3, WIDTH)
    assert gather_uneven(x_RD, [3], NO_GROUP).wait() is x_RD
    assert RowSum(x_RD, [3], NO_GROUP).wait() is x_RD


def _one_exchange_of_counts(rank: int, world: int) -> None:
    groups = make_groups(ParallelConfig(ranks=world, expert=2, expert_shard=2)).experts
    dispatcher = AllToAllDispatcher(EXPERTS, groups)
    tickets = dispatcher.prepare(cut_pieces(routed(11 + rank, rank), 3), may_drop=True)()
    assert groups.everyone.traffic.calls == 1
    assert groups.rows.traffic.calls == groups.shard.traffic.calls == 0
    for ticket in tickets:
        assert ticket.shard_rows[groups.shard.rank] == sum(ticket.receive)
        assert ticket.counts is not None
        assert sum(ticket.counts) == sum(ticket.shard_rows)
        assert ticket.arrange_R is not None
        assert sorted(ticket.arrange_R.tolist()) == list(range(sum(ticket.shard_rows)))
        every = [torch.zeros(2, dtype=torch.int64) for _ in range(groups.shard.size)]
        dist.all_gather(every, torch.tensor(ticket.shard_rows), group=groups.shard.handle)
        assert all(rows.tolist() == ticket.shard_rows for rows in every)


@pytest.mark.dist
def test_shards_of_experts_agree_on_all_sizes_in_one_collective() -> None:
    run_ranks(_one_exchange_of_counts, 4)
