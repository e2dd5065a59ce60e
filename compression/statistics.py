"""What one layer's experts cost at each width, and how they are used: the base of all allocations.

One pass over the calibration tokens that reached an expert measures, for each width, how far the
layer's output moves when only this expert (or one of its matrices) is quantised. Routing does not
depend on a layer's own experts, so `sum over its tokens of gate^2 |E(x) - E'(x)|^2` is exactly the
squared change of the layer's output; no other expert needs to run.

Read first: `observe.py`, `quantize.py`. The formulas of the costs are in `costs.py`.

Shapes:  E experts   R rows of one expert   D model width   F expert width   G rows of w_in
Source:  MC-MoE, arXiv:2410.06270, section 3.2 (frequency, weight, error).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.observe import (
    ExpertRows,
    Seen,
    blend,
    expert_rows,
    gram,
    inner_activations,
)
from gatewise.compression.quantize import Quantized
from gatewise.moe.experts import GroupedExperts

__all__ = [
    "ExpertHessians",
    "LayerStatistics",
    "Quantiser",
    "in_hessians",
    "measure_layer",
    "out_hessians",
    "usage",
]

# (weights of one shape, their Hessians, a width for each) -> codes
Quantiser = Callable[[Tensor, Tensor, Sequence[float]], list[Quantized]]
_CHOICES = {"both": (True, True), "in": (True, False), "out": (False, True)}


@dataclass(frozen=True, slots=True)
class ExpertHessians:
    """Hessians of one projection of all experts, and how much of each is not its own."""

    hessian_EKK: Tensor
    borrowed_E: tuple[float, ...]  # rho of `blend`: 1 for an expert without a token


@dataclass(slots=True)
class LayerStatistics:
    """Sums over the calibration tokens of one layer; lists have one value per expert.

    `squared`, `norms`, `fisher`, `diagonal` and `weight_error` are keyed by "<what>/<bits>", what
    being "both" (not of `weight_error`), "in" or "out".
    """

    layer: int
    tokens: int
    count: list[int]
    gate: list[float]  # sum of combine weights
    gate_squared: list[float]
    probability: list[float]  # sum of softmax probabilities where chosen, not renormalised
    margin: float  # mean gap between the last chosen and the first other logit; 0: not known
    borrowed: dict[str, list[float]] = field(default_factory=dict)  # rho by projection
    trace: dict[str, list[float]] = field(default_factory=dict)  # of Hessians by projection
    squared: dict[str, list[float]] = field(default_factory=dict)  # of the output's change
    norms: dict[str, list[float]] = field(default_factory=dict)  # the same, root of each batch
    fisher: dict[str, list[float]] = field(default_factory=dict)  # (gradient . change)^2 per token
    diagonal: dict[str, list[float]] = field(default_factory=dict)  # the same without cross terms
    weight_error: dict[str, list[float]] = field(default_factory=dict)  # squared, of the weights

    def to_json(self) -> str:
        """Return the statistics as text, exactly."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "LayerStatistics":
        """Read what `to_json` wrote."""
        record: dict[str, Any] = json.loads(text)
        return LayerStatistics(**record)


def usage(layer: int, seen: Seen, rows: Sequence[ExpertRows]) -> LayerStatistics:
    """Count how the experts of a layer are used."""
    assert seen.expert_TK is not None
    probability = [0.0] * len(rows)
    margin = 0.0
    if seen.logits_TE is not None:
        probability_TE = seen.logits_TE.double().softmax(-1)
        probability = [
            float(probability_TE[part.token_R, expert].sum()) for expert, part in enumerate(rows)
        ]
        top_k = seen.expert_TK.shape[1]
        if top_k < len(rows):
            sorted_TE = seen.logits_TE.double().sort(-1, descending=True).values
            margin = float((sorted_TE[:, top_k - 1] - sorted_TE[:, top_k]).mean())
    else:
        probability = [float(part.weight_R.sum()) for part in rows]
    return LayerStatistics(
        layer=layer,
        tokens=seen.x_TD.shape[0],
        count=[len(part.token_R) for part in rows],
        gate=[float(part.weight_R.sum()) for part in rows],
        gate_squared=[float(part.weight_R.square().sum()) for part in rows],
        probability=probability,
        margin=margin,
    )


def in_hessians(seen: Seen, rows: Sequence[ExpertRows]) -> ExpertHessians:
    """Return the Hessians of the experts' first matrices."""
    prior_DD = gram(seen.x_TD)
    hessians, borrowed = [], []
    for part in rows:
        count = len(part.token_R)
        own_DD = gram(seen.x_TD[part.token_R])
        hessian_DD, rho = blend(own_DD, count, prior_DD, seen.x_TD.shape[0])
        hessians.append(hessian_DD)
        borrowed.append(rho)
    return ExpertHessians(torch.stack(hessians), tuple(borrowed))


