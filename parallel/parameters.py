"""What the trainer must know of each parameter to reduce, update and save it."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["Label", "ParameterSpec"]

Label = Literal["dense", "embedding", "router", "expert"]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter with its place in the whole model.

    A sharded parameter is this rank's rows (dim 0) of a tensor spread over the expert group; its
    range in the flattened whole starts at `start`.
    """

    name: str
    parameter: nn.Parameter
    label: Label
    sharded: bool
    decay: bool  # weight decay applies
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0  # first element of ours in the flattened whole

    def local(self) -> Tensor:
        """Return this rank's values, flattened."""
        return self.parameter.detach().view(-1)
