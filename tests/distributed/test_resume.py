"""A run that stops and goes on is the run that never stopped."""

import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from training_runs import Run, losses, make_text, make_trainer, run, tiny

from gatewise.moe.config import CapacityConfig, CapacityOrder
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction
from gatewise.training import evaluate as evaluate_module
from gatewise.training import trainer as trainer_module
from gatewise.training.checkpointer import find_latest
from gatewise.training.config import CheckpointConfig, EvaluationConfig, TrainConfig
from gatewise.training.data import PreparedData
from gatewise.training.guard import NonfiniteError
from gatewise.training.step import StepResult
from gatewise.training.trainer import Trainer

NOISY = RouterConfig(
    score=ScoreFunction.sigmoid,
    bias_rate=0.01,
    balance_scope=BalanceScope.sequence,
    jitter=0.1,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("resume"))


def saving(
    steps: int, *, every: int | None = 3, asynchronous: bool = True, **settings: object
) -> TrainConfig:
    checkpoint = CheckpointConfig(every=every, keep_last=9, asynchronous=asynchronous)
    return tiny(steps, checkpoint=checkpoint, **settings)  # type: ignore[arg-type]


def cut(source: Run, folder: Path, step: int) -> Path:
    """Make a run folder that holds the checkpoint of a step alone, as if the run ended there."""
    name = f"step_{step:08d}"
    shutil.copytree(source.folder / "checkpoints" / name, folder / "checkpoints" / name)
    return folder


def assert_identical(have: Run, want: Run, *, first: int) -> None:
    """Compare the records from step `first` on, and the final state, bit for bit."""
    assert have.training() == [r for r in want.training() if r["step"] >= first]
    assert have.column("val/loss") == want.column("val/loss")
    wanted, found = want.tensors(), have.tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_three_steps_and_three_more_are_six_bit_for_bit(
    asynchronous: bool, data: PreparedData, tmp_path: Path
) -> None:
    # a record is written every second step: the run goes on inside the window of step 4
    config = saving(6, asynchronous=asynchronous, router=NOISY, micro=4, log_every=2)
    whole = run(config, data, tmp_path / "whole")
    resumed = run(config, data, cut(whole, tmp_path / "resumed", 3))
    assert resumed.output["resumed_from"].endswith("step_00000003")
    assert resumed.output["steps"] == 6
    assert resumed.output["tokens"] == whole.output["tokens"]
    assert_identical(resumed, whole, first=4)


@pytest.mark.dist
def test_ranks_go_on_bit_for_bit_and_any_other_layout_within_rounding(
    data: PreparedData, tmp_path: Path
) -> None:
    config = saving(6, router=NOISY, ranks=4, expert=4, shard=2, log_every=2)
    whole = run(config, data, tmp_path / "whole")
    same = run(config, data, cut(whole, tmp_path / "same", 3))
    assert_identical(same, whole, first=4)
    for ranks, expert, shard in ((2, 2, 1), (1, 1, 1)):
        place = cut(whole, tmp_path / f"on {ranks}", 3)
        settings = {"ranks": ranks, "expert": expert, "shard": shard}
        other = run(saving(6, router=NOISY, log_every=2, **settings), data, place)
        assert losses(other) == pytest.approx(losses(whole)[1:], rel=1e-5)
        assert other.column("val/loss") == pytest.approx(whole.column("val/loss"), rel=1e-5)
        found = other.tensors()
        for name, tensor in whole.tensors().items():
            error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
            assert float(error) < 1e-4, name


@pytest.mark.dist
def test_split_experts_and_attention_are_saved_for_any_other_layout(
    data: PreparedData, tmp_path: Path
) -> None:
    """Flat shards of optimizer state cut the runs of rows and columns at any place."""
    layouts: dict[str, tuple[int, dict[str, int]]] = {
        "split": (4, {"expert": 2, "expert_shard": 2, "tensor": 2}),
        "flat": (4, {"expert_shard": 2, "tensor": 2, "shard": 4}),
        "whole": (2, {"expert": 2, "shard": 2}),
        "alone": (1, {}),
    }

    def config(name: str) -> TrainConfig:
        ranks, degrees = layouts[name]
        return saving(6, router=NOISY, log_every=2, ranks=ranks, parallel=degrees)

    for name, others in (("split", ("flat", "alone")), ("flat", ("whole",)), ("alone", ("flat",))):
        run_through = run(config(name), data, tmp_path / name)
        again = run(config(name), data, cut(run_through, tmp_path / f"{name} again", 3))
        assert_identical(again, run_through, first=4)
        for other in others:
            place = cut(run_through, tmp_path / f"{name} on {other}", 3)
            result = run(config(other), data, place)
            assert losses(result) == pytest.approx(losses(run_through)[1:], rel=1e-5)
            found = result.tensors()
            for key, tensor in run_through.tensors().items():
                error = (found[key] - tensor).norm() / tensor.norm().clamp(min=1e-6)
                assert float(error) < 1e-4, (name, other, key)


