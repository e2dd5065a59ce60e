"""A run's numbers do not depend on how many ranks there are and what they split."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import LENGTH, Run, losses, make_text, make_trainer, run, tiny

from gatewise.moe.model import parameter_specs
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.parallel.parameters import take_spans
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction
from gatewise.training.config import EvaluationConfig, OptimConfig, Precision, TrainConfig
from gatewise.training.data import PreparedData, open_prepared
from gatewise.training.step import LABELS, train_step
from ranks import run_ranks

STEPS = 8
BALANCED = RouterConfig(
    score=ScoreFunction.sigmoid,
    bias_rate=0.01,
    balance_loss=0.01,
    balance_scope=BalanceScope.sequence,
    jitter=0.1,
)
NORMS = ["train/grad_norm", *(f"grad/{label}_norm" for label in LABELS)]
HEALTH = [
    "moe/max_violation",
    "moe/load_entropy",
    "moe/router_entropy",
    "moe/router_confidence",
    "moe/router_inner_balance",
    "moe/router_max_logit",
]
EXPERTS = [f"grad/expert_norm_{which}" for which in ("min", "median", "max")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def alone(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Train on one rank, with each router."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: run(tiny(STEPS, router=router), data, folder / name)
        for name, router in (("default", RouterConfig()), ("balanced", BALANCED))
    }


def assert_same(have: Run, want: Run, *, relative: float = 1e-5, health: bool = True) -> None:
    """Compare losses, norms, load and the final state of two runs."""
    names = ["train/loss", "train/z_loss", "train/balance_loss", "val/loss", *NORMS, *EXPERTS]
    for name in names + (HEALTH if health else []):
        assert len(want.column(name)) in (1, STEPS)
        assert have.column(name) == pytest.approx(want.column(name), rel=relative, abs=1e-9), name
    wanted, found = want.tensors(), have.tensors()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = float((found[name] - tensor).norm()) / max(float(tensor.norm()), 1e-6)
        assert error < 10 * relative, f"{name} is off by {error:.1e}"
    for name in wanted:
        if name.startswith("model/"):  # no single value runs away either
            assert float((found[name] - wanted[name]).abs().max()) < 100 * relative, name


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "expert", "shard"),
    [(4, 1, 1), (4, 2, 4), (4, 4, 1), (2, 1, 2)],
)
def test_losses_norms_and_parameters_do_not_depend_on_the_layout(
    ranks: int, expert: int, shard: int, data: PreparedData, alone: dict[str, Run], tmp_path: Path
) -> None:
    config = tiny(STEPS, ranks=ranks, expert=expert, shard=shard)
    assert_same(run(config, data, tmp_path), alone["default"])


SPLIT = {  # degrees that split experts and attention
    "experts": (2, {"expert_shard": 2, "shard": 2}),
    "experts over two nodes": (4, {"expert": 2, "expert_shard": 2, "node": 2}),
    "attention": (2, {"tensor": 2, "shard": 2}),
    "both": (4, {"expert": 2, "expert_shard": 2, "tensor": 2, "shard": 4, "node": 2}),
    "attention, whole experts": (4, {"expert": 4, "tensor": 2, "node": 2, "dispatch": "2dh"}),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", SPLIT)
@pytest.mark.parametrize("name", ["default", "balanced"])
def test_split_experts_and_attention_train_as_one_rank(
    name: str, layout: str, data: PreparedData, alone: dict[str, Run], tmp_path: Path
) -> None:
    ranks, degrees = SPLIT[layout]
    router = RouterConfig() if name == "default" else BALANCED
    config = tiny(STEPS, ranks=ranks, parallel=degrees, router=router)
    assert_same(run(config, data, tmp_path), alone[name])


@pytest.mark.dist
@pytest.mark.parametrize("expert", [1, 2])
def test_bias_sequence_loss_and_jitter_do_not_depend_on_the_layout(
    expert: int, data: PreparedData, alone: dict[str, Run], tmp_path: Path
) -> None:
    config = tiny(STEPS, ranks=4, expert=expert, shard=2, router=BALANCED)
    result = run(config, data, tmp_path)
    assert_same(result, alone["balanced"])
    biases = {n: b for n, b in result.tensors().items() if n.startswith("bias/")}
    assert len(biases) == 2
    assert all(bias_E.any() and abs(float(bias_E.mean())) < 1e-7 for bias_E in biases.values())


def test_micro_batches_add_up_to_the_batch(
    data: PreparedData, alone: dict[str, Run], tmp_path: Path
) -> None:
    result = run(tiny(STEPS, micro=2, router=BALANCED), data, tmp_path)
    assert_same(result, alone["balanced"])


@pytest.mark.dist
def test_micro_batches_on_several_ranks_add_up_to_the_batch(
    data: PreparedData, alone: dict[str, Run], tmp_path: Path
) -> None:
    config = tiny(STEPS, ranks=2, expert=2, micro=1, router=BALANCED)
    assert_same(run(config, data, tmp_path), alone["balanced"])


def test_the_global_loss_over_micro_batches_counts_those_so_far(
    data: PreparedData, alone: dict[str, Run], tmp_path: Path
) -> None:
    """Its counts grow from one micro-batch to the next, so it is near the whole's, not equal."""
    result = run(tiny(STEPS, micro=4), data, tmp_path)
    assert losses(result)[0] == pytest.approx(losses(alone["default"])[0], rel=1e-6)
    assert losses(result) == pytest.approx(losses(alone["default"]), rel=2e-3)
    balance = result.column("train/balance_loss")
    assert balance == pytest.approx(alone["default"].column("train/balance_loss"), rel=0.05)


