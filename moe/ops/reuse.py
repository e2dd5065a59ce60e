"""Memory for gradients that is used again as soon as nobody holds it.

On a CPU the first touch of fresh memory is slower than anything else a gradient needs, and large
blocks go back to the system each time they are freed. So a layer keeps the memory of its weights'
gradients: after `zero_grad(set_to_none=True)` the next gradient is written where the last one was.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["ReusedMemory"]

_MOST = 3  # tensors kept per shape: the gradient, what is added to it, and one to spare


class ReusedMemory:
    """Hands out uninitialised tensors; a tensor's memory is free again when its last holder goes.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._kept: list[
            tuple[Tensor, int]
        ] = []  # with the storage's holders when it is ours alone

    def take(self, like: Tensor) -> Tensor:
        """Return a contiguous tensor of the shape, dtype and device of `like`."""
        if like.device.type != "cpu" or not _can_count():
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        alike = [
            (kept, alone)
            for kept, alone in self._kept
            if kept.shape == like.shape and kept.dtype == like.dtype
        ]
        for kept, alone in alike:
            if _holders(kept) == alone:
                return (
                    kept.data
                )  # another tensor of the same memory, so that autograd takes it over
        fresh = torch.empty_like(like, memory_format=torch.contiguous_format).detach()
        if len(alike) < _MOST:
            self._kept.append((fresh, _holders(fresh)))
        return fresh.data

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReusedMemory":
        return ReusedMemory()

    def __reduce__(self) -> tuple[type["ReusedMemory"], tuple[()]]:
        return ReusedMemory, ()


def _can_count() -> bool:
    """Tell whether torch lets us ask; without that nothing is reused."""
    return hasattr(torch._C, "_storage_Use_Count")


def _holders(tensor: Tensor) -> int:
    """Count the tensors and other objects that hold the memory of `tensor`."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
