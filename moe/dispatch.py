"""How rows travel to their experts and back, in phases that separate arithmetic from bytes.

Read first: `compute.py` calls the phases in the order of a plan. `prepare` decides everything
that depends on the routing, once for all chunks of a layer, or of all layers where the routing is
known before layer 0 (`plan_ahead.py`); it holds the only host synchronisation.
`order`, `arrange` and `restore` (and their gradients) are local arithmetic; `send` and `give_back`
move bytes and return at once with a handle. The gradient of each phase is another phase.

Shapes:  T tokens of a chunk   K experts per token   N pairs that are kept   E experts, all ranks
         e experts of this rank   R rows received   P ranks of the group   C chunks   D width
         S sources of rows, in the order in which rows arrive: here the ranks of the group
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from gatewise.moe.ops.permute import sort_pairs
from gatewise.parallel.collectives import Group, RowExchange, exchange_ints

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
    count_Se: Tensor | None = None  # the same by source, on the host, where rows travel


@dataclass(frozen=True, slots=True)
class Piece:
    """The pairs of one chunk of one layer."""

    tokens: slice  # of this rank's tokens
    expert_TK: Tensor  # of these tokens; int64 in [0, E), -1 marks a dropped pair


def cut_pieces(expert_TK: Tensor, chunks: int) -> list[Piece]:
    """Cut a layer's tokens into `chunks` ranges of nearly equal length; some may be empty."""
    tokens = expert_TK.shape[0]
    ends = [tokens * (index + 1) // chunks for index in range(chunks)]
    cuts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [Piece(cut, expert_TK[cut]) for cut in cuts]


class Dispatcher(Protocol):
    """Moves rows between ranks; see the module's first lines for the phases."""

    num_local: int  # e
    first_expert: int  # global index of this rank's first expert

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> list[Ticket]:
        """Sort the pairs of each piece and agree with the other ranks on sizes, once for all.

        Args:
            pieces: equally many on all ranks: the chunks of a layer, or of all layers.
            may_drop: whether there can be dropped pairs.

        Returns:
            One ticket per piece.
        """
        ...

    def send(self, x_ND: Tensor, ticket: Ticket) -> RowExchange:
        """Start moving rows to their experts' ranks."""
        ...

    def give_back(self, y_RD: Tensor, ticket: Ticket) -> RowExchange:
        """Start moving rows back to where `send` took them from."""
        ...


class LocalDispatcher:
    """All experts on this rank: rows are sorted, nothing moves.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_local = num_experts
        self.first_expert = 0
        self._group = Group.of(None)

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> list[Ticket]:
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
        return tickets

    def send(self, x_ND: Tensor, ticket: Ticket) -> RowExchange:
        """Hand the rows on."""
        return RowExchange(x_ND, ticket.send, ticket.receive, self._group)

    def give_back(self, y_RD: Tensor, ticket: Ticket) -> RowExchange:
        """Hand the rows back."""
        return RowExchange(y_RD, ticket.receive, ticket.send, self._group)


class AllToAllDispatcher:
    """Experts spread evenly over the ranks of a group; exact sizes, no padding.

    Args:
        num_experts: E, a multiple of the group's size.
        group: rank p holds experts [p * E / P, (p + 1) * E / P).
    """

    def __init__(self, num_experts: int, group: Group) -> None:
        if num_experts % group.size:
            raise ValueError(
                f"num_experts is {num_experts}, which the group's {group.size} ranks do not "
                "divide; every rank holds equally many experts"
            )
        self.num_local = num_experts // group.size
        self.first_expert = group.rank * self.num_local
        self.group = group

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> list[Ticket]:
        """Sort the pairs of each piece and exchange all counts in one collective."""
        size, local = self.group.size, self.num_local
        sorts = [sort_pairs(piece.expert_TK, size * local) for piece in pieces]
        send_PCe = torch.stack([count_E.view(size, local) for *_, count_E in sorts], 1)
        with record_function("moe.exchange_counts"):
            receive_PCe = exchange_ints(send_PCe, self.group)
        # The one host synchronisation: the collectives need sizes as host integers.
        both = torch.stack((send_PCe, receive_PCe)).cpu()
        sent_CP = both[0].sum(2).T.tolist()
        received_CP = both[1].sum(2).T.tolist()
        tickets = []
        for index, (piece, (order_N, token_N, inverse_TK, _)) in enumerate(
            zip(pieces, sorts, strict=True)
        ):
            send, receive = sent_CP[index], received_CP[index]
            kept = sum(send)
            arrange_R, restore_R = _expert_major(both[1, :, index])
            count_e = both[1, :, index].sum(0)
            device = piece.expert_TK.device
            tickets.append(
                Ticket(
                    piece.tokens,
                    order_N[:kept],
                    token_N[:kept],
                    inverse_TK,
                    send,
                    receive,
                    arrange_R.to(device, non_blocking=True),
                    restore_R.to(device, non_blocking=True),
                    count_e.cumsum(0).int().to(device, non_blocking=True),
                    count_e.tolist(),
                    both[1, :, index],
                )
            )
        return tickets

    def send(self, x_ND: Tensor, ticket: Ticket) -> RowExchange:
        """Start the all-to-all towards the experts."""
        return RowExchange(x_ND, ticket.send, ticket.receive, self.group)

    def give_back(self, y_RD: Tensor, ticket: Ticket) -> RowExchange:
        """Start the all-to-all back to the tokens."""
        return RowExchange(y_RD, ticket.receive, ticket.send, self.group)


def _expert_major(count_Pe: Tensor) -> tuple[Tensor, Tensor]:
    """Return the permutation from (rank, expert) order to (expert, rank) order, and its inverse.

    Rows arrive rank by rank, each rank's sorted by expert; a grouped product wants all rows of an
    expert together. The order within an expert is by rank, then by token, which is the order that
    one rank with all tokens would have: sums do not depend on the layout.
    """
    start_Pe = (count_Pe.flatten().cumsum(0) - count_Pe.flatten()).view_as(count_Pe)
    count_N = count_Pe.T.flatten()
    offset_N = start_Pe.T.flatten() - (count_N.cumsum(0) - count_N)
    rows = torch.arange(int(count_N.sum()))
    arrange_R = rows + offset_N.repeat_interleave(count_N)
    restore_R = torch.empty_like(arrange_R).scatter_(0, arrange_R, rows)
    return arrange_R, restore_R
