"""How rows travel to their experts and back, in phases that separate arithmetic from bytes.

Read first: `compute.py` calls the phases in the order of a plan. `prepare` decides everything
that depends on the routing, once for all chunks of a layer, or of all layers where the routing is
known before layer 0 (`plan_ahead.py`); it holds the only host synchronisation.
`order`, `arrange` and `restore` (and their gradients) are local arithmetic. `send` and `give_back`
move rows between ranks with different experts; `gather` and `scatter_sum` between ranks that hold
parts of the same ones, where there are such. All four return at once with a handle. The gradient
of each phase is another phase.

Shapes:  T tokens of a chunk   K experts per token   N pairs that are kept   E experts, all ranks
         e experts of this rank   R rows received   P ranks among which rows travel
         S ranks that split an expert   C chunks   D width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from gatewise.moe.ops.permute import sort_pairs
from gatewise.parallel.collectives import (
    NO_GROUP,
    Group,
    RowExchange,
    Rows,
    RowSum,
    gather_uneven,
    start_ints,
)
from gatewise.parallel.dims import ExpertGroups
from gatewise.parallel.exchange import exchange_rows

__all__ = [
    "AllToAllDispatcher",
    "Dispatcher",
    "LocalDispatcher",
    "Piece",
    "Ticket",
    "cut_pieces",
]


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where the rows of one chunk go, and how they come back."""

    tokens: slice  # of this rank's tokens
    order_N: Tensor  # flat pair of each row, rows sorted by expert
    token_N: Tensor  # token of each row, counted within the chunk
    inverse_TK: Tensor  # row of each pair, -1 where it was dropped
    send: list[int]  # rows for each rank
    receive: list[int]  # rows from each rank
    arrange_R: Tensor | None  # expert-major row -> received row; None: they are the same
    restore_R: Tensor | None  # received row -> expert-major row
    end_e: Tensor  # int32, where each local expert's rows end
    counts: list[int] | None  # rows of each local expert, where the host knows them anyway
    count_Se: Tensor | None = None  # the same by source rank, on the host, where rows travel
    shard_rows: Sequence[int] = ()  # rows that each rank of the shard group received
    between: list[list[int]] | None = None  # rows from each rank to each, if others pass them on


@dataclass(frozen=True, slots=True)
class Piece:
    """The pairs of one chunk of one layer."""

    tokens: slice  # of this rank's tokens
    expert_TK: Tensor  # of these tokens; int64 in [0, E), -1 marks a dropped pair


