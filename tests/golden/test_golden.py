"""Twenty steps of a small model on two ranks against stored numbers.

They say that nothing changed; the other tests say that it is right. After a change of the maths on
purpose: `pytest tests/golden --regen-golden`, and look at the difference.
"""

import json
from pathlib import Path

import pytest
import torch
from training_runs import make_text, make_trainer, tiny

from gatewise.training import health
from gatewise.training.config import OptimConfig
from gatewise.training.data import open_prepared
from ranks import run_ranks

STORED = Path(__file__).with_name("two_ranks.json")
METRICS = ("train/loss", "train/grad_norm", "train/balance_loss", "train/z_loss", "val/loss")


def _train(rank: int, world: int, data: str, folder: str) -> None:
    counts: list[list[list[float]]] = []
    summarise = health.summarise

    def note(count_LE: torch.Tensor, *others: object, **named: object) -> dict[str, float]:
        counts.append(count_LE.tolist())
        return summarise(count_LE, *others, **named)  # type: ignore[arg-type]

    health.summarise = note
    config = tiny(20, ranks=world, expert=world, optim=OptimConfig(warmup=5))
    trainer, records = make_trainer(config, open_prepared(data), Path(folder), rank)
    trainer.fit()
    trainer.close()
    if rank == 0:
        have = {
            "torch": torch.__version__,
            **{name: [r[name] for r in records.all if name in r] for name in METRICS},
            "tokens_per_expert": counts,
        }
        (Path(folder) / "have.json").write_text(json.dumps(have))


@pytest.mark.golden
@pytest.mark.dist
def test_twenty_steps_give_the_stored_numbers(tmp_path: Path, regen_golden: bool) -> None:
    data = make_text(tmp_path)
    run_ranks(_train, 2, (str(data.folder), str(tmp_path)))
    have = json.loads((tmp_path / "have.json").read_text())
    assert len(have["train/loss"]) == len(have["tokens_per_expert"]) == 20
    if regen_golden:
        lines = [f' "{name}": {json.dumps(value)}' for name, value in have.items()]
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii")
    want = json.loads(STORED.read_text(encoding="ascii"))
    for name in METRICS:
        assert have[name] == pytest.approx(want[name], rel=1e-5), name
    assert have["tokens_per_expert"] == want["tokens_per_expert"]
