"""The tickets of both passes of a layer, also where the passes cut the tokens differently.

Read `dispatch.py` first. A pass cuts a rank's tokens into ranges, its chunks. Where both passes cut
alike they share tickets. Else the backward pass has tickets of its own, made of the same routing in
the same exchange of counts, and both passes let the experts work on pieces: the ranges between any
two neighbouring cuts. A chunk of either pass is some neighbouring pieces, so the backward pass
finds what the forward pass kept of a piece as it lies, in whatever order the kernels keep it.

Shapes:  T tokens on this rank   K experts per token   N pairs that are kept   R rows received
         e experts of this rank   S sources of rows   A pieces
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from gatewise.moe.dispatch import Piece, Ticket, cut_pieces
from gatewise.moe.stages import Schedule
from gatewise.parallel.schedule.plan import Plan

__all__ = ["Chunk", "Part", "PassPieces", "PassTickets", "chunk_ends"]

_DENOMINATOR = 10**6  # shares that differ by less are one


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one piece among those of a chunk, sorted by expert."""

    piece: int
    rows: slice
    end_e: Tensor  # int32, where each local expert's rows end, counted within the part
    counts: list[int] | None  # rows of each local expert, where the host knows them


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a pass; its ticket arranges rows by part, then expert, source and token."""

    ticket: Ticket
    parts: tuple[Part, ...]
    returned_N: Tensor | None = None  # of each row: its place among all that came back in forward


@dataclass(frozen=True, slots=True)
class PassTickets:
    """The chunks of each pass, and the number of pieces that these consist of."""

    forward: tuple[Chunk, ...]
    backward: tuple[Chunk, ...]  # the same object where both passes cut alike
    pieces: int


def chunk_ends(plan: Plan) -> tuple[Fraction, ...]:
    """Return where each chunk of a plan ends, as a part of the tokens."""
    if not plan.shares:
        return tuple(Fraction(chunk + 1, plan.chunks) for chunk in range(plan.chunks))
    ends = [Fraction(sum(plan.shares[: chunk + 1])) for chunk in range(plan.chunks - 1)]
    return (*(end.limit_denominator(_DENOMINATOR) for end in ends), Fraction(1))


@dataclass(frozen=True, slots=True)
class PassPieces:
    """How both passes cut one layer's tokens.

    The number of pieces depends on the plans alone, so that ranks with different numbers of tokens
    exchange equally many counts.
    """

    forward: tuple[Fraction, ...]
    backward: tuple[Fraction, ...]

    @staticmethod
    def of(schedule: Schedule) -> "PassPieces":
        """Return the cuts of both plans; without gradients no backward pass follows."""
        forward = chunk_ends(schedule.forward)
        has_backward = torch.is_grad_enabled()
        return PassPieces(forward, chunk_ends(schedule.backward) if has_backward else forward)

    @property
    def between(self) -> tuple[Fraction, ...]:
        """The ends of the pieces between neighbouring cuts of either pass."""
        return tuple(sorted({*self.forward, *self.backward}))

    @property
    def _lists(self) -> list[tuple[Fraction, ...]]:
        """The different cuts for which tickets are needed."""
        return list(dict.fromkeys((self.forward, self.backward, self.between)))

    def cut(self, expert_TK: Tensor) -> list[Piece]:
        """Return all ranges to prepare tickets for; some may be empty."""
        return [piece for ends in self._lists for piece in cut_pieces(expert_TK, ends)]

    def tickets(self, prepared: Sequence[Ticket]) -> PassTickets:
        """Return the chunks of both passes.

        Args:
            prepared: tickets of the ranges from `cut`, in order.
        """
        found: dict[tuple[Fraction, ...], tuple[Ticket, ...]] = {}
        rest = tuple(prepared)
        for ends in self._lists:
            found[ends], rest = rest[: len(ends)], rest[len(ends) :]
        assert not rest
        if self.forward == self.backward:
            whole = tuple(
                Chunk(ticket, (Part(index, slice(None), ticket.end_e, ticket.counts),))
                for index, ticket in enumerate(found[self.forward])
            )
            return PassTickets(whole, whole, len(whole))
        count_ASe = _counts(found[self.between])
        chunks = {
            ends: [
                _in_parts(ticket, members, count_ASe)
                for ticket, members in zip(found[ends], _members(self.between, ends), strict=True)
            ]
            for ends in (self.forward, self.backward)
        }
        row_TK = _rows_of_pairs(found[self.forward])
        backward = (
            replace(
                chunk,
                returned_N=row_TK[chunk.ticket.tokens]
                .flatten()
                .index_select(0, chunk.ticket.order_N),
            )
            for chunk in chunks[self.backward]
        )
        return PassTickets(tuple(chunks[self.forward]), tuple(backward), len(self.between))


def _counts(tickets: Sequence[Ticket]) -> Tensor:
    """Return the rows (A, S, e) of each piece and local expert by source, on the host.

    Where nothing was exchanged they come from the device: the one wait of the host for it.
    """
    known = [ticket.count_Se for ticket in tickets if ticket.count_Se is not None]
    if len(known) == len(tickets):
        return torch.stack(known)
    end_Ae = torch.stack([ticket.end_e for ticket in tickets]).cpu().long()
    return end_Ae.diff(prepend=end_Ae.new_zeros(len(tickets), 1)).unsqueeze(1)


def _members(between: Sequence[Fraction], ends: Sequence[Fraction]) -> list[range]:
    """Return which pieces each chunk consists of."""
    places = [0, *(between.index(end) + 1 for end in ends)]
    return [range(start, end) for start, end in pairwise(places)]


def _in_parts(ticket: Ticket, members: range, count_ASe: Tensor) -> Chunk:
    """Return a chunk whose rows are arranged piece by piece.

    Args:
        ticket: of the chunk; it arranges rows by expert, source and token.
        members: the pieces of the chunk.
        count_ASe: rows of every piece, on the host.
    """
    device = ticket.end_e.device
    count_aSe = count_ASe[members.start : members.stop]
    parts, start = [], 0
    for piece, count_Se in zip(members, count_aSe, strict=True):
        count_e = count_Se.sum(0)
        end = start + int(count_e.sum())
        end_e = count_e.cumsum(0).int().to(device, non_blocking=True)
        parts.append(Part(piece, slice(start, end), end_e, count_e.tolist()))
        start = end
    if len(parts) == 1:
        return Chunk(ticket, (replace(parts[0], rows=slice(None)),))
    count_eSa = count_aSe.permute(2, 1, 0)
    start_eSa = (count_eSa.flatten().cumsum(0) - count_eSa.flatten()).view(count_eSa.shape)
    count_N = count_aSe.transpose(1, 2).flatten()  # by piece, expert, source
    start_N = start_eSa.permute(2, 0, 1).flatten()
    shift_N = start_N - (count_N.cumsum(0) - count_N)
    row_R = (torch.arange(start) + shift_N.repeat_interleave(count_N)).to(device, non_blocking=True)
    arrange_R = row_R if ticket.arrange_R is None else ticket.arrange_R.index_select(0, row_R)
    return Chunk(replace(ticket, arrange_R=arrange_R, restore_R=None), tuple(parts))


def _rows_of_pairs(forward: Sequence[Ticket]) -> Tensor:
    """Return the row of each pair where the rows of all forward chunks lie side by side."""
    parts, start = [], 0
    for ticket in forward:
        parts.append(ticket.inverse_TK + start)  # a dropped pair's place is never asked for
        start += ticket.order_N.shape[0]
    return torch.cat(parts)
