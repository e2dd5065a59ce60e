"""What a run does about steps that went wrong: skip, go back to a checkpoint, or end.

All ranks decide alike, from numbers that are equal on all of them. Numbers of single ranks are
gathered only once something went wrong, to name the rank.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gatewise.moe.model import Decoder
from gatewise.parallel.errors import RankError
from gatewise.parallel.runtime import Runtime
from gatewise.training.config import TrainConfig
from gatewise.training.guard_config import NonfinitePolicy, ReplicaPolicy, SpikePolicy
from gatewise.training.replicas import compare_replicas
from gatewise.training.resume import Progress
from gatewise.training.spikes import SpikeGuard
from gatewise.training.state import Updater
from gatewise.training.step import StepResult

__all__ = ["Guard", "NonfiniteError", "ReplicaError", "Trouble"]

_log = logging.getLogger(__name__)


class NonfiniteError(RankError):
    """Loss or gradients stayed NaN, infinite or far too large for too many steps."""


class ReplicaError(RankError):
    """Ranks that should hold the same weights do not."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why the run goes back to a checkpoint."""

    error: RankError  # to be raised where it cannot
    skips_data: bool  # whether the samples since the checkpoint are passed over


class Guard:
    """Judges steps by the policies of a run.

    Args:
        config: of the run.
        runtime: this rank.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        is_on = config.spikes.policy is not SpikePolicy.off
        self.spikes = SpikeGuard(config.spikes, runtime.device) if is_on else None

    def inspect(
        self, result: StepResult, *, skipped: bool, spiked: bool, progress: Progress
    ) -> Trouble | None:
        """Count a step's flags; return why to go back, if the policy says so.

        Args:
            result: of the step; read only where a flag is up.
            skipped: whether it changed nothing.
            spiked: whether it stood out.
            progress: gets the counts.

        Raises:
            NonfiniteError: on all ranks, if the run ends here.
        """
        progress.skipped += int(skipped)
        progress.spikes += int(spiked)
        progress.spikes_in_a_row = progress.spikes_in_a_row + 1 if spiked else 0
        broken = skipped and not spiked
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if broken else 0
        if not (skipped or spiked):
            return None
        blame = self._blame(result)
        return self._spike(progress, blame) if spiked else self._nonfinite(progress, blame)

    def due(self, step: int, *, saves: bool) -> bool:
        """Tell whether replicas are compared after a step, which may be followed by a save."""
        every = self._config.replicas.every
        return every is not None and (saves or step % every == 0)

    def compare(self, model: Decoder, updater: Updater, step: int) -> Trouble | None:
        """Compare the replicas of weights; the host waits for it.

        Raises:
            ReplicaError: on all ranks, if they differ and the policy is to stop.
        """
        differences = compare_replicas(model, updater, self._runtime.groups.control)
        if not differences:
            return None
        error = ReplicaError(
            f"{'; '.join(map(str, differences))}, after step {step}: memory was corrupted since "
            "the replicas were compared last. Every checkpoint was compared before it was saved: "
            "start again to go on from the newest, without that rank's machine if this repeats"
        )
        if self._config.replicas.policy is ReplicaPolicy.stop:
            raise error
        return Trouble(error, skips_data=False)

    def _nonfinite(self, progress: Progress, blame: str) -> Trouble | None:
        config = self._config.nonfinite
        limit = 1 if config.policy is NonfinitePolicy.stop else config.max_consecutive
        row = progress.skipped_in_a_row
        if row < limit:
            self._warn(f"step {progress.step} skipped: {blame} ({row} in a row)")
            return None
        steps = f"{limit} steps in a row, up to step" if limit > 1 else "step"
        error = NonfiniteError(
            f"{blame}: loss or gradients were not finite in {steps} {progress.step}; these steps "
            "changed no weights. Lower optim.lr or optim.clip, use precision=fp32, or raise "
            "nonfinite.max_consecutive"
        )
        if config.policy is not NonfinitePolicy.rollback:
            raise error
        return Trouble(error, skips_data=True)

    def _spike(self, progress: Progress, blame: str) -> Trouble | None:
        config, row = self._config.spikes, progress.spikes_in_a_row
        held = config.policy is not SpikePolicy.warn
        what = f"step {progress.step} {'skipped' if held else 'stands out'}: spike, {blame}"
        if not held or row < config.max_consecutive:
            self._warn(f"{what} ({row} in a row)")
            return None
        error = NonfiniteError(
            f"{blame}: loss or gradient norm stood out in {row} steps in a row, up to step "
            f"{progress.step}; these steps changed no weights. Lower optim.lr or optim.clip, or "
            "raise spikes.sigmas or spikes.max_consecutive"
        )
        if config.policy is not SpikePolicy.rollback:
            raise error
        return Trouble(error, skips_data=True)

    def _blame(self, result: StepResult) -> str:
        """Name the rank whose own loss is not finite or largest; all ranks take part."""
        control = self._runtime.groups.control
        table = torch.zeros(control.size, dtype=torch.float64, device=self._runtime.device)
        table[control.rank] = result.own_loss
        if control.handle is not None:
            dist.all_reduce(table, group=control.handle)
        return _blame_rank(table.tolist(), result)

    def _warn(self, text: str) -> None:
        if self._runtime.rank == 0:
            _log.warning(text)


def _blame_rank(losses: Sequence[float], result: StepResult) -> str:
    broken = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if broken:
        return f"rank {broken[0]}: its loss is {losses[broken[0]]}"
    norms = {label: float(norm) for label, norm in result.norms.items() if label != "total"}
    kinds = [label for label, norm in norms.items() if not math.isfinite(norm)]
    if kinds:
        return f"all ranks: the sum of {' and '.join(kinds)} gradients is not finite"
    worst = max(range(len(losses)), key=losses.__getitem__)
    return (
        f"rank {worst}: largest loss {losses[worst]:.4g}, gradient norm "
        f"{float(result.norms['total']):.4g}"
    )
