"""Give each expert its width: exact knapsacks over the costs, and the baselines.

Read first: `costs.py` (what a width costs), `knapsack.py` (the solver), `plan.py` (sizes).

PMQ's rules: in each block at least one expert has the widest and one the second widest of the
widths; every block has the same budget. Frequency, weight and random deal out the widths that
`pmq_release` chose for a block, so that only who gets what differs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gatewise.compression.config import Allocation, Budget, CompressConfig, Fisher, Granularity
from gatewise.compression.costs import CostKind, costs_of_layer
from gatewise.compression.formats import TERNARY, MatrixFormat
from gatewise.compression.knapsack import Infeasible, solve_knapsack
from gatewise.compression.plan import Part, Plan
from gatewise.compression.statistics import LayerStatistics
from gatewise.parallel.errors import ConfigError

__all__ = ["allocate", "check_budget", "cost_kind", "measured_parts"]

_KINDS = {
    Allocation.fisher_global: CostKind.fisher,
    Allocation.fisher_block: CostKind.fisher,
    Allocation.fnorm2_global: CostKind.fnorm2,
    Allocation.fnorm2: CostKind.fnorm2,
    Allocation.pmq_paper: CostKind.pmq_paper,
    Allocation.pmq_release: CostKind.pmq_release,
    Allocation.hessian: CostKind.hessian,
    Allocation.frequency: CostKind.pmq_release,
    Allocation.weight: CostKind.pmq_release,
    Allocation.random: CostKind.pmq_release,
}
_GLOBAL = (Allocation.fisher_global, Allocation.fnorm2_global)
_WIDTH_RULES = (
    Allocation.pmq_paper,
    Allocation.pmq_release,
    Allocation.hessian,
    Allocation.frequency,
    Allocation.weight,
    Allocation.random,
)


@dataclass(frozen=True, slots=True)
class _Item:
    """What gets one width: some parts of one layer, and what each width costs and takes."""

    layer: int
    parts: tuple[Part, ...]
    costs: tuple[float, ...]
    weights: tuple[int, ...]


def cost_kind(config: CompressConfig) -> CostKind | None:
    """Return the formula that the allocation needs, or None for `uniform`."""
    kind = _KINDS.get(config.allocation)
    if kind is CostKind.fisher and config.fisher is Fisher.diagonal:
        return CostKind.fisher_diagonal
    return kind


def measured_parts(config: CompressConfig) -> tuple[str, ...]:
    """Return which matrices of an expert are measured together."""
    return ("in", "out") if config.granularity is Granularity.projection else ("both",)


def check_budget(plan: Plan, config: CompressConfig) -> None:
    """Refuse a budget that the narrowest widths do not meet.

    Args:
        plan: without widths of experts.
        config: the budget and the widths.

    Raises:
        ConfigError: with the budgets that are possible.
    """
    experts = [part for part in plan.parts if part.kind == "expert"]
    if not experts:
        raise ConfigError(
            "checkpoint has no experts (model.num_experts is 0), so there is nothing to allocate; "
            "compress a Mixture-of-Experts model"
        )
    least, most = (
        _bits_of(plan, config, {part.name: width for part in experts})
        for width in (config.width_list()[0], config.width_list()[-1])
    )
    asked, shown = config.bits, 0.0
    if config.bytes is not None:
        asked, name, unit, shown = float(config.bytes), "bytes", "", math.ceil(least)
    else:
        asked, name, unit = config.bits, "bits", f" (budget={config.budget.name})"
        shown = math.ceil(least * 1000) / 1000  # so that the number shown works
    if asked < least - 1e-9:
        raise ConfigError(
            f"{name} is {asked:g}{unit}, but this model takes from {shown:.10g} (all experts at "
            f"{config.width_list()[0]:g}) to {most:.4g} ({config.width_list()[-1]:g}); raise "
            f"{name}, or lower widths or attention_bits"
        )


def allocate(
    plan: Plan, statistics: Sequence[LayerStatistics], config: CompressConfig
) -> dict[str, float]:
    """Choose the width of every expert's matrices.

    Args:
        plan: without widths of experts.
        statistics: of the layers with experts, ascending; may be empty for `uniform`.
        config: which allocation, its budget and widths.

    Returns:
        The width of each expert part by name.

    Raises:
        ConfigError: if the budget, or the rules within it, cannot be met.
    """
    check_budget(plan, config)
    experts = [part for part in plan.parts if part.kind == "expert"]
    budget = _budget(plan, config)
    if config.allocation is Allocation.uniform:
        return _uniform(experts, budget, config)
    items = [item for found in statistics for item in _items(plan, found, config)]
    if config.allocation in _GLOBAL:
        widths = _solve(items, budget, config, required=())
    else:
        widths = {}
        layers = sorted({item.layer for item in items})
        sizes = {
            layer: sum(p.shape.elements for p in plan.of_layer(layer, "expert")) for layer in layers
        }
        rules = config.allocation in _WIDTH_RULES and len(config.width_list()) > 1
        options = len(config.width_list())
        required = (options - 1, options - 2) if rules else ()
        for layer in layers:
            share = budget * sizes[layer] // sum(sizes.values())
            chosen = [item for item in items if item.layer == layer]
            widths |= _solve(chosen, share, config, required=required)
    if config.allocation in (Allocation.frequency, Allocation.weight, Allocation.random):
        widths = _deal(plan, statistics, widths, config)
    return widths


def _items(plan: Plan, found: LayerStatistics, config: CompressConfig) -> list[_Item]:
    kind = cost_kind(config)
    assert kind is not None
    widths = config.width_list()
    parts = plan.of_layer(found.layer, "expert")
    items = []
    for what in measured_parts(config):
        table = costs_of_layer(kind, found, widths, what=what, pmq=config.pmq)
        for expert, costs in enumerate(table):
            mine = tuple(
                part
                for part in parts
                if part.expert == expert and what in ("both", part.projection)
            )
            weights = tuple(sum(_weight(p.shape, w, config) for p in mine) for w in widths)
            items.append(_Item(found.layer, mine, tuple(costs), weights))
    if config.granularity is not Granularity.layer:
        return items
    return [
        _Item(
            found.layer,
            tuple(part for item in items for part in item.parts),
            tuple(sum(column) for column in zip(*(item.costs for item in items), strict=True)),
            tuple(sum(column) for column in zip(*(item.weights for item in items), strict=True)),
        )
    ]


def _solve(
    items: Sequence[_Item], budget: int, config: CompressConfig, *, required: tuple[int, ...]
) -> dict[str, float]:
    try:
        chosen = solve_knapsack(
            [item.costs for item in items],
            [item.weights for item in items],
            budget,
            required=required,
        )
    except Infeasible as error:
        layers = sorted({item.layer for item in items})
        where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        rule = " with one expert at each of the two widest widths" if required else ""
        raise ConfigError(
            f"bits is {config.bits:g}, but {where} cannot meet it{rule} ({error}); raise bits, or "
            "use an allocation without this rule, such as fisher_global"
        ) from error
    widths = config.width_list()
    return {
        part.name: widths[option]
        for item, option in zip(items, chosen, strict=True)
        for part in item.parts
    }


def _uniform(experts: Sequence[Part], budget: int, config: CompressConfig) -> dict[str, float]:
    fitting = [
        width
        for width in config.width_list()
        if sum(_weight(part.shape, width, config) for part in experts) <= budget
    ]
    return {part.name: fitting[-1] for part in experts}


def _deal(
    plan: Plan,
    statistics: Sequence[LayerStatistics],
    widths: dict[str, float],
    config: CompressConfig,
) -> dict[str, float]:
    """Give each layer's widths to its experts in another order: the widest to the first."""
    dealt: dict[str, float] = {}
    for found in statistics:
        experts = range(len(found.count))
        if config.allocation is Allocation.random:
            generator = np.random.Generator(np.random.PCG64([config.seed, found.layer]))
            order = [int(expert) for expert in generator.permutation(len(found.count))]
        elif config.allocation is Allocation.frequency:
            order = sorted(experts, key=lambda expert: (-found.count[expert], expert))
        else:
            order = sorted(experts, key=lambda expert: (-found.gate[expert], expert))
        parts = plan.of_layer(found.layer, "expert")
        by_expert = {
            expert: [part for part in parts if part.expert == expert] for expert in experts
        }
        pool = sorted((widths[by_expert[expert][0].name] for expert in experts), reverse=True)
        for expert, width in zip(order, pool, strict=True):
            dealt |= {part.name: width for part in by_expert[expert]}
    return dealt


