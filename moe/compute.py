"""The MoE layer's computation as stages: forward and backward, each run by a plan.

Read `parallel/schedule/plan.py` first. The layer is one autograd function. Its forward pass runs
five stages per chunk of tokens, its backward pass six, and the order in which the stages of
different chunks run is the plan's. The serial layer is the plan with one chunk, not other code.

    forward   order -> dispatch -> experts -> collect -> combine
    backward  combine_grad -> collect_grad -> experts_data -> dispatch_grad -> order_grad
                                                  `-> experts_weights

`dispatch`, `collect` and their gradients move rows between ranks (lane "inter"); everything else
is arithmetic of this rank (lane "compute"). `experts_weights` waits for nobody and nobody waits
for it, so it can hide `dispatch_grad`.

Shapes:  T tokens on this rank   K experts per token   N pairs that are kept   R rows received
         D width   E experts, all ranks   e experts of this rank   G, F see `ops/grouped_ffn.py`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from gatewise.moe.config import Activation
from gatewise.moe.dispatch import Dispatcher, Ticket, cut_pieces
from gatewise.moe.ops.grouped_ffn import ffn_backward_data, ffn_backward_weights, ffn_forward
from gatewise.moe.ops.permute import (
    combine_rows,
    combine_rows_backward,
    gather_rows,
    gather_rows_backward,
)
from gatewise.moe.ops.reuse import ReusedMemory
from gatewise.parallel.buckets import Slot
from gatewise.parallel.collectives import RowExchange
from gatewise.parallel.schedule.executor import run_plan
from gatewise.parallel.schedule.plan import Plan, Stage, StageGraph, Task, serial_plan

__all__ = ["BACKWARD", "FORWARD", "GradientSink", "Job", "Schedule", "moe_compute"]

FORWARD = StageGraph(
    (
        Stage("order", "compute"),
        Stage("dispatch", "inter", ("order",)),
        Stage("experts", "compute", ("dispatch",)),
        Stage("collect", "inter", ("experts",)),
        Stage("combine", "compute", ("collect",)),
    )
)
BACKWARD = StageGraph(
    (
        Stage("combine_grad", "compute"),
        Stage("collect_grad", "inter", ("combine_grad",)),
        Stage("experts_data", "compute", ("collect_grad",)),
        Stage("dispatch_grad", "inter", ("experts_data",)),
        Stage("experts_weights", "compute", ("experts_data",)),
        Stage("order_grad", "compute", ("dispatch_grad",)),
    )
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The plans of both passes; they cut the tokens into equally many chunks."""

    forward: Plan
    backward: Plan

    def __post_init__(self) -> None:
        self.forward.check(FORWARD)
        self.backward.check(BACKWARD)
        if self.forward.shares or self.backward.shares:
            raise ValueError("this layer cuts the tokens evenly; give it plans without shares")
        if self.forward.chunks != self.backward.chunks:
            raise ValueError(
                f"forward plan has {self.forward.chunks} chunks, backward plan "
                f"{self.backward.chunks}; they must be equal"
            )

    @staticmethod
    def serial(chunks: int = 1) -> "Schedule":
        """Return the schedule that finishes each chunk before the next."""
        return Schedule(serial_plan(FORWARD, chunks), serial_plan(BACKWARD, chunks))


@dataclass(frozen=True, slots=True)
class GradientSink:
    """Where a weight's gradient is written without passing through autograd.

    Large expert gradients are written once, straight into the reducer's bucket.
    """

    slot: Slot  # of the weight; its `fresh` tells whether to overwrite or to add
    written: Callable[[], None]  # called when this pass's gradient is complete


@dataclass(frozen=True, slots=True)
class Job:
    """What one call needs beside its differentiable inputs."""

    expert_TK: Tensor  # int64; -1 is a dropped pair
    may_drop: bool
    activation: Activation
    dispatcher: Dispatcher
    schedule: Schedule
    sinks: tuple[GradientSink, GradientSink] | None = None  # of w_in and w_out
    gradient_scale: float = 1.0  # of the experts' weights; sinks take 1 only
    memory: ReusedMemory | None = None  # for the experts' gradients where there are no sinks
    tickets: Sequence[Ticket] | None = None  # one per chunk, where they were made ahead

    def __post_init__(self) -> None:
        assert self.sinks is None or self.gradient_scale == 1.0


