"""Which loss moves the router: gradients of several losses apart.

Source:  RMoE, arXiv:2408.06793, section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.moe.model import Decoder, parameter_specs
from gatewise.routers.balance import global_balance_loss
from gatewise.routers.router import ComposedRouter
from gatewise.training.step import language_loss

__all__ = ["GradientSplit", "gradient_split", "router_gradients"]


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


def router_gradients(model: Decoder, input_BS: Tensor, target_BS: Tensor) -> GradientSplit:
    """Split the gradient of all routers' parameters by loss, on one batch without noise or drops.

    Args:
        model: with all experts on this rank; put into evaluation mode, and back.
        input_BS: token ids.
        target_BS: the tokens that follow.

    Returns:
        `language` first, then each router loss by its name, weighted as in training and summed
        over layers; empty where the routers have no parameters.
    """
    parameters = [spec.parameter for spec in parameter_specs(model) if spec.label == "router"]
    if not parameters:
        return GradientSplit({}, {})
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        output = model(input_BS)
        losses = {"language": language_loss(model, output, target_BS) / target_BS.numel()}
        for layer, routing in zip(model.moe_layers(), output.routings, strict=True):
            parts = dict(routing.losses)
            router, load = layer.router, routing.load
            weight = router.global_loss_weight if isinstance(router, ComposedRouter) else 0.0
            if load is not None and not (isinstance(weight, float) and weight == 0):
                parts["balance"] = weight * global_balance_loss(
                    load.score_E.unsqueeze(0),
                    load.count_E.unsqueeze(0),
                    tokens=load.tokens,
                    top_k=model.config.top_k,
                    ranks=1,
                )
            for name, value in parts.items():
                losses[name] = losses[name] + value if name in losses else value
        split = gradient_split(losses, parameters)
    model.train(was_training)
    return split
