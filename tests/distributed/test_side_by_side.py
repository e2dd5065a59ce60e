"""Parts of a micro-batch side by side: what they compute is what they compute one by one."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import losses, make_text, run, tiny

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import apply_schedule, build_model
from gatewise.moe.side_by_side import forward_side_by_side
from gatewise.moe.stages import Schedule
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.recorder import Recorder
from gatewise.routers.api import RoutingContext
from gatewise.routers.presets import preset
from gatewise.training.schedule_config import ScheduleConfig
from ranks import run_ranks

pytestmark = pytest.mark.dist

SEQUENCES, LENGTH, VOCABULARY = 2, 9, 50


def decoder(rank: int, world: int, router: str, *, expert: int, shard: int) -> Decoder:
    """Return a small model in float64, spread over the ranks."""
    config = ParallelConfig(ranks=world, expert=expert, expert_shard=shard)
    model = build_model(
        ModelConfig(
            layers=3,
            hidden=16,
            heads=2,
            num_experts=4,
            top_k=2,
            expert_width=8,
            shared_experts=1,
            dense_layers=1,
            init_std=0.3,
        ),
        preset(router),
        vocab_size=VOCABULARY,
        group=make_groups(config).experts,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=1,
    ).double()
    execution = Execution(ThreadLanes(), Recorder())
    apply_schedule(model, Schedule.serial(is_sharded=shard > 1), execution)
    return model


def gradients(model: Decoder, outputs: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a loss that every state and router takes part in."""
    total = torch.zeros((), dtype=torch.float64)
    for output, token_BS in zip(outputs, batches, strict=True):
        weight_BSD = torch.linspace(-1, 1, token_BS.numel()).double().view(*token_BS.shape, 1)
        total = total + (output.hidden_BSD * weight_BSD).sum()
        for routing in output.routings:
            total = total + sum(routing.losses.values(), torch.zeros(()))
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _as_one_by_one(rank: int, world: int, router: str, expert: int, shard: int, parts: int) -> None:
    model = decoder(rank, world, router, expert=expert, shard=shard)
    generator = torch.Generator().manual_seed(7 + rank)
    shape = (SEQUENCES, LENGTH)
    batches = [torch.randint(VOCABULARY, shape, generator=generator) for _ in range(parts)]
    one_by_one = [model(token_BS, RoutingContext()) for token_BS in batches]
    wanted = gradients(model, one_by_one, batches)
    recorder = model.moe_layers()[0].execution.recorder
    assert recorder is not None
    recorder.clear()
    together = forward_side_by_side(model, batches, [RoutingContext() for _ in batches])
    for one, other in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(other.hidden_BSD, one.hidden_BSD, rtol=0, atol=1e-10)
        assert len(one.routings) == len(other.routings) == 2
    found = gradients(model, together, batches)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    _check_overlap(recorder)


def _check_overlap(recorder: Recorder) -> None:
    """The rows of one part are under way while others compute, in both passes."""
    line = recorder.drain()
    ran = {str(i.task): i for i in line.intervals}
    if "1.gather:0" in ran:  # lanes carry the rows, one task after another
        for lane in ("inter", "intra"):
            own = [i for i in line.intervals if i.lane == lane]
            assert all(one.end_ms <= other.start_ms for one, other in pairwise(own))
        return
    assert line.exposed_ms() < line.busy_ms("inter")
    assert ran["1.dispatch:0"].end_ms > ran["1.dispatch:1"].start_ms
    assert ran["1.collect:0"].end_ms > ran["1.experts:1"].start_ms
    assert ran["1.collect_grad:1"].end_ms > ran["1.collect_grad:0"].start_ms
    assert ran["1.dispatch_grad:1"].end_ms > ran["1.experts_data:0"].start_ms


@pytest.mark.parametrize(
    ("router", "expert", "shard", "parts"),
    [
        ("mixtral", 2, 1, 3),
        ("rmoe", 2, 1, 5),
        ("deepseek_v3", 1, 2, 4),
        ("qwen3", 1, 2, 3),
        ("rmoe", 2, 2, 6),
    ],
)
def test_states_and_all_gradients_are_those_of_one_after_the_other(
    router: str, expert: int, shard: int, parts: int
) -> None:
    run_ranks(_as_one_by_one, expert * shard, (router, expert, shard, parts))


def test_training_side_by_side_is_training_in_one_piece(tmp_path: Path) -> None:
    data = make_text(tmp_path)
    small = run(tiny(3, ranks=2, expert=2), data, tmp_path / "small")
    beside = ScheduleConfig(policy="whole_block", chunks_forward=4)
    wide = run(tiny(3, ranks=2, expert=2, schedule=beside), data, tmp_path / "wide")
    assert losses(wide) == pytest.approx(losses(small), rel=1e-6)
    tensors = small.tensors()
    for name, tensor in wide.tensors().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-6)
    assert all(ms > 0 for ms in wide.column("schedule/exposed_communication_ms"))
