"""One optimizer step: forward and backward passes over micro-batches, reduction, update.

Every rank's loss is the mean over its own tokens; the whole batch's loss is the mean of these.
Decisions (clip, skip) are made from numbers that all ranks hold in the same bits, on the device.

Shapes:  B sequences of a micro-batch   S positions   L MoE layers   E experts, all ranks
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from gatewise.moe.model import Decoder, DecoderOutput
from gatewise.moe.plan_ahead import BatchPlan
from gatewise.moe.side_by_side import forward_side_by_side
from gatewise.parallel.dims import Groups
from gatewise.parallel.schedule.recorder import Recorder
from gatewise.routers.ahead.config import Exchange
from gatewise.routers.api import Demand, Load, NoiseKey, Routing, RoutingContext
from gatewise.routers.balance import global_balance_loss
from gatewise.routers.router import ComposedRouter
from gatewise.training.engine import Engine
from gatewise.training.health import HealthMeter
from gatewise.training.spikes import SpikeGuard

__all__ = ["LABELS", "StepResult", "language_loss", "train_step"]

LABELS = ("dense", "embedding", "router", "expert")


@dataclass(frozen=True, slots=True)
class StepResult:
    """Device scalars of one step; reading them makes the host wait."""

    loss: Tensor  # language-model loss, nats per token, over the whole batch
    extra: dict[str, Tensor]  # router losses by name, weighted, summed over layers
    norms: dict[str, Tensor]  # gradient norms before clipping: total and per label
    skipped: Tensor  # 1 where nothing was updated: not finite, or a spike that is held back
    stop: Tensor  # above 0 where some rank was asked to stop
    spiked: Tensor  # 1 where loss or gradient norm stood out
    own_loss: Tensor  # of this rank's share of the batch


def language_loss(model: Decoder, output: DecoderOutput, target_BS: Tensor) -> Tensor:
    """Return the sum of -log p(target) in nats over targets that are not -100; at least fp32."""
    logits_TV = F.linear(output.hidden_BSD.flatten(0, 1), model.output_weight)
    # In bf16 the sum alone is wrong by up to 0.4 percent, hence not F.linear_cross_entropy, which
    # returns the type of its input.
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(
        logits_TV.to(wide), target_BS.flatten(), reduction="sum", ignore_index=-100
    )


def train_step(
    model: Decoder,
    engine: Engine,
    micro_batches: Sequence[Tensor],
    *,
    groups: Groups,
    meter: HealthMeter,
    noise: Sequence[NoiseKey],
    lr: float,
    clip: float,
    stop: bool = False,
    measure: bool = False,
    recorder: Recorder | None = None,
    spikes: SpikeGuard | None = None,
    beside: int = 1,
) -> StepResult:
    """Update the model on one global batch.

    Args:
        model: in training mode.
        engine: of the model's parameters.
        micro_batches: this rank's token ids, each (B, S + 1), all of one shape.
        groups: of this rank.
        meter: gets every routing.
        noise: one key per micro-batch.
        lr: learning rate.
        clip: largest gradient norm; 0 is off.
        stop: whether this rank was asked to stop; every rank learns of it.
        measure: whether the meter shall look at the gradients; equal on all ranks.
        recorder: gets when this rank communicated; the layers' passes have it from their
            `execution`.
        spikes: judges the step; None lets every finite one pass.
        beside: so many micro-batches in a row travel through the model side by side.
    """
    share = 1.0 / len(micro_batches)
    routers = model.routers()
    balance = _GlobalBalance(routers, groups, recorder)
    loss = torch.zeros((), device=micro_batches[0].device)
    extra: dict[str, Tensor] = {}
    plans: Sequence[BatchPlan | None] = [None] * len(micro_batches)
    if model.router_config.ahead.exchange is Exchange.step:
        plans = model.plan([token_BS[:, :-1] for token_BS in micro_batches])
    for first in range(0, len(micro_batches), beside):
        group = range(first, first + beside)
        outputs = _run_model(model, micro_batches, noise, plans, group)
        # the load of what travels side by side is balanced as that of one micro-batch
        shared = balance.add([output.routings for output in outputs])
        total = sum(shared.values(), torch.zeros((), device=loss.device)) * share * len(group)
        for name, part in shared.items():
            extra[name] = extra.get(name, 0) + part.detach() * share * len(group)
        for index, output in zip(group, outputs, strict=True):
            target_BS = model.split.own(micro_batches[index][:, 1:])
            mean = language_loss(model, output, target_BS) / target_BS.numel()
            losses = _sum_losses(output.routings)
            total = total + (mean + sum(losses.values(), torch.zeros_like(mean))) * share
            loss += mean.detach() * share
            for name, part in losses.items():
                extra[name] = extra.get(name, 0) + part.detach() * share
            meter.add(output.routings)
        engine.backward(total, last=first + beside >= len(micro_batches))
    watch = recorder.communication("reduce") if recorder else nullcontext()
    with record_function("step.reduce"), watch:
        engine.finish()
    if measure and output.routings:  # now: a fused optimizer scales them in place
        squares_LE = engine.expert_squares(model.config.num_experts)
        meter.measure_gradients(squares_LE, engine.divisor)
    asked = loss.new_tensor(float(stop))
    own_loss = loss
    watch = recorder.communication("scalars") if recorder else nullcontext()
    with watch:
        loss, asked, extra, norms = _reduce_scalars(engine, loss, asked, extra, groups)
    finite = torch.isfinite(norms["total"]) & torch.isfinite(loss)
    spiked = torch.zeros_like(finite)
    if spikes is not None:
        spiked = spikes.judge(loss, norms["total"], finite)
        if spikes.holds_back:
            finite = finite & ~spiked
    skipped = (~finite).float()
    # one scale divides by what the sums of gradients are too large by, and clips
    factor = (norms["total"] / clip).clamp(min=1.0) if clip else torch.ones_like(loss)
    scale = torch.where(finite, factor, 1.0) * engine.divisor
    with record_function("step.update"):
        engine.step(lr, scale=scale, skip=skipped)
    if model.ahead is not None:
        model.ahead.advance()
    demand = balance.demand()
    if demand is not None:
        _after_step(routers, demand, finite)
    return StepResult(loss, extra, norms, skipped, asked, spiked.float(), own_loss)


def _run_model(
    model: Decoder,
    micro_batches: Sequence[Tensor],
    noise: Sequence[NoiseKey],
    plans: Sequence[BatchPlan | None],
    group: range,
) -> list[DecoderOutput]:
    """Return what the model gives for the micro-batches of `group`, side by side if several."""
    tokens = [micro_batches[index][:, :-1] for index in group]
    contexts = [RoutingContext(noise=noise[index]) for index in group]
    if len(group) == 1:
        return [model(tokens[0], contexts[0], plan=plans[group[0]])]
    return forward_side_by_side(model, tokens, contexts)


class _GlobalBalance:
    """Counts over ranks and micro-batches of one optimizer step, one collective a micro-batch."""

    def __init__(
        self, routers: Sequence[ComposedRouter], groups: Groups, recorder: Recorder | None
    ) -> None:
        self._recorder = recorder
        # routers of one model have the same settings, and a steered weight the same value
        self._weight = routers[0].global_loss_weight if routers else 0.0
        self._has_loss = isinstance(self._weight, Tensor) or self._weight > 0
        self._moves = any(router.moves for router in routers)
        self._top_k = routers[0].top_k if routers else 0
        self._groups = groups
        self._count_LE: Tensor | None = None
        self._margin_LEM: Tensor | None = None
        self._tokens = torch.zeros(())

    def add(self, routings: Sequence[Sequence[Routing]]) -> dict[str, Tensor]:
        """Count a micro-batch; return its part of the global-batch loss, if there is one.

        Args:
            routings: of each of the parts of the micro-batch, those of all layers.
        """
        if not (self._has_loss or self._moves):
            return {}
        loads = [_whole_load(layer) for layer in zip(*routings, strict=True)]
        count_LE = torch.stack([load.count_E for load in loads])
        first = loads[0]
        if first.margin_EM is not None:
            margin_LEM = torch.stack([m for load in loads if (m := load.margin_EM) is not None])
            before = self._margin_LEM
            self._margin_LEM = margin_LEM if before is None else before + margin_LEM
        packed = torch.cat((count_LE.flatten(), first.tokens.view(1)))
        if self._groups.control.handle is not None:
            watch = self._recorder.communication("balance") if self._recorder else nullcontext()
            with watch:
                dist.all_reduce(packed, group=self._groups.control.handle)
        batch_tokens = packed[-1]
        if self._count_LE is None:
            self._count_LE = torch.zeros_like(count_LE)
            self._tokens = torch.zeros_like(batch_tokens)
        self._count_LE = self._count_LE + packed[:-1].view_as(count_LE)
        self._tokens = self._tokens + batch_tokens
        if not self._has_loss:
            return {}
        # scores are this micro-batch's, counts all of the step's so far: rescale them alike
        loss = global_balance_loss(
            torch.stack([load.score_E for load in loads]),
            self._count_LE * (batch_tokens / self._tokens),
            tokens=batch_tokens,
            top_k=self._top_k,
            ranks=self._groups.ranks,
        )
        return {"balance": self._weight * loss}

    def demand(self) -> Demand | None:
        """Return what the step demanded over all ranks; None where no router asks."""
        if not self._moves or self._count_LE is None:
            return None
        if self._margin_LEM is not None and self._groups.control.handle is not None:
            dist.all_reduce(self._margin_LEM, group=self._groups.control.handle)
        return Demand(self._count_LE, self._tokens, self._margin_LEM)


def _whole_load(routings: Sequence[Routing]) -> Load:
    """Return one layer's load over the parts of a micro-batch."""
    loads = [routing.load for routing in routings if routing.load is not None]
    if len(loads) == 1:
        return loads[0]
    margins = [load.margin_EM for load in loads if load.margin_EM is not None]
    return Load(
        torch.stack([load.count_E for load in loads]).sum(0),
        torch.stack([load.score_E for load in loads]).sum(0),
        torch.stack([load.tokens for load in loads]).sum(0),
        torch.stack(margins).sum(0) if margins else None,
    )


