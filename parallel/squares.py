"""Sums of squares that stay exact for long tensors.

A sum of fp32 numbers one by one loses the small ones once it has grown: over tens of millions of
gradients on a CPU, a thousandth of the norm. Blocks are summed in fp32, and their sums in fp64.

Shapes:  R rows   N numbers of a row
"""

import torch
from torch import Tensor

__all__ = ["square_sums"]

_BLOCK = 4096


def square_sums(x_RN: Tensor) -> Tensor:
    """Return the sum of squares of each row, fp64 (R,), without a copy of the rows."""
    blocks = x_RN.shape[1] // _BLOCK
    whole = x_RN[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    norms = torch.linalg.vector_norm(whole, dim=2).double()
    rest = torch.linalg.vector_norm(x_RN[:, blocks * _BLOCK :], dim=1).double()
    sums: Tensor = norms.square().sum(1) + rest.square()
    return sums
