"""A training run from top to bottom: build, resume, loop, evaluate, save.

Read first: `step.py` (one optimizer step), `state.py` (what a checkpoint holds), `config.py`.
Every rank runs this file; rank 0 alone writes records.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.config import count_parameters
from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import build_model
from gatewise.parallel.beat import Beat
from gatewise.parallel.errors import CheckpointError, RankError, is_lost_peer
from gatewise.parallel.runtime import Runtime, memory_mb, multiplies_bf16
from gatewise.parallel.stuck import Watch, report_stuck
from gatewise.routers.api import NoiseKey
from gatewise.training.blend import training_order
from gatewise.training.config import Precision, TrainConfig
from gatewise.training.data import PreparedData
from gatewise.training.engine import Engine, build_engine
from gatewise.training.evaluate import Evaluation, EvaluationStopped, evaluate
from gatewise.training.faults import FaultInjector
from gatewise.training.guard import Guard, Trouble
from gatewise.training.hash_table import balance_hash_table
from gatewise.training.health import HealthMeter
from gatewise.training.measures.churn import RouteProbe
from gatewise.training.optim import learning_rate
from gatewise.training.pace import PaceMeter
from gatewise.training.resume import Progress, RunCheckpoints
from gatewise.training.scheduled_layers import ScheduledLayers
from gatewise.training.sequences import read_batch
from gatewise.training.sinks import MetricSink
from gatewise.training.step import StepResult, train_step

__all__ = ["Trainer", "resolve_dtype", "train"]

_log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    runtime: Runtime,
    data: PreparedData,
    folder: Path,
    sinks: Sequence[MetricSink],
) -> dict[str, Any]:
    """Run training as `config` says and return what `result.json` shall hold.

    Args:
        config: checked settings; `parallel.ranks` equals the number of ranks.
        runtime: this rank.
        data: tokens and tokenizer.
        folder: the run's folder; checkpoints go below it.
        sinks: get one record per logged step and evaluation; empty on ranks other than 0.

    Raises:
        RankError: where a rank is lost, its weights differ from its replicas', or steps stay not
            finite (`guard.py`); the message names rank, step and cause, and the last checkpoint
            is intact.
        CheckpointError: if a checkpoint cannot be read or written.
    """
    trainer = Trainer(config, runtime, data, folder, sinks)
    watch = Watch(
        folder / "logs",
        runtime.rank,
        runtime.world,
        groups=runtime.groups.members() if runtime.world > 1 else {},
        beat=trainer.beat,
        timeout=config.parallel.timeout,
    )
    try:
        with _stop_signals(trainer):
            result = trainer.fit()
        trainer.close()
        return result
    except (RuntimeError, CheckpointError) as error:
        if runtime.world == 1 or not is_lost_peer(str(error)):
            trainer.close()
            raise
        # nothing is waited for: whoever is gone would be missed again
        raise RankError(report_stuck(watch, error)) from error
    finally:
        watch.close()


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type of forward and backward arithmetic."""
    if precision is Precision.auto:
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    wide = torch.float64 if precision is Precision.fp64 else torch.float32
    return torch.bfloat16 if precision is Precision.bf16 else wide


