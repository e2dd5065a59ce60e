"""From statistics to the cost of each expert at each width.

| costs | formula | compared |
|---|---|---|
| fisher | sum over tokens of (gradient . change of the layer's output)^2 | over all layers |
| fisher_diagonal | the same without cross terms of channels | over all layers |
| fnorm2 | squared change of the layer's output | within a layer, or over all |
| pmq_paper | frequency^1 * weight^1 * change^2 | within a layer |
| pmq_release | frequency^1 * weight^1.5 * change^1, the first two as shares | within a layer |
| hessian | trace of the Hessian times squared error, summed over both matrices | within a layer |

An expert without a token costs nothing by any of them. A wider code never costs more: where the
measured cost rises, the least cost of the narrower widths stands.

Source:  MC-MoE, arXiv:2410.06270, section 3.2; the release's exponents were found from its plans.
         fisher_diagonal: GEMQ. It takes the channels of a change as independent, which those of
         one-bit codes are not: there it was 2 to 4 times below `fisher`, and `fisher` nearer to
         the loss.
"""

from collections.abc import Sequence
from enum import Enum

from gatewise.compression.config import PmqConfig
from gatewise.compression.statistics import LayerStatistics

__all__ = ["FISHER_KINDS", "CostKind", "costs_of_layer"]


class CostKind(Enum):
    """A formula of the table above."""

    fisher = "fisher"
    fisher_diagonal = "fisher_diagonal"
    fnorm2 = "fnorm2"
    pmq_paper = "pmq_paper"
    pmq_release = "pmq_release"
    hessian = "hessian"


FISHER_KINDS = (CostKind.fisher, CostKind.fisher_diagonal)
_EXPONENTS = {CostKind.pmq_paper: (1.0, 1.0, 2.0), CostKind.pmq_release: (1.0, 1.5, 1.0)}


def costs_of_layer(
    kind: CostKind,
    statistics: LayerStatistics,
    widths: Sequence[float],
    *,
    what: str = "both",
    pmq: PmqConfig | None = None,
) -> list[list[float]]:
    """Return the cost of each expert at each width, ascending.

    Args:
        kind: formula.
        statistics: of the layer.
        widths: that were measured.
        what: which matrices are quantised together: "both", "in" or "out".
        pmq: exponents other than the formula's.
    """
    columns = [_column(kind, statistics, f"{what}/{width:g}", pmq) for width in widths]
    rows = [list(row) for row in zip(*columns, strict=True)]
    for row in rows:
        for place in range(1, len(row)):
            row[place] = min(row[place], row[place - 1])
    return rows


def _column(kind: CostKind, found: LayerStatistics, key: str, pmq: PmqConfig | None) -> list[float]:
    if kind is CostKind.fisher:
        return found.fisher[key]
    if kind is CostKind.fisher_diagonal:
        return found.diagonal[key]
    if kind is CostKind.fnorm2:
        return found.squared[key]
    if kind is CostKind.hessian:
        what, _, width = key.partition("/")
        names = ("in", "out") if what == "both" else (what,)
        return [
            sum(
                found.trace[name][expert] * found.weight_error[f"{name}/{width}"][expert]
                for name in names
            )
            if count
            else 0.0
            for expert, count in enumerate(found.count)
        ]
    alpha, beta, gamma = _EXPONENTS[kind]
    if pmq is not None:
        alpha = alpha if pmq.alpha is None else pmq.alpha
        beta = beta if pmq.beta is None else pmq.beta
        gamma = gamma if pmq.gamma is None else pmq.gamma
    if kind is CostKind.pmq_release:
        frequency = _shares([float(count) for count in found.count])
        weight, change = _shares(found.probability), found.norms[key]
    else:
        frequency = [count / max(found.tokens, 1) for count in found.count]
        weight = [gate / max(found.tokens, 1) for gate in found.gate]
        change = [square**0.5 for square in found.squared[key]]
    return [
        phi**alpha * w**beta * error**gamma if phi > 0 else 0.0
        for phi, w, error in zip(frequency, weight, change, strict=True)
    ]


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total > 0 else 0.0 for value in values]
