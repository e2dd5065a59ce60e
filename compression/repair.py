"""Routers fitted to the quantised weights around them.

Quantised weights move the inputs of the routers, and with them the choice of experts. `topk_mse`
fits each linear router, right after its block's attention was quantised, to the logits that the
uncompressed model had for the experts that it chose: a ridge regression per expert, around the old
weights. Of some steps from the old weights to the fitted ones the one that agrees best with the
uncompressed model's choices is taken, so agreement on the calibration tokens never falls.
`cross_entropy` trains the routers of the finished model by the loss on the calibration sequences.

Read first: `observe.py`, `routers/router.py`.

Shapes:  T tokens   K choices per token   E experts   D model width   R tokens of one expert
Source:  topk_mse: EAC-MoE (QESC). cross_entropy: GEMQ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.compression.artefact import read_parts, write_layer
from gatewise.compression.config import Repair
from gatewise.compression.observe import Seen
from gatewise.compression.plan import Plan
from gatewise.moe.model import Decoder, parameter_specs
from gatewise.parallel.errors import ConfigError
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig, Scorer, Selector
from gatewise.routers.router import ComposedRouter
from gatewise.training.step import language_loss

__all__ = [
    "RouterTarget",
    "check_repairable",
    "fit_by_loss",
    "fit_router",
    "put_tensors",
]

_STEPS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class RouterTarget:
    """What the uncompressed model's router did with the same tokens."""

    expert_TK: Tensor
    logits_TE: Tensor  # fp32


def check_repairable(config: RouterConfig, rule: Repair) -> None:
    """Refuse routers that the rule cannot fit.

    Raises:
        ConfigError: with the reason.
    """
    if rule is Repair.none:
        return
    if config.ahead.is_on:
        raise ConfigError(
            f"repair is {rule.name}, but a pre-gate chooses the experts of this model, not its "
            "layers' routers"
        )
    by_none = config.scorer in {Scorer.sparsity, Scorer.hash}
    if rule is Repair.cross_entropy and by_none:
        raise ConfigError(
            f"repair is cross_entropy, which trains the routers' weights; those of this model have "
            f"none (scorer={config.scorer.name}): use repair=none"
        )
    if rule is Repair.topk_mse and (
        config.scorer is not Scorer.linear or config.selector is not Selector.topk
    ):
        raise ConfigError(
            f"repair is topk_mse, which fits linear routers that take the best K; this model has "
            f"scorer={config.scorer.name}, selector={config.selector.name}: use "
            f"{'none' if by_none else 'cross_entropy'}"
        )


@torch.no_grad()
def fit_router(
    router: ComposedRouter, seen: Seen, target: RouterTarget, *, ridge: float
) -> dict[str, float]:
    """Fit a linear router to the logits of the experts that the uncompressed model chose.

    Args:
        router: changed in place, unless no step agrees better than what it is.
        seen: what it sees now, of the same tokens in the same order.
        target: the uncompressed model's.
        ridge: pull to the present weights, times the mean squared input of an expert's tokens.

    Returns:
        Share of the uncompressed model's choices that are made too, before and after, and the
        step that was taken from 0 (nothing) to 1.
    """
    if router.hashed:
        return {"agreement_before": 1.0, "agreement_after": 1.0, "step": 0.0}
    old_ED = router.weight.detach().clone()
    x_TD = seen.x_TD.double()
    fitted_ED = old_ED.double()
    eye_DD = torch.eye(x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    for expert in range(router.num_experts):
        row_R = (target.expert_TK == expert).any(1).nonzero()[:, 0]
        if not len(row_R):
            continue
        x_RD = x_TD[row_R]
        gram_DD = x_RD.t() @ x_RD
        pull = ridge * float(gram_DD.trace()) / gram_DD.shape[0]
        if not pull > 0:
            continue
        left_R = target.logits_TE[row_R, expert].double() - x_RD @ fitted_ED[expert]
        fitted_ED[expert] += torch.linalg.solve(gram_DD + pull * eye_DD, x_RD.t() @ left_R)
    before = best = _agreement(router, seen.x_TD, target.expert_TK)
    taken, chosen_ED = 0.0, old_ED
    for step in _STEPS:
        trial_ED = old_ED.double().lerp(fitted_ED, step).to(old_ED.dtype)
        router.weight.copy_(trial_ED)
        found = _agreement(router, seen.x_TD, target.expert_TK)
        if found > best:
            best, taken, chosen_ED = found, step, trial_ED
    router.weight.copy_(chosen_ED)
    return {"agreement_before": before, "agreement_after": best, "step": taken}


def fit_by_loss(
    model: Decoder,
    batches: Sequence[Tensor],
    *,
    rate: float,
    epochs: int,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train only the routers of a model, by the loss on some batches.

    Args:
        model: dequantised, fp32; its routers are changed.
        batches: int64 (B, S + 1): the last position is a target only.
        rate: learning rate of AdamW.
        epochs: passes over the batches.
        progress: told how many steps are done, of how many.

    Returns:
        The routers' tensors by their names in checkpoints: none where the loss did not fall; and
        the loss per token before and after.
    """
    model.eval()  # no noise, no dropping
    routers = {
        spec.name: spec.parameter for spec in parameter_specs(model) if spec.label == "router"
    }
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in routers.values():
        parameter.requires_grad_(True)
    before = _loss(model, batches)
    optimizer = torch.optim.AdamW(routers.values(), lr=rate, weight_decay=1e-4)
    steps = epochs * len(batches)
    for step in range(steps):
        token_BS = batches[step % len(batches)].to(model.embedding.device)
        output = model(token_BS[:, :-1])
        loss = language_loss(model, output, token_BS[:, 1:]) / token_BS[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, steps)
    after = _loss(model, batches)
    record = {"loss_before": before, "loss_after": after}
    if not after < before:
        return {}, record
    return {f"model/{name}": tensor.detach() for name, tensor in routers.items()}, record


def put_tensors(folder: Path, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Replace kept tensors in the files of an artefact; each file stays complete throughout."""
    for number in range(plan.layers + 1):
        here = {item.name for item in plan.kept_of_file(number)} & tensors.keys()
        if here:
            parts, kept = read_parts(folder, plan, number)
            kept |= {name: tensors[name] for name in here}
            write_layer(folder, plan, number, parts=parts, kept=kept)


@torch.no_grad()
def _loss(model: Decoder, batches: Sequence[Tensor]) -> float:
    nats, tokens = 0.0, 0
    for batch_BS in batches:
        token_BS = batch_BS.to(model.embedding.device)
        output = model(token_BS[:, :-1])
        nats += float(language_loss(model, output, token_BS[:, 1:]))
        tokens += token_BS[:, 1:].numel()
    return nats / tokens


def _agreement(router: ComposedRouter, x_TD: Tensor, wanted_TK: Tensor) -> float:
    """Return the share of wanted choices that the router makes."""
    routing, _ = router(x_TD, RoutingContext(), 0)
    experts = router.num_experts
    ours_TE = F.one_hot(routing.expert_TK, experts).sum(1)
    wanted_TE = F.one_hot(wanted_TK, experts).sum(1)
    return float((ours_TE * wanted_TE).sum()) / max(wanted_TK.numel(), 1)