@pytest.mark.dist
def test_bf16_agrees_within_its_rounding(data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    config = tiny(STEPS, precision=Precision.bf16)
    one = run(config, data, tmp_path / "runs" / "one")
    config = tiny(STEPS, ranks=2, expert=2, shard=2, precision=Precision.bf16)
    two = run(config, data, tmp_path / "runs" / "two")
    assert losses(two) == pytest.approx(losses(one), rel=0.01)
    assert losses(one)[-1] < losses(one)[0] - 0.3
    # the loss itself is summed in fp32: near that of an fp32 run from the same start
    exact = run(tiny(1), data, tmp_path / "runs" / "exact")
    assert losses(one)[0] == pytest.approx(losses(exact)[0], rel=2e-3)


@pytest.mark.dist
def test_deterministic_algorithms_run_and_clipping_can_be_off(
    data: PreparedData, tmp_path: Path
) -> None:
    runs = [tmp_path / "plain", tmp_path / "other"]
    plain = run(tiny(3, ranks=2, expert=2), data, runs[0])
    optim = OptimConfig(warmup=2, clip=0.0)
    other = run(tiny(3, ranks=2, expert=2, deterministic=True, optim=optim), data, runs[1])
    assert losses(other)[0] == losses(plain)[0]
    assert other.column("train/grad_norm")[0] == plain.column("train/grad_norm")[0] > 1
    assert losses(other) != losses(plain)  # 1.0 had been clipping


def _trains_without_the_compiler(rank: int, world: int, folder: str, tmp: str) -> None:
    config = tiny(1, ranks=world, expert=world)
    trainer, _ = make_trainer(config, open_prepared(folder), Path(tmp), rank)
    trainer.fit()
    trainer.close()
    assert "torch._dynamo" not in sys.modules


@pytest.mark.dist
def test_no_rank_imports_torchs_compiler(data: PreparedData, tmp_path: Path) -> None:
    """It takes two seconds and 75 MB of each rank."""
    run_ranks(_trains_without_the_compiler, 2, (str(data.folder), str(tmp_path)))


# --- one step under the magnifying glass


def _one_step(
    config: TrainConfig, data: PreparedData, folder: Path, rank: int
) -> tuple[dict[str, float], float]:
    """Return the norms of a first step, and the expert norm by single experts."""
    trainer, _ = make_trainer(config, data, folder, rank)
    before = {s.name: s.parameter.detach().clone() for s in parameter_specs(trainer.model)}
    for slot in (slot for bucket in trainer.engine.optimizer.buckets for slot in bucket.slots):
        slot.gradient.fill_(float("nan"))  # whatever a step does not write would show
    micro_batches, noise = trainer._read_micro_batches()
    control = trainer.runtime.groups.control
    result = train_step(
        trainer.model,
        trainer.engine,
        micro_batches,
        groups=trainer.runtime.groups,
        meter=trainer.meter,
        noise=noise,
        lr=0.001,
        clip=1.0,
        measure=True,
    )
    for spec in parameter_specs(trainer.model):
        assert not torch.equal(spec.parameter, before[spec.name]), f"{spec.name} did not move"
        if spec.label == "expert":
            moved_e = (spec.parameter != before[spec.name]).flatten(1).any(1)
            assert moved_e.all(), f"an expert of {spec.name} did not move"
    squares = trainer.meter._norm_squares.sum()
    if control.handle is not None:
        dist.all_reduce(squares, group=control.handle)
    values = trainer.meter.drain(control)
    trainer.close()
    assert values["grad/expert_norm_max"] <= float(result.norms["expert"])
    return {name: float(norm) for name, norm in result.norms.items()}, float(squares.sqrt())


def _norms_are(rank: int, world: int, folder: str, tmp: str, wanted: dict[str, float]) -> None:
    data = open_prepared(folder)
    layouts = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 4), (4, 4)]
    layouts += [(2, 1, 2), (1, 4, 4), (1, 2, 2, 2), (2, 4, 2, 2)]
    for expert, shard, *others in layouts:
        more = dict(zip(("expert_shard", "tensor"), others, strict=False))
        config = tiny(1, ranks=world, expert=expert, shard=shard, parallel=more)
        place = Path(tmp) / f"{expert}-{shard}-{others}"
        place.mkdir(exist_ok=True)
        norms, by_expert = _one_step(config, data, place, rank)
        assert norms == pytest.approx(wanted, rel=1e-5), (expert, shard, others)
        assert by_expert == pytest.approx(norms["expert"], rel=1e-5), (expert, shard, others)


