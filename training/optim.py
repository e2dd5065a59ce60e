"""AdamW on flat buckets, with sharded state, and learning-rate schedules.

The update reads gradients as sums over ranks and folds three things into one scale: the division
by the data-parallel size, the clipping by the one true norm, and the skip of a non-finite step.
None needs the host to wait.

Source: AdamW: arXiv:1711.05101; sharded state: ZeRO stage 1, arXiv:1910.02054;
        warmup-stable-decay: arXiv:2404.06395, section 4.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gatewise.parallel.buckets import Bucket
from gatewise.parallel.collectives import Group
from gatewise.training.config import OptimConfig, Schedule

__all__ = ["ShardedAdamW", "learning_rate", "load_apex_adam"]


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


class ShardedAdamW:
    """One AdamW over this rank's slices of all buckets.

    Args:
        buckets: master weights are the buckets' own values where these are fp32 and unsharded,
            else fp32 copies of this rank's slice.
        config: rates and decay.
        apex_adam: NVIDIA Apex's FusedAdam, from `load_apex_adam`; None takes torch's fused AdamW.
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
        groups = []
        for bucket in self.buckets:
            mine = bucket.values[bucket.owned]
            wide = bucket.gradients.dtype
            master = mine if mine.dtype == wide else mine.to(wide)
            master.grad = bucket.gradients[bucket.owned]
            self.masters.append(master)
            groups.append(
                {
                    "params": [master],
                    "weight_decay": config.weight_decay if bucket.decay else 0.0,
                    "ratio": _ratio(config, bucket),
                }
            )
        settings: dict[str, Any] = {  # of both optimizers
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
        }
        self._apex = apex_adam is not None
        self._inner = (
            torch.optim.AdamW(groups, **settings, fused=True)
            if apex_adam is None
            else apex_adam(groups, **settings, adam_w_mode=True)
        )
        for master in self.masters:  # made now, so that a checkpoint can be loaded into them
            self._inner.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def step(self, lr: float, *, scale: Tensor, skip: Tensor) -> None:
        """Update all parameters and bring every rank's copy up to date.

        Args:
            lr: learning rate before the labels' ratios.
            scale: scalar; gradients are divided by it.
            skip: scalar, 1 leaves parameters, moments and step counts as they are.
        """
        for group in self._inner.param_groups:
            group["lr"] = lr * group["ratio"]
        if self._apex:
            self._step_apex(scale, skip)
        else:
            # the protocol of torch.amp.GradScaler with fused optimizers
            self._inner.grad_scale = scale  # type: ignore[attr-defined]
            self._inner.found_inf = skip  # type: ignore[attr-defined]
            self._inner.step()
        self.publish()

    def _step_apex(self, scale: Tensor, skip: Tensor) -> None:
        """Update with Apex, which takes neither scale nor skip: the host waits for `skip`."""
        if bool(skip):
            return
        torch._foreach_div_([m.grad for m in self.masters if m.grad is not None], scale)
        self._inner.step()
        for master in self.masters:  # Apex counts in its groups; checkpoints read it here
            self._inner.state[master]["step"] += 1

    def publish(self) -> None:
        """Copy master weights into the parameters and gather the other ranks' slices."""
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            mine = bucket.values[bucket.owned]
            if mine.data_ptr() != master.data_ptr():
                mine.copy_(master)
            shard = bucket.groups.shard
            if shard.handle is not None:
                _gather_slices(bucket.values, mine, shard)

    def moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the first and second moments of bucket `index`'s owned slice."""
        state = self._inner.state[self.masters[index]]
        return state["exp_avg"], state["exp_avg_sq"]

    @property
    def updates(self) -> int:
        """Number of updates applied (skipped steps do not count); the host waits for it."""
        return int(self._inner.state[self.masters[0]]["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for master in self.masters:
            self._inner.state[master]["step"].fill_(float(count))
        if self._apex:
            for group in self._inner.param_groups:
                group["step"] = count


def load_apex_adam(device: torch.device) -> Callable[..., torch.optim.Optimizer] | None:
    """Return NVIDIA Apex's FusedAdam for a GPU where it is built, else None.

    PyPI's package of the same name is unrelated and has no such module.
    """
    if device.type != "cuda":
        return None
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    fused: Callable[..., torch.optim.Optimizer] = FusedAdam  # apex ships no types
    return fused


def _ratio(config: OptimConfig, bucket: Bucket) -> float:
    if bucket.label == "router":
        return config.router_lr_ratio
    return config.embedding_lr_ratio if bucket.label == "embedding" else 1.0


def _gather_slices(flat: Tensor, mine: Tensor, group: Group) -> None:
    import torch.distributed as dist

    dist.all_gather_single(flat, mine.clone(), group=group.handle)
