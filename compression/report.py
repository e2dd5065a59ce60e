"""The numbers of `report.json`: bits in four ways, bytes, coverage, losses of matrices.

| bits | what is counted |
|---|---|
| experts | codes over the routed experts: their mean width |
| paper | codes over all quantised weights, as MC-MoE's paper counts (no scales, no embedding) |
| with_metadata | codes, scales and zeros over all quantised weights |
| all_parameters | every byte of the tensors over every parameter |

`activated_bytes_per_token` is what one token reads on average: everything but experts once, and the
experts that its routing chose, each with its own width.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gatewise.compression.artefact import header_bytes
from gatewise.compression.config import CompressConfig
from gatewise.compression.formats import stored_bits
from gatewise.compression.plan import Part, Plan, file_entries, file_name
from gatewise.compression.pruning import Pruning
from gatewise.compression.statistics import LayerStatistics
from gatewise.compression.thresholds import LayerThresholds

__all__ = [
    "activated_bytes",
    "bits_report",
    "bytes_report",
    "coverage_report",
    "coverage_target",
    "losses_report",
    "prune_report",
    "settings_report",
    "widths_report",
]


def bits_report(plan: Plan, used: Sequence[LayerStatistics]) -> dict[str, float]:
    """Return the bits in all ways, and the activated bytes of a token.

    Args:
        plan: with all widths.
        used: how the compressed model's routers spread the calibration tokens.
    """
    experts = [part for part in plan.parts if part.kind == "expert"]
    elements = sum(part.shape.elements for part in plan.parts)
    kept = [_numel(item.shape) for item in plan.kept]
    metadata = sum(part.shape.bytes for part in plan.parts)
    return {
        "experts": _mean_bits(experts),
        "paper": _mean_bits(plan.parts),
        "with_metadata": 8 * metadata / elements,
        "all_parameters": 8 * plan.payload_bytes() / (elements + sum(kept)),
        "activated_bytes_per_token": activated_bytes(plan, used),
    }


def activated_bytes(plan: Plan, used: Sequence[LayerStatistics]) -> float:
    """Return the bytes that one token reads on average, by how often each expert is used."""
    experts = sum(part.shape.bytes for part in plan.parts if part.kind == "expert")
    return plan.payload_bytes() - experts + _expert_bytes(plan, used)


def bytes_report(plan: Plan, folder: Path | None = None) -> dict[str, int]:
    """Return the computed bytes, and those on the disk where a folder is given."""
    entries = [file_entries(plan, number) for number in range(plan.layers + 1)]
    headers = sum(len(header_bytes(part)) for part in entries)
    experts = [part for part in plan.parts if part.kind == "expert"]
    record = {
        "experts": sum(part.shape.bytes for part in experts),
        "experts_bf16": 2 * sum(part.shape.elements for part in experts),
        "payload": plan.payload_bytes(),
        "headers": headers,
        "computed": plan.payload_bytes() + headers,
    }
    if folder is not None:
        files = [folder / file_name(number) for number in range(plan.layers + 1)]
        record["on_disk"] = sum(file.stat().st_size for file in files)
    return record


def coverage_target(columns: int, tokens: int) -> int:
    """Return how many tokens an expert should see, by its matrices' columns and all tokens."""
    return max(min(4 * columns, 4096), tokens // 200)


def coverage_report(used: Sequence[LayerStatistics], plan: Plan) -> list[dict[str, Any]]:
    """Return per layer how many tokens its experts saw, and which of them borrowed how much."""
    rows = []
    for found in used:
        columns = plan.of_layer(found.layer, "expert")[0].shape.columns
        target = coverage_target(columns, found.tokens)
        rows.append(
            {
                "layer": found.layer,
                "tokens": found.tokens,
                "target": target,
                "tokens_per_expert": found.count,
                "below_target": [e for e, count in enumerate(found.count) if count < target],
                "without_a_token": [e for e, count in enumerate(found.count) if count == 0],
                "borrowed": found.borrowed,
                "margin": found.margin,
                "gate": found.gate,
            }
        )
    return rows


def settings_report(config: CompressConfig) -> dict[str, Any]:
    """Return the settings that shape the result, as JSON."""
    record = asdict(config)
    del record["run"], record["checkpoint"]

    def plain(value: Any) -> Any:  # a setting: a scalar, an Enum or a section
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return getattr(value, "name", value)

    settings: dict[str, Any] = plain(record)
    return settings


def widths_report(plan: Plan) -> dict[str, Any]:
    """Return how many matrices of experts have each width, in all and per layer."""
    experts = [part for part in plan.parts if part.kind == "expert"]
    layers = sorted({part.layer for part in experts})
    return {
        "all": _histogram(experts),
        "mean_by_layer": {
            str(layer): _mean_bits(plan.of_layer(layer, "expert")) for layer in layers
        },
        "by_layer": {
            str(layer): [part.shape.bits for part in plan.of_layer(layer, "expert")]
            for layer in layers
        },
    }


def prune_report(
    pruning: Pruning,
    found: Sequence[LayerThresholds],
    used: Sequence[LayerStatistics],
    counts: Mapping[int, Sequence[int]],
    plan: Plan,
) -> dict[str, Any]:
    """Return what dynamic pruning leaves of the calibration tokens' activations.

    Args:
        pruning: the rule.
        found: of the layers, without pruning.
        used: how the routers spread the same tokens without pruning.
        counts: tokens of each expert by layer, with pruning.
        plan: with all widths.
    """
    pairs = {layer.layer: layer.pairs for layer in found}
    kept = {layer: sum(count) for layer, count in counts.items()}
    left = [replace(item, count=list(counts[item.layer])) for item in used]
    return {
        "rule": pruning.rule.name,
        "protect": pruning.protect.name,
        "kept_activations": sum(kept.values()) / max(sum(pairs.values()), 1),
        "kept_by_layer": {str(layer): kept[layer] / max(pairs[layer], 1) for layer in kept},
        "activated_bytes_per_token": activated_bytes(plan, left),
        "activated_bytes_of_experts_per_token": _expert_bytes(plan, left),
        "activated_bytes_of_experts_before": _expert_bytes(plan, used),
        "layers": [
            {"layer": rule.layer, "ratio": list(rule.ratio[1:]), "saliency": rule.saliency}
            for rule in pruning.layers
        ],
    }


def losses_report(losses: Mapping[str, float]) -> dict[str, float]:
    """Summarise the relative squared output errors of all matrices."""
    values = sorted(losses.values())
    if not values:
        return {}
    return {"median": statistics.median(values), "largest": values[-1]}


def _histogram(parts: Sequence[Part]) -> dict[str, int]:
    counts = Counter(part.shape.bits for part in parts)
    return {f"{width:g}": counts[width] for width in sorted(counts)}


def _mean_bits(parts: Sequence[Part]) -> float:
    total = sum(part.shape.elements * stored_bits(part.shape.bits) for part in parts)
    return total / max(sum(part.shape.elements for part in parts), 1)


def _expert_bytes(plan: Plan, used: Sequence[LayerStatistics]) -> float:
    total = 0.0
    for found in used:
        for part in plan.of_layer(found.layer, "expert"):
            assert part.expert is not None
            total += part.shape.bytes * found.count[part.expert] / found.tokens
    return total


def _numel(shape: Sequence[int]) -> int:
    size = 1
    for width in shape:
        size *= width
    return size