def _weight(shape: MatrixFormat, width: float, config: CompressConfig) -> int:
    """Return what a matrix takes of the budget: bytes, or tenths of bits of its codes."""
    if config.bytes is not None or config.budget is Budget.metadata:
        return replace(shape, bits=width).bytes
    return shape.elements * round(10 * (1.6 if width == TERNARY else width))


def _budget(plan: Plan, config: CompressConfig) -> int:
    """Return the experts' budget in the units of `_weight`."""
    fixed = [part for part in plan.parts if part.kind != "expert"]
    experts = sum(part.shape.elements for part in plan.parts if part.kind == "expert")
    elements = experts + sum(part.shape.elements for part in fixed)
    taken = sum(_weight(part.shape, part.shape.bits, config) for part in fixed)
    if config.bytes is not None:
        narrow = plan.with_bits({part.name: 1.0 for part in plan.parts if part.kind == "expert"})
        kept = narrow.payload_bytes() - sum(part.shape.bytes for part in narrow.parts)
        return config.bytes - kept - taken
    if config.budget is Budget.experts:
        return math.floor(config.bits * 10 * experts + 1e-6)
    if config.budget is Budget.paper:
        return math.floor(config.bits * 10 * elements + 1e-6) - taken
    return math.floor(config.bits * elements / 8 + 1e-6) - taken


def _bits_of(plan: Plan, config: CompressConfig, widths: dict[str, float]) -> float:
    """Return what `bits` (or `bytes`) is for these widths of the experts."""
    filled = plan.with_bits(widths)
    if config.bytes is not None:
        return filled.payload_bytes()
    chosen = [
        part
        for part in filled.parts
        if part.kind == "expert" or config.budget is not Budget.experts
    ]
    total = sum(_weight(part.shape, part.shape.bits, config) for part in chosen)
    elements = sum(part.shape.elements for part in chosen)
    return total / elements * (8 if config.budget is Budget.metadata else 0.1)
