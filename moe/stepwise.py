"""One call of the MoE layer in steps, between which the calling thread does something else.

Read `forward.py`, `backward.py` and `compute.py` first. There one call runs its pass to the end.
Here each step of `turns.py` is an autograd function of its own:

    send      order, dispatch                         order_grad
    gather    gather                                  dispatch_grad            (split experts)
    work      experts, scatter                        experts_data, gather_grad, experts_weights
    collect   collect                                 scatter_grad
    arrive    combine                                 combine_grad, collect_grad

with the backward pass on the right, upwards. The calling thread waits only before it computes with
what has arrived. Rows of split experts travel twice in a row, so lanes carry them, each behind what
it needs. Rows of whole experts are issued at once: they have nothing to wait for, and their counts
travel in the same group, which one thread alone may use.

Shapes:  T tokens   K experts per token   D width   e experts of this rank   G, F see
         `ops/grouped_ffn.py`
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from gatewise.moe.backward import BackwardPass
from gatewise.moe.compute import arithmetic_types, request_tickets
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.forward import ForwardPass
from gatewise.moe.job import Job
from gatewise.moe.tickets import PassTickets
from gatewise.moe.transit import StageFunction
from gatewise.parallel.schedule.executor import Handle, Issue, LaneError
from gatewise.parallel.schedule.plan import Lane, StageGraph, Task
from gatewise.parallel.schedule.recorder import Mark, Recorder

__all__ = ["CallStep", "Host", "StepwiseCall"]

CallStep = Literal["send", "gather", "work", "collect"]


class Host:
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
            recorder.add(Task("between", 0), "compute", "compute", self._since, now)
        self._since = None
        return now

    def go_on(self, recorder: Recorder | None) -> Mark | None:
        """Return now, when it has ended."""
        self._since = None if recorder is None else recorder.mark()
        return self._since


class StepwiseCall:
    """One call; where it is made the ranks start to tell each other their counts.

    Args:
        x_TD: tokens.
        weight_TK: combine weights.
        experts: of this rank.
        job: routing, dispatcher and plans; its gradients go through autograd, not to sinks.
        place: among the micro-batches that go side by side.
        host: the thread that runs all of them.
    """

    def __init__(
        self,
        x_TD: Tensor,
        weight_TK: Tensor,
        experts: GroupedExperts,
        job: Job,
        *,
        place: int,
        host: Host,
    ) -> None:
        x_TD, w_in_eGD, w_out_eDF = arithmetic_types(x_TD, experts.w_in_eGD, experts.w_out_eDF)
        self._weight_TK, self._weights = weight_TK, (w_in_eGD, w_out_eDF)
        self._state = state = _State(job, place, host)
        state.weight_TK = weight_TK.detach()
        state.weights = w_in_eGD.detach(), w_out_eDF.detach()
        self._is_sharded = job.dispatcher.is_sharded
        self._thread = x_TD  # then what only ties the steps together

    def go_on(self, step: CallStep) -> None:
        """Run the next step; `send` waits for the other ranks' counts."""
        state = self._state
        if step == "send":
            state.agree()
            self._thread = _Send.apply(self._thread, state)  # type: ignore[no-untyped-call]
        elif step == "gather" and self._is_sharded:
            self._move("gather", "dispatch_grad")
        elif step == "work":
            self._thread = _Work.apply(self._thread, *self._weights, state)  # type: ignore[no-untyped-call]
        elif step == "collect":
            self._move("collect", "scatter_grad")

    def _move(self, there: str, back: str) -> None:
        self._thread = _Move.apply(self._thread, self._state, there, back)  # type: ignore[no-untyped-call]

    def arrive(self) -> Tensor:
        """Run the last step and return the output (T, D)."""
        y_TD: Tensor = _Arrive.apply(self._thread, self._weight_TK, self._state)  # type: ignore[no-untyped-call]
        return y_TD


