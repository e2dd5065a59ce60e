"""What one call of the MoE layer needs beside its differentiable inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.dispatch import Dispatcher
from gatewise.moe.ops.reuse import ReusedMemory
from gatewise.moe.stages import Schedule
from gatewise.moe.tickets import PassTickets
from gatewise.parallel.buckets import Slot
from gatewise.parallel.schedule.executor import Execution, Handle

__all__ = ["GradientSink", "Job", "SliceSender"]


@dataclass(frozen=True, slots=True)
class GradientSink:
    """Where a weight's gradient is written without passing through autograd.

    Large expert gradients are written once, straight into the reducer's bucket.
    """

    slot: Slot  # of the weight; its `fresh` tells whether to overwrite or to add
    written: Callable[[], None]  # called when this pass's gradient is complete


class SliceSender(Protocol):
    """Sends slices of the gradients behind a layer while its backward pass goes on."""

    def send(self, index: int) -> Handle | None:
        """Start the sum of one slice of the window."""
        ...

    def finish(self) -> None:
        """Start what is left over, once the pass is over."""
        ...


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
    tickets: PassTickets | None = None  # where they were made ahead
    layer: int = 0  # of the model, for records
    execution: Execution = field(default_factory=Execution)
    reduce: SliceSender | None = None  # where slices of gradient sums travel with this layer

    def __post_init__(self) -> None:
        assert self.sinks is None or self.gradient_scale == 1.0
        if self.schedule.is_sharded != self.dispatcher.is_sharded:
            raise ValueError(
                f"the ranks of a node {'' if self.dispatcher.is_sharded else 'do not '}split the "
                "width of this layer's experts, but its schedule is of a layer of the other kind; "
                f"make it with is_sharded={self.dispatcher.is_sharded}"
            )
