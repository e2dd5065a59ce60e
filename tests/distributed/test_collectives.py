"""Collectives on rows and slices: what arrives where, and what is counted."""

import pytest
import torch
import torch.distributed as dist

from gatewise.parallel.collectives import (
    NO_GROUP,
    Group,
    RowExchange,
    reduce_scatter_sum,
    start_ints,
)
from ranks import run_ranks


def _rows_arrive(rank: int, world: int) -> None:
    group = Group.of(dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        send = [(rank + other) % 3 for other in range(world)]  # rank r sends (r + o) % 3 to o
        rows = [(rank, other, i) for other in range(world) for i in range(send[other])]
        x_ND = torch.tensor(rows, dtype=dtype).view(-1, 3)
        x_ND = x_ND.T.contiguous().T  # not contiguous
        sent = group.traffic.sent_bytes
        exchange = RowExchange(x_ND, send, send, group)  # symmetric: receives as many
        want = [(other, rank, i) for other in range(world) for i in range(send[other])]
        assert exchange.wait().tolist() == [list(row) for row in want]
        assert exchange.wait() is exchange.wait()
        left = sum(send) - send[rank]
        assert group.traffic.sent_bytes - sent == left * 3 * x_ND.element_size()
    nothing = RowExchange(torch.zeros(0, 3), [0] * world, [0] * world, group).wait()
    assert nothing.shape == (0, 3)


@pytest.mark.dist
def test_rows_arrive_in_the_order_of_their_ranks() -> None:
    run_ranks(_rows_arrive, 3)


def _integers_arrive(rank: int, world: int) -> None:
    group = Group.of(dist.group.WORLD)
    mine = torch.arange(world * 2).view(world, 2) + 100 * rank
    assert start_ints(mine.T.contiguous().T, group)().tolist() == [
        [100 * other + 2 * rank, 100 * other + 2 * rank + 1] for other in range(world)
    ]


@pytest.mark.dist
def test_integers_arrive_by_rank() -> None:
    run_ranks(_integers_arrive, 3)


def _slices_are_summed(rank: int, world: int) -> None:
    group = Group.of(dist.group.WORLD)
    parts = torch.arange(world * world * 5, dtype=torch.float32).view(world, world * 5)
    flat = parts[rank].clone()
    before = flat.clone()
    mine = reduce_scatter_sum(flat, group).wait()
    place = slice(rank * 5, rank * 5 + 5)
    assert torch.equal(mine, parts.sum(0)[place])
    assert mine.data_ptr() == flat[place].data_ptr()  # in place
    others = torch.arange(world * 5)
    others = (others < place.start) | (others >= place.stop)
    assert torch.equal(flat[others], before[others])


@pytest.mark.dist
def test_a_rank_gets_the_sum_of_its_slices_in_place() -> None:
    run_ranks(_slices_are_summed, 3)


def test_a_group_of_one_moves_nothing() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert RowExchange(x, [], [], NO_GROUP).wait() is x
    assert start_ints(x.long(), NO_GROUP)().tolist() == x.long().tolist()
    assert reduce_scatter_sum(x.view(-1), NO_GROUP).wait().tolist() == list(range(6))
    assert NO_GROUP.traffic.calls == 0
