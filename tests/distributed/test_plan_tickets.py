"""Tickets of all layers made ahead, in one exchange, are those that each layer would make."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher, cut_pieces
from gatewise.moe.plan_ahead import plan_tickets
from gatewise.moe.stages import Schedule
from gatewise.parallel.collectives import Group
from gatewise.routers.ahead.plan import RoutePlan
from ranks import run_ranks

EXPERTS, TOP_K, LAYERS, CHUNKS = 8, 2, 3, (1, 2, 3)


def make_routes(rank: int, micro_batches: int, *, single: bool, empty: bool) -> list[RoutePlan]:
    generator = torch.Generator().manual_seed(rank)
    routes = []
    for _ in range(micro_batches):
        tokens = 0 if empty and rank == 0 else 13 + rank
        shape = (1 if single else LAYERS, tokens, EXPERTS)
        expert_LTK = torch.rand(shape, generator=generator).topk(TOP_K, -1).indices
        expert_LTK[:, tokens - 3 :] = -1  # padding
        routes.append(RoutePlan(expert_LTK, EXPERTS, LAYERS))
    return routes


def assert_invariants(
    rank: int, world: int, dispatcher: Dispatcher, routes: list[RoutePlan]
) -> None:
    group = dispatcher.group if isinstance(dispatcher, AllToAllDispatcher) else Group.of(None)
    before = group.traffic.calls
    plans = plan_tickets(routes, dispatcher, schedules=[Schedule.serial(c) for c in CHUNKS])
    assert group.traffic.calls - before == (1 if world > 1 else 0)
    for route, plan in zip(routes, plans, strict=True):
        for layer, chunks in enumerate(CHUNKS):
            expert_TK = route.layer(layer).expert_TK
            pieces = cut_pieces(expert_TK, chunks)
            alone = dispatcher.prepare(pieces, may_drop=True)()
            both = plan.layer(layer)
            assert both is not None
            assert both.backward is both.forward
            tickets = [chunk.ticket for chunk in both.forward]
            kept = int((expert_TK >= 0).sum())
            assert sum(ticket.order_N.shape[0] for ticket in tickets) == kept
            for ticket, wanted, piece in zip(tickets, alone, pieces, strict=True):
                assert ticket.tokens == wanted.tokens
                assert (ticket.send, ticket.receive) == (wanted.send, wanted.receive)
                assert ticket.counts == wanted.counts
                for name in ("order_N", "token_N", "inverse_TK", "arrange_R", "restore_R", "end_e"):
                    have, want = getattr(ticket, name), getattr(wanted, name)
                    assert (have is None) == (want is None)
                    assert have is None or torch.equal(have, want), name
                rows = ticket.order_N.shape[0]
                places = ticket.inverse_TK[piece.expert_TK >= 0]
                assert sorted(places.tolist()) == list(range(rows))
                if world > 1:
                    check_landing(rank, world, ticket.send, ticket.receive, ticket.arrange_R)


def check_landing(
    rank: int, world: int, send: list[int], receive: list[int], arrange_R: Tensor | None
) -> None:
    """Splits of ranks mirror each other, and the rows land without gap or overlap."""
    assert arrange_R is not None
    assert sorted(arrange_R.tolist()) == list(range(sum(receive)))
    every = [torch.zeros(2 * world, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(every, torch.tensor(send + receive))
    sends, receives = torch.stack(every)[:, :world], torch.stack(every)[:, world:]
    assert torch.equal(sends, receives.T)


def _tickets_are_those_of_the_layers(rank: int, world: int) -> None:
    dispatcher = AllToAllDispatcher(EXPERTS, Group.of(dist.group.WORLD))
    for single in (False, True):
        for empty in (False, True):
            routes = make_routes(rank, 2, single=single, empty=empty)
            assert_invariants(rank, world, dispatcher, routes)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_tickets_made_ahead_are_those_of_the_layers(world: int) -> None:
    run_ranks(_tickets_are_those_of_the_layers, world)


def test_tickets_made_ahead_on_one_rank_are_those_of_the_layers() -> None:
    routes = make_routes(0, 2, single=False, empty=False)
    assert_invariants(0, 1, LocalDispatcher(EXPERTS), routes)


def test_layers_that_decide_alike_share_their_tickets() -> None:
    (route,) = make_routes(0, 1, single=True, empty=False)
    schedules = [Schedule.serial(chunks) for chunks in (2, 2, 1)]
    (plan,) = plan_tickets([route], LocalDispatcher(EXPERTS), schedules=schedules)
    first, second, third = (plan.layer(layer) for layer in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert all(a is b for a, b in zip(first.forward, second.forward, strict=True))
    assert len(third.forward) == 1
