"""The forward pass of the MoE layer: each stage a small method of its chunk.

Read `stages.py` and `tickets.py` first.

Shapes:  T tokens on this rank   K experts per token   N pairs that are kept   R rows received
         D width   e experts of this rank   G, F see `ops/grouped_ffn.py`
"""

from functools import partial

import torch
from torch import Tensor

from gatewise.moe.job import Job
from gatewise.moe.ops.grouped_ffn import ffn_forward
from gatewise.moe.ops.permute import combine_rows, gather_rows
from gatewise.moe.tickets import PassTickets
from gatewise.moe.transit import StageFunction, Transit, run_stages

__all__ = ["ForwardPass"]


class ForwardPass:
    """One forward pass.

    After `run`, `y_TD` is the output; `returned` holds the rows (N, D) that came back, of each
    chunk, or of all of them side by side where the backward pass cuts otherwise; `received` holds,
    of each piece, the experts' inputs (R, D) and what else they keep.

    Args:
        job: routing, dispatcher and plans.
        tickets: of both passes.
        x_TD: tokens.
        weight_TK: combine weights.
        weights: of this rank's experts: first (e, G, D) and second (e, D, F).
    """

    def __init__(
        self,
        job: Job,
        tickets: PassTickets,
        x_TD: Tensor,
        weight_TK: Tensor,
        weights: tuple[Tensor, Tensor],
    ) -> None:
        self._job, self._chunks = job, tickets.forward
        self._x_TD, self._weight_TK, self._weights = x_TD, weight_TK, weights
        self.y_TD = torch.empty_like(x_TD) if len(self._chunks) > 1 else None
        self._transit = Transit(self._chunks)
        self.received: list[tuple[Tensor, ...]] = [()] * tickets.pieces
        self.returned: list[Tensor] = [x_TD] * len(self._chunks)  # each is replaced
        if len(self._chunks) > 1 and tickets.forward is not tickets.backward:
            rows = [chunk.ticket.order_N.shape[0] for chunk in self._chunks]
            self.returned = [x_TD.new_empty(sum(rows), x_TD.shape[1])]
            self._places = self.returned[0].split(rows)
        else:
            self._places = ()

    def run(self) -> Tensor:
        """Run all stages by the plan and return the output (T, D)."""
        runner = self._job.schedule.runners[0]
        overlaps = self._job.dispatcher.moves and len(self._chunks) > 1
        run_stages(runner, self.stages(), self._job, overlaps=overlaps)
        assert self.y_TD is not None
        return self.y_TD

    def stages(self) -> dict[str, StageFunction]:
        """Return what each stage does with a chunk."""
        move, dispatcher = self._transit.move, self._job.dispatcher
        return {
            "order": self._order,
            "dispatch": partial(move, dispatcher.send),
            "gather": partial(move, dispatcher.gather),
            "experts": self._experts,
            "scatter": partial(move, dispatcher.scatter_sum),
            "collect": partial(move, dispatcher.give_back),
            "combine": self._combine,
        }

    def _order(self, index: int) -> None:
        ticket = self._chunks[index].ticket
        self._transit.put(index, gather_rows(self._x_TD[ticket.tokens], ticket.token_N))

    def _experts(self, index: int) -> None:
        x_RD = self._transit.take_arranged(index)
        outputs = []
        for part in self._chunks[index].parts:
            part_RD = x_RD[part.rows]
            y_RD, kept = ffn_forward(
                part_RD,
                part.end_e,
                *self._weights,
                self._job.activation,
                count_list=part.counts,
            )
            self.received[part.piece] = (part_RD, *kept)
            outputs.append(y_RD)
        self._transit.put_restored(index, outputs)

    def _combine(self, index: int) -> None:
        ticket = self._chunks[index].ticket
        y_ND = self._transit.take(index)
        if self._places:
            self._places[index].copy_(y_ND)
        else:
            self.returned[index] = y_ND
        part_TD = combine_rows(y_ND, ticket.inverse_TK, self._weight_TK[ticket.tokens])
        if self.y_TD is None:
            self.y_TD = part_TD
        else:
            self.y_TD[ticket.tokens] = part_TD
