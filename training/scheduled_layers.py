"""The schedule of a run's MoE layers: planned at the start, watched, and planned again.

Read `schedule.py`, `lane_meter.py` and `drift.py` first. Every rank plans from the same costs, so
all have the same plans. Costs that the ranks measure themselves are kept in the run's folder.
"""

import logging
from pathlib import Path

import torch

from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import apply_schedule
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.runtime import Runtime
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.profiles import Profile, write_profile
from gatewise.parallel.schedule.recorder import Recorder
from gatewise.parallel.streams import lanes_for
from gatewise.training.config import TrainConfig
from gatewise.training.drift import DriftWatch
from gatewise.training.engine import Engine
from gatewise.training.lane_meter import LaneMeter
from gatewise.training.measure_costs import measure_costs
from gatewise.training.schedule import TrainingSchedule, known_profile, plan_schedule

__all__ = ["ScheduledLayers"]

_log = logging.getLogger(__name__)
_LATER = 2  # so many times longer must the next prediction be off


class ScheduledLayers:
    """Gives the layers their plans and lanes, and new plans where the costs have changed.

    Args:
        model: of this rank.
        engine: sums its gradients.
        config: settings of the run.
        runtime: of this rank.
        folder: of the run.
        dtype: of the layers' arithmetic.

    Raises:
        ConfigError: if the costs cannot be read, measured or used.
    """

    def __init__(
        self,
        model: Decoder,
        engine: Engine,
        config: TrainConfig,
        runtime: Runtime,
        folder: Path,
        *,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._engine, self._config = model, engine, config
        self._runtime, self._folder, self._dtype = runtime, folder, dtype
        self._sinks = [layer.experts.sinks for layer in model.moe_layers()]
        self._meter = LaneMeter(runtime, folder, trace=config.schedule.trace)
        self._lanes = lanes_for(runtime.device)
        self._steps = config.schedule.refit
        self._watch: DriftWatch | None = None
        self._refits = 0
        self._is_off = False
        if config.schedule.measures:
            profile: Profile | None = self._measure("profile.json", "at the start of a run")
        else:
            profile = known_profile(config)
        self.plan = self._use(profile)

    @property
    def recorder(self) -> Recorder:
        """Gets what the layers and the step communicate."""
        return self._meter.recorder

    def begin(self, step: int) -> None:
        """Get ready for a step."""
        self._meter.begin(step)

    def end(self, step: int) -> float:
        """Read what the step did, once the host has waited for it.

        Returns:
            Milliseconds in which this rank only communicated or waited for others.
        """
        line = self._meter.end(step, self.plan.predicted)
        if self._watch is not None:
            self._is_off = self._watch.add(line)
        return line.exposed_ms()

    def adapt(self, step: int) -> None:
        """Measure and plan again if the prediction was off for long; all ranks do so together."""
        if not self._is_off or self._watch is None or self._steps is None:
            return
        self._is_off = False
        steps, self._steps = self._steps, self._steps * _LATER
        found = (
            f"step {step}: the MoE layers' passes were predicted {abs(self._watch.error):.0%} too "
            f"{'short' if self._watch.error < 0 else 'long'} for {steps} steps"
        )
        if self._runtime.device.type != "cpu":
            _log.warning("%s; measure the costs again and start with schedule.profile=FILE", found)
            return
        before = self.plan
        profile = self._measure(f"profile_step_{step}.json", f"at step {step} of a run")
        self._refits += 1
        self.plan = self._use(profile)
        _log.warning(
            "%s; costs measured again (profile_step_%d.json): %s, before %s",
            found,
            step,
            self.plan,
            before,
        )

    def drain(self) -> dict[str, float]:
        """Return the metrics since the last record."""
        found = self._meter.drain()
        if self._watch is not None:
            found |= self._watch.drain() | {"schedule/refits": float(self._refits)}
        return found

    def _use(self, profile: Profile | None) -> TrainingSchedule:
        """Plan, and let the layers run by the plan from now on."""
        config = self._config
        plan = plan_schedule(config, profile, number_bytes=self._dtype.itemsize)
        apply_schedule(self._model, plan.schedule, Execution(self._lanes, self.recorder))
        self._engine.place_slices(self._model, plan.window_bytes)
        for layer, sinks in zip(self._model.moe_layers(), self._sinks, strict=True):
            # every part has a gradient of its own, which autograd adds up
            layer.experts.sinks = None if plan.parts > 1 else sinks
        self._watch = None
        if plan.predicted and self._steps is not None and not config.recompute:
            control = self._runtime.groups.control
            self._watch = DriftWatch(plan.predicted, control, steps=self._steps)
        _log.info("schedule of the MoE layers: %s", plan)
        return plan

    def _measure(self, name: str, when: str) -> Profile:
        """Measure the costs and keep them in the run's folder."""
        if self._runtime.device.type != "cpu":
            raise ConfigError(
                "schedule.profile is measure, but these ranks are on GPUs, where costs are not "
                "measured yet; give a file"
            )
        _log.info("measuring what the MoE layers cost %s", when)
        profile = measure_costs(
            self._model,
            self._config,
            self._runtime,
            self._lanes,
            dtype=self._dtype,
            source=f"measured {when} by its {self._runtime.world} ranks",
        )
        if self._runtime.rank == 0:
            write_profile(profile, self._folder / name)
        return profile