def out_hessians(seen: Seen, rows: Sequence[ExpertRows], experts: GroupedExperts) -> ExpertHessians:
    """Return the Hessians of the experts' second matrices, with the first as they are now.

    The other inputs that a little-used expert borrows from are its own inner activations on evenly
    spaced tokens of the others.
    """
    hessians, borrowed = [], []
    for expert, part in enumerate(rows):
        w_in_GD = experts.w_in_eGD[expert].detach()
        own_RF = inner_activations(seen.x_TD[part.token_R], w_in_GD, experts.activation)
        wanted = min(4 * own_RF.shape[1], seen.x_TD.shape[0])
        spaced_R = torch.linspace(0, seen.x_TD.shape[0] - 1, wanted).long().to(part.token_R.device)
        other_RF = inner_activations(seen.x_TD[spaced_R], w_in_GD, experts.activation)
        hessian_FF, rho = blend(gram(own_RF), len(part.token_R), gram(other_RF), wanted)
        hessians.append(hessian_FF)
        borrowed.append(rho)
    return ExpertHessians(torch.stack(hessians), tuple(borrowed))


@torch.no_grad()
def measure_layer(
    layer: int,
    seen: Seen,
    experts: GroupedExperts,
    *,
    widths: Sequence[float],
    what: Sequence[str],
    quantiser: Quantiser,
    gradient_TD: Tensor | None = None,
) -> LayerStatistics:
    """Measure what each width costs each expert.

    Args:
        layer: index, kept in the result.
        seen: inputs and routing of the layer with its weights as they are.
        experts: not changed.
        widths: to measure.
        what: which matrices are quantised together: some of "both", "in", "out".
        quantiser: the one that will be used, or a quicker one.
        gradient_TD: of the loss by the layer's output; None leaves `fisher` and `diagonal` empty.
    """
    rows = expert_rows(seen, experts.num_local)
    found = usage(layer, seen, rows)
    hessians_in, hessians_out = in_hessians(seen, rows), out_hessians(seen, rows, experts)
    for name, hessians in (("in", hessians_in), ("out", hessians_out)):
        found.borrowed[name] = list(hessians.borrowed_E)
        found.trace[name] = [float(matrix.trace()) for matrix in hessians.hessian_EKK]
    w_in_eGD, w_out_eDF = experts.w_in_eGD.detach(), experts.w_out_eDF.detach()
    exact = [
        _output(seen, part, w_in_GD, w_out_DF, experts)
        for part, w_in_GD, w_out_DF in zip(rows, w_in_eGD, w_out_eDF, strict=True)
    ]
    for width in widths:
        same = [width] * experts.num_local
        new_in = [q.dequantise() for q in quantiser(w_in_eGD, hessians_in.hessian_EKK, same)]
        new_out = [q.dequantise() for q in quantiser(w_out_eDF, hessians_out.hessian_EKK, same)]
        for name, old, new in (("in", w_in_eGD, new_in), ("out", w_out_eDF, new_out)):
            found.weight_error[f"{name}/{width:g}"] = [
                float((before_NK - after_NK).double().square().sum())
                for before_NK, after_NK in zip(old, new, strict=True)
            ]
        for name in what:
            key = f"{name}/{width:g}"
            found.squared[key], found.norms[key] = [], []
            if gradient_TD is not None:
                found.fisher[key], found.diagonal[key] = [], []
            for expert, part in enumerate(rows):
                use_in, use_out = _CHOICES[name]
                w_in_GD = new_in[expert] if use_in else w_in_eGD[expert]
                w_out_DF = new_out[expert] if use_out else w_out_eDF[expert]
                moved_RD = exact[expert] - _output(seen, part, w_in_GD, w_out_DF, experts)
                step_RD = moved_RD.double() * part.weight_R.unsqueeze(1)
                square_RD = step_RD.square()
                found.squared[key].append(float(square_RD.sum()))
                found.norms[key].append(_sum_of_norms(square_RD.sum(1), part, seen.batch_ends))
                if gradient_TD is not None:
                    gradient_RD = gradient_TD[part.token_R].double()
                    found.fisher[key].append(float((gradient_RD * step_RD).sum(1).square().sum()))
                    diagonal = (gradient_RD.square() * square_RD).sum()
                    found.diagonal[key].append(float(diagonal))
    return found


def _output(
    seen: Seen, part: ExpertRows, w_in_GD: Tensor, w_out_DF: Tensor, experts: GroupedExperts
) -> Tensor:
    inner_RF = inner_activations(seen.x_TD[part.token_R], w_in_GD, experts.activation)
    return inner_RF @ w_out_DF.t()


def _sum_of_norms(square_R: Tensor, part: ExpertRows, batch_ends: Sequence[int]) -> float:
    """Return the sum over batches of the root of the batch's squared change."""
    ends_B = torch.tensor(batch_ends, device=square_R.device)
    batch_R = torch.searchsorted(ends_B, part.token_R, right=True)
    total_B = torch.zeros(len(batch_ends), dtype=torch.float64, device=square_R.device)
    return float(total_B.index_add_(0, batch_R, square_R).sqrt().sum())
