"""How far a pre-gate chooses as a layer's own router would: a loss to learn it, and two measures.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gatewise.routers.ahead.config import AheadConfig
from gatewise.routers.ahead.plan import RoutePlan
from gatewise.routers.api import Routing
from gatewise.routers.choice import stable_topk

__all__ = ["distillation_loss", "learn_to_agree", "mass_recall", "recall_at_k"]


def distillation_loss(
    teacher_TE: Tensor,
    student_TE: Tensor,
    *,
    temperature: float = 1.0,
    padding_T: Tensor | None = None,
) -> Tensor:
    """Return the mean over tokens of KL(softmax(teacher / tau) || softmax(student / tau)).

    Args:
        teacher_TE: logits of the layer's router; no gradient reaches them.
        student_TE: logits of the pre-gate.
        temperature: tau.
        padding_T: True where a token does not count.

    Returns:
        A scalar in nats; 0 where both agree up to a constant, and for zero tokens.
    """
    teacher_TE = teacher_TE.detach().to(student_TE.dtype) / temperature
    log_p_TE = teacher_TE.log_softmax(-1)
    log_q_TE = (student_TE / temperature).log_softmax(-1)
    loss_T = (log_p_TE.exp() * (log_p_TE - log_q_TE)).sum(-1)
    if padding_T is None:
        return loss_T.sum() / max(loss_T.shape[0], 1)
    return torch.where(padding_T, 0.0, loss_T).sum() / (~padding_T).sum().clamp(min=1)


def recall_at_k(wanted_TK: Tensor, chosen_TK: Tensor, *, padding_T: Tensor | None = None) -> Tensor:
    """Return the sum over tokens of the share of `wanted` experts that were chosen.

    Args:
        wanted_TK: what the layer's router would choose; -1 is no expert.
        chosen_TK: what the pre-gate chose, any number of experts.
        padding_T: True where a token does not count.
    """
    found_TK = (wanted_TK.unsqueeze(2) == chosen_TK.unsqueeze(1)).any(2) & (wanted_TK >= 0)
    share_T = found_TK.float().sum(1) / (wanted_TK >= 0).float().sum(1).clamp(min=1)
    return share_T.sum() if padding_T is None else torch.where(padding_T, 0.0, share_T).sum()


def mass_recall(score_TE: Tensor, chosen_TK: Tensor, *, padding_T: Tensor | None = None) -> Tensor:
    """Return the sum over tokens of the router's probability that lies on the chosen experts.

    Args:
        score_TE: probabilities of the layer's router; rows sum to 1.
        chosen_TK: what the pre-gate chose; -1 is no expert.
        padding_T: True where a token does not count.
    """
    mass_TK = score_TE.gather(1, chosen_TK.clamp(min=0)) * (chosen_TK >= 0)
    mass_T = mass_TK.sum(1)
    return mass_T.sum() if padding_T is None else torch.where(padding_T, 0.0, mass_T).sum()


def learn_to_agree(
    routings: Sequence[Routing],
    route: RoutePlan,
    config: AheadConfig,
    *,
    padding_T: Tensor | None = None,
) -> list[Routing]:
    """Add to each layer's losses what teaches the pre-gate to choose as that layer would.

    The loss `distil` is weighted so that the sum over layers is `config.distil` times their mean.
    Where the pre-gate weighs the experts itself, or the route was recorded, nothing is added.

    Args:
        routings: of all MoE layers, which followed the route.
        route: with the pre-gate's logits.
        config: weight and temperature.
        padding_T: True where a token does not count.
    """
    if route.logits_LTE is None or route.weighs:
        return list(routings)
    taught = []
    for layer, routing in enumerate(routings):
        decision = route.layer(layer)
        assert decision.logits_TE is not None
        assert routing.logits_TE is not None
        losses = dict(routing.losses)
        if config.distil:
            loss = distillation_loss(
                routing.logits_TE,
                decision.logits_TE,
                temperature=config.temperature,
                padding_T=padding_T,
            )
            losses["distil"] = loss * (config.distil / len(routings))
        with torch.no_grad():
            logits_TE = torch.nan_to_num(routing.logits_TE.detach(), nan=-1e30)
            wanted_TK = stable_topk(logits_TE, decision.expert_TK.shape[1])
            recall = recall_at_k(wanted_TK, decision.expert_TK, padding_T=padding_T)
        taught.append(replace(routing, losses=losses, health={**routing.health, "recall": recall}))
    return taught
