"""Compress a checkpoint: calibrate, cost, allocate, quantise, pack, evaluate, report.

Each arrow is a file in the run's folder, so that a killed run goes on from the last complete one:

    calibration/sequences.json      which training sequences calibrate
                gradients_*         gradients of each batch (fisher costs only)
                layer_*.json        statistics and costs of the layers with experts
                logits_*            what uncompressed routers chose (repair=topk_mse only)
                quantized_*.json    what there was to say of each quantised block
                repaired.*          fitted routers (repair=cross_entropy only)
                prune_*.json        what the tokens say of dropping experts (prune=... only)
    .compressed.partial/            the artefact, a file per block; at the end `compressed/`

Blocks run one at a time (`stream.py`). Costs are measured on the uncompressed model, because a
budget over all layers must know them all before the first layer is quantised; quantisation then
uses what the compressed blocks before a block give it.

Read first: `plan.py`, `stream.py`, `statistics.py`, `quantize_block.py`, `artefact.py`.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.allocate import allocate, check_budget, cost_kind, measured_parts
from gatewise.compression.artefact import (
    PARTIAL,
    fill_model,
    finish_artefact,
    replace_file,
    write_layer,
)
from gatewise.compression.compare import Scores, compare_scores, score_windows
from gatewise.compression.config import (
    CompressConfig,
    Method,
    Perturbation,
    PruneRule,
    Repair,
)
from gatewise.compression.costs import FISHER_KINDS
from gatewise.compression.cover import choose_sequences, count_by_sequence
from gatewise.compression.gradients import measure_gradients, read_gradients
from gatewise.compression.observe import see_feed_forward
from gatewise.compression.plan import Plan, file_name, list_parts
from gatewise.compression.prune_stage import PruneStage, check_prunable, count_choices
from gatewise.compression.pruning import Pruning, apply_pruning
from gatewise.compression.quantize_block import make_quantiser, quantize_block
from gatewise.compression.repair import check_repairable
from gatewise.compression.repair_stage import (
    keep_reference_logits,
    read_target,
    repair_by_loss,
)
from gatewise.compression.report import (
    bits_report,
    bytes_report,
    coverage_report,
    coverage_target,
    losses_report,
    prune_report,
    settings_report,
    widths_report,
)
from gatewise.compression.statistics import LayerStatistics, measure_layer
from gatewise.compression.stream import BlockStream, check_names, give_memory
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import DataError
from gatewise.training.checkpoint_folder import read_meta
from gatewise.training.checkpoint_load import load
from gatewise.training.config import TrainConfig
from gatewise.training.data import PreparedData, SequenceOrder, read_batch
from gatewise.training.state import model_ranges

__all__ = ["Progress", "Source", "build_empty", "compress", "load_compressed", "planned_shapes"]

_logger = logging.getLogger(__name__)
_OPTIMIZER = ("adam_m/", "adam_v/")
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that is compressed, and the text that it is measured on."""

    path: Path
    config: TrainConfig
    meta: Mapping[str, Any]  # what the checkpoint says of itself
    data: PreparedData
    device: torch.device


@dataclass(slots=True)
class _Work:
    """What the stages pass on."""

    source: Source
    config: CompressConfig
    folder: Path
    progress: Progress
    plan: Plan
    batches: list[Tensor] = field(default_factory=list)  # (B, S + 1) each

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration"

    @property
    def partial(self) -> Path:
        return self.folder / PARTIAL

    def inputs(self) -> list[Tensor]:
        return [token_BS[:, :-1] for token_BS in self.batches]

    def stream(self) -> BlockStream:
        source = self.source
        model = build_empty(source.config, int(source.meta["vocab_size"]))
        return BlockStream(model, lambda ranges: _fill(source.path, ranges), source.device)

    def moe_layers(self) -> list[int]:
        return sorted({part.layer for part in self.plan.parts if part.kind == "expert"})


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
    model = build_empty(source.config, int(source.meta["vocab_size"]))
    saved = {
        name: spec["shape"]
        for name, spec in read_meta(source.path)["tensors"].items()
        if not name.startswith(_OPTIMIZER)
    }
    check_names(model, saved, source=str(source.path))
    work = _Work(source, config, folder, progress, list_parts(model, config))
    check_budget(work.plan, config)
    check_prunable(source.config, config.prune)
    check_repairable(source.config.router, config.repair.rule)
    order = _sequence_order(work)
    work.calibration.mkdir(exist_ok=True)
    work.partial.mkdir(exist_ok=True)
    work.batches = _calibration_batches(work, order)
    statistics = _measure(work)
    work.plan = work.plan.with_bits(allocate(work.plan, statistics, config))
    replace_file(work.partial / "plan.json", work.plan.to_json())
    _quantize(work)
    if config.repair.rule is Repair.cross_entropy:
        repair_by_loss(
            lambda: load_compressed(
                source.config, model.embedding.shape[0], work.partial, work.plan, source.device
            ),
            work.batches,
            config.repair,
            plan=work.plan,
            calibration=work.calibration,
            partial=work.partial,
            progress=lambda done, total: progress("repair", done, total),
        )
    report = _report(work)
    return _finish(work, report), report


