"""Measure what a run's layers cost, on the run's own ranks, groups, lanes and experts.

Read `parallel/schedule/profiler.py` and `probes.py` first. All ranks measure at once, between two
steps, so every operation has the neighbours that it has in training. What is measured are the sizes
that the run's layers have, and parts of them. Times are the host's, so ranks must be on CPUs.

Shapes:  R rows of this rank's experts   e experts of this rank   D width
         F, G see `moe/ops/grouped_ffn.py`
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gatewise.moe.experts import GroupedExperts
from gatewise.moe.model import Block, Decoder
from gatewise.moe.ops.grouped_ffn import ffn_backward_data, ffn_backward_weights, ffn_forward
from gatewise.parallel.collectives import Group, RowExchange
from gatewise.parallel.runtime import Runtime
from gatewise.parallel.schedule.cost import Cost, Interference
from gatewise.parallel.schedule.executor import Lanes
from gatewise.parallel.schedule.plan import Lane
from gatewise.parallel.schedule.probes import collective_probes, compute_probes, drop, sweep
from gatewise.parallel.schedule.profiler import Meter, Probe, Run
from gatewise.parallel.schedule.profiles import OPERATIONS, OPTIONAL, Profile
from gatewise.training.config import TrainConfig
from gatewise.training.schedule import layer_problem, run_layout

__all__ = ["measure_costs"]


def measure_costs(
    model: Decoder,
    config: TrainConfig,
    runtime: Runtime,
    lanes: Lanes,
    *,
    dtype: torch.dtype,
    source: str,
) -> Profile:
    """Return the costs of this run's layout; every rank must call it, and gets the same.

    Args:
        model: of this rank.
        config: its settings.
        runtime: of this rank, on a CPU.
        lanes: those of the layers.
        dtype: of the experts' arithmetic.
        source: what the profile shall say about its making.
    """
    layout, groups = run_layout(config), runtime.groups
    unknown = Profile(layout, dict.fromkeys(OPERATIONS, Cost(0.0, 0.0)), Interference.none())
    problem = layer_problem(config, unknown, dtype.itemsize)
    work = problem.work
    size = {name: amount.size for name, amount in {**work.forward, **work.backward}.items()}
    probes = collective_probes(
        groups.experts.rows,
        groups.experts.shard,
        groups.dense.replicate if groups.dense.replicate.handle is not None else groups.control,
        width=config.model.hidden,
        largest={
            "all_to_all": size["dispatch"],
            "all_gather": size.get("gather", 1.0),
            "reduce_scatter": size.get("scatter", 1.0),
            "all_reduce": max(work.reduce.size, size["dispatch"]),
        },
    )
    probes |= compute_probes(
        width=config.model.hidden,
        largest={"attention": size["attention_grad"], "memory": size["order"]},
    )
    if groups.tensor.size == 1:  # else each rank has a part of the heads, which nothing runs alone
        own = work.forward["attention"].size / problem.sequences
        probes["attention"] = _attention_probe(
            model, size["attention_grad"], own, length=config.data.sequence_length, dtype=dtype
        )
    experts = model.moe_layers()[0].experts
    probes |= _expert_probes(experts, size["experts"], dtype)
    meter = Meter(groups.control, lanes)
    costs = {name: meter.cost(probe) for name, probe in probes.items()}
    if groups.experts.rows.handle is not None:
        issue_ms = meter.cost(_issue_probe(groups.experts.rows)).ms(1.0)
        costs["memory"] = _later(costs["memory"], issue_ms)
    matrices = 1 + experts.matrices_in
    costs |= {name: costs[name].scaled(1 / matrices) for name in ("experts", *OPTIONAL)}
    stand_in: dict[Lane, str] = {"compute": "experts"}
    if groups.experts.rows.handle is not None:
        stand_in["inter"] = "all_to_all"
    if groups.experts.shard.handle is not None:
        stand_in["intra"] = "all_gather"
    interference = meter.interference({lane: _quarter(probes[n]) for lane, n in stand_in.items()})
    return Profile(layout, costs, interference, source)


def _issue_probe(group: Group) -> Probe:
    """Return the probe of an exchange of a row with each rank, led by the computing thread.

    Every piece of a layer costs the host that much with each exchange, however few its rows.
    """
    rows = [1] * group.size

    def run() -> None:
        drop(RowExchange(torch.zeros(group.size, 1), rows, rows, group).wait())

    return Probe("compute", (1.0,), lambda _size: (1.0, run))


def _later(cost: Cost, ms: float) -> Cost:
    """Return a cost with a longer start."""
    return replace(
        cost, alpha_ms=cost.alpha_ms + ms, small_alpha_ms=cost.small_alpha_ms + ms * bool(cost.knee)
    )


def _quarter(probe: Probe) -> Probe:
    """Return a probe of the size that chunks have."""
    return Probe(probe.lane, (max(probe.sizes) / 4,), probe.prepare)


def _attention_probe(
    model: Decoder, largest: float, own: float, *, length: int, dtype: torch.dtype
) -> Probe:
    """Return the probe of a block's attention with its norms, as the host runs it.

    Its start includes what the host needs to issue it, which is what small parts pay for.

    Args:
        model: whose first block is measured.
        largest: most multiply-adds.
        own: multiply-adds of one sequence.
        length: S, of a sequence.
        dtype: of the arithmetic.
    """
    block = next(module for module in model.modules() if isinstance(module, Block))
    device = model.embedding.device
    rotary = model.rotary(length, device=device)

    def prepare(size: float) -> tuple[float, Run]:
        count = max(1, round(size / own))
        x_BSD = torch.randn(count, length, model.config.hidden, dtype=dtype, device=device)

        @torch.no_grad()
        def run() -> None:
            y_BSD = block.attention(block.norm_attention(x_BSD), rotary, block.layer, None)
            drop(block.norm_feed_forward(x_BSD + y_BSD))

        return count * own, run

    return Probe("compute", sweep(largest), prepare)


def _expert_probes(experts: GroupedExperts, largest: float, dtype: torch.dtype) -> dict[str, Probe]:
    """Return the probes of the experts' three parts; sizes are of one product, times of all."""
    w_in_eGD, w_out_eDF = (
        weight.detach().to(dtype) for weight in (experts.w_in_eGD, experts.w_out_eDF)
    )
    local, hidden, inner = w_out_eDF.shape
    weights, activation = (w_in_eGD, w_out_eDF), experts.activation

    def probe(part: Callable[[Tensor, Tensor, list[int]], Run]) -> Probe:
        def prepare(size: float) -> tuple[float, Run]:
            each = [max(1, round(size / (hidden * inner * local)))] * local
            end_e = torch.tensor(each).cumsum(0).int()
            x_RD = torch.randn(sum(each), hidden).to(dtype)
            return float(sum(each) * hidden * inner), part(x_RD, end_e, each)

        return Probe("compute", sweep(largest), prepare)

    def forward(x_RD: Tensor, end_e: Tensor, each: list[int]) -> Run:
        return lambda: drop(ffn_forward(x_RD, end_e, *weights, activation, count_list=each)[0])

    def data(x_RD: Tensor, end_e: Tensor, each: list[int]) -> Run:
        _, kept = ffn_forward(x_RD, end_e, *weights, activation, count_list=each)

        def run() -> None:
            ffn_backward_data(x_RD, end_e, *weights, activation, kept, count_list=each)

        return run

    def backward(x_RD: Tensor, end_e: Tensor, each: list[int]) -> Run:
        _, kept = ffn_forward(x_RD, end_e, *weights, activation, count_list=each)
        _, work = ffn_backward_data(x_RD, end_e, *weights, activation, kept, count_list=each)
        gradients = [torch.zeros_like(weight) for weight in weights]

        def run() -> None:
            ffn_backward_weights(
                x_RD,
                x_RD,
                end_e,
                *weights,
                work,
                dw_in_eGD=gradients[0],
                dw_out_eDF=gradients[1],
                accumulate=True,
                count_list=each,
            )

        return run

    return {
        "experts": probe(forward),
        "experts_data": probe(data),
        "experts_weights": probe(backward),
    }