@pytest.mark.dist
def test_recomputation_and_evaluation_in_between_change_no_bit(
    data: PreparedData, tmp_path: Path
) -> None:
    drops = {"capacity": CapacityConfig(factor=1.0, order=CapacityOrder.random)}
    for ranks, router, model in ((1, RouterConfig(jitter=0.1), {}), (2, NOISY, drops)):
        settings = {"router": router, "model": model, "ranks": ranks, "expert": ranks}
        plain = run(saving(4, every=None, **settings), data, tmp_path / f"plain {ranks}")
        often = EvaluationConfig(every=1, tokens=300, micro=2)
        other = run(
            saving(4, every=1, recompute=True, evaluation=often, **settings),
            data,
            tmp_path / f"other {ranks}",
        )
        assert other.training() == plain.training()
        assert len(other.column("val/loss")) == 4
        wanted, found = plain.tensors(), other.tensors()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_finished_run_only_evaluates_when_it_is_started_again(
    data: PreparedData, tmp_path: Path
) -> None:
    config = saving(2)
    first = run(config, data, tmp_path)
    again = run(config, data, tmp_path)
    assert again.training() == []
    assert again.output["val_loss"] == first.output["val_loss"]


def test_another_runs_checkpoint_may_be_the_start(data: PreparedData, tmp_path: Path) -> None:
    first = run(saving(3), data, tmp_path / "first")
    load = str(first.folder / "checkpoints" / "step_00000003")
    config = saving(6)
    config.checkpoint.load = load
    second = run(config, data, tmp_path / "second")
    assert [record["step"] for record in second.training()] == [4, 5, 6]
    assert second.output["resumed_from"] == load