def build_empty(config: TrainConfig, vocab_size: int) -> Decoder:
    """Build a run's model on the meta device."""
    with torch.device("meta"):
        return Decoder(config.model, config.router, vocab_size)


def load_compressed(
    config: TrainConfig, vocab_size: int, path: Path, plan: Plan, device: torch.device
) -> Decoder:
    """Build a model from an artefact, with its weights dequantised to fp32."""
    model = build_empty(config, vocab_size)
    check_names(model, planned_shapes(plan), source=str(path))
    give_memory(model, device)
    fill_model(model, path, plan, range(plan.layers + 1))
    return model.eval()


def planned_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a plan's parts and kept tensors make, by name."""
    shapes = {item.name: item.shape for item in plan.kept}
    slices: dict[str, int] = {}
    for part in plan.parts:
        slices[part.source] = slices.get(part.source, 0) + 1
    for part in plan.parts:
        shape = (part.shape.rows, part.shape.columns)
        is_slice = part.expert is not None
        shapes[f"model/{part.source}"] = (slices[part.source], *shape) if is_slice else shape
    return shapes


def _sequence_order(work: _Work) -> SequenceOrder:
    """Return the order of the training sequences, once there are enough for the settings."""
    config, length = work.config.calibration, work.source.config.data.sequence_length
    order = SequenceOrder(len(work.source.data.train), length, config.seed)
    wanted, columns = config.sequences, max(part.shape.columns for part in work.plan.parts)
    if wanted > order.sequences_per_epoch:
        raise DataError(
            f"calibration.sequences is {wanted}, but the training split has only "
            f"{order.sequences_per_epoch} sequences of {length} tokens; lower it or give more text"
        )
    if wanted * length < columns:
        raise DataError(
            f"calibration.sequences is {wanted}, which is {wanted * length} tokens; the widest "
            f"matrix has {columns} inputs, so take at least {-(-columns // length)}"
        )
    return order


def _calibration_batches(work: _Work, order: SequenceOrder) -> list[Tensor]:
    """Choose the sequences and read them."""
    config, train = work.config.calibration, work.source.config
    tokens, wanted = work.source.data.train, config.sequences
    columns = max(part.shape.columns for part in work.plan.parts)
    file = work.calibration / "sequences.json"
    if file.exists():
        chosen = json.loads(file.read_text())
    else:
        pool = min(max(wanted, round(wanted * config.pool)), order.sequences_per_epoch)
        chosen = list(range(wanted))
        if pool > wanted:
            batches = [
                read_batch(tokens, order, range(first, min(first + config.batch, pool)))[:, :-1]
                for first in range(0, pool, config.batch)
            ]
            counts = count_by_sequence(work.stream(), batches, train.model.num_experts)
            target = coverage_target(columns, wanted * order.sequence_length)
            chosen = choose_sequences(counts, wanted, target)
        replace_file(file, json.dumps(chosen) + "\n")
    work.progress("choose", 1, 1)
    return [
        read_batch(tokens, order, chosen[first : first + config.batch])
        for first in range(0, wanted, config.batch)
    ]


def _measure(work: _Work) -> list[LayerStatistics]:
    """Measure the costs of all layers on the uncompressed model."""
    kind = cost_kind(work.config)
    if kind is None:
        return []
    files = {layer: work.calibration / f"layer_{layer:03d}.json" for layer in work.moe_layers()}
    if not all(file.exists() for file in files.values()):
        if kind in FISHER_KINDS:
            _gradients(work)
        method = work.config.method
        if work.config.perturbation is Perturbation.rtn:
            method = Method.rtn
        stream = work.stream()
        stream.begin(work.inputs())
        for layer in range(work.plan.layers):
            with stream.resident(layer) as block:
                file = files.get(layer)
                if file is not None and not file.exists():
                    assert isinstance(block.feed_forward, MoELayer)
                    gradient_TD = None
                    if kind in FISHER_KINDS:
                        gradient_TD = read_gradients(work.calibration, len(work.batches), layer)
                        gradient_TD = gradient_TD.to(work.source.device)
                    found = measure_layer(
                        layer,
                        see_feed_forward(stream, block),
                        block.feed_forward.experts,
                        widths=work.config.width_list(),
                        what=measured_parts(work.config),
                        quantiser=make_quantiser(work.config, method),
                        gradient_TD=gradient_TD,
                    )
                    replace_file(file, found.to_json())
                stream.advance(block)
            work.progress("cost", layer + 1, work.plan.layers)
        for left in work.calibration.glob("gradients_*"):
            left.unlink()
    return [LayerStatistics.from_json(file.read_text()) for file in files.values()]


def _gradients(work: _Work) -> None:
    source = work.source
    model = build_empty(source.config, int(source.meta["vocab_size"]))
    give_memory(model, source.device)
    _fill(source.path, model_ranges(model))
    measure_gradients(
        model,
        work.batches,
        work.calibration,
        progress=lambda done: work.progress("gradients", done, len(work.batches)),
    )


