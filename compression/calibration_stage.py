"""The stages before any weight changes: choose the calibration sequences, measure the costs.

    calibration/sequences.json      which training sequences calibrate
                gradients_*         gradients of each batch, while fisher costs need them
                layer_*.json        statistics and costs of the layers with experts

Costs are measured on the uncompressed model, because a budget over all layers must know them all
before the first layer is quantised.

Read first: `work.py`, `statistics.py`.
"""

import json

from torch import Tensor

from gatewise.compression.allocate import cost_kind, measured_parts
from gatewise.compression.artefact import replace_file
from gatewise.compression.config import Method, Perturbation
from gatewise.compression.costs import FISHER_KINDS
from gatewise.compression.cover import choose_sequences, count_by_sequence
from gatewise.compression.gradients import measure_gradients, read_gradients
from gatewise.compression.observe import see_feed_forward
from gatewise.compression.quantize_block import make_quantiser
from gatewise.compression.report import coverage_target
from gatewise.compression.statistics import LayerStatistics, measure_layer
from gatewise.compression.work import Work
from gatewise.moe.layer import MoELayer
from gatewise.parallel.errors import DataError
from gatewise.training.blend import training_order
from gatewise.training.data import Order, read_batch

__all__ = ["calibration_batches", "measure_costs", "sequence_order"]


def sequence_order(work: Work) -> Order:
    """Return the order of the training sequences, once there are enough for the settings.

    Raises:
        DataError: if there are not.
    """
    config, length = work.config.calibration, work.source.config.data.sequence_length
    data = work.source.data
    order = training_order(data.blend, len(data.train), length, config.seed)
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


def calibration_batches(work: Work, order: Order) -> list[Tensor]:
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


def measure_costs(work: Work) -> list[LayerStatistics]:
    """Measure the costs of all layers on the uncompressed model."""
    kind = cost_kind(work.config)
    if kind is None:
        return []
    files = {layer: work.calibration / f"layer_{layer:03d}.json" for layer in work.moe_layers()}
    if not all(file.exists() for file in files.values()):
        if kind in FISHER_KINDS:
            measure_gradients(
                work.load_before(),
                work.batches,
                work.calibration,
                progress=lambda done: work.progress("gradients", done, len(work.batches)),
            )
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
                if layer + 1 < work.plan.layers:
                    stream.advance(block)
            work.progress("cost", layer + 1, work.plan.layers)
        for left in work.calibration.glob("gradients_*"):
            left.unlink()
    return [LayerStatistics.from_json(file.read_text()) for file in files.values()]