class _State:
    """What the steps of a call share; each pass runs its stages in the order of its graph."""

    weight_TK: Tensor
    weights: tuple[Tensor, Tensor]
    tickets: PassTickets

    def __init__(self, job: Job, place: int, host: Host) -> None:
        assert job.sinks is None
        self.job, self._place, self._host = job, place, host
        self._request = request_tickets(job)
        self.forward: ForwardPass | None = None
        self.backward: BackwardPass | None = None
        self._under_way: Handle | None = None
        if self._recorder is not None:
            self._recorder.prefix = ""  # steps of several layers alternate: tasks say which

    def agree(self) -> None:
        """Wait for the other ranks' counts."""
        self._host.stop(self._recorder)
        self.tickets = self._request()
        self._host.go_on(self._recorder)

    def run_forward(self, *names: str) -> ForwardPass:
        """Run stages of the forward pass."""
        assert self.forward is not None
        self._run(names, self.forward.stages(), self.job.schedule.forward_graph)
        return self.forward

    def run_backward(self, *names: str) -> BackwardPass:
        """Run stages of the backward pass."""
        assert self.backward is not None
        self._run(names, self.backward.stages(), self.job.schedule.backward_graph)
        return self.backward

    def _run(
        self, names: Sequence[str], functions: Mapping[str, StageFunction], graph: StageGraph
    ) -> None:
        lane_of = {stage.name: stage.lane for stage in graph.stages}
        for name in names:
            if name not in lane_of:
                continue
            task = Task(f"{self.job.layer}.{name}", self._place)
            stage = partial(_named, name, functions[name])
            if lane_of[name] == "compute":
                if name != "experts_weights":  # which needs no rows
                    self._wait()
                self._compute(task, stage)
            else:
                self._send_off(task, lane_of[name], stage)

    def _compute(self, task: Task, stage: Issue) -> None:
        recorder = self._recorder
        start = self._host.stop(recorder)
        stage()
        end = self._host.go_on(recorder)
        if recorder is not None:
            recorder.add(task, "compute", "compute", start, end)

    def _send_off(self, task: Task, lane: Lane, stage: Issue) -> None:
        """Start communication behind what this call has under way."""
        issue = partial(_issue, task, lane, stage, self._recorder)
        lanes = self.job.execution.lanes
        if lanes is not None and self.job.dispatcher.is_sharded:
            self._under_way = lanes.start(lane, issue, self._under_way)
            return
        self._wait()
        self._host.stop(self._recorder)
        self._under_way = issue()
        self._host.go_on(self._recorder)

    def _wait(self) -> None:
        """Return when the rows under way have arrived."""
        if self._under_way is None:
            return
        self._host.stop(self._recorder)
        self._under_way.wait()
        self._under_way = None
        self._host.go_on(self._recorder)

    @property
    def _recorder(self) -> Recorder | None:
        recorder = self.job.execution.recorder
        return recorder if recorder is not None and recorder.is_on else None


def _named(name: str, function: StageFunction) -> Handle | None:
    with record_function(f"moe.{name}"):
        return function(0)


def _issue(task: Task, lane: Lane, stage: Issue, recorder: Recorder | None) -> Handle | None:
    """Start communication; what is returned waits for it, and notes when it had ended."""
    start = None if recorder is None else recorder.mark()
    try:
        handle = stage()
    except RuntimeError as error:
        raise LaneError.of(task, lane, error) from error
    return None if handle is None else _Travel(handle, task, lane, start, recorder)


class _Travel:
    """Communication under way."""

    def __init__(
        self, handle: Handle, task: Task, lane: Lane, start: Mark | None, recorder: Recorder | None
    ) -> None:
        self._handle, self._task, self._lane = handle, task, lane
        self._start, self._recorder = start, recorder

    def wait(self) -> None:
        """Return when it has ended; called once."""
        try:
            self._handle.wait()
        except RuntimeError as error:
            raise LaneError.of(self._task, self._lane, error) from error
        if self._recorder is not None:
            end = self._recorder.mark()
            self._recorder.add(self._task, self._lane, self._lane, self._start, end)


class _Send(torch.autograd.Function):
    """Sort the rows and send them."""

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
    """Let the experts work on what has arrived."""

    @staticmethod
    def forward(
        ctx: Any, thread: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, state: _State
    ) -> Tensor:
        ctx.state = state
        state.run_forward("experts", "scatter")
        return thread.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dthread: Tensor) -> tuple[Tensor | None, ...]:
        state: _State = ctx.state
        if state.job.dispatcher.is_sharded:
            backward = state.run_backward("experts_data", "gather_grad", "experts_weights")
        else:  # no step of their own sends rows on
            backward = state.run_backward("experts_data", "dispatch_grad", "experts_weights")
        return dthread, *backward.weight_gradients(), None


class _Move(torch.autograd.Function):
    """Send rows on: a stage of the forward pass, and one of the backward pass."""

    @staticmethod
    def forward(ctx: Any, thread: Tensor, state: _State, there: str, back: str) -> Tensor:
        ctx.state, ctx.back = state, back
        state.run_forward(there)
        return thread.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dthread: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.run_backward(ctx.back)
        return dthread, None, None, None


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
