"""Tickets of passes that cut differently: the experts meet the same rows in both."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from gatewise.moe.dispatch import LocalDispatcher, Piece, Ticket
from gatewise.moe.stages import BACKWARD, FORWARD, Schedule
from gatewise.moe.tickets import PassPieces, chunk_ends
from gatewise.parallel.schedule.plan import Plan, StageGraph, staged_plan


def plan(graph: StageGraph, cut: int | tuple[float, ...]) -> Plan:
    if isinstance(cut, int):
        return staged_plan(graph, cut)
    return replace(staged_plan(graph, len(cut)), shares=cut)


def cut_by(forward: int | tuple[float, ...], backward: int | tuple[float, ...]) -> PassPieces:
    return PassPieces.of(Schedule(plan(FORWARD, forward), plan(BACKWARD, backward)))


def test_equal_parts_and_shares_end_where_they_say() -> None:
    assert chunk_ends(plan(FORWARD, 3)) == (Fraction(1, 3), Fraction(2, 3), Fraction(1))
    assert chunk_ends(plan(FORWARD, (0.25, 0.75))) == (Fraction(1, 4), Fraction(1))
    thirds = (1 / 3, 1 / 3, 1 / 3)  # floats that do not sum to 1
    assert chunk_ends(plan(FORWARD, thirds)) == chunk_ends(plan(FORWARD, 3))


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 50])
@pytest.mark.parametrize(
    ("forward", "backward", "pieces"),
    [
        (2, 2, 2),
        (1, 3, 1 + 3),
        (2, 4, 2 + 4),
        (2, 3, 2 + 3 + 4),
        ((0.2, 0.8), (0.5, 0.5), 2 + 2 + 3),
        ((0.5, 0.5), 2, 2),
    ],
)
def test_the_number_of_pieces_depends_on_the_plans_alone(
    tokens: int, forward: int, backward: int, pieces: int
) -> None:
    cuts = cut_by(forward, backward)
    cut = cuts.cut(torch.zeros(tokens, 2, dtype=torch.int64))
    assert len(cut) == pieces
    first = [token for piece in cut[: len(cuts.forward)] for token in range(tokens)[piece.tokens]]
    assert first == list(range(tokens))


def test_equal_cuts_share_their_tickets() -> None:
    cuts = cut_by(2, (0.5, 0.5))
    expert_TK = torch.tensor([[0], [1], [0], [1]])
    tickets = cuts.tickets(LocalDispatcher(2).prepare(cuts.cut(expert_TK), may_drop=False)())
    assert tickets.forward is tickets.backward
    assert [part.piece for chunk in tickets.forward for part in chunk.parts] == [0, 1]


def test_no_tickets_are_made_for_a_backward_pass_that_does_not_come() -> None:
    expert_TK = torch.tensor([[0], [1], [0], [1]])
    with torch.no_grad():
        cuts = cut_by(2, 3)
    assert len(cuts.cut(expert_TK)) == 2
    assert len(cut_by(2, 3).cut(expert_TK)) == 2 + 3 + 4


@pytest.mark.parametrize(("forward", "backward"), [(1, 3), (3, 1), (2, 3), (4, 2), (3, 4)])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_rows_that_came_back_are_found_by_their_pairs(
    forward: int, backward: int, dropped: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(13, 4, generator=generator).topk(2).indices
    expert_TK[torch.rand(13, 2, generator=generator) < dropped] = -1
    cuts = cut_by(forward, backward)
    dispatcher = LocalDispatcher(4)
    tickets = cuts.tickets(dispatcher.prepare(cuts.cut(expert_TK), may_drop=dropped > 0)())
    returned = torch.cat(  # the pair of each row that comes back in the forward pass
        [2 * chunk.ticket.tokens.start + chunk.ticket.order_N for chunk in tickets.forward]
    )
    for chunk in tickets.backward:
        wanted = 2 * chunk.ticket.tokens.start + chunk.ticket.order_N
        assert chunk.returned_N is not None
        assert torch.equal(returned[chunk.returned_N], wanted)


class Sources:
    """Makes the ticket that a rank gets which receives from several others."""

    def __init__(self, expert_STK: torch.Tensor, num_experts: int) -> None:
        self.expert_STK, self.num_experts = expert_STK, num_experts

    def rows(self, tokens: slice) -> list[tuple[int, int, int, int]]:
        """Return (source, expert, token, choice) of each row in the order of arrival."""
        first = tokens.start
        return sorted(
            (source, expert, first + token, choice)
            for source, expert_TK in enumerate(self.expert_STK[:, tokens].tolist())
            for token, chosen in enumerate(expert_TK)
            for choice, expert in enumerate(chosen)
        )

    def ticket(self, piece: Piece) -> Ticket:
        rows = self.rows(piece.tokens)
        arrange = sorted(range(len(rows)), key=lambda i: (rows[i][1], rows[i][0], rows[i][2:]))
        count_Se = torch.zeros(len(self.expert_STK), self.num_experts, dtype=torch.int64)
        for source, expert, _, _ in rows:
            count_Se[source, expert] += 1
        count_e = count_Se.sum(0)
        own = LocalDispatcher(self.num_experts).prepare([piece], may_drop=False)()[0]
        arrange_R = torch.tensor(arrange, dtype=torch.int64)
        return replace(
            own,
            arrange_R=arrange_R,
            restore_R=torch.argsort(arrange_R),
            end_e=count_e.cumsum(0).int(),
            counts=count_e.tolist(),
            count_Se=count_Se,
        )


@pytest.mark.parametrize(("forward", "backward"), [(1, 3), (2, 3), ((0.2, 0.8), (0.6, 0.4))])
def test_both_passes_meet_the_same_rows_in_every_piece(
    forward: int | tuple[float, ...], backward: int | tuple[float, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    expert_STK = torch.rand(3, 11, 5, generator=generator).topk(2, -1).indices
    expert_STK[1:, :, 0] = 4  # most rows are of one expert
    sources = Sources(expert_STK, 5)
    cuts = cut_by(forward, backward)
    tickets = cuts.tickets([sources.ticket(piece) for piece in cuts.cut(expert_STK[0])])
    met: dict[int, list[list[tuple[int, int, int, int]]]] = {}
    for chunk in (*tickets.forward, *tickets.backward):
        arrived = sources.rows(chunk.ticket.tokens)
        assert chunk.ticket.arrange_R is not None
        rows = [arrived[place] for place in chunk.ticket.arrange_R.tolist()]
        for part in chunk.parts:
            mine = rows[part.rows]
            assert mine == sorted(mine, key=lambda row: (row[1], row[0], row[2:]))
            counts = [sum(expert == row[1] for row in mine) for expert in range(5)]
            assert part.counts == counts
            assert part.end_e.tolist() == torch.tensor(counts).cumsum(0).tolist()
            met.setdefault(part.piece, []).append(mine)
    assert sorted(met) == list(range(tickets.pieces))
    assert all(len(both) == 2 and both[0] == both[1] for both in met.values())
