"""T6, T7 and T14 at several ranks: no router's numbers depend on the layout.

The other properties of routers are in `tests/unit/test_router_*.py`, by number.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import make_text, make_trainer, run, tiny

from gatewise.routers.api import RoutingContext
from gatewise.routers.config import BalanceScope, BiasRule, RouterConfig, ScoreFunction
from gatewise.routers.presets import PRESETS, preset
from gatewise.training.config import CheckpointConfig, TrainConfig
from gatewise.training.data import PreparedData, open_prepared
from ranks import run_ranks

STEPS = 3
QUANTILE = RouterConfig(
    score=ScoreFunction.sigmoid, bias_rule=BiasRule.quantile, bias_rate=0.5, z_loss=0.0
)


def router_of(name: str) -> RouterConfig:
    """Return a preset whose losses look at sequences, and whose state moves fast."""
    if name == "quantile":
        return QUANTILE
    config = replace(preset(name), allow_noncausal=True)
    if config.balance_scope is BalanceScope.micro_batch:
        config.balance_scope = BalanceScope.sequence  # a micro-batch is another at other ranks
    if config.bias_rate:
        config.bias_rate = 0.01
    if config.sparsity_rate:
        config.balance_loss = 0.1
    config.state_dim = 8
    return config


NAMES = ("quantile", *sorted(name for name in PRESETS if not name.endswith("pregate")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("routers"))


def settings(name: str, world: int, expert: int) -> TrainConfig:
    model = {"layers": 2 if name != "deepseek_v4" else 4}
    shard = world if expert == 1 else 1
    return tiny(STEPS, ranks=world, expert=expert, shard=shard, router=router_of(name), model=model)


def steps(name: str, data: PreparedData, folder: Path, rank: int, world: int, expert: int):  # type: ignore[no-untyped-def]
    """Train a few steps; return losses, norms and the routers' state."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer, _ = make_trainer(settings(name, world, expert), data, folder, rank)
    trainer.model.train()
    values: list[float] = []
    for _ in range(STEPS):
        result = trainer.run_step()
        values += [float(result.loss), *(float(v) for v in result.extra.values())]
        values += [float(result.norms[key]) for key in sorted(result.norms)]
    states = {
        f"{index}.{key}": value.clone()
        for index, router in enumerate(trainer.model.routers())
        for key, value in router.state().items()
    }
    trainer.close()
    return values, states


def _same_as_alone(rank: int, world: int, folder: str, tmp: str, names: list[str]) -> None:
    data = open_prepared(folder)
    wanted = torch.load(Path(tmp) / "alone.pt", weights_only=True)
    for name in names:
        for expert in (1, world):
            place = Path(tmp) / f"{name}-{world}-{expert}"
            values, states = steps(name, data, place, rank, world, expert)
            want_values, want_states = wanted[name]
            assert values == pytest.approx(want_values, rel=2e-5, abs=1e-7), (name, expert)
            for key, state in want_states.items():
                torch.testing.assert_close(states[key], state, msg=f"{name} {key}")


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_t06_losses_norms_and_state_of_every_router_do_not_depend_on_the_ranks(
    world: int, data: PreparedData, tmp_path: Path
) -> None:
    names = list(NAMES) if world == 2 else ["quantile", "rmoe", "remoe", "moe_x", "deepseek_v4"]
    alone = {name: steps(name, data, tmp_path / name, 0, 1, 1) for name in names}
    torch.save(alone, tmp_path / "alone.pt")
    for name in ("quantile", "deepseek_v3", "remoe"):
        if name in alone:  # the state did move
            moved = [s for key, s in alone[name][1].items() if not key.endswith("loss_weight")]
            moved = moved if name != "remoe" else [alone[name][1]["0.loss_weight"] - 0.1]
            assert all(bool(state.any()) for state in moved), name
    run_ranks(_same_as_alone, world, (str(data.folder), str(tmp_path), names))


def _routes_alike(rank: int, world: int, folder: str, tmp: str) -> None:
    data = open_prepared(folder)
    found: list[list[Tensor]] = []
    for expert, recompute in ((1, False), (2, False), (2, True), (4, False)):
        place = Path(tmp) / f"{expert}-{recompute}"
        place.mkdir(exist_ok=True)
        trainer, _ = make_trainer(settings("rmoe", world, expert), data, place, rank)
        trainer.model.recompute = recompute
        (batch,), _ = trainer._read_micro_batches()
        output = trainer.model(batch[:, :-1], RoutingContext())
        cell = trainer.model.router_cell
        assert cell is not None
        # a gradient that passes the experts would be summed in another order
        total = sum((r.weight_TK[:, 0].sum() for r in output.routings[:1]), torch.zeros(()))
        grads = torch.autograd.grad(total, list(cell.parameters()))
        kept = [t for r in output.routings for t in (r.expert_TK, r.weight_TK, r.logits_TE)]
        found.append([output.hidden_BSD, *(t for t in kept if t is not None), *grads])
        trainer.close()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.dist
def test_t06_rmoe_routes_with_the_same_bits_at_every_expert_degree(
    data: PreparedData, tmp_path: Path
) -> None:
    run_ranks(_routes_alike, 4, (str(data.folder), str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["rmoe", "remoe"])
def test_t14_a_checkpoint_of_two_ranks_goes_on_at_one(
    name: str, data: PreparedData, tmp_path: Path
) -> None:
    config = replace(settings(name, 2, 2), checkpoint=CheckpointConfig(every=1))
    whole = run(config, data, tmp_path / "whole")
    start = str(tmp_path / "whole" / "checkpoints" / "step_00000002")
    config = replace(settings(name, 1, 1), checkpoint=CheckpointConfig(load=start))
    rest = run(config, data, tmp_path / "rest")
    assert rest.column("train/loss") == pytest.approx(whole.column("train/loss")[2:], rel=2e-5)
    wanted, found = whole.tensors(), rest.tensors()
    assert wanted.keys() == found.keys()
    assert any(key.startswith("loss_weight/") for key in wanted) == (name == "remoe")
    for key, tensor in wanted.items():
        error = float((found[key] - tensor).norm()) / max(float(tensor.norm()), 1e-6)
        assert error < 2e-4, key