def moe_compute(
    x_TD: Tensor, weight_TK: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, job: Job
) -> Tensor:
    """Send tokens to their experts, apply these, and sum what comes back with the weights.

    Under autocast the tokens and the experts' weights are cast as those of `nn.Linear` are.

    Args:
        x_TD: tokens, in the experts' dtype.
        weight_TK: combine weights, fp32 (fp64 for fp64 tokens).
        w_in_eGD: first weights of this rank's experts.
        w_out_eDF: second weights of this rank's experts.
        job: routing, dispatcher and plans.

    Returns:
        (T, D) of the dtype of `x_TD`; under autocast of autocast's.

    Raises:
        ValueError: if tokens and weights are of different dtypes.
    """
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        small = torch.get_autocast_dtype(kind)
        x_TD, w_in_eGD, w_out_eDF = (
            tensor if tensor.dtype == torch.float64 else tensor.to(small)
            for tensor in (x_TD, w_in_eGD, w_out_eDF)
        )
    if not x_TD.dtype == w_in_eGD.dtype == w_out_eDF.dtype:
        raise ValueError(
            f"the tokens are {x_TD.dtype} and the experts' weights {w_in_eGD.dtype} and "
            f"{w_out_eDF.dtype}; cast one of them, or use torch.autocast"
        )
    result: Tensor = _MoECompute.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        x_TD, weight_TK, w_in_eGD, w_out_eDF, job
    )
    return result


def _arranged(rows_RD: Tensor, index_R: Tensor | None) -> Tensor:
    return rows_RD if index_R is None else rows_RD.index_select(0, index_R)


