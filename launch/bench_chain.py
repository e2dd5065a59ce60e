"""The five-task chain of a layer of experts, with real communication and experts of two kinds.

Read `parallel/schedule/executor.py` and `moe/planning/block.py` first. Each chunk of rows is sent
to its expert's node, gathered by the ranks that split the expert, worked on, scattered and sent
back; the backward pass does the same with gradients, and sums dense gradients in between. Routing
is even: what is compared are schedules of the same bytes.

Experts are `real` (our products and their gradients on this processor) or `emulated`: they sleep
as long as a device of a set rate would compute, and hand the rows on unchanged.

Shapes:  n ranks that exchange rows   s ranks that split an expert   t rows of a chunk for each of
         the n   T all of these rows   R rows of an expert, all ranks   D width
         F width of the expert on this rank
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops.grouped_ffn import ffn_backward_data, ffn_backward_weights, ffn_forward
from gatewise.moe.planning.block import REDUCE_STAGES
from gatewise.moe.planning.policies import Pass
from gatewise.parallel.collectives import Group, RowExchange, RowSum, gather_uneven
from gatewise.parallel.schedule.executor import Lanes, PlanRunner
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.schedule.recorder import Recorder

__all__ = [
    "MATRICES",
    "Chain",
    "ChainGroups",
    "EmulatedExpert",
    "Expert",
    "PreparedPass",
    "RealExpert",
]

MATRICES = 2  # of an expert
_ACTIVATION = Activation.relu
_Step = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True)
class ChainGroups:
    """Who talks to whom; every group has connections of its own."""

    control: Group  # all ranks
    exchange: Group  # one rank of each node: rows travel here
    node: Group  # the ranks of a node, which split each expert
    gradients: Group  # one rank of each node: gradient sums


class Expert(Protocol):
    """Works on the gathered rows (s, n, t, D) of a chunk, which are `rows` of T."""

    def forward(self, x_sntD: Tensor, rows: slice) -> Tensor:
        """Return the outputs, which are to be summed over the ranks that split the expert."""
        ...

    def data(self, dy_sntD: Tensor, rows: slice) -> Tensor:
        """Return the gradient of the rows, to be summed in the same way."""
        ...

    def weights(self, rows: slice) -> None:
        """Add to the gradients of the weights."""
        ...

    def start(self) -> None:
        """Forget the gradients of the weights."""
        ...


class EmulatedExpert:
    """Sleeps for the time of a device.

    Args:
        peers: n x s, ranks whose rows are gathered here.
        row_seconds: time of one row in each of the three parts.
    """

    def __init__(self, peers: int, row_seconds: float) -> None:
        self._seconds = peers * row_seconds

    def forward(self, x_sntD: Tensor, rows: slice) -> Tensor:
        """Wait as long as the forward pass takes."""
        self.weights(rows)
        return x_sntD

    def data(self, dy_sntD: Tensor, rows: slice) -> Tensor:
        """Wait as long as the gradient of the rows takes."""
        self.weights(rows)
        return dy_sntD

    def weights(self, rows: slice) -> None:
        """Wait as long as the gradients of the weights take."""
        time.sleep(self._seconds * (rows.stop - rows.start))

    def start(self) -> None:
        """Do nothing: there are no weights."""


class RealExpert:
    """This rank's part of one expert.

    What the backward pass needs is stored by row, so that both passes may be cut differently.

    Args:
        peers: n x s, ranks whose rows are gathered here.
        rows: T.
        width: D.
        inner: F.
        generator: of the weights.
    """

    def __init__(
        self, peers: int, rows: int, width: int, inner: int, generator: torch.Generator
    ) -> None:
        self._peers = peers
        self._w_in = torch.randn(1, inner, width, generator=generator) / width**0.5
        self._w_out = torch.randn(1, width, inner, generator=generator) / inner**0.5
        self._x_RD = torch.zeros(rows * peers, width)
        self._hidden_RF = torch.zeros(rows * peers, inner)
        self._work: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.dw_in = torch.zeros_like(self._w_in)
        self.dw_out = torch.zeros_like(self._w_out)

    def forward(self, x_sntD: Tensor, rows: slice) -> Tensor:
        """Apply the two products and the activation."""
        x_tsnD = x_sntD.permute(2, 0, 1, 3)
        x_RD = self._part(self._x_RD, rows)
        x_RD.view(x_tsnD.shape).copy_(x_tsnD)
        y_RD, (hidden_RF,) = ffn_forward(
            x_RD, _end(x_RD), self._w_in, self._w_out, _ACTIVATION, count_list=[x_RD.shape[0]]
        )
        self._part(self._hidden_RF, rows).copy_(hidden_RF)
        return y_RD.view(x_tsnD.shape).permute(1, 2, 0, 3).contiguous()

    def data(self, dy_sntD: Tensor, rows: slice) -> Tensor:
        """Return the gradient of the rows."""
        dy_tsnD = dy_sntD.permute(2, 0, 1, 3)
        dy_RD = dy_tsnD.reshape(-1, dy_tsnD.shape[-1])
        dx_RD, work = ffn_backward_data(
            dy_RD,
            _end(dy_RD),
            self._w_in,
            self._w_out,
            _ACTIVATION,
            (self._part(self._hidden_RF, rows),),
            count_list=[dy_RD.shape[0]],
        )
        assert dx_RD is not None
        self._work[rows.start] = dy_RD, work
        return dx_RD.view(dy_tsnD.shape).permute(1, 2, 0, 3).contiguous()

    def weights(self, rows: slice) -> None:
        """Add to the gradients of the weights."""
        dy_RD, work = self._work[rows.start]
        ffn_backward_weights(
            dy_RD,
            self._part(self._x_RD, rows),
            _end(dy_RD),
            self._w_in,
            self._w_out,
            work,
            dw_in_eGD=self.dw_in,
            dw_out_eDF=self.dw_out,
            accumulate=True,
            count_list=[dy_RD.shape[0]],
        )

    def start(self) -> None:
        """Forget the gradients of the weights."""
        self._work.clear()
        self.dw_in.zero_()
        self.dw_out.zero_()

    def _part(self, stored_RD: Tensor, rows: slice) -> Tensor:
        return stored_RD[rows.start * self._peers : rows.stop * self._peers]


def _end(x_RD: Tensor) -> Tensor:
    """Return where the rows of the one expert end."""
    return torch.tensor([x_RD.shape[0]], dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class PreparedPass:
    """A pass that can be run many times: its runner, its cuts, and slices of the gradient."""

    runner: PlanRunner
    cuts: tuple[slice, ...]
    slices: Mapping[Task, slice]

    @staticmethod
    def of(item: Pass, rows: int, gradient: int) -> "PreparedPass":
        """Prepare a planned pass.

        Args:
            item: the pass.
            rows: T.
            gradient: numbers of the gradient that is summed.
        """
        shares = item.plan.shares or (1.0 / item.plan.chunks,) * item.plan.chunks
        sums = {
            Task(stage.name, chunk): item.amounts[stage.name].size * share
            for stage in item.graph.stages
            if stage.name in REDUCE_STAGES
            for chunk, share in enumerate(stage.shares)
        }
        whole = sum(sums.values())
        pieces = _cut(gradient, [size / whole for size in sums.values()])
        return PreparedPass(
            PlanRunner(item.graph, item.plan),
            tuple(_cut(rows, shares)),
            dict(zip(sums, pieces, strict=True)),
        )


def _cut(length: int, shares: Sequence[float]) -> list[slice]:
    """Return slices of 0..length whose ends are as near to the shares as whole numbers can be."""
    ends, total = [0], 0.0
    for share in shares:
        total += share
        ends.append(min(length, round(total * length)))
    return [slice(start, end) for start, end in pairwise(ends)]


class Chain:
    """The chain of one rank, with its rows.

    Args:
        groups: who talks to whom.
        lanes: where communication runs.
        expert: works on the gathered rows.
        x_nTD: rows of this rank, by the rank that they go to.
        dy_nTD: gradient of what comes back.
        gradient: numbers of the dense gradient that is summed.
    """

    def __init__(
        self,
        groups: ChainGroups,
        lanes: Lanes,
        expert: Expert,
        *,
        x_nTD: Tensor,
        dy_nTD: Tensor,
        gradient: int,
    ) -> None:
        self._groups, self._lanes, self.expert = groups, lanes, expert
        self._x_nTD, self._dy_nTD = x_nTD, dy_nTD
        self.gradient = torch.ones(gradient)

    def start(self) -> None:
        """Forget all gradients."""
        self.gradient.fill_(1.0)
        self.expert.start()

    def prepare(self, item: Pass, _blocks: int = 1) -> PreparedPass:
        """Make a planned pass ready."""
        return PreparedPass.of(item, self._x_nTD.shape[1], self.gradient.numel())

    def run(self, name: str, item: PreparedPass, recorder: Recorder | None = None) -> Tensor:
        """Run a pass, "forward" or "backward", and return its result."""
        return (self.forward if name == "forward" else self.backward)(item, recorder)

    def gradients(self, *, with_sum: bool) -> list[Tensor]:
        """Return copies of the gradients of the weights, and of the sum over nodes."""
        found = []
        if isinstance(self.expert, RealExpert):
            found += [self.expert.dw_in.clone(), self.expert.dw_out.clone()]
        return [*found, self.gradient.clone()] if with_sum else found

    def forward(self, item: PreparedPass, recorder: Recorder | None = None) -> Tensor:
        """Return the rows that came back, (n, T, D)."""
        steps: dict[str, _Step] = {
            "dispatch": self._exchange,
            "gather": self._gather,
            "experts": self._through(self.expert.forward),
            "scatter": self._scatter,
            "collect": self._exchange,
        }
        return self._run(item, steps, self._x_nTD, recorder)

    def backward(self, item: PreparedPass, recorder: Recorder | None = None) -> Tensor:
        """Return the gradient of this rank's rows, (n, T, D); sum `gradient` over nodes."""
        steps: dict[str, _Step] = {
            "collect_grad": self._exchange,
            "scatter_grad": self._gather,
            "experts_data": self._through(self.expert.data),
            "gather_grad": self._scatter,
            "dispatch_grad": self._exchange,
        }
        return self._run(item, steps, self._dy_nTD, recorder)

    def _run(
        self,
        item: PreparedPass,
        steps: Mapping[str, _Step],
        rows_nTD: Tensor,
        recorder: Recorder | None,
    ) -> Tensor:
        first, *_, last = steps
        result_nTD = torch.empty_like(rows_nTD)
        moving: dict[int, Tensor] = {}

        def run(task: Task) -> None:
            if task in item.slices:
                self._sum(item.slices[task])
                return
            rows = item.cuts[task.chunk]
            if task.stage == "experts_weights":
                self.expert.weights(rows)
                return
            if task.stage == first:
                moving[task.chunk] = rows_nTD[:, rows].contiguous()
            y = steps[task.stage](moving.pop(task.chunk), rows)
            if task.stage == last:
                result_nTD[:, rows] = y
            else:
                moving[task.chunk] = y

        item.runner.run(run, lanes=self._lanes, recorder=recorder)
        return result_nTD

    def _through(self, part: _Step) -> _Step:
        shape = (self._groups.node.size, self._groups.exchange.size, -1, self._x_nTD.shape[-1])
        return lambda x_sntD, rows: part(x_sntD.view(shape), rows)

    def _exchange(self, x_ntD: Tensor, _rows: slice) -> Tensor:
        group = self._groups.exchange
        x_ND = x_ntD.reshape(-1, x_ntD.shape[-1])
        each = [x_ND.shape[0] // group.size] * group.size
        y_ND = RowExchange(x_ND, each, each, group).wait()
        return y_ND.view(group.size, -1, x_ND.shape[-1])

    def _gather(self, x_ntD: Tensor, _rows: slice) -> Tensor:
        group = self._groups.node
        gathered = gather_uneven(x_ntD, [x_ntD.shape[0]] * group.size, group).wait()
        return gathered.view(group.size, *x_ntD.shape)

    def _scatter(self, y_sntD: Tensor, _rows: slice) -> Tensor:
        group = self._groups.node
        sizes = [y_sntD.shape[1]] * group.size
        return RowSum(y_sntD.flatten(0, 1), sizes, group).wait()

    def _sum(self, piece: slice) -> None:
        dist.all_reduce(self.gradient[piece], group=self._groups.gradients.handle)