@dataclass(slots=True)
class _Clock:
    """Time spent in training steps, evaluation and saving left out."""

    seconds: float = 0.0
    tokens: int = 0

    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """Holds the objects of one run; `fit` is the run."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        data: PreparedData,
        folder: Path,
        sinks: Sequence[MetricSink],
    ) -> None:
        self.config, self.runtime, self.data, self.sinks = config, runtime, data, sinks
        self.stop_requested = False
        self.beat = Beat(folder / "logs", runtime.rank)
        self.faults = FaultInjector(config.faults, runtime.rank, folder)
        self.guard = Guard(config, runtime)
        self.pace = PaceMeter(config.stragglers, runtime.groups.control, runtime.device)
        torch.manual_seed(config.seed + runtime.rank)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        groups = runtime.groups
        vocab_size = config.embedding_rows(data.tokenizer.vocab_size)
        self.model: Decoder = build_model(
            config.model,
            config.router,
            vocab_size=vocab_size,
            group=groups.experts,
            tensor=groups.tensor,
            device=runtime.device,
            dtype=resolve_dtype(config.precision, runtime.device),
            seed=config.seed,
        )
        self.model.recompute = config.recompute
        balance_hash_table(self.model, data)
        self.counts = count_parameters(config.model, vocab_size, config.router)
        self.engine: Engine = build_engine(self.model, config, runtime)
        self.lanes = ScheduledLayers(
            self.model,
            self.engine,
            config,
            runtime,
            folder,
            dtype=resolve_dtype(config.precision, runtime.device),
        )
        length = config.data.sequence_length
        self.order = training_order(data.blend, len(data.train), length, config.seed)
        self.meter = HealthMeter(
            len(self.model.moe_layers()),
            config.model.num_experts,
            runtime.device,
            ahead=config.router.ahead.learns and not config.router.ahead.weighs,
        )
        self.checkpoints = RunCheckpoints(config, runtime, data, folder, self.faults.save)
        self.probe = RouteProbe()
        self.progress = Progress()

    def fit(self) -> dict[str, Any]:
        """Train to the last step, evaluate, save; return the run's results."""
        config = self.config
        clock, window = _Clock(), _Clock()
        losses = _Window(self.runtime.device)
        self._go_on(self.checkpoints.resume(self.model, self.engine), losses)
        self.model.train()
        result: StepResult | None = None
        evaluation: Evaluation | None = None
        stopped = False
        while self.progress.step < config.steps and not stopped:
            began = time.perf_counter()
            step = self.progress.step + 1
            logged = step % config.log_every == 0 or step == config.steps
            self._begin(step)
            result = self.run_step(measure=logged)
            self.faults.end()
            losses.add(result)
            tokens = config.batch.sequences * config.data.sequence_length
            # reading scalars makes the host wait; in between, one step may be under way
            stopped, trouble = self._inspect(result, losses)
            exposed_ms = self.lanes.end(step)
            seconds = time.perf_counter() - began
            self.pace.add(seconds * 1e3, exposed_ms)
            for timer in (clock, window):
                timer.seconds += seconds
                timer.tokens += tokens
            due = config.checkpoint.every and step % config.checkpoint.every == 0
            saves = bool(due or stopped or step == config.steps)
            if trouble is None and self.guard.due(step, saves=saves):
                trouble = self.guard.compare(self.model, self.engine, step)
            if trouble is not None:
                self._roll_back(trouble, losses)
                window = _Clock()
                continue
            if logged:
                self._write(self._training_record(result, losses, window))
                window, losses.mean = _Clock(), losses.mean.zero_()
            self.lanes.adapt(step)
            if config.evaluation.every and step % config.evaluation.every == 0 and not stopped:
                evaluation = self._evaluate_unless_stopped()
                stopped = evaluation is None
            if saves or stopped:
                self._save(losses)
        self.checkpoints.wait()
        step_evaluated = config.evaluation.every and self.progress.step % config.evaluation.every
        if not stopped and (evaluation is None or step_evaluated != 0):
            evaluation = self._evaluate_unless_stopped()
            stopped = evaluation is None
        self.beat.tell(self.progress.step, "end")
        return self._results(result, evaluation, clock, stopped=stopped)

    def _begin(self, step: int) -> None:
        """Say that a step begins, and let the faults planted for it happen."""
        self.beat.tell(step, "train")
        self.faults.begin(step, poisoned=self.model.norm_final, weights=self._shared_weights)

    def _shared_weights(self) -> Tensor:
        """Return weights that as many ranks as possible hold alike."""
        held = self.engine.held()
        shared = [part for part in held if part.parts[0].spec.owner == "all"]
        return (shared or held)[0].master

    def _save(self, losses: "_Window") -> None:
        self.beat.tell(self.progress.step, "save")
        sums = self._window_sums(losses)
        self.checkpoints.save(self.model, self.engine, self.progress, sums)

    def _go_on(self, progress: Progress, losses: "_Window") -> None:
        """Take the place of a checkpoint, its unfinished window included."""
        self.progress = progress
        self.probe.restore(self.checkpoints.window, self.runtime.device)
        for name, tensor in self._window_sums(losses).items():
            saved = self.checkpoints.window.get(name)
            if saved is not None and saved.shape == tensor.shape:  # else of other metrics than ours
                tensor.copy_(saved)
        for sink in self.sinks:
            sink.resume(progress.step)

    def _roll_back(self, trouble: Trouble, losses: "_Window") -> None:
        """Go back to the newest checkpoint.

        Raises:
            RankError: where there is none, or the run went back too often.
        """
        before = self.progress
        allowed = self.config.checkpoint.max_rollbacks
        if before.rollbacks >= allowed:
            raise type(trouble.error)(
                f"{trouble.error} (went back {before.rollbacks} times; checkpoint.max_rollbacks "
                f"is {allowed})"
            )
        progress = self.checkpoints.roll_back(self.model, self.engine)
        if progress is None:
            raise type(trouble.error)(
                f"{trouble.error} (there is no checkpoint to go back to; set checkpoint.every)"
            )
        progress.rollbacks = before.rollbacks + 1
        if trouble.skips_data:
            progress.sample = before.sample
        if self.runtime.rank == 0:
            passed = " and passing over the samples since" if trouble.skips_data else ""
            _log.warning("going back to step %d%s: %s", progress.step, passed, trouble.error)
        self.pace.clear()
        self._go_on(progress, losses)

    def evaluate(self) -> Evaluation:
        """Score the validation split."""
        return evaluate(
            self.model,
            self.data,
            self.config.evaluation,
            sequence_length=self.config.data.sequence_length,
            control=self.runtime.groups.control,
            device=self.runtime.device,
            stop=lambda: self.stop_requested,
            probe=self.probe,
        )

    def _evaluate_unless_stopped(self) -> Evaluation | None:
        """Evaluate and write the record; return None where a rank was asked to stop."""
        self.beat.tell(self.progress.step, "evaluate")
        try:
            evaluation = self.evaluate()
        except EvaluationStopped:
            return None
        self._write({"step": self.progress.step, **evaluation.record()})
        return evaluation

    def close(self) -> None:
        """Finish saves that are under way."""
        self.checkpoints.close()

    def run_step(self, *, measure: bool = False) -> StepResult:
        """Run one optimizer step on the next samples.

        Args:
            measure: also take the norms of single experts' gradients.
        """
        config, progress = self.config, self.progress
        self.lanes.begin(progress.step + 1)
        micro_batches, noise = self._read_micro_batches()
        result = train_step(
            self.model,
            self.engine,
            micro_batches,
            groups=self.runtime.groups,
            meter=self.meter,
            noise=noise,
            lr=learning_rate(config.optim, progress.step, config.steps),
            clip=config.optim.clip,
            stop=self.stop_requested,
            measure=measure,
            recorder=self.lanes.recorder,
            beside=self.lanes.plan.parts,
            spikes=self.guard.spikes,
        )
        progress.step += 1
        progress.sample += config.batch.sequences
        progress.tokens += config.batch.sequences * config.data.sequence_length
        return result

    def _read_micro_batches(self) -> tuple[list[Tensor], list[NoiseKey]]:
        """Read this rank's consecutive share of the step's samples, cut into micro-batches."""
        config = self.config
        groups = self.runtime.groups
        share = config.batch.sequences // groups.readers
        micro = (config.batch.micro or share) // self.lanes.plan.parts
        first = self.progress.sample + self.runtime.rank // groups.tensor.size * share
        batches, keys = [], []
        for start in range(first, first + share, micro):
            indices = range(start, start + micro)
            batch = read_batch(self.data.train, self.order, indices)
            batches.append(batch.to(self.runtime.device, non_blocking=True))
            keys.append(NoiseKey(config.seed, self.progress.step, tuple(indices)))
        return batches, keys

    def _inspect(self, result: StepResult, losses: "_Window") -> tuple[bool, Trouble | None]:
        """Read the last step's flags: whether to stop, and why to go back."""
        skipped, stop, spiked = losses.flags()
        try:
            trouble = self.guard.inspect(
                result, skipped=skipped, spiked=spiked, progress=self.progress
            )
        except RankError as error:
            self.checkpoints.wait()
            kept = self.checkpoints.newest()
            raise type(error)(f"{error}. Last good checkpoint: {kept or 'none'}") from None
        return stop, trouble

    def _training_record(
        self, result: StepResult, losses: "_Window", window: _Clock
    ) -> dict[str, Any]:
        config, step = self.config, self.progress.step
        health = self.meter.drain(self.runtime.groups.control)
        record: dict[str, Any] = {
            "step": step,
            "steps": config.steps,
            "train/loss": float(result.loss),
            "train/loss_mean": float(losses.mean[0] / losses.mean[1].clamp(min=1)),
            "train/lr": learning_rate(config.optim, step - 1, config.steps),
            "train/grad_norm": float(result.norms["total"]),
            "train/tokens": self.progress.tokens,
            "train/epoch": self.progress.sample / self.order.sequences_per_epoch,
            "train/skipped_steps": self.progress.skipped,
            "train/spikes": self.progress.spikes,
            "train/rollbacks": self.progress.rollbacks,
            "checkpoint/failed_saves": self.checkpoints.failed,
            "train/tokens_per_second": window.rate(),
            "train/memory_mb": memory_mb(self.runtime.device),
        }
        record |= {f"train/{name}_loss": float(value) for name, value in result.extra.items()}
        record |= {
            f"grad/{label}_norm": float(norm)
            for label, norm in result.norms.items()
            if label != "total"
        }
        return record | health | self.lanes.drain() | self.pace.drain(step)

    def _window_sums(self, losses: "_Window") -> dict[str, Tensor]:
        """Name the sums of the logging window, so that a resumed run goes on with them."""
        spikes = self.guard.spikes.state() if self.guard.spikes else {}
        return {"losses": losses.mean, **self.meter.sums(), **spikes, **self.probe.state()}

    def _write(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _results(
        self,
        result: StepResult | None,
        evaluation: Evaluation | None,
        clock: _Clock,
        *,
        stopped: bool,
    ) -> dict[str, Any]:
        newest = self.checkpoints.newest()
        return {
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "train_loss": float(result.loss) if result else None,
            "val_loss": evaluation.loss if evaluation else None,
            "val_bits_per_byte": evaluation.bits_per_byte if evaluation else None,
            "tokens_per_second": clock.rate(),
            "train_seconds": clock.seconds,
            "skipped_steps": self.progress.skipped,
            "rollbacks": self.progress.rollbacks,
            "failed_saves": self.checkpoints.failed,
            "resumed_from": self.checkpoints.resumed_from,
            "checkpoint": str(newest) if newest else None,
            "parameters": self.counts.total,
            "active_parameters": self.counts.active,
            "router_parameters": self.counts.router,
            "stopped": stopped,
        }


class _Window:
    """Device-side sums of a logging window, and the last step's flags."""

    def __init__(self, device: torch.device) -> None:
        self.mean = torch.zeros(2, device=device)  # sum of finite losses, and their number
        self._flags = torch.zeros(3, device=device)

    def add(self, result: StepResult) -> None:
        """Take one step."""
        kept = 1 - result.skipped
        self.mean += torch.stack((torch.where(kept > 0, result.loss, 0.0), kept))
        self._flags = torch.stack((result.skipped, result.stop, result.spiked))

    def flags(self) -> tuple[bool, bool, bool]:
        """Return (skipped, stop, spiked) of the last step; the host waits for that step."""
        skipped, stop, spiked = self._flags.tolist()
        return bool(skipped), bool(stop), bool(spiked)


@contextmanager
def _stop_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGUSR2 ask for a save and an orderly end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(signum: int, frame: object) -> None:
        trainer.stop_requested = True

    signals = [signal.SIGTERM]
    signals += [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    before = {number: signal.signal(number, request) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