def test_other_data_is_named_in_a_warning(
    data: PreparedData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(saving(2), data, tmp_path / "run")
    (tmp_path / "more").mkdir()
    other = make_text(tmp_path / "more", sentences=70)
    run(saving(3), other, tmp_path / "run")
    assert "was trained on other data" in caplog.text


# --- checkpoints of something else


@pytest.mark.parametrize(
    ("model", "router", "message"),
    [
        ({"hidden": 32}, None, "model.hidden is 16 in the checkpoint and 32 here"),
        ({"heads": 4}, None, "model.heads is 2 in the checkpoint and 4 here"),
        ({"num_experts": 8}, None, "model.num_experts is 4 in the checkpoint and 8 here"),
        (
            {},
            RouterConfig(score=ScoreFunction.sigmoid),
            "router.score is softmax in the checkpoint and sigmoid here",
        ),
        ({"tie_embeddings": False}, None, "model.tie_embeddings is True in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    model: dict[str, object],
    router: RouterConfig | None,
    message: str,
    data: PreparedData,
    tmp_path: Path,
) -> None:
    run(saving(1), data, tmp_path)
    with pytest.raises(CheckpointError, match="is a checkpoint of another model") as caught:
        run(saving(2, model=model, router=router), data, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "or another run.dir" in str(caught.value)


def test_a_checkpoint_with_another_tokenizer_is_refused_in_one_line(
    data: PreparedData, tmp_path: Path
) -> None:
    from gatewise.training.config import DataConfig, Tokenizer
    from gatewise.training.data import prepare_data

    run(saving(1), data, tmp_path / "run")
    bpe = DataConfig(
        path=str(data.folder.parent.parent / "text"),
        cache=str(tmp_path / "cache"),
        sequence_length=32,
        tokenizer=Tokenizer.bpe,
        vocab_size=300,
    )
    with pytest.raises(CheckpointError, match="trained with another tokenizer") as caught:
        run(saving(2), prepare_data(bpe), tmp_path / "run")
    assert "\n" not in str(caught.value)


# --- steps that are not finite


def _poison(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    """Make the loss NaN at some calls, counted from 0 over training and evaluation."""
    real, calls = trainer_module.train_step.__globals__["language_loss"], iter(range(10**6))

    def loss(*arguments: object) -> torch.Tensor:
        value: torch.Tensor = real(*arguments)
        return value * float("nan") if next(calls) in bad_calls else value

    monkeypatch.setitem(trainer_module.train_step.__globals__, "language_loss", loss)


def _state(trainer: Trainer) -> list[torch.Tensor]:
    buckets = range(len(trainer.engine.optimizer.buckets))
    moments = [m.clone() for i in buckets for m in trainer.engine.optimizer.moments(i)]
    values = [bucket.values.clone() for bucket in trainer.engine.optimizer.buckets]
    biases = [b.clone() for n, b in trainer.model.named_buffers() if n.endswith("bias_E")]
    return [*moments, *values, *biases]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_goes_on(
    fault: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = make_trainer(tiny(9, router=NOISY), data, tmp_path)
    gradients = iter(range(10))
    if fault == "loss":
        _poison(monkeypatch, {2})
    else:  # the loss is finite, one gradient is not
        trainer.model.norm_final.gain.register_hook(
            lambda gradient: gradient * (math.inf if next(gradients) == 2 else 1.0)
        )
    results: list[StepResult] = []
    for step in range(4):
        before, updates = _state(trainer), trainer.engine.optimizer.updates
        results.append(trainer.run_step())
        same = [torch.equal(a, b) for a, b in zip(before, _state(trainer), strict=True)]
        assert all(same) if step == 2 else not any(same)
        assert trainer.engine.optimizer.updates == updates + (step != 2)
    trainer.close()
    assert [float(result.skipped) for result in results] == [0, 0, 1, 0]
    assert torch.isfinite(results[3].loss)
    assert torch.isfinite(results[2].loss) == (fault == "gradient")
    assert trainer.progress.sample == 32  # the data of the skipped step is not used again


def test_skipped_steps_are_counted_and_leave_records_and_health_readable(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {1, 2, 4})
    config = saving(6, log_every=2)
    result = run(config, data, tmp_path)
    assert result.output["skipped_steps"] == 3
    assert result.column("train/skipped_steps") == [1, 2, 3]
    for name in ("train/loss_mean", "moe/router_entropy", "moe/router_confidence", "val/loss"):
        assert all(math.isfinite(value) for value in result.column(name)), name


def test_a_run_stops_after_too_many_in_a_row_with_its_checkpoint_intact(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = saving(20, every=2)
    config.nonfinite.max_consecutive = 3
    _poison(monkeypatch, {1, *range(5, 99)})
    with pytest.raises(NonfiniteError) as caught:
        run(config, data, tmp_path)
    message = str(caught.value)
    assert "not finite in 3 steps in a row, up to step 8" in message
    assert "step_00000006" in message
    assert "Lower optim.lr" in message
    assert "\n" not in message
    newest = find_latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000006"
    monkeypatch.undo()
    resumed = run(config, data, tmp_path)  # the fault is gone: the run goes on from there
    assert resumed.training()[0]["step"] == 7
    assert all(torch.isfinite(tensor).all() for tensor in resumed.tensors().values())


def _poison_rank_one(rank: int) -> None:
    if rank == 1:
        _poison(pytest.MonkeyPatch(), {1})


@pytest.mark.dist
def test_all_ranks_skip_when_one_of_them_has_nan(data: PreparedData, tmp_path: Path) -> None:
    config = saving(3, ranks=2, expert=2, shard=2, every=1)
    result = run(config, data, tmp_path, _poison_rank_one)
    assert result.output["skipped_steps"] == 1
    before, after = result.tensors(1), result.tensors(2)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert math.isfinite(result.output["val_loss"])


# --- signals


def _stop_in_evaluation(number: signal.Signals, rank: int) -> None:
    """Send the last rank a signal in the first pass of its evaluation."""
    names = evaluate_module.evaluate.__wrapped__.__globals__
    real = names["language_loss"]

    def loss(*arguments: object) -> torch.Tensor:
        if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), number)
        value: torch.Tensor = real(*arguments)
        return value

    names["language_loss"] = loss


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "every", "number"),
    [
        (1, None, signal.SIGUSR1),
        (1, 2, signal.SIGTERM),
        (2, 2, signal.SIGUSR2),
    ],
)
def test_a_signal_during_evaluation_is_not_left_waiting_for_its_end(
    ranks: int,
    every: int | None,
    number: signal.Signals,
    data: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = evaluate_module.evaluate.__wrapped__.__globals__
    monkeypatch.setitem(names, "language_loss", names["language_loss"])  # put back after
    evaluation = EvaluationConfig(every=every, micro=1)
    config = saving(4, every=None, ranks=ranks, evaluation=evaluation)
    stopped = run(config, data, tmp_path, partial(_stop_in_evaluation, number))
    assert stopped.output["stopped"] is True
    assert stopped.output["steps"] == (every or 4)
    assert stopped.output["checkpoint"].endswith(f"step_{every or 4:08d}")
    assert stopped.output["val_loss"] is None
    monkeypatch.undo()
    again = run(config, data, tmp_path)
    assert again.output["stopped"] is False
    assert again.output["val_loss"] > 0


def _stop_after_two_steps(rank: int) -> None:
    """Send this rank a signal in its second step, where it is the last rank."""
    real = trainer_module.train_step
    count = 0

    def step(*arguments: object, **others: object) -> StepResult:
        nonlocal count
        count += 1
        if count == 2 and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **others)  # type: ignore[arg-type]

    trainer_module.train_step = step  # type: ignore[assignment]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_saves_and_stops_all(
    ranks: int, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "train_step", trainer_module.train_step)  # put back after
    handler = signal.getsignal(signal.SIGTERM)
    config = saving(20, every=None, ranks=ranks, expert=ranks)
    stopped = run(config, data, tmp_path, _stop_after_two_steps)
    assert stopped.output["stopped"] is True
    steps = stopped.output["steps"]
    assert steps in (2, 3)  # the signal is seen in this step or the next
    assert stopped.output["checkpoint"].endswith(f"step_{steps:08d}")
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.undo()
    config.steps = 4
    resumed = run(config, data, tmp_path)
    assert [record["step"] for record in resumed.training()] == list(range(steps + 1, 5))
