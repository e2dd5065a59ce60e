"""The base of every module with router parameters: fp32 always, starting values of their own."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gatewise.routers.shapes import Start, Weight

__all__ = ["RouterWeights", "fill"]

_ALONE_STD = 0.02  # of the plain normal start where no model says another


class RouterWeights(nn.Module):
    """Parameters as a table says, kept in fp32 when the model around them is cast.

    The trainer labels them "router": they are reduced, clipped and saved as such.

    Args:
        weights: name to shape and start.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        self.starts: dict[str, Start] = {name: weight.start for name, weight in weights.items()}
        for name, weight in weights.items():
            parameter = nn.Parameter(torch.empty(weight.shape, dtype=torch.float32))
            self.register_parameter(name, parameter)
            if not parameter.is_meta:  # drawing nothing there imports torch's compiler
                fill(parameter.data, weight.start, _ALONE_STD, None)

    def reset_state(self) -> None:
        """Give what is not a parameter (biases, tables) its starting values."""

    def state(self) -> dict[str, Tensor]:
        """Return what decides beside the parameters, by name; kept in checkpoints."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RouterWeights":
        """Keep all values as they are when the model is cast to half precision."""

        def keep(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype in (torch.bfloat16, torch.float16):
                return tensor.detach().to(changed.device)
            return changed

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype == torch.float64:  # state is fp32 also in a double model
                setattr(self, name, buffer.float())
        return self


def fill(data: Tensor, start: Start, model_std: float, generator: torch.Generator | None) -> None:
    """Write starting values.

    Args:
        data: changed in place.
        start: what to draw.
        model_std: standard deviation of the model's matrices.
        generator: on the CPU; None takes torch's own.
    """
    if start.kind == "constant":
        data.fill_(start.value)
    elif start.kind == "uniform":
        drawn = torch.rand(data.shape, generator=generator)
        data.copy_((2 * drawn - 1) * start.value)
    else:
        std = start.value * (model_std if start.kind == "scaled" else 1.0)
        data.copy_(torch.randn(data.shape, generator=generator) * std)
