"""Experts of an emulated device: they sleep as long as their products would take there.

On a machine with fewer cores than ranks, real products compete with each other and with the copies
of the network's packets, and no schedule can hide one behind the other. Ranks whose experts sleep
leave the cores to all else, as a device would. Rows still travel; their numbers have no meaning.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gatewise.moe.backward
import gatewise.moe.forward
import gatewise.training.measure_costs
from gatewise.moe.feed_forward import FeedForward

__all__ = ["SleepingFeedForward", "emulate_experts"]


def emulate_experts(gmacs: float) -> None:
    """Let this process's experts sleep, in training and where costs are measured.

    Args:
        gmacs: 1e9 multiply-adds a second of the emulated device.
    """

    def sleep(x_RD: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor) -> None:
        each = w_in_eGD[0].numel() + w_out_eDF[0].numel()
        time.sleep(x_RD.shape[0] * each / (gmacs * 1e9))

    def forward(
        x_RD: Tensor, _end_e: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sleep(x_RD, w_in_eGD, w_out_eDF)
        return x_RD.clone(), (x_RD[:0],)

    def data(
        dy_RD: Tensor, _end_e: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sleep(dy_RD, w_in_eGD, w_out_eDF)
        return dy_RD.clone(), (dy_RD[:0], dy_RD[:0])

    def weights(
        dy_RD: Tensor,
        *operands: Any,
        dw_in_eGD: Tensor | None = None,
        dw_out_eDF: Tensor | None = None,
        accumulate: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        w_in_eGD, w_out_eDF = operands[2:4]
        sleep(dy_RD, w_in_eGD, w_out_eDF)
        found = []
        for weight, buffer in ((w_in_eGD, dw_in_eGD), (w_out_eDF, dw_out_eDF)):
            if buffer is None:
                found.append(torch.zeros_like(weight))
            else:
                found.append(buffer if accumulate else buffer.zero_())
        return found[0], found[1]

    replaced: dict[str, Callable[..., Any]] = {
        "ffn_forward": forward,
        "ffn_backward_data": data,
        "ffn_backward_weights": weights,
    }
    for module in (gatewise.moe.forward, gatewise.moe.backward, gatewise.training.measure_costs):
        for name, function in replaced.items():
            if hasattr(module, name):
                setattr(module, name, function)


class SleepingFeedForward(FeedForward):
    """The same for another system's layer, which applies one expert at a time."""

    seconds_per_row = 0.0

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the rows as they are, later."""
        y_TD: Tensor = _Sleep.apply(x_TD, self.w_in_GD, self.w_out_DF, self.seconds_per_row)  # type: ignore[no-untyped-call]
        return y_TD


class _Sleep(torch.autograd.Function):
    """Sleep once in the forward pass and twice as long in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_in_GD: Tensor, w_out_DF: Tensor, each: float) -> Tensor:
        ctx.seconds = x_TD.numel() // x_TD.shape[-1] * each
        ctx.save_for_backward(w_in_GD, w_out_DF)
        time.sleep(ctx.seconds)
        return x_TD.clone()

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(2 * ctx.seconds)
        return dy_TD.clone(), *(torch.zeros_like(weight) for weight in ctx.saved_tensors), None