def _sum_losses(routings: Sequence[Routing]) -> dict[str, Tensor]:
    """Sum each named loss over layers."""
    parts: dict[str, Tensor] = {}
    for routing in routings:
        for name, value in routing.losses.items():
            parts[name] = parts[name] + value if name in parts else value
    return parts


def _reduce_scalars(
    engine: Engine, loss: Tensor, asked: Tensor, extra: dict[str, Tensor], groups: Groups
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Average losses over ranks and complete the gradient norms, in one collective."""
    squares = engine.squares()
    zero = loss.new_zeros(())
    scalars = [asked, loss, *extra.values(), *(squares.get(label, zero) for label in LABELS)]
    packed = torch.stack([scalar.double() for scalar in scalars])
    if groups.control.handle is not None:
        dist.all_reduce(packed, group=groups.control.handle)
    count = 2 + len(extra)
    means = (packed[:count] / groups.ranks).float()
    label_squares = packed[count:]
    norms = {
        label: (label_squares[index].sqrt() / engine.divisor).float()
        for index, label in enumerate(LABELS)
        if label in squares
    }
    norms["total"] = (label_squares.sum().sqrt() / engine.divisor).float()
    return means[1], means[0], dict(zip(extra, means[2:], strict=True)), norms


def _after_step(routers: Sequence[ComposedRouter], demand: Demand, finite: Tensor) -> None:
    """Let the routers move their balance state, and put it back where the step was skipped."""
    for router in routers:
        if not router.moves:
            continue
        before = {name: tensor.clone() for name, tensor in router.state().items()}
        router.after_step(demand)
        for name, tensor in router.state().items():
            tensor.copy_(torch.where(finite, tensor, before[name]))
