"""The backward pass of the MoE layer: each stage a small method of its chunk.

Read `forward.py` first. Where this pass cuts the tokens otherwise than the forward pass did, the
experts still work on the same pieces (`tickets.py`), so what they kept is used as it lies.

Shapes:  T tokens on this rank   K experts per token   N pairs that are kept   R rows received
         D width   e experts of this rank   G, F see `ops/grouped_ffn.py`
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gatewise.moe.job import Job
from gatewise.moe.ops.grouped_ffn import ffn_backward_data, ffn_backward_weights
from gatewise.moe.ops.permute import combine_rows_backward, gather_rows_backward
from gatewise.moe.tickets import Part, PassTickets
from gatewise.moe.transit import StageFunction, Transit, run_stages
from gatewise.parallel.schedule.executor import Handle

__all__ = ["BackwardPass"]


class BackwardPass:
    """One backward pass; after it `dx_TD` and `dweight_TK` are gradients.

    Args:
        job: the forward pass's.
        tickets: of both passes.
        kept: `returned` and `received` of the forward pass.
        dy_TD: gradient of the output.
        weight_TK: combine weights.
        weights: of this rank's experts: first (e, G, D) and second (e, D, F).
        need_dx: whether the tokens' gradient is wanted.
    """

    def __init__(
        self,
        job: Job,
        tickets: PassTickets,
        kept: tuple[Sequence[Tensor], Sequence[tuple[Tensor, ...]]],
        *,
        dy_TD: Tensor,
        weight_TK: Tensor,
        weights: tuple[Tensor, Tensor],
        need_dx: bool,
    ) -> None:
        self._job, self._chunks = job, tickets.backward
        self._returned, self._received = kept
        self._dy_TD, self._weight_TK, self._weights = dy_TD, weight_TK, weights
        self._need_dx = need_dx
        self._transit = Transit(self._chunks)
        self._work: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}  # of each piece
        self._gradients = _WeightGradients(job, weights)
        self.dweight_TK = torch.empty_like(weight_TK)
        self.dx_TD = torch.empty_like(dy_TD) if len(self._chunks) > 1 else None

    def run(self) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """Run all stages by the plan.

        Returns:
            The gradients of tokens, combine weights, and the experts' weights; None where nobody
            wants them or they are in the sinks.
        """
        schedule, reduce, dispatcher = self._job.schedule, self._job.reduce, self._job.dispatcher
        sends_slices = reduce is not None and bool(schedule.reduce_shares)
        overlaps = sends_slices or (dispatcher.moves and len(self._chunks) > 1)
        run_stages(schedule.runners[1], self.stages(), self._job, overlaps=overlaps)
        if reduce is not None:
            reduce.finish()
        dx_TD = self.dx_TD if self._need_dx else None
        return dx_TD, self.dweight_TK, *self.weight_gradients()

    def stages(self) -> dict[str, StageFunction]:
        """Return what each stage does with a chunk."""
        move, dispatcher = self._transit.move, self._job.dispatcher
        return {
            "combine_grad": self._combine_grad,
            "collect_grad": partial(move, dispatcher.send),
            "scatter_grad": partial(move, dispatcher.gather),
            "experts_data": self._experts_data,
            "gather_grad": partial(move, dispatcher.scatter_sum),
            "dispatch_grad": partial(move, dispatcher.give_back),
            "experts_weights": self._experts_weights,
            "order_grad": self._order_grad,
            "reduce_window": self._reduce_window,
        }

    def weight_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the experts' weights once all stages have run.

        None where they are in the sinks.
        """
        return self._gradients.finish()

    def _combine_grad(self, index: int) -> None:
        chunk = self._chunks[index]
        ticket, returned_N = chunk.ticket, chunk.returned_N
        if returned_N is None:
            y_ND = self._returned[index]
        else:
            y_ND = self._returned[0].index_select(0, returned_N)
        dy_ND, self.dweight_TK[ticket.tokens] = combine_rows_backward(
            self._dy_TD[ticket.tokens],
            y_ND,
            ticket.order_N,
            ticket.inverse_TK,
            self._weight_TK[ticket.tokens],
        )
        self._transit.put(index, dy_ND)

    def _experts_data(self, index: int) -> None:
        chunk = self._chunks[index]
        dy_RD = self._transit.take_arranged(index)
        gradients = []
        for part in chunk.parts:
            part_RD = dy_RD[part.rows]
            dx_RD, work = ffn_backward_data(
                part_RD,
                part.end_e,
                *self._weights,
                self._job.activation,
                self._received[part.piece][1:],
                # ranks must agree on the collectives, so with several ranks it is always sent
                need_dx=self._need_dx or chunk.ticket.arrange_R is not None,
                count_list=part.counts,
            )
            self._work[part.piece] = part_RD, work
            if dx_RD is not None:
                gradients.append(dx_RD)
        if gradients:
            self._transit.put_restored(index, gradients)

    def _experts_weights(self, index: int) -> None:
        for part in self._chunks[index].parts:
            dy_RD, work = self._work.pop(part.piece)
            self._gradients.add(dy_RD, self._received[part.piece][0], work, part)

    def _order_grad(self, index: int) -> None:
        if index not in self._transit:
            return
        ticket = self._chunks[index].ticket
        part_TD = gather_rows_backward(self._transit.take(index), ticket.inverse_TK)
        if self.dx_TD is None:
            self.dx_TD = part_TD
        else:
            self.dx_TD[ticket.tokens] = part_TD

    def _reduce_window(self, index: int) -> Handle | None:
        return None if self._job.reduce is None else self._job.reduce.send(index)


class _WeightGradients:
    """Collects the experts' weight gradients of all chunks, in buffers or in the sinks."""

    def __init__(self, job: Job, weights: tuple[Tensor, Tensor]) -> None:
        self._sinks = sinks = job.sinks
        self._scale = job.gradient_scale
        self._memory = job.memory
        self._weights = weights
        self._buffers: tuple[Tensor | None, Tensor | None] = (None, None)
        self._accumulate = False
        if sinks is not None:
            self._buffers = (sinks[0].slot.gradient, sinks[1].slot.gradient)
            self._accumulate = not sinks[0].slot.fresh

    def add(self, dy_RD: Tensor, x_RD: Tensor, work: tuple[Tensor, Tensor], part: Part) -> None:
        """Add the gradients of one piece."""
        self._buffers = ffn_backward_weights(
            dy_RD,
            x_RD,
            part.end_e,
            *self._weights,
            work,
            dw_in_eGD=self._buffers[0],
            dw_out_eDF=self._buffers[1],
            accumulate=self._accumulate,
            count_list=part.counts,
            memory=self._memory,
        )
        self._accumulate = True

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what autograd shall accumulate: nothing, where sinks took it."""
        if self._sinks is None:
            if self._scale != 1.0:
                for buffer in self._buffers:
                    if buffer is not None:
                        buffer.mul_(self._scale)
            return self._buffers
        for sink in self._sinks:
            sink.written()
        return None, None
