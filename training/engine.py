"""What sums gradients and updates weights: our own buckets here, DeepSpeed in `zero_engine.py`.

A step (`step.py`) asks an engine for backward passes, for sums of squares of the gradients that
this rank owns, and for the update. What is decided from them (norms, clipping, skipped steps) is
decided in the step, so it is the same whichever engine is used.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gatewise.moe.model import Decoder, parameter_specs
from gatewise.moe.parallelize import send_slices_in_windows, write_gradients_directly
from gatewise.parallel.buckets import make_buckets
from gatewise.parallel.parameters import ParameterSpec
from gatewise.parallel.reducer import GradientReducer, gradient_squares
from gatewise.parallel.runtime import Runtime
from gatewise.training.config import EngineKind, TrainConfig
from gatewise.training.fused import choose_fused, use_norms
from gatewise.training.health import expert_squares
from gatewise.training.optim import Held, ShardedAdamW
from gatewise.training.state import Updater

__all__ = ["BucketEngine", "Engine", "build_engine", "expert_layers"]


class Engine(Updater, Protocol):
    """Sums gradients over ranks and updates weights."""

    divisor: float  # reduced gradients are the batch's times this

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a loss to those of this step.

        Args:
            loss: of one micro-batch of this rank, times its share of the step.
            last: whether it is the last of the step, after which gradients are reduced.
        """
        ...

    def finish(self) -> None:
        """Return when the gradients are reduced."""
        ...

    def squares(self) -> dict[str, Tensor]:
        """Return, per label, sums of squares of gradients, which summed over all ranks are whole.

        Of the gradients times `divisor`, before any clipping.
        """
        ...

    def expert_squares(self, num_experts: int) -> Tensor:
        """Return (layers, experts) the same of single experts."""
        ...

    def step(self, lr: float, *, scale: Tensor, skip: Tensor) -> None:
        """Update the weights of all ranks, and forget the gradients.

        Args:
            lr: learning rate before the labels' ratios.
            scale: scalar; gradients are divided by it.
            skip: scalar, 1 leaves parameters, moments and step counts as they are.
        """
        ...

    def place_slices(self, model: Decoder, window_bytes: float) -> None:
        """Let the layers' backward passes send slices of the sums, where their plans say so."""
        ...


class BucketEngine:
    """Our own: flat buckets, sums during the backward pass, one AdamW, ZeRO-1 by `shard`.

    Args:
        model: placed and initialised; its parameters move into the buckets.
        config: of the run.
        runtime: this rank.
    """

    def __init__(self, model: Decoder, config: TrainConfig, runtime: Runtime) -> None:
        specs = parameter_specs(model)
        buckets = make_buckets(specs, runtime.groups)
        self._layers = expert_layers(specs)
        self.reducer = GradientReducer(buckets, ranks=runtime.world)
        self.divisor = self.reducer.divisor
        fused = choose_fused(runtime.device)
        use_norms(model, fused.norm)
        self.optimizer = ShardedAdamW(buckets, config.optim, apex_adam=fused.adam)
        write_gradients_directly(model, self.reducer)

    @property
    def updates(self) -> int:
        """Number of updates applied."""
        return self.optimizer.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self.optimizer.updates = count

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Collect gradients in the buckets, and send them in the last pass."""
        self.reducer.begin(reduce=last)
        loss.backward()

    def finish(self) -> None:
        """Wait for the sums."""
        self.reducer.finish()

    def squares(self) -> dict[str, Tensor]:
        """Return sums of squares per label."""
        return gradient_squares(self.reducer.buckets)

    def expert_squares(self, num_experts: int) -> Tensor:
        """Return sums of squares per layer and expert."""
        owned = [part for bucket in self.reducer.buckets for part in bucket.owned_gradients()]
        return expert_squares(owned, self._layers, num_experts)

    def step(self, lr: float, *, scale: Tensor, skip: Tensor) -> None:
        """Update, and let the next gradients overwrite these."""
        self.optimizer.step(lr, scale=scale, skip=skip)
        self.reducer.clear()

    def place_slices(self, model: Decoder, window_bytes: float) -> None:
        """Give the layers what travels within their backward passes."""
        send_slices_in_windows(model, self.reducer, window_bytes=window_bytes)

    def held(self) -> list[Held]:
        """Return what this rank updates."""
        return self.optimizer.held()

    def publish(self) -> None:
        """Copy master weights into the parameters of all ranks."""
        self.optimizer.publish()


def build_engine(model: Decoder, config: TrainConfig, runtime: Runtime) -> Engine:
    """Build the engine that the settings ask for."""
    if config.engine is EngineKind.deepspeed:
        from gatewise.training.zero_engine import ZeroEngine

        return ZeroEngine(model, config, runtime)
    return BucketEngine(model, config, runtime)


def expert_layers(specs: Sequence[ParameterSpec]) -> list[str]:
    """Return the names of all modules of experts, in one order on all ranks."""
    return sorted({spec.name.rpartition(".")[0] for spec in specs if spec.label == "expert"})