def _quantize(work: _Work) -> None:
    """Quantise block after block, each on what the compressed ones before it give."""
    plan, layers = work.plan, work.plan.layers
    files = [work.partial / file_name(number) for number in range(layers + 1)]
    notes = [work.calibration / f"quantized_{layer:03d}.json" for layer in range(layers)]
    if all(file.exists() for file in (*files, *notes)):
        return
    targets: dict[int, Path] = {}
    if work.config.repair.rule is Repair.topk_mse:
        targets = {
            layer: work.calibration / f"logits_{layer:03d}.safetensors"
            for layer in work.moe_layers()
        }
        if not all(file.exists() for file in targets.values()):
            keep_reference_logits(
                work.stream(),
                work.inputs(),
                targets,
                lambda done, total: work.progress("reference", done, total),
            )
    quantiser = make_quantiser(work.config, work.config.method)
    stream = work.stream()
    stream.begin(work.inputs(), adjust=lambda: _round_kept(stream.model, plan, 0))
    if not files[0].exists():
        kept = _kept_tensors(stream.model, plan, 0)
        write_layer(work.partial, plan, 0, parts={}, kept=kept)
    for layer in range(layers):
        complete = files[layer + 1].exists() and notes[layer].exists()
        with stream.resident(layer, load=not complete) as block:
            if complete:
                fill_model(stream.model, work.partial, plan, [layer + 1])
            else:
                _round_kept(stream.model, plan, layer + 1)
                target = None
                if layer in targets:
                    target = read_target(targets[layer], work.source.device)
                ridge = work.config.repair.ridge
                done = quantize_block(stream, block, plan, quantiser, target=target, ridge=ridge)
                record = {
                    "losses": done.losses,
                    "notes": {name: part.note for name, part in done.parts.items() if part.note},
                    "usage": asdict(done.usage) if done.usage is not None else None,
                    "repair": done.repair,
                }
                replace_file(notes[layer], json.dumps(record, indent=1) + "\n")
                kept = _kept_tensors(stream.model, plan, layer + 1)
                write_layer(work.partial, plan, layer + 1, parts=done.parts, kept=kept)
            stream.advance(block)
        work.progress("quantize", layer + 1, layers)


def _prune(work: _Work, used: list[LayerStatistics]) -> tuple[Pruning, dict[str, Any]]:
    """Calibrate dynamic pruning on the quantised model."""
    stage = PruneStage(
        work.stream, work.inputs(), work.plan, work.calibration, work.partial, work.progress
    )
    pruning, found = stage.find(work.config.prune)
    return pruning, prune_report(pruning, found, used, stage.count(pruning), work.plan)


def _kept_tensors(model: Decoder, plan: Plan, number: int) -> dict[str, Tensor]:
    ranges = model_ranges(model)
    return {
        item.name: ranges[item.name].data.view(item.shape) for item in plan.kept_of_file(number)
    }


def _round_kept(model: Decoder, plan: Plan, number: int) -> None:
    """Round kept weights to the type they are stored in, so that later blocks see that."""
    ranges = model_ranges(model)
    for item in plan.kept_of_file(number):
        data = ranges[item.name].data
        data.copy_(data.to(item.dtype))


def _report(work: _Work) -> dict[str, Any]:
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


def _repair_report(work: _Work, notes: list[dict[str, Any]]) -> dict[str, Any]:
    if work.config.repair.rule is Repair.cross_entropy:
        record: dict[str, Any] = json.loads((work.calibration / "repaired.json").read_text())
        return record
    return {str(layer): notes[layer]["repair"] for layer in work.moe_layers()}


def _evaluate(work: _Work, pruning: Pruning | None) -> dict[str, Any]:
    """Compare the model before and after on the same windows, in fp32, and with pruning too."""
    source, vocab_size = work.source, int(work.source.meta["vocab_size"])

    def score(stage: str, model: Decoder) -> Scores:
        return score_windows(
            model,
            source.data,
            sequence_length=source.config.data.sequence_length,
            tokens=work.config.text.tokens,
            progress=lambda done, total: work.progress(stage, done, total),
        )

    model = build_empty(source.config, vocab_size)
    give_memory(model, source.device)
    _fill(source.path, model_ranges(model))
    before = score("evaluate before", model)
    model = load_compressed(source.config, vocab_size, work.partial, work.plan, source.device)
    with count_choices(model) as asked:
        after = score("evaluate after", model)
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


def _finish(work: _Work, report: Mapping[str, Any]) -> Path:
    source, partial = work.source, work.partial
    meta = {key: source.meta[key] for key in ("step", "vocab_size", "tokenizer", "config")}
    replace_file(partial / "config.json", json.dumps({"meta": meta}, indent=1) + "\n")
    replace_file(partial / "report.json", json.dumps(report, indent=1) + "\n")
    shutil.copyfile(source.data.folder / "tokenizer.json", partial / "tokenizer.json")
    return finish_artefact(partial)


def _fill(path: Path, ranges: Mapping[str, Any]) -> None:
    """Read some tensors of a checkpoint whose names were checked as a whole."""
    others = tuple(name for name in read_meta(path)["tensors"] if name not in ranges)
    load(path, ranges, optional_prefixes=others)
