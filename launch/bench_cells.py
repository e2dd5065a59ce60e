"""The measuring process of `bench_layer.py`: every cell, every candidate, in interleaved rounds.

Read `bench_peers.py` first. Run as a module with a JSON specification and the file that takes one
JSON object per cell and candidate.

Shapes:  T tokens   D width   E experts   G, F see `bench_peers.py`
"""

import gc
import json
import math
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.launch.bench_peers import DENSE, OURS, Candidate, Cell, Weights, build
from gatewise.moe.config import Activation
from gatewise.parallel.runtime import return_freed_memory

__all__ = ["main", "skewed_inputs"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest relative difference from our output that is still the same function: in bf16 a router
# that rounds differently sends a few tokens elsewhere.
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.15}
_SLOW = 8.0  # times the dense layer: such a candidate is timed once
_MIN_ROUNDS = 3


def main(arguments: list[str]) -> int:
    """Measure all cells of the specification."""
    spec = json.loads(arguments[0])
    with Path(arguments[1]).open("a") as stream:
        for point in spec["points"]:
            for row in _measure(point, spec):
                stream.write(json.dumps(row) + "\n")
            stream.flush()
            gc.collect()
            return_freed_memory()  # cells of other sizes would pile up beside what is kept
    return 0


def skewed_inputs(cell: Cell, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Draw tokens and router weights such that the fullest expert has `skew` times the mean.

    All tokens share a direction along which the experts' router weights differ; how much of it
    they have is found by bisection. Without skew they have none.

    Returns:
        Tokens (T, D), router weights (E, D), and the load of the fullest expert over the mean.
    """
    x_TD = torch.randn(cell.tokens, cell.hidden, generator=generator)
    router_ED = torch.randn(cell.experts, cell.hidden, generator=generator) / cell.hidden**0.5
    logits_TE = x_TD @ router_ED.T
    if cell.skew <= 1:
        return x_TD, router_ED, _max_over_mean(logits_TE, cell)
    shared_D = torch.randn(cell.hidden, generator=generator)
    shared_D /= shared_D.norm()
    router_ED -= (router_ED @ shared_D).unsqueeze(1) * shared_D
    slope_E = torch.linspace(1, 0, cell.experts) ** 3
    router_ED += slope_E.unsqueeze(1) * shared_D
    x_TD -= (x_TD @ shared_D).unsqueeze(1) * shared_D
    logits_TE = x_TD @ router_ED.T
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        if _max_over_mean(logits_TE + middle * slope_E, cell) < cell.skew:
            low = middle
        else:
            high = middle
    x_TD += high * shared_D
    return x_TD, router_ED, _max_over_mean(x_TD @ router_ED.T, cell)


def _max_over_mean(logits_TE: Tensor, cell: Cell) -> float:
    expert_TK = logits_TE.topk(cell.top_k).indices
    count_E = torch.bincount(expert_TK.flatten(), minlength=cell.experts)
    return float(count_E.max() * cell.experts / count_E.sum())


def _measure(point: dict[str, Any], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one cell and return its rows."""
    cell = Cell(
        experts=point["experts"],
        top_k=point["top_k"],
        activation=Activation[point["activation"]],
        dtype=_DTYPES[point["dtype"]],
        threads=point["threads"],
        skew=point["skew"],
        tokens=spec["tokens"],
        hidden=spec["hidden"],
        expert_width=spec["expert_width"],
    )
    torch.set_num_threads(cell.threads)
    generator = torch.Generator().manual_seed(spec["seed"])
    x_TD, router_ED, max_over_mean = skewed_inputs(cell, generator)
    gated = cell.activation is Activation.swiglu
    inner = cell.expert_width * (2 if gated else 1)
    shape = (cell.experts, inner, cell.hidden)
    weights = Weights(
        router_ED,
        torch.randn(shape, generator=generator) / cell.hidden**0.5,
        torch.randn(cell.experts, cell.hidden, cell.expert_width, generator=generator)
        / cell.expert_width**0.5,
    )
    dy_TD = torch.randn(x_TD.shape, generator=generator).to(cell.dtype)
    trial = _Trial(x_TD.to(cell.dtype), dy_TD, weights, cell, spec["gradients"] == "none")
    for name in (DENSE, OURS, *spec["candidates"]):
        trial.admit(name)
    times = trial.run(spec["rounds"], spec["cell_seconds"])
    rows = []
    for name, problem in trial.problems.items():
        row = {
            **point,
            "candidate": name,
            "ms_median": None,
            "ratio_to_dense": None,
            "ratio_spread": None,
            "drops_tokens": trial.drops.get(name, False),
            "max_over_mean": round(max_over_mean, 3),
            "rounds": len(times.get(name, ())),
            "output_error": trial.errors.get(name),
            "problem": problem,
        }
        if times.get(name):
            ratios = sorted(ms / times[DENSE][at] for at, ms in times[name].items())
            row["ms_median"] = round(statistics.median(times[name].values()), 3)
            row["ratio_to_dense"] = round(statistics.median(ratios), 4)
            row["ratio_spread"] = round(_half_quartile_range(ratios), 4)
        rows.append(row)
    return rows


def _half_quartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


class _Trial:
    """The candidates of one cell, checked against ours and then timed in turns."""

    def __init__(
        self, x_TD: Tensor, dy_TD: Tensor, weights: Weights, cell: Cell, free_gradients: bool
    ) -> None:
        self._x_TD = x_TD
        self._dy_TD = dy_TD
        self._weights = weights
        self._cell = cell
        self._free_gradients = free_gradients
        self._ours_TD: Tensor | None = None
        self._candidates: dict[str, Candidate] = {}
        self._warm_ms: dict[str, float] = {}
        self.problems: dict[str, str | None] = {}
        self.errors: dict[str, float] = {}
        self.drops: dict[str, bool] = {}

    def admit(self, name: str) -> None:
        """Build a candidate, warm it up and compare its output with ours."""
        try:
            candidate = build(name, self._cell, self._weights)
            if candidate is None:
                return
            self.drops[name] = candidate.drops_tokens
            self.problems[name] = None
            self._warm_ms[name], y_TD = self._iterate(candidate)
        except Exception as error:  # a peer that does not run must not end the comparison
            traceback.print_exc()
            self.problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return
        self._candidates[name] = candidate
        if name == OURS:
            self._ours_TD = y_TD
        elif name != DENSE and self._ours_TD is not None:
            difference = float((y_TD - self._ours_TD).norm() / self._ours_TD.norm())
            self.errors[name] = round(difference, 9)
            dtype = "fp32" if self._cell.dtype == torch.float32 else "bf16"
            if not candidate.drops_tokens and not difference <= _TOLERANCE[dtype]:
                self.problems[name] = f"computes something else: differs by {difference:.2g}"

    def run(self, rounds: int, seconds: float) -> dict[str, dict[int, float]]:
        """Return milliseconds per candidate and round; slow candidates take part in one round."""
        times: dict[str, dict[int, float]] = {name: {} for name in self._candidates}
        names = list(self._candidates)
        end = time.monotonic() + seconds
        for at in range(rounds):
            if at >= _MIN_ROUNDS and time.monotonic() > end:
                break
            for name in names[at % len(names) :] + names[: at % len(names)]:
                slow = self._warm_ms[name] > _SLOW * self._warm_ms.get(DENSE, math.inf)
                if not (slow and at):
                    times[name][at] = self._iterate(self._candidates[name])[0]
        return times

    def _iterate(self, candidate: Candidate) -> tuple[float, Tensor]:
        """Return the milliseconds of one forward and backward pass, and the output."""
        for parameter in candidate.parameters:
            if self._free_gradients or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()
        x_TD = self._x_TD.clone().requires_grad_()
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        y_TD = candidate.forward(x_TD)
        y_TD.backward(self._dy_TD)
        seconds = time.perf_counter() - start
        gc.enable()
        return seconds * 1e3, y_TD.detach().float()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
