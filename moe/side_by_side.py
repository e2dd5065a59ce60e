"""Micro-batches that travel through a model side by side: whole blocks cover each other's rows.

Read `turns.py`, `forward.py`, `backward.py` and `compute.py` first. There one call of the layer
runs its pass to the end. Here a call has three steps (rows leave; experts work and rows leave
again; rows have come back), each an autograd function of its own, and between them other
micro-batches compute: while the rows of one travel, attention and experts of the others work. In
the backward pass autograd takes the steps in the reverse order of the forward pass, so gradients
travel side by side in the same way; weight gradients hide the last rows of each.

The order in which collectives are issued follows from the number of micro-batches alone.

Shapes:  B sequences of a micro-batch   S positions   T tokens of it   K experts per token   D width
         e experts of this rank   G, F see `ops/grouped_ffn.py`
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from gatewise.moe.backward import BackwardPass
from gatewise.moe.compute import arithmetic_types, request_tickets
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.forward import ForwardPass
from gatewise.moe.job import Job
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block, Decoder, DecoderOutput
from gatewise.moe.tickets import PassTickets
from gatewise.moe.transit import StageFunction
from gatewise.moe.turns import turns
from gatewise.parallel.schedule.executor import Handle, LaneError
from gatewise.parallel.schedule.plan import Lane, StageGraph, Task
from gatewise.parallel.schedule.recorder import Mark, Recorder
from gatewise.routers.api import Routing, RoutingContext

__all__ = ["forward_side_by_side"]


def forward_side_by_side(
    model: Decoder, batches: Sequence[Tensor], contexts: Sequence[RoutingContext]
) -> list[DecoderOutput]:
    """Return what `model` gives for each micro-batch; all may enter one backward pass.

    Args:
        model: without a router that decides ahead, recomputation, or sequences spread over ranks.
        batches: token ids (B, S) of each, on all ranks equally many.
        contexts: what the routers are told of each.

    Raises:
        LaneError: if communication fails.
    """
    assert model.ahead is None
    assert model.split.parts == 1
    host = _Host()
    parts = [_Part(model, token_BS, contexts[i], i, host) for i, token_BS in enumerate(batches)]
    for turn in turns(len(model.blocks), len(parts)):
        part = parts[turn.part]
        if turn.step == "enter":
            block = model.blocks[turn.block]
            assert isinstance(block, Block)
            part.enter(block)
        elif turn.step == "send":
            part.send()
        else:
            part.work()
    return [part.leave(model) for part in parts]


class _Part:
    """One micro-batch on its way through the blocks.

    Args:
        model: whose blocks they are.
        token_BS: token ids.
        context: what the routers are told.
        place: among the micro-batches that go side by side.
        host: the thread that runs all of them.
    """

    def __init__(
        self,
        model: Decoder,
        token_BS: Tensor,
        context: RoutingContext,
        place: int,
        host: "_Host",
    ) -> None:
        self._place, self._host = place, host
        self._context = RoutingContext(
            token_ids=token_BS.flatten(),
            padding_T=context.padding_T,
            sequences=token_BS.shape[0],
            noise=context.noise,
            measures=context.measures,
        )
        self._rotary = model.rotary(token_BS.shape[1], device=token_BS.device)
        self._x_BSD = F.embedding(token_BS, model.embedding)
        self._call: _Call | None = None
        self._layer: MoELayer | None = None
        self._x_TD = self._x_BSD  # what the layer gets
        self._shared_TD: Tensor | None = None
        self._routings: list[Routing] = []

    def enter(self, block: Block) -> None:
        """Take what the block before gave, compute attention, and decide where rows go."""
        self._arrive()
        x_BSD = self._x_BSD
        x_BSD = x_BSD + block.attention(
            block.norm_attention(x_BSD), self._rotary, block.layer, None
        )
        normed_BSD = block.norm_feed_forward(x_BSD)
        layer = block.feed_forward
        if isinstance(layer, FeedForward):
            self._x_BSD = x_BSD + layer(normed_BSD)
            return
        self._x_BSD = x_BSD
        x_TD = self._x_TD = normed_BSD.flatten(0, 1)
        routing, self._context, may_drop = layer.decide(x_TD, self._context, block.layer)
        job = layer.job(routing.expert_TK, may_drop=may_drop, layer=block.layer)
        state = _State(job, self._place, self._host)
        self._call, self._layer = _Call(x_TD, routing.weight_TK, layer.experts, state), layer
        self._routings.append(routing)

    def send(self) -> None:
        """Let the rows leave, once all ranks know how many."""
        if self._call is not None and self._layer is not None:
            self._call.send()
            shared = self._layer.shared
            self._shared_TD = None if shared is None else shared(self._x_TD)

    def work(self) -> None:
        """Let the experts work on the rows that have arrived, and send them back."""
        if self._call is not None:
            self._call.work()

    def leave(self, model: Decoder) -> DecoderOutput:
        """Return what the model gives."""
        self._arrive()
        return DecoderOutput(model.norm_final(self._x_BSD), tuple(self._routings))

    def _arrive(self) -> None:
        if self._call is None:
            return
        y_TD = self._call.arrive()
        if self._shared_TD is not None:
            y_TD = y_TD + self._shared_TD
        self._x_BSD = self._x_BSD + y_TD.view_as(self._x_BSD)
        self._call = self._layer = self._shared_TD = None


class _Call:
    """One call of the layer in three steps; where it is made the ranks start to tell counts."""

    def __init__(
        self, x_TD: Tensor, weight_TK: Tensor, experts: GroupedExperts, state: "_State"
    ) -> None:
        x_TD, w_in_eGD, w_out_eDF = arithmetic_types(x_TD, experts.w_in_eGD, experts.w_out_eDF)
        self._weight_TK, self._weights = weight_TK, (w_in_eGD, w_out_eDF)
        self._state = state
        state.weight_TK = weight_TK.detach()
        state.weights = w_in_eGD.detach(), w_out_eDF.detach()
        self._x_TD = self._thread = x_TD

    def send(self) -> None:
        """Run the first step."""
        self._state.agree()
        self._thread = _Leave.apply(self._x_TD, self._state)  # type: ignore[no-untyped-call]

    def work(self) -> None:
        """Run the second step."""
        self._thread = _Work.apply(self._thread, *self._weights, self._state)  # type: ignore[no-untyped-call]

    def arrive(self) -> Tensor:
        """Run the third step and return the output (T, D)."""
        y_TD: Tensor = _Arrive.apply(self._thread, self._weight_TK, self._state)  # type: ignore[no-untyped-call]
        return y_TD


class _Host:
    """Notes what the one thread of all micro-batches computes between their stages.

    It waits nowhere else than in them, so what lies between is attention, routers and the like.
    """

    def __init__(self) -> None:
        self._since: Mark | None = None

    def stop(self, recorder: Recorder | None) -> Mark | None:
        """Return now, when a stage or a wait begins."""
        if recorder is None:
            return None
        now = recorder.mark()
        if self._since is not None:
            recorder.prefix = ""
            recorder.add(Task("between", 0), "compute", "compute", self._since, now)
        self._since = None
        return now

    def go_on(self, recorder: Recorder | None) -> Mark | None:
        """Return now, when it has ended."""
        self._since = None if recorder is None else recorder.mark()
        return self._since


class _State:
    """What the steps of a call share; each pass runs its stages in the order of its graph."""

    weight_TK: Tensor
    weights: tuple[Tensor, Tensor]
    tickets: PassTickets

    def __init__(self, job: Job, place: int, host: _Host) -> None:
        assert job.sinks is None
        self.job, self._place, self._host = job, place, host
        self._request = request_tickets(job)
        self.forward: ForwardPass | None = None
        self.backward: BackwardPass | None = None
        self._under_way: tuple[Task, Lane, Handle, Mark | None] | None = None

    def agree(self) -> None:
        """Wait for the other ranks' counts."""
        self._host.stop(self._recorder)
        self.tickets = self._request()
        self._host.go_on(self._recorder)

    def run(
        self, names: Sequence[str], functions: Mapping[str, StageFunction], graph: StageGraph
    ) -> None:
        """Run stages; communication goes on until the next stage needs it."""
        recorder = self._recorder
        have = {stage.name: stage.lane for stage in graph.stages}
        for name in names:
            if name not in have:
                continue
            if name != "experts_weights":  # which needs no rows
                self.wait()
            task, lane = Task(name, self._place), have[name]
            start = self._host.stop(recorder)
            try:
                with record_function(f"moe.{name}"):
                    handle = functions[name](0)
            except RuntimeError as error:
                raise error if lane == "compute" else LaneError.of(task, lane, error) from error
            end = self._host.go_on(recorder)
            if handle is not None:
                self._under_way = task, lane, handle, start
            else:
                self._record(task, lane, start, end)

    def wait(self) -> None:
        """Return when the rows under way have arrived."""
        if self._under_way is None:
            return
        task, lane, handle, start = self._under_way
        self._under_way = None
        self._host.stop(self._recorder)
        try:
            handle.wait()
        except RuntimeError as error:
            raise LaneError.of(task, lane, error) from error
        self._record(task, lane, start, self._host.go_on(self._recorder))

    @property
    def _recorder(self) -> Recorder | None:
        recorder = self.job.execution.recorder
        return recorder if recorder is not None and recorder.is_on else None

    def _record(self, task: Task, lane: Lane, start: Mark | None, end: Mark | None) -> None:
        recorder = self._recorder
        if recorder is not None and start is not None and end is not None:
            recorder.prefix = f"{self.job.layer}."
            recorder.add(task, lane, lane, start, end)

    def run_forward(self, *names: str) -> ForwardPass:
        """Run stages of the forward pass."""
        assert self.forward is not None
        self.run(names, self.forward.stages(), self.job.schedule.forward_graph)
        return self.forward

    def run_backward(self, *names: str) -> BackwardPass:
        """Run stages of the backward pass."""
        assert self.backward is not None
        self.run(names, self.backward.stages(), self.job.schedule.backward_graph)
        return self.backward


