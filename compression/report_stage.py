"""The last stages: dynamic pruning, the loss before and after, and `report.json`.

    calibration/prune_*.json        what the tokens say of dropping experts (prune=... only)
                before.json         what the uncompressed model makes of each validation window
                after.json          the same of the compressed one; kept for other comparisons

Read first: `report.py`, `compare.py`, `prune_stage.py`.
"""

import json
import logging
from dataclasses import asdict, replace
from typing import Any

from gatewise.compression.artefact import replace_file
from gatewise.compression.compare import Scores, compare_scores, score_windows
from gatewise.compression.config import PruneRule, Repair
from gatewise.compression.prune_stage import PruneStage, count_choices
from gatewise.compression.pruning import Pruning, apply_pruning
from gatewise.compression.report import (
    bits_report,
    bytes_report,
    coverage_report,
    losses_report,
    prune_report,
    settings_report,
    widths_report,
)
from gatewise.compression.statistics import LayerStatistics
from gatewise.compression.work import Work
from gatewise.moe.model import Decoder

__all__ = ["make_report"]

_logger = logging.getLogger(__name__)


def make_report(work: Work) -> dict[str, Any]:
    """Put together `report.json`; nothing in it depends on when or where it was made."""
    plan, config = work.plan, work.config
    notes = [
        json.loads((work.calibration / f"quantized_{layer:03d}.json").read_text())
        for layer in range(plan.layers)
    ]
    used = [LayerStatistics(**note["usage"]) for note in notes if note["usage"] is not None]
    losses = {name: loss for note in notes for name, loss in note["losses"].items()}
    coverage = coverage_report(used, plan)
    for row in coverage:
        if row["without_a_token"]:
            _logger.warning(
                "layer %d: no calibration token reached experts %s; they are quantised on all "
                "tokens of the layer",
                row["layer"],
                ", ".join(map(str, row["without_a_token"])),
            )
    if config.repair.rule is Repair.cross_entropy:  # the routers choose otherwise now
        counts = _prune_stage(work).count(None)
        used = [replace(found, count=counts[found.layer]) for found in used]
    pruning = None
    if config.prune.rule is not PruneRule.none:
        pruning, pruned = _prune(work, used)
    sizes = bytes_report(plan, work.partial)
    if sizes["computed"] != sizes["on_disk"]:
        raise RuntimeError(
            f"the artefact takes {sizes['on_disk']} bytes, but its plan {sizes['computed']}"
        )
    report = {
        "checkpoint": str(work.source.path),
        "step": work.source.meta["step"],
        "settings": settings_report(config),
        "bits": bits_report(plan, used),
        "bytes": sizes,
        "widths": widths_report(plan),
        "matrices": {"planned": len(plan.parts), "quantised": len(losses)},
        "relative_output_error": losses_report(losses),
        "notes": {name: text for note in notes for name, text in note["notes"].items()},
        "calibration_tokens": sum(token_BS[:, 1:].numel() for token_BS in work.batches),
        "coverage": coverage,
    }
    if pruning is not None:
        report["prune"] = pruned
    if config.repair.rule is not Repair.none:
        report["repair"] = _repair_report(work, notes)
    if config.text.evaluate:
        report["evaluation"] = _evaluate(work, pruning)
    return report


def _repair_report(work: Work, notes: list[dict[str, Any]]) -> dict[str, Any]:
    if work.config.repair.rule is Repair.cross_entropy:
        record: dict[str, Any] = json.loads((work.calibration / "repaired.json").read_text())
        return record
    return {str(layer): notes[layer]["repair"] for layer in work.moe_layers()}


def _evaluate(work: Work, pruning: Pruning | None) -> dict[str, Any]:
    """Compare the model before and after on the same windows, in fp32, and with pruning too."""
    source = work.source

    def score(stage: str, model: Decoder) -> Scores:
        return score_windows(
            model,
            source.data,
            sequence_length=source.config.data.sequence_length,
            tokens=work.config.text.tokens,
            progress=lambda done, total: work.progress(stage, done, total),
        )

    file = work.calibration / "before.json"
    if file.exists():
        before = Scores.from_json(file.read_text())
    else:
        before = score("evaluate before", work.load_before())
        replace_file(file, before.to_json())
    model = work.load_after()
    with count_choices(model) as asked:
        after = score("evaluate after", model)
    replace_file(work.calibration / "after.json", after.to_json())
    change = compare_scores(before, after)
    found: dict[str, Any] = {
        "loss_before": before.loss,
        "loss_after": after.loss,
        **asdict(change),
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "windows": len(before.nats_W),
        "tokens": int(before.targets_W.sum()),
    }
    if pruning is not None:
        apply_pruning(model, pruning)
        with count_choices(model) as kept:
            pruned = score("evaluate pruned", model)
        found["pruned"] = {
            "loss": pruned.loss,
            "accuracy": pruned.accuracy,
            "kept_activations": kept[0] / max(asked[0], 1),
            **asdict(compare_scores(after, pruned)),  # with the quantised model, not pruned
        }
    return found


def _prune(work: Work, used: list[LayerStatistics]) -> tuple[Pruning, dict[str, Any]]:
    """Calibrate dynamic pruning on the quantised model."""
    stage = _prune_stage(work)
    pruning, found = stage.find(work.config.prune)
    return pruning, prune_report(pruning, found, used, stage.count(pruning), work.plan)


def _prune_stage(work: Work) -> PruneStage:
    return PruneStage(
        work.stream, work.inputs(), work.plan, work.calibration, work.partial, work.progress
    )