def cut_pieces(expert_TK: Tensor, cuts: int | Sequence[Fraction]) -> list[Piece]:
    """Cut a layer's tokens into ranges; some may be empty.

    Args:
        expert_TK: of these tokens.
        cuts: number of ranges of nearly equal length, or the part of the tokens at which each ends.
    """
    tokens = expert_TK.shape[0]
    ends = [Fraction(i + 1, cuts) for i in range(cuts)] if isinstance(cuts, int) else cuts
    places = [0, *(tokens * end.numerator // end.denominator for end in ends)]
    return [Piece(slice(*cut), expert_TK[slice(*cut)]) for cut in pairwise(places)]


class Dispatcher(Protocol):
    """Moves rows between ranks; see the module's first lines for the phases."""

    num_local: int  # e
    first_expert: int  # global index of this rank's first expert
    is_sharded: bool  # whether other ranks hold parts of the same experts
    moves: bool  # whether rows travel between ranks

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> Callable[[], list[Ticket]]:
        """Sort the pairs of each piece and start to agree with the other ranks on sizes.

        Args:
            pieces: equally many on all ranks: the chunks of a layer, or of all layers.
            may_drop: whether there can be dropped pairs.

        Returns:
            What waits for the other ranks, once for all pieces, and gives one ticket per piece.
        """
        ...

    def send(self, x_ND: Tensor, ticket: Ticket) -> Rows:
        """Start moving rows to their experts' ranks."""
        ...

    def give_back(self, y_RD: Tensor, ticket: Ticket) -> Rows:
        """Start moving rows back to where `send` took them from."""
        ...

    def gather(self, x_RD: Tensor, ticket: Ticket) -> Rows:
        """Start giving each rank that holds a part of the same experts the rows of all of them."""
        ...

    def scatter_sum(self, y_RD: Tensor, ticket: Ticket) -> Rows:
        """Start adding up what these ranks made of the rows; each gets the sums of its own."""
        ...


class LocalDispatcher:
    """All experts on this rank: rows are sorted, nothing moves.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_local = num_experts
        self.first_expert = 0
        self.is_sharded = False
        self.moves = False

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> Callable[[], list[Ticket]]:
        """Sort the pairs of each piece; on a GPU the host waits only where pairs may be dropped."""
        sorts = [sort_pairs(piece.expert_TK, self.num_local) for piece in pieces]
        known = may_drop or any(piece.expert_TK.device.type == "cpu" for piece in pieces)
        counts_Ce = torch.stack([count_E for *_, count_E in sorts]).tolist() if known else None
        tickets = []
        for index, (piece, (order_N, token_N, inverse_TK, count_E)) in enumerate(
            zip(pieces, sorts, strict=True)
        ):
            counts = counts_Ce[index] if counts_Ce is not None else None
            kept = order_N.shape[0] if counts is None else sum(counts)  # others were dropped
            tickets.append(
                Ticket(
                    piece.tokens,
                    order_N[:kept],
                    token_N[:kept],
                    inverse_TK,
                    [],
                    [],
                    None,
                    None,
                    count_E.cumsum(0).int(),
                    counts,
                )
            )
        return lambda: tickets

    def send(self, x_ND: Tensor, ticket: Ticket) -> Rows:
        """Hand the rows on."""
        return RowExchange(x_ND, ticket.send, ticket.receive, NO_GROUP)

    def give_back(self, y_RD: Tensor, ticket: Ticket) -> Rows:
        """Hand the rows back."""
        return RowExchange(y_RD, ticket.receive, ticket.send, NO_GROUP)

    def gather(self, x_RD: Tensor, ticket: Ticket) -> Rows:
        """Hand the rows on."""
        return gather_uneven(x_RD, ticket.shard_rows, NO_GROUP)

    def scatter_sum(self, y_RD: Tensor, ticket: Ticket) -> Rows:
        """Hand the rows on."""
        return RowSum(y_RD, ticket.shard_rows, NO_GROUP)


class AllToAllDispatcher:
    """Experts spread evenly over the ranks of a group; exact sizes, no padding.

    With a shard group each rank holds a part of the width of its experts: rows are gathered over
    that group before the experts, and their outputs, which are parts of a sum, added up after.

    Args:
        num_experts: E, a multiple of the number of ranks among which rows travel.
        groups: rank p of `rows` holds experts [p * E / P, (p + 1) * E / P); a plain group spreads
            whole experts over it.
    """

    def __init__(self, num_experts: int, groups: Group | ExpertGroups) -> None:
        groups = groups if isinstance(groups, ExpertGroups) else ExpertGroups.of(groups)
        rows = groups.rows
        if num_experts % rows.size:
            raise ValueError(
                f"num_experts is {num_experts}, which the group's {rows.size} ranks do not "
                "divide; every rank holds equally many experts"
            )
        self.num_local = num_experts // rows.size
        self.first_expert = rows.rank * self.num_local
        self.groups = groups
        self.group = rows
        self.is_sharded = groups.shard.size > 1
        self.moves = groups.everyone.size > 1

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> Callable[[], list[Ticket]]:
        """Sort the pairs of each piece and start to exchange all counts in one collective."""
        size, shards, local = self.group.size, self.groups.shard.size, self.num_local
        sorts = [sort_pairs(piece.expert_TK, size * local) for piece in pieces]
        sent_PCe = torch.stack([count_E.view(size, local) for *_, count_E in sorts], 1)
        message_PCe = sent_PCe
        if self.groups.dispatch != "direct":  # others pass our rows on, and must know their numbers
            totals_PCP = sent_PCe.sum(2).T.expand(size, -1, -1)
            message_PCe = torch.cat((sent_PCe, totals_PCP), 2)
        # every rank that holds a part of an expert needs its counts
        message_QCe = message_PCe
        if shards > 1:
            message_QCe = message_PCe.repeat_interleave(shards, 0)
        arrived = start_ints(message_QCe, self.groups.everyone)

        def agree() -> list[Ticket]:
            with record_function("moe.exchange_counts"):
                received_QCe = arrived()
            return self._tickets(pieces, sorts, message_QCe, received_QCe)

        return agree

    def _tickets(
        self,
        pieces: Sequence[Piece],
        sorts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
        message_QCe: Tensor,
        received_QCe: Tensor,
    ) -> list[Ticket]:
        """Return the tickets, once it is known what the other ranks send."""
        size, shards, local = self.group.size, self.groups.shard.size, self.num_local
        # The one host synchronisation: the collectives need sizes as host integers.
        both = torch.stack((message_QCe, received_QCe)).cpu()
        both = both.view(2, size, shards, len(pieces), -1)
        sent_CP = both[0, :, 0, :, :local].sum(2).T.tolist()
        count_PSCe = both[1, ..., :local]
        rows_CSP = count_PSCe.sum(3).permute(2, 1, 0)
        received_CP = rows_CSP[:, self.groups.shard.rank].tolist()
        shard_rows_CS = rows_CSP.sum(2).tolist()
        between_CPP = both[1, :, self.groups.shard.rank, :, local:].transpose(0, 1).tolist()
        direct = self.groups.dispatch == "direct"
        tickets = []
        for index, (piece, (order_N, token_N, inverse_TK, _)) in enumerate(
            zip(pieces, sorts, strict=True)
        ):
            count_PSe = count_PSCe[:, :, index]
            arrange_R, restore_R = _expert_major(count_PSe)
            count_e = count_PSe.sum((0, 1))
            device = piece.expert_TK.device
            tickets.append(
                Ticket(
                    piece.tokens,
                    order_N[: sum(sent_CP[index])],
                    token_N[: sum(sent_CP[index])],
                    inverse_TK,
                    sent_CP[index],
                    received_CP[index],
                    arrange_R.to(device, non_blocking=True),
                    restore_R.to(device, non_blocking=True),
                    count_e.cumsum(0).int().to(device, non_blocking=True),
                    count_e.tolist(),
                    count_PSe.flatten(0, 1),
                    shard_rows_CS[index],
                    None if direct else between_CPP[index],
                )
            )
        return tickets

    def send(self, x_ND: Tensor, ticket: Ticket) -> Rows:
        """Start the exchange towards the experts."""
        return exchange_rows(x_ND, ticket.send, ticket.receive, ticket.between, self.groups)

    def give_back(self, y_RD: Tensor, ticket: Ticket) -> Rows:
        """Start the exchange back to the tokens."""
        between = ticket.between
        if between is not None:
            between = [list(column) for column in zip(*between, strict=True)]
        return exchange_rows(y_RD, ticket.receive, ticket.send, between, self.groups)

    def gather(self, x_RD: Tensor, ticket: Ticket) -> Rows:
        """Start the all-gather of the rows that the ranks of the shard group received."""
        return gather_uneven(x_RD, ticket.shard_rows, self.groups.shard)

    def scatter_sum(self, y_RD: Tensor, ticket: Ticket) -> Rows:
        """Start the sum over the shard group; each rank gets what it had received."""
        return RowSum(y_RD, ticket.shard_rows, self.groups.shard)


def _expert_major(count_PSe: Tensor) -> tuple[Tensor, Tensor]:
    """Return the permutation from the order of arrival to expert-major order, and its inverse.

    Rows lie by shard rank, within it by the rank that they came from, each rank's sorted by expert;
    a grouped product wants all rows of an expert together. The order within an expert is by rank,
    then by token, which is the order that one rank with all tokens would have: sums do not depend
    on the layout.
    """
    count_SPe = count_PSe.transpose(0, 1)
    start_SPe = (count_SPe.flatten().cumsum(0) - count_SPe.flatten()).view(count_SPe.shape)
    count_N = count_PSe.permute(2, 0, 1).flatten()
    start_N = start_SPe.permute(2, 1, 0).flatten()
    offset_N = start_N - (count_N.cumsum(0) - count_N)
    rows = torch.arange(int(count_N.sum()))
    arrange_R = rows + offset_N.repeat_interleave(count_N)
    restore_R = torch.empty_like(arrange_R).scatter_(0, arrange_R, rows)
    return arrange_R, restore_R