class _Leave(torch.autograd.Function):
    """Sort the rows and send them; what it returns only ties the steps together."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, state: _State) -> Tensor:
        ctx.state = state
        operands = (x_TD, state.weight_TK, state.weights)
        state.forward = ForwardPass(state.job, state.tickets, *operands)
        state.run_forward("order", "dispatch")
        return x_TD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _dthread: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD = ctx.state.run_backward("order_grad").dx_TD
        ctx.state.backward = None
        return dx_TD, None


class _Work(torch.autograd.Function):
    """Let the experts work, and send the rows back."""

    @staticmethod
    def forward(
        ctx: Any, thread: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, state: _State
    ) -> Tensor:
        ctx.state = state
        state.run_forward("gather", "experts", "scatter", "collect")
        return thread.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dthread: Tensor) -> tuple[Tensor | None, ...]:
        names = ("scatter_grad", "experts_data", "gather_grad", "dispatch_grad", "experts_weights")
        backward = ctx.state.run_backward(*names)
        return dthread, *backward.weight_gradients(), None


class _Arrive(torch.autograd.Function):
    """Sum what has come back."""

    @staticmethod
    def forward(ctx: Any, thread: Tensor, weight_TK: Tensor, state: _State) -> Tensor:
        ctx.state = state
        y_TD = state.run_forward("combine").y_TD
        assert y_TD is not None
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        state: _State = ctx.state
        forward = state.forward
        assert forward is not None
        state.forward = None
        state.backward = BackwardPass(
            state.job,
            state.tickets,
            (forward.returned, forward.received),
            dy_TD=dy_TD,
            weight_TK=state.weight_TK,
            weights=state.weights,
            need_dx=True,
        )
        backward = state.run_backward("combine_grad", "collect_grad")
        return dy_TD.new_zeros(()), backward.dweight_TK, None
