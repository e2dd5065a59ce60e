"""A planned step played on every rank: skewed loads, slow ranks, and waiting for each other.

Read `step.py` first. All ranks run the same plan. A computation starts when its rank is ready; a
collective starts when the last of its group is, and takes as long as the fullest member needs. The
times of all ranks are one array per task, so a thousand ranks cost little more than one.

Interference is taken from the timeline of the mean rank: each task is stretched as it is there.
Ranks of a pipeline stage start each micro-batch together.

Shapes:  M micro-batches   C copies of the experts   E expert ranks   S shard ranks (M, C, E, S)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gatewise.moe.planning.block import REDUCE_STAGES
from gatewise.moe.planning.policies import Pass
from gatewise.moe.planning.step import Slot, Step, StepPlan, pipeline_slots, slot_name
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Interference
from gatewise.parallel.schedule.timeline import Program

__all__ = ["Disturbance", "SimulatedStep", "simulate_step"]

Array = NDArray[np.float64]
_EXCHANGES = ("dispatch", "collect", "collect_grad", "dispatch_grad")
_BY_LOAD = ("experts", "experts_data", "experts_weights")
_GATHERS = ("gather", "scatter", "gather_grad", "scatter_grad")
_COPY, _EXPERT, _SHARD = 1, 2, 3  # axes


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What makes ranks unlike each other."""

    skew: float = 1.0  # expected load of the fullest expert over the mean
    counts: Sequence[Sequence[float]] = field(default=())  # recorded rows, layer by expert
    slow_share: float = 0.0  # part of the ranks that are slow
    slow_extra: float = 0.0  # extra time of their computation: 0.2 is 20 %
    samples: int = 16  # different draws of the load; micro-batches repeat them
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.skew >= 1:
            raise ConfigError(f"skew is {self.skew}; it must be at least 1 (no skew)")
        if not 0 <= self.slow_share <= 1:
            raise ConfigError(f"slow_share is {self.slow_share}; it must be between 0 and 1")
        if not self.slow_extra >= 0:
            raise ConfigError(f"slow_extra is {self.slow_extra}; it must be at least 0")
        if self.samples < 1:
            raise ConfigError(f"samples is {self.samples}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """What came out."""

    step_ms: float
    slots: Sequence[Slot]
    fullest_rank_load: float  # mean over layers of the fullest rank's rows over the mean


def simulate_step(plan: StepPlan, disturbance: Disturbance) -> SimulatedStep:
    """Play a step on all ranks.

    Args:
        plan: the step.
        disturbance: loads and speeds.

    Raises:
        ConfigError: if recorded counts do not have the model's number of experts.
    """
    step = plan.step
    layout = step.profile.layout
    draws = min(step.micro_batches, disturbance.samples)
    ranks = (layout.copies, layout.expert, layout.shard)
    generator = np.random.default_rng(disturbance.seed)
    logits = step.logits().ms()
    factors: list[float] = []
    tables: list[dict[tuple[str, bool], Array]] = []
    prepared: dict[int, _Prepared] = {}

    def ready(item: Pass) -> "_Prepared":
        if id(item) not in prepared:
            prepared[id(item)] = _Prepared(item, step.profile.interference)
        return prepared[id(item)]

    layer = 0
    for stage in step.stages:
        speed = _speeds(disturbance, ranks, generator)
        loads = []
        for _ in range(stage.moe):
            load, fullest = _rank_load(disturbance, step, layer, draws=draws, generator=generator)
            loads.append(load)
            factors.append(fullest)
            layer += 1
        table: dict[tuple[str, bool], Array] = {}
        for name in ("pair", "forward", "backward") if plan.paired else ("forward", "backward"):
            for is_last in (False, True):
                clock = np.zeros((draws, *ranks))
                for number, (proposal, part) in enumerate(plan.pieces(name, is_last=is_last)):
                    played = ready(proposal.passes[part])
                    if number == 0:
                        clock = _play_blocks(played, proposal.blocks, loads, speed, clock)
                    else:
                        for _ in range(stage.dense):
                            clock = played.play([_ONES], speed, clock)
                times = {"forward": 1, "backward": 2, "pair": 3}[name]
                clock = clock + times * logits * stage.last * speed
                table[name, is_last] = clock.max(axis=(_COPY, _EXPERT, _SHARD))
        tables.append(table)

    def duration(stage: int, forward: int | None, backward: int | None) -> float:
        name = slot_name(forward, backward)
        index = forward if forward is not None else backward
        assert index is not None
        is_last = backward == step.micro_batches - 1
        return float(tables[stage][name, is_last][index % draws])

    slots = pipeline_slots(
        len(step.stages), step.micro_batches, duration, step.hop_ms, paired=plan.paired
    )
    total = max(slot.end_ms for slot in slots) + step.update_ms()
    return SimulatedStep(total, slots, float(np.mean(factors)) if factors else 1.0)


_ONES: Array = np.ones((1, 1, 1, 1))


class _Prepared:
    """A pass ready to be played on arrays of ranks."""

    def __init__(self, item: Pass, interference: Interference) -> None:
        self._program = program = Program(item.graph, item.plan)
        ms = [item.ms(task) for task in program.tasks]
        spans = {i.task: i.end_ms - i.start_ms for i in program.play(ms, interference).intervals}
        self._stretched = [
            (spans[task] if work else 0.0) for task, work in zip(program.tasks, ms, strict=True)
        ]
        self._fixed = []  # the part that does not grow with the load
        for task, work, stretched in zip(program.tasks, ms, self._stretched, strict=True):
            alpha = min(item.amounts[task.stage].cost.ms(1e-9), work)
            self._fixed.append(alpha * (stretched / work if work else 1.0))
        self._names = [task.stage.rpartition(".")[2] for task in program.tasks]
        self._blocks = [_block_number(task.stage) for task in program.tasks]
        self._last_use = [0] * len(program.tasks)
        for index, before in enumerate(program.before):
            for other in before:
                self._last_use[other] = index

    def play(self, loads: Sequence[Array], speed: Array, start: Array) -> Array:
        """Return when each rank ends, given when it starts.

        Args:
            loads: rows of each rank over the mean, per block of the pass.
            speed: factor of each rank's computing times.
            start: of each rank.
        """
        ends: dict[int, Array] = {}
        latest = start
        for index, before in enumerate(self._program.before):
            begin = start
            for other in before:
                begin = np.maximum(begin, ends[other])
            load = loads[self._blocks[index] % len(loads)]
            ends[index] = self._end(index, begin, load, speed)
            latest = np.maximum(latest, ends[index])
            for other in before:
                if self._last_use[other] == index:
                    ends.pop(other, None)
        return latest

    def _end(self, index: int, begin: Array, load: Array, speed: Array) -> Array:
        name = self._names[index]
        whole, fixed = self._stretched[index], self._fixed[index]
        if self._program.resources[index] == "compute":
            if name in _BY_LOAD:
                return begin + (fixed + (whole - fixed) * load) * speed
            return begin + whole * speed
        axes: tuple[int, ...] = (_SHARD,)
        if name in REDUCE_STAGES:
            axes = (_COPY, _EXPERT, _SHARD)
        elif name in _EXCHANGES:
            axes = (_EXPERT,)
        duration: Array = np.full((1, 1, 1, 1), whole)
        if name in _EXCHANGES or name in _GATHERS:
            duration = fixed + (whole - fixed) * load.max(axis=axes, keepdims=True)
        together: Array = begin.max(axis=axes, keepdims=True)
        ended: Array = np.broadcast_to(together + duration, begin.shape)
        return ended


def _block_number(stage: str) -> int:
    """Return the block that a stage of a graph of several blocks belongs to."""
    label = stage.rpartition(".")[0].lstrip("fb")
    return int(label) if label else 0


def _play_blocks(
    played: _Prepared, spans: int, loads: Sequence[Array], speed: Array, clock: Array
) -> Array:
    """Play the blocks of a stage with a pass that spans one or several of them."""
    if not loads:
        return clock
    if spans == 1:
        for load in loads:
            clock = played.play([load], speed, clock)
        return clock
    # a stage may have fewer blocks than the pass: it takes the same share of its time
    ended = played.play(loads, speed, clock)
    return clock + (ended - clock) * (len(loads) / spans)


def _speeds(
    disturbance: Disturbance, ranks: tuple[int, int, int], generator: np.random.Generator
) -> Array:
    """Return the factor of each rank's computing times."""
    slow = generator.random(ranks) < disturbance.slow_share
    return np.where(slow, 1.0 + disturbance.slow_extra, 1.0)[np.newaxis]


def _rank_load(
    disturbance: Disturbance,
    step: Step,
    layer: int,
    *,
    draws: int,
    generator: np.random.Generator,
) -> tuple[Array, float]:
    """Return each rank's rows over what was planned for, and the fullest rank's over the mean."""
    copies, expert = step.profile.layout.copies, step.profile.layout.expert
    experts = step.shape.experts
    if disturbance.counts:
        row = np.asarray(disturbance.counts[layer % len(disturbance.counts)], dtype=np.float64)
        if row.shape != (experts,) or not row.sum() > 0 or row.min() < 0:
            raise ConfigError(
                f"load has {row.size} counts in layer {layer % len(disturbance.counts)}; there "
                f"must be {experts}, one for each expert of {step.shape.name}, at least 0 and "
                "not all 0"
            )
        rows = np.broadcast_to(row, (draws, copies, experts))
    else:
        rows = _skewed(disturbance.skew, (draws, copies, experts), generator)
    share = rows / rows.mean(axis=-1, keepdims=True)
    load = share.reshape(draws, copies, expert, experts // expert).mean(axis=-1)
    fullest = float(load.max(axis=-1).mean())
    return (load / step.workload.load)[..., np.newaxis], fullest


def _skewed(skew: float, shape: tuple[int, int, int], generator: np.random.Generator) -> Array:
    """Draw log-normal loads whose largest is `skew` times the mean, in expectation."""
    if skew == 1.0 or shape[-1] == 1:
        return np.ones(shape)
    # Blom's approximation of the expected largest of so many standard normal draws
    highest = NormalDist().inv_cdf((shape[-1] - 0.375) / (shape[-1] + 0.25))
    # exp(sigma * highest - sigma^2 / 2) = skew; beyond the top of the parabola, take the top
    root = max(0.0, highest**2 - 2 * math.log(skew))
    return np.asarray(generator.lognormal(0.0, highest - math.sqrt(root), shape))