@pytest.mark.dist
def test_every_parameter_counts_once_in_the_norm_and_moves_in_the_first_step(
    data: PreparedData, tmp_path: Path
) -> None:
    wanted, by_expert = _one_step(tiny(1), data, tmp_path, 0)
    assert by_expert == pytest.approx(wanted["expert"], rel=1e-5)
    squares = sum(wanted[label] ** 2 for label in LABELS)
    assert wanted["total"] == pytest.approx(squares**0.5, rel=1e-5)
    run_ranks(_norms_are, 4, (str(data.folder), str(tmp_path), wanted))


def test_the_norm_is_that_of_plain_autograd(data: PreparedData, tmp_path: Path) -> None:
    from gatewise.moe.parallelize import build_model
    from gatewise.parallel.collectives import NO_GROUP
    from gatewise.routers.api import RoutingContext
    from gatewise.routers.balance import global_balance_loss
    from gatewise.training.step import language_loss

    config = tiny(1)
    norms, _ = _one_step(config, data, tmp_path, 0)
    model = build_model(
        config.model,
        config.router,
        vocab_size=data.tokenizer.vocab_size,
        group=NO_GROUP,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=config.seed,
    )
    trainer, _ = make_trainer(config, data, tmp_path)
    (batch,), _ = trainer._read_micro_batches()
    trainer.close()
    output = model(batch[:, :-1], RoutingContext())
    total = language_loss(model, output, batch[:, 1:]) / (8 * LENGTH)
    for routing in output.routings:
        assert routing.load is not None
        balance = global_balance_loss(
            routing.load.score_E,
            routing.load.count_E,
            tokens=torch.tensor(8.0 * LENGTH),
            top_k=2,
            ranks=1,
        )
        total = total + config.router.balance_loss * balance + routing.losses["z"]
    total.backward()
    for label in LABELS:
        squares = [
            float(spec.parameter.grad.square().sum())
            for spec in parameter_specs(model)
            if spec.label == label and spec.parameter.grad is not None
        ]
        assert norms[label] == pytest.approx(sum(squares) ** 0.5, rel=1e-5), label


# --- the start and the groups


def _starts_are_slices(rank: int, world: int, folder: str, tmp: str, whole: str) -> None:
    wanted = torch.load(whole, weights_only=True)
    split = {"expert_shard": 2, "tensor": 2}
    for expert, more in ((1, {}), (2, {}), (4, {}), (2, split), (1, {"expert_shard": 4})):
        config = tiny(1, ranks=world, expert=expert, parallel=more)
        place = Path(tmp) / f"{expert} {len(more)}"
        place.mkdir(exist_ok=True)
        trainer, _ = make_trainer(config, open_prepared(folder), place, rank)
        for spec in parameter_specs(trainer.model):
            flat = wanted[spec.name].flatten()
            mine = take_spans(flat, spec.cut(0, spec.parameter.numel()))
            assert torch.equal(spec.local(), mine), spec.name
            assert spec.shape == wanted[spec.name].shape
        trainer.close()