class _MoECompute(torch.autograd.Function):
    """Both passes; each stage is a small function of its chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes operands by position
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, job: Job
    ) -> Tensor:
        plan = job.schedule.forward
        tickets = job.tickets
        if tickets is None:
            with record_function("moe.prepare"):
                pieces = cut_pieces(job.expert_TK, plan.chunks)
                tickets = job.dispatcher.prepare(pieces, may_drop=job.may_drop)
        assert len(tickets) == plan.chunks
        y_TD = torch.empty_like(x_TD) if plan.chunks > 1 else None
        ordered: dict[int, Tensor] = {}
        moving: dict[tuple[str, int], RowExchange] = {}
        outputs: dict[int, Tensor] = {}
        saved: list[tuple[Tensor, ...]] = [()] * plan.chunks

        def order(chunk: int, ticket: Ticket) -> None:
            ordered[chunk] = gather_rows(x_TD[ticket.tokens], ticket.token_N)

        def dispatch(chunk: int, ticket: Ticket) -> RowExchange:
            exchange = job.dispatcher.send(ordered.pop(chunk), ticket)
            moving["dispatch", chunk] = exchange
            return exchange

        def experts(chunk: int, ticket: Ticket) -> None:
            x_RD = _arranged(moving.pop(("dispatch", chunk)).wait(), ticket.arrange_R)
            y_RD, kept = ffn_forward(
                x_RD, ticket.end_e, w_in_eGD, w_out_eDF, job.activation, count_list=ticket.counts
            )
            saved[chunk] = (x_RD, *kept)
            outputs[chunk] = _arranged(y_RD, ticket.restore_R)

        def collect(chunk: int, ticket: Ticket) -> RowExchange:
            exchange = job.dispatcher.give_back(outputs.pop(chunk), ticket)
            moving["collect", chunk] = exchange
            return exchange

        def combine(chunk: int, ticket: Ticket) -> None:
            nonlocal y_TD
            y_ND = moving.pop(("collect", chunk)).wait()
            saved[chunk] = (y_ND, *saved[chunk])
            part_TD = combine_rows(y_ND, ticket.inverse_TK, weight_TK[ticket.tokens])
            if y_TD is None:
                y_TD = part_TD
            else:
                y_TD[ticket.tokens] = part_TD

        _run(FORWARD, plan, tickets, (order, dispatch, experts, collect, combine))
        assert y_TD is not None
        ctx.job, ctx.tickets = job, tickets
        ctx.saved_per_chunk = [len(kept) for kept in saved]
        ctx.num_tokens, ctx.width = x_TD.shape
        # everything large goes through save_for_backward, so that recomputation can drop it
        ctx.save_for_backward(weight_TK, w_in_eGD, w_out_eDF, *sum(saved, ()))
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        tickets: Sequence[Ticket] = ctx.tickets
        weight_TK, w_in_eGD, w_out_eDF, *rest = ctx.saved_tensors
        saved = []
        for length in ctx.saved_per_chunk:
            saved.append(tuple(rest[:length]))
            rest = rest[length:]
        plan = job.schedule.backward
        need_dx = ctx.needs_input_grad[0]
        dx_TD = dy_TD.new_empty(ctx.num_tokens, ctx.width) if plan.chunks > 1 else None
        dweight_TK = torch.empty_like(weight_TK)
        moving: dict[tuple[str, int], RowExchange] = {}
        gradients: dict[int, Tensor] = {}
        work: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        into = _WeightGradients(job, w_in_eGD, w_out_eDF)

        def combine_grad(chunk: int, ticket: Ticket) -> None:
            gradients[chunk], dweight_TK[ticket.tokens] = combine_rows_backward(
                dy_TD[ticket.tokens],
                saved[chunk][0],
                ticket.order_N,
                ticket.inverse_TK,
                weight_TK[ticket.tokens],
            )

        def collect_grad(chunk: int, ticket: Ticket) -> RowExchange:
            exchange = job.dispatcher.send(gradients.pop(chunk), ticket)
            moving["collect_grad", chunk] = exchange
            return exchange

        def experts_data(chunk: int, ticket: Ticket) -> None:
            dy_RD = _arranged(moving.pop(("collect_grad", chunk)).wait(), ticket.arrange_R)
            dx_RD, kept = ffn_backward_data(
                dy_RD,
                ticket.end_e,
                w_in_eGD,
                w_out_eDF,
                job.activation,
                saved[chunk][2:],
                # ranks must agree on the collectives, so with several ranks it is always sent
                need_dx=need_dx or ticket.arrange_R is not None,
                count_list=ticket.counts,
            )
            work[chunk] = (dy_RD, kept)
            if dx_RD is not None:
                gradients[chunk] = _arranged(dx_RD, ticket.restore_R)

        def dispatch_grad(chunk: int, ticket: Ticket) -> RowExchange | None:
            if chunk not in gradients:
                return None
            exchange = job.dispatcher.give_back(gradients.pop(chunk), ticket)
            moving["dispatch_grad", chunk] = exchange
            return exchange

        def experts_weights(chunk: int, ticket: Ticket) -> None:
            dy_RD, kept = work.pop(chunk)
            into.add(dy_RD, saved[chunk][1], kept, ticket)

        def order_grad(chunk: int, ticket: Ticket) -> None:
            nonlocal dx_TD
            if ("dispatch_grad", chunk) not in moving:
                return
            dx_ND = moving.pop(("dispatch_grad", chunk)).wait()
            part_TD = gather_rows_backward(dx_ND, ticket.inverse_TK)
            if dx_TD is None:
                dx_TD = part_TD
            else:
                dx_TD[ticket.tokens] = part_TD

        _run(
            BACKWARD,
            plan,
            tickets,
            (combine_grad, collect_grad, experts_data, dispatch_grad, experts_weights, order_grad),
        )
        return dx_TD if need_dx else None, dweight_TK, *into.finish(), None


class _WeightGradients:
    """Collects the experts' weight gradients of all chunks, in buffers or in the sinks."""

    def __init__(self, job: Job, w_in_eGD: Tensor, w_out_eDF: Tensor) -> None:
        self._sinks = sinks = job.sinks
        self._scale = job.gradient_scale
        self._memory = job.memory
        self._weights = (w_in_eGD, w_out_eDF)
        self._buffers: tuple[Tensor | None, Tensor | None] = (None, None)
        self._accumulate = False
        if sinks is not None:
            self._buffers = (sinks[0].slot.gradient, sinks[1].slot.gradient)
            self._accumulate = not sinks[0].slot.fresh

    def add(self, dy_RD: Tensor, x_RD: Tensor, kept: tuple[Tensor, Tensor], ticket: Ticket) -> None:
        """Add one chunk's gradients."""
        self._buffers = ffn_backward_weights(
            dy_RD,
            x_RD,
            ticket.end_e,
            *self._weights,
            kept,
            dw_in_eGD=self._buffers[0],
            dw_out_eDF=self._buffers[1],
            accumulate=self._accumulate,
            count_list=ticket.counts,
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


def _run(
    graph: StageGraph,
    plan: Plan,
    tickets: Sequence[Ticket],
    functions: tuple[Callable[[int, Ticket], RowExchange | None], ...],
) -> None:
    by_name = {stage.name: fn for stage, fn in zip(graph.stages, functions, strict=True)}

    def run(task: Task) -> RowExchange | None:
        with record_function(f"moe.{task.stage}"):  # names for profiles
            return by_name[task.stage](task.chunk, tickets[task.chunk])

    run_plan(graph, plan, run)
