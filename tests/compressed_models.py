"""Small models, statistics and compressions for tests of `gatewise compress`.

The properties of compression are numbered in the tests' names (`test_c13_...`): C1 to C8 the solver
in `test_compress_knapsack.py`, C9 to C11 allocation in `test_compress_allocate.py`, C12 packing in
`test_compress_packing.py`, C13 sizes in `test_compress_artefact.py`, C15 to C22 quantisers in
`test_compress_quantize.py`, C23 and C24 costs in `test_compress_statistics.py`, C25 to C32 pruning
in `test_compress_prune*.py` (and on two ranks), C33 routers in `test_compress_repair.py`, C14 and
C34 export in `test_compress_export.py`, C9 and C35 to C37 runs in `test_compress_pipeline.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training_runs import make_text, run, tiny

from gatewise.compression.config import (
    Allocation,
    CalibrationConfig,
    CompressConfig,
    Granularity,
    GridConfig,
    Kept,
    TextConfig,
)
from gatewise.compression.formats import ZeroPoint
from gatewise.compression.load import build_empty
from gatewise.compression.pipeline import compress
from gatewise.compression.plan import Plan, list_parts
from gatewise.compression.statistics import LayerStatistics
from gatewise.compression.work import Source
from gatewise.moe.model import Decoder
from gatewise.routers.config import RouterConfig
from gatewise.training.checkpointer import find_latest, read_meta
from gatewise.training.config import TrainConfig
from gatewise.training.data import PreparedData

__all__ = [
    "PLANS",
    "compressed",
    "empty_plan",
    "made_up_statistics",
    "settings",
    "trained",
    "weights",
]


PLANS = {
    "global": {"bits": 2.8},
    "uniform 3, integer zeros": {
        "allocation": Allocation.uniform,
        "widths": "3",
        "bits": 3.6,
        "grid": GridConfig(group=16, clip_steps=2, zero=ZeroPoint.int),
    },
    "all widths, apart": {
        "allocation": Allocation.fnorm2_global,
        "granularity": Granularity.projection,
        "widths": "1,1.58,2,3,4,8",
        "bits": 3.1,
        "attention_bits": 16.0,
        "kept": Kept.fp32,
    },
    "ternary, ragged groups": {
        "widths": "1.58,2",
        "bits": 3.8,
        "grid": GridConfig(group=24, clip_steps=2),
        "attention_bits": 8.0,
    },
}


def settings(**changes: Any) -> CompressConfig:
    """Return settings for models of 16 channels."""
    return CompressConfig(
        **{
            "grid": GridConfig(group=16, clip_steps=6),
            "calibration": CalibrationConfig(sequences=12, batch=4),
            "text": TextConfig(tokens=300),
            **changes,
        }
    )


def empty_plan(config: CompressConfig, **model: Any) -> Plan:
    """Return the parts of a tiny model."""
    return list_parts(build_empty(tiny(model=model), 257), config)


def made_up_statistics(
    layers: Sequence[int], experts: int, *, seed: int = 0, widths: Sequence[float] = (1, 2, 3)
) -> list[LayerStatistics]:
    """Return statistics of layers whose experts differ, with costs that fall with the width."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[float]:
        return (torch.rand(experts, generator=generator) + 0.05).tolist()

    found = []
    for layer in layers:
        gate = draw()
        statistics = LayerStatistics(
            layer=layer,
            tokens=1000,
            count=[int(1000 * value) for value in draw()],
            gate=[500 * value for value in gate],
            gate_squared=[300 * value for value in gate],
            probability=[400 * value for value in gate],
            margin=0.5,
            trace={"in": draw(), "out": draw()},
        )
        for what in ("both", "in", "out"):
            table = [draw() for _ in widths]
            for place, width in enumerate(widths):
                key = f"{what}/{width:g}"
                left = [sum(column[place:]) for column in zip(*table, strict=True)]
                statistics.squared[key] = left
                statistics.norms[key] = [value**0.5 for value in left]
                statistics.fisher[key] = [(layer + 1) ** 2 * value for value in left]
                statistics.diagonal[key] = left
                statistics.weight_error[key] = left
        found.append(statistics)
    return found


def trained(
    folder: Path, *, router: RouterConfig | None = None, **model: Any
) -> tuple[Source, TrainConfig, PreparedData]:
    """Train a few steps and return the checkpoint."""
    data = make_text(folder)
    config = tiny(8, model=model, router=router)
    run(config, data, folder / "run")
    path = find_latest(folder / "run" / "checkpoints")
    assert path is not None
    meta = read_meta(path)["meta"]
    return Source(path, config, meta, data, torch.device("cpu")), config, data


def compressed(source: Source, config: CompressConfig, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Compress into a folder."""
    folder.mkdir(exist_ok=True)
    return compress(source, config, folder, lambda _stage, _done, _total: None)


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    """Return a model's parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
