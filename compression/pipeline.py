"""Compress a checkpoint: calibrate, cost, allocate, quantise, pack, prune, evaluate, report.

Each arrow is a file in the run's folder, so that a killed run goes on from the last complete one:
below `calibration/` what was measured (the stages name their files), in `.compressed.partial/` the
artefact, a file per block; at the end that folder becomes `compressed/`.

Blocks run one at a time (`stream.py`). The whole model is in memory for the gradients of fisher
costs, for repair=cross_entropy and for the final evaluation, and nowhere else.

Read first: `work.py`, then the stages: `calibration_stage.py`, `quantize_stage.py`,
`repair_stage.py`, `prune_stage.py`, `report_stage.py`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatewise.compression.allocate import allocate, check_budget
from gatewise.compression.artefact import finish_artefact, replace_file
from gatewise.compression.calibration_stage import (
    calibration_batches,
    measure_costs,
    sequence_order,
)
from gatewise.compression.config import CompressConfig, Repair
from gatewise.compression.load import build_empty
from gatewise.compression.plan import list_parts
from gatewise.compression.prune_stage import check_prunable
from gatewise.compression.quantize_stage import quantize_blocks
from gatewise.compression.repair import check_repairable
from gatewise.compression.repair_stage import repair_by_loss
from gatewise.compression.report_stage import make_report
from gatewise.compression.stream import check_names
from gatewise.compression.work import Progress, Source, Work
from gatewise.training.checkpoint_folder import read_meta

__all__ = ["compress"]

_OPTIMIZER = ("adam_m/", "adam_v/")


def compress(
    source: Source, config: CompressConfig, folder: Path, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """Compress a checkpoint, or go on where an earlier call with equal settings was killed.

    Args:
        source: the checkpoint; it is only read.
        config: settings.
        folder: of the run.
        progress: told of every finished step.

    Returns:
        Folder of the artefact, and its report.

    Raises:
        ConfigError: for a budget that cannot be met.
        DataError: for text that is too short, or activations that are not finite.
        CheckpointError: for a checkpoint with unknown or missing tensors.
    """
    model = build_empty(source.config, source.vocab_size)
    saved = {
        name: spec["shape"]
        for name, spec in read_meta(source.path)["tensors"].items()
        if not name.startswith(_OPTIMIZER)
    }
    check_names(model, saved, source=str(source.path))
    work = Work(source, config, folder, progress, list_parts(model, config))
    check_budget(work.plan, config)
    check_prunable(source.config, config.prune)
    check_repairable(source.config.router, config.repair.rule)
    order = sequence_order(work)
    work.calibration.mkdir(exist_ok=True)
    work.partial.mkdir(exist_ok=True)
    work.batches = calibration_batches(work, order)
    statistics = measure_costs(work)
    work.plan = work.plan.with_bits(allocate(work.plan, statistics, config))
    replace_file(work.partial / "plan.json", work.plan.to_json())
    quantize_blocks(work)
    if config.repair.rule is Repair.cross_entropy:
        repair_by_loss(
            work.load_after,
            work.batches,
            config.repair,
            plan=work.plan,
            calibration=work.calibration,
            partial=work.partial,
            progress=lambda done, total: progress("repair", done, total),
        )
    report = make_report(work)
    return _finish(work, report), report


def _finish(work: Work, report: Mapping[str, Any]) -> Path:
    source, partial = work.source, work.partial
    meta = {key: source.meta[key] for key in ("step", "vocab_size", "tokenizer", "config")}
    replace_file(partial / "config.json", json.dumps({"meta": meta}, indent=1) + "\n")
    replace_file(partial / "report.json", json.dumps(report, indent=1) + "\n")
    shutil.copyfile(source.data.folder / "tokenizer.json", partial / "tokenizer.json")
    return finish_artefact(partial)