@pytest.mark.dist
def test_a_model_starts_from_the_same_values_in_every_layout(
    data: PreparedData, tmp_path: Path
) -> None:
    trainer, _ = make_trainer(tiny(1), data, tmp_path)
    trainer.close()
    specs = parameter_specs(trainer.model)
    experts = next(s.parameter for s in specs if s.label == "expert")
    assert len({tuple(row.flatten()[:4].tolist()) for row in experts}) == 4  # all different
    torch.save({spec.name: spec.parameter.detach().clone() for spec in specs}, tmp_path / "start")
    run_ranks(_starts_are_slices, 4, (str(data.folder), str(tmp_path), str(tmp_path / "start")))


def _groups_are(rank: int, world: int) -> None:
    members = lambda group: (  # noqa: E731 - a name for one expression
        dist.get_process_group_ranks(group.handle) if group.handle is not None else [rank]
    )
    groups = make_groups(ParallelConfig(ranks=world, expert=2, shard=2))
    pair = rank // 2 * 2
    assert members(groups.control) == [0, 1, 2, 3]
    assert members(groups.experts.rows) == [pair, pair + 1]
    assert members(groups.dense.shard) == [pair, pair + 1]
    assert members(groups.dense.replicate) == [rank % 2, rank % 2 + 2]
    assert members(groups.expert_data.shard) == [rank]
    assert members(groups.expert_data.replicate) == [rank % 2, rank % 2 + 2]
    groups = make_groups(ParallelConfig(ranks=world, expert=2, shard=4))
    assert members(groups.dense.shard) == [0, 1, 2, 3]
    assert members(groups.dense.replicate) == [rank]
    assert members(groups.expert_data.shard) == [rank % 2, rank % 2 + 2]
    groups = make_groups(ParallelConfig(ranks=world, expert=4))
    assert members(groups.experts.rows) == [0, 1, 2, 3]
    assert members(groups.expert_data.replicate) == [rank]
    groups = make_groups(
        ParallelConfig(ranks=world, expert=2, expert_shard=2, tensor=2, node=2, dispatch="2dh")
    )
    assert members(groups.experts.rows) == [rank % 2, rank % 2 + 2]
    assert members(groups.experts.shard) == members(groups.tensor) == [pair, pair + 1]
    assert members(groups.experts.everyone) == [0, 1, 2, 3]
    assert members(groups.experts.local) == [rank]
    assert members(groups.experts.across) == [rank % 2, rank % 2 + 2]
    assert members(groups.expert_data.replicate) == [rank]
    assert members(groups.tensor_data.replicate) == [rank % 2, rank % 2 + 2]
    assert groups.readers == 2
    # lanes do not share a communicator, though the ranks be the same
    handles = [
        group.handle
        for group in (
            groups.control,
            groups.experts.rows,
            groups.experts.across,
            groups.experts.shard,
            groups.experts.everyone,
            groups.tensor,
            groups.tensor_data.replicate,
            groups.dense.replicate,
        )
    ]
    assert None not in handles
    assert len(set(map(id, handles))) == len(handles)


@pytest.mark.dist
def test_groups_are_the_documented_ranks() -> None:
    run_ranks(_groups_are, 4)


def _evaluates(
    rank: int, world: int, folder: str, tmp: str, stride: int | None, tensor: int
) -> None:
    config = tiny(
        1,
        ranks=world,
        expert=1 if world == 3 else world,
        batch=_batch(world),
        parallel={"tensor": tensor},
    )
    config.evaluation = EvaluationConfig(stride=stride, micro=3, tokens=None)
    trainer, _ = make_trainer(config, open_prepared(folder), Path(tmp), rank)
    result = trainer.evaluate()
    trainer.close()
    assert trainer.model.training
    if rank == 0:
        torch.save(
            [result.nats, result.tokens, result.text_bytes], Path(tmp) / f"e{world}-{tensor}"
        )


def _batch(world: int):
    from gatewise.training.config import BatchConfig

    return BatchConfig(sequences=world)


@pytest.mark.dist
def test_evaluation_scores_every_target_once_on_any_number_of_ranks(
    data: PreparedData, tmp_path: Path
) -> None:
    results = []
    for world, stride, tensor in ((1, 20, 1), (2, 20, 1), (3, 20, 1), (2, 20, 2)):
        args = (str(data.folder), str(tmp_path), stride, tensor)
        if world == 1:
            _evaluates(0, 1, *args)
        else:
            run_ranks(_evaluates, world, args)
        results.append(torch.load(tmp_path / f"e{world}-{tensor}", weights_only=False))
    tokens = data.validation.tokens
    for nats, count, text_bytes in results:
        assert count == len(tokens) - 1
        assert text_bytes == int((tokens[1:] != data.tokenizer.end_of_text).sum())
        assert nats == pytest.approx(results[0][0], rel=1e-6)
