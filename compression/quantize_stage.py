"""The stage that quantises: block after block, each on what the compressed ones before it give.

    .compressed.partial/model-*         a file per block, complete once it is there
    calibration/quantized_*.json        what there was to say of the block
                logits_*                what uncompressed routers chose (repair=topk_mse only)

Read first: `quantize_block.py`, `artefact.py`.
"""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from gatewise.compression.artefact import fill_model, replace_file, write_layer
from gatewise.compression.config import Repair
from gatewise.compression.plan import Plan, file_name
from gatewise.compression.quantize_block import make_quantiser, quantize_block
from gatewise.compression.repair_stage import keep_reference_logits, read_target
from gatewise.compression.work import Work
from gatewise.moe.model import Decoder
from gatewise.training.state import model_ranges

__all__ = ["quantize_blocks"]


def quantize_blocks(work: Work) -> None:
    """Write every block that is not there yet."""
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
            if layer + 1 < layers:
                stream.advance(block)
        work.progress("quantize", layer + 1, layers)


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
