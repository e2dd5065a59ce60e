"""Training with the experts known before layer 0: the same losses with one exchange of counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import make_text, make_trainer, tiny

from gatewise.moe.model import Decoder
from gatewise.moe.stages import BACKWARD, FORWARD, Schedule
from gatewise.parallel.schedule.plan import staged_plan
from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadWeights, Exchange
from gatewise.routers.ahead.plan import record_routes
from gatewise.routers.config import RouterConfig
from gatewise.training.data import PreparedData, open_prepared
from gatewise.training.observe import observe
from gatewise.training.trainer import Trainer
from ranks import run_ranks

GRU = AheadConfig(kind=AheadKind.gru, width=16, heads=2, state=12)
KINDS = {
    "gru": GRU,
    "gru_weights": replace(GRU, weights=AheadWeights.pregate),
    "read_me_single": replace(GRU, kind=AheadKind.read_me, per_layer=False),
    "hash": AheadConfig(kind=AheadKind.hash),
}
LAYERS, MICRO_BATCHES, STEPS = 2, 2, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_text(tmp_path_factory.mktemp("pregated"))


def build(
    rank: int, world: int, data: str, folder: str, ahead: AheadConfig, chunks: int, recompute: bool
) -> Trainer:
    micro = 8 // world // MICRO_BATCHES
    config = tiny(
        STEPS,
        ranks=world,
        expert=world,
        micro=micro,
        router=RouterConfig(ahead=ahead),
        recompute=recompute,
    )
    path = Path(folder) / ahead.exchange.name
    trainer, _ = make_trainer(config, open_prepared(data), path, rank)
    for layer in trainer.model.moe_layers():
        layer.schedule = Schedule(staged_plan(FORWARD, chunks), staged_plan(BACKWARD, chunks))
    return trainer


def digests(model: Decoder, token_BS: torch.Tensor) -> tuple[str, str]:
    """Return the digests of what the layers executed and of what the pre-gate plans."""
    assert model.ahead is not None
    executed = record_routes(model(token_BS).routings, num_experts=4)
    return executed.digest(), model.ahead.plan(token_BS).digest()


def _same_bits_with_fewer_exchanges(
    rank: int, world: int, data: str, folder: str, kind: str, chunks: int, recompute: bool
) -> None:
    seen, losses, final = {}, {}, {}
    for way in Exchange:
        ahead = replace(KINDS[kind], exchange=way)
        trainer = build(rank, world, data, folder, ahead, chunks, recompute)
        with observe() as seen[way]:
            results = [trainer.run_step() for _ in range(STEPS)]
        in_last_step = [i.task.stage for i in trainer.lanes.recorder.drain().intervals]
        assert in_last_step.count("exchange_counts") == seen[way].metadata / STEPS
        losses[way] = [
            (float(r.loss), float(r.norms["total"]), *(float(v) for v in r.extra.values()))
            for r in results
        ]
        losses[way].append((trainer.evaluate().loss,))
        final[way] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        if way is Exchange.step:  # known == used, in training and in evaluation
            token_BS = torch.arange(40).view(2, 20) % 200
            for mode in (True, False):
                trainer.model.train(mode)
                assert len(set(digests(trainer.model, token_BS))) == 1
        trainer.close()
    assert losses[Exchange.layer] == losses[Exchange.micro_batch] == losses[Exchange.step]
    for name, tensor in final[Exchange.layer].items():
        assert torch.equal(tensor, final[Exchange.micro_batch][name]), name
        assert torch.equal(tensor, final[Exchange.step][name]), name
    passes = 2 if recompute else 1  # the layer-wise exchange is repeated in recomputation
    alone = world == 1
    wanted = {
        Exchange.layer: 0 if alone else STEPS * MICRO_BATCHES * LAYERS * passes,
        Exchange.micro_batch: 0 if alone else STEPS * MICRO_BATCHES,
        Exchange.step: 0 if alone else STEPS,
    }
    assert {way: s.metadata for way, s in seen.items()} == wanted
    assert seen[Exchange.layer].metadata_in_layers == wanted[Exchange.layer]
    assert seen[Exchange.layer].reads_in_layers > 0
    for way in (Exchange.micro_batch, Exchange.step):
        assert seen[way].metadata_in_layers == seen[way].reads_in_layers == 0
        assert seen[way].rows == seen[Exchange.layer].rows
        assert seen[way].others == seen[Exchange.layer].others


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "kind", "chunks", "recompute"),
    [
        (2, "gru", 1, False),
        (2, "gru", 3, True),
        (4, "gru", 1, True),
        (2, "gru_weights", 2, False),
        (4, "read_me_single", 2, False),
        (2, "hash", 1, False),
    ],
)
def test_a_plan_made_ahead_gives_the_same_bits_with_fewer_exchanges(
    world: int, kind: str, chunks: int, recompute: bool, data: PreparedData, tmp_path: Path
) -> None:
    args = (str(data.folder), str(tmp_path), kind, chunks, recompute)
    run_ranks(_same_bits_with_fewer_exchanges, world, args)


@pytest.mark.parametrize("kind", ["gru", "read_me_single"])
def test_on_one_rank_a_plan_made_ahead_gives_the_same_bits(
    kind: str, data: PreparedData, tmp_path: Path
) -> None:
    args = (str(data.folder), str(tmp_path), kind, 2, True)
    _same_bits_with_fewer_exchanges(0, 1, *args)
