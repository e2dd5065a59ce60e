"""AdamW on flat buckets, with sharded state, and learning-rate schedules.

The update reads gradients as sums over ranks and folds three things into one scale: the division
by the data-parallel size, the clipping by the one true norm, and the skip of a non-finite step.
None needs the host to wait.

Source: AdamW: arXiv:1711.05101; sharded state: ZeRO stage 1, arXiv:1910.02054;
        warmup-stable-decay: arXiv:2404.06395, section 4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gatewise.parallel.buckets import Bucket
from gatewise.parallel.collectives import Group
from gatewise.parallel.parameters import Label, Part
from gatewise.training.config import OptimConfig, Schedule

__all__ = ["Held", "ShardedAdamW", "learning_rate", "learning_rate_ratio"]


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`.

    Linear warm-up over `config.warmup` steps, then the schedule's shape down to
    `lr * lr_min_ratio` at the last step.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule is Schedule.constant:
        return config.lr
    end = max(steps - 1, 1)
    if config.schedule is Schedule.wsd:
        start = max(config.warmup, math.floor(steps * (1 - config.decay)))
        if step < start:
            return config.lr
        share = (step - start + 1) / max(end - start + 1, 1)
        return config.lr * (1 - share * (1 - config.lr_min_ratio))
    share = (step - config.warmup) / max(end - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return config.lr * (config.lr_min_ratio + (1 - config.lr_min_ratio) * cosine)


@dataclass(frozen=True, slots=True)
class _State:
    """What an update of one bucket's owned slice needs beside values and gradients."""

    decay: float
    ratio: float  # of the learning rate
    step: Tensor  # updates so far; fp32 scalar on the device, as the fused kernel wants it
    first: Tensor  # moments
    second: Tensor


@dataclass(frozen=True, slots=True)
class Held:
    """A flat range of weights that this rank updates, and Adam's moments of them."""

    parts: Sequence[Part]
    master: Tensor
    first: Tensor
    second: Tensor


class ShardedAdamW:
    """One AdamW over this rank's slices of all buckets.

    Args:
        buckets: master weights are the buckets' own values where these are fp32 and unsharded,
            else fp32 copies of this rank's slice.
        config: rates and decay.
        apex_adam: NVIDIA Apex's FusedAdam, from `choose_fused`; None takes torch's fused AdamW.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        config: OptimConfig,
        *,
        apex_adam: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        self.buckets = list(buckets)
        self.config = config
        self.masters: list[Tensor] = []
        self._states: list[_State] = []  # made now, so that a checkpoint can be loaded into them
        for bucket in self.buckets:
            mine = bucket.values[bucket.owned]
            wide = bucket.gradients.dtype
            master = mine if mine.dtype == wide else mine.to(wide)
            master.grad = bucket.gradients[bucket.owned]
            self.masters.append(master)
            self._states.append(
                _State(
                    decay=config.weight_decay if bucket.decay else 0.0,
                    ratio=learning_rate_ratio(config, bucket.label),
                    step=torch.zeros((), dtype=torch.float32, device=master.device),
                    first=torch.zeros_like(master),
                    second=torch.zeros_like(master),
                )
            )
        self._apex = None if apex_adam is None else self._wrap_apex(apex_adam)

    def step(self, lr: float, *, scale: Tensor, skip: Tensor) -> None:
        """Update all parameters and bring every rank's copy up to date.

        Args:
            lr: learning rate before the labels' ratios.
            scale: scalar; gradients are divided by it.
            skip: scalar, 1 leaves parameters, moments and step counts as they are.
        """
        if self._apex is not None:
            self._step_apex(self._apex, lr, scale=scale, skip=skip)
        else:
            self._step_torch(lr, scale=scale, skip=skip)
        self.publish()

    def _step_torch(self, lr: float, *, scale: Tensor, skip: Tensor) -> None:
        """Update with torch's fused kernel, which takes scale and skip.

        The function, not the class: making a `torch.optim.AdamW` imports torch's compiler, 2 s and
        75 MB on every rank.
        """
        for bucket, master, state in zip(self.buckets, self.masters, self._states, strict=True):
            adamw(
                [master],
                [bucket.gradients[bucket.owned]],
                [state.first],
                [state.second],
                [],
                [state.step],
                fused=True,
                grad_scale=scale,
                found_inf=skip,
                amsgrad=False,
                maximize=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=lr * state.ratio,
                weight_decay=state.decay,
                eps=self.config.eps,
            )

    def _wrap_apex(self, adam: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        groups = [
            {"params": [master], "weight_decay": state.decay}
            for master, state in zip(self.masters, self._states, strict=True)
        ]
        config = self.config
        betas = (config.beta1, config.beta2)
        inner = adam(groups, lr=config.lr, betas=betas, eps=config.eps, adam_w_mode=True)
        for master, state in zip(self.masters, self._states, strict=True):
            inner.state[master] = {"exp_avg": state.first, "exp_avg_sq": state.second}
        return inner

    def _step_apex(
        self, inner: torch.optim.Optimizer, lr: float, *, scale: Tensor, skip: Tensor
    ) -> None:
        """Update with Apex, which takes neither scale nor skip: the host waits for `skip`."""
        if bool(skip):
            return
        for group, state in zip(inner.param_groups, self._states, strict=True):
            group["lr"] = lr * state.ratio
            state.step.add_(1)  # Apex counts in its groups; checkpoints read it here
        torch._foreach_div_([m.grad for m in self.masters if m.grad is not None], scale)
        inner.step()

    def publish(self) -> None:
        """Copy master weights into the parameters and gather the other ranks' slices."""
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            mine = bucket.values[bucket.owned]
            if mine.data_ptr() != master.data_ptr():
                mine.copy_(master)
            shard = bucket.groups.shard
            if shard.handle is not None:
                _gather_slices(bucket.values, mine, shard)

    def held(self) -> list[Held]:
        """Return all that this rank updates; the tensors are those that `step` changes."""
        return [
            Held(bucket.parts(), master, state.first, state.second)
            for bucket, master, state in zip(self.buckets, self.masters, self._states, strict=True)
        ]

    def moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the first and second moments of bucket `index`'s owned slice."""
        return self._states[index].first, self._states[index].second

    @property
    def updates(self) -> int:
        """Number of updates applied (skipped steps do not count); the host waits for it."""
        return int(self._states[0].step.item())

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._states:
            state.step.fill_(float(count))
        for group in self._apex.param_groups if self._apex else ():
            group["step"] = count


def learning_rate_ratio(config: OptimConfig, label: Label) -> float:
    """Return by what the learning rate of parameters with that label is multiplied."""
    if label == "router":
        return config.router_lr_ratio
    return config.embedding_lr_ratio if label == "embedding" else 1.0


def _gather_slices(flat: Tensor, mine: Tensor, group: Group) -> None:
    import torch.distributed as dist

    dist.all_gather_single(flat, mine.clone(), group=group.handle)
