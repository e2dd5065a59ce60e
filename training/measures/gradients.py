"""Which loss moves the router: gradients of several losses apart.

Source:  RMoE, arXiv:2408.06793, section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientSplit", "gradient_split"]


@dataclass(frozen=True, slots=True)
class GradientSplit:
    """Gradients of some parameters, by the loss that they come from."""

    norms: dict[str, float]
    cosines: dict[str, float]  # of each loss's gradient with the first loss's; 0 for a zero one


def gradient_split(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> GradientSplit:
    """Differentiate each loss by the parameters, one backward pass a loss.

    Args:
        losses: scalars of one graph, weighted as in training; the first is the one to compare with.
        parameters: of the router; one that a loss does not reach has gradient zero there.

    Returns:
        Norms over all parameters together.
    """
    norms: dict[str, float] = {}
    cosines: dict[str, float] = {}
    first: Tensor | None = None
    for name, loss in losses.items():
        parts: Sequence[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if part is None else part).flatten().double()
                for p, part in zip(parameters, parts, strict=True)
            ]
        )
        first = flat if first is None else first
        norms[name] = float(flat.norm())
        product = norms[name] * float(first.norm())
        cosines[name] = float(first @ flat) / product if product > 0 else 0.0
    return GradientSplit(norms, cosines)
