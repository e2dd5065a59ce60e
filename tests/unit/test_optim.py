"""AdamW on buckets against torch's on plain parameters, and learning-rate schedules."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gatewise.parallel.buckets import Bucket, make_buckets
from gatewise.parallel.collectives import NO_GROUP
from gatewise.parallel.dims import ExpertGroups, Groups, ReduceGroups
from gatewise.parallel.parameters import Label, ParameterSpec
from gatewise.training.config import OptimConfig, Schedule
from gatewise.training.optim import ShardedAdamW, learning_rate

ALONE = ReduceGroups(NO_GROUP, NO_GROUP)
GROUPS = Groups(NO_GROUP, ExpertGroups(NO_GROUP), ALONE, ALONE, None)
KINDS: list[tuple[str, tuple[int, ...], Label, bool]] = [
    ("embedding", (7, 3), "embedding", False),
    ("norm", (3,), "dense", False),
    ("matrix", (3, 3), "dense", True),
    ("router", (4, 3), "router", True),
    ("experts", (4, 3, 2), "expert", True),
]


def specs(dtype: torch.dtype = torch.float32) -> list[ParameterSpec]:
    generator = torch.Generator().manual_seed(0)
    return [
        ParameterSpec(
            name,
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)),
            label,
            owner="expert" if label == "expert" else "all",
            decay=decay,
            shape=shape,
        )
        for name, shape, label, decay in KINDS
    ]


def fill(buckets: list[Bucket], step: int) -> dict[str, Tensor]:
    """Give every parameter a gradient; return them by name."""
    gradients = {}
    for slot in (slot for bucket in buckets for slot in bucket.slots):
        generator = torch.Generator().manual_seed(hash_name(slot.spec.name) + step)
        gradient = torch.randn(slot.gradient.shape, generator=generator)
        slot.gradient.copy_(gradient)
        gradients[slot.spec.name] = gradient
    return gradients


def hash_name(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 10**6


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_updates_are_those_of_torch_with_decay_and_rates_by_kind(scale: float) -> None:
    config = OptimConfig(weight_decay=0.2, router_lr_ratio=0.5, embedding_lr_ratio=3.0)
    mine = specs()
    plain = {spec.name: spec.parameter.detach().clone().requires_grad_() for spec in mine}
    ratio = {"router": 0.5, "embedding": 3.0}
    decayed = {"matrix", "router", "experts"}
    reference = torch.optim.AdamW(
        [
            {
                "params": [value],
                "lr": 0.01 * ratio.get(name, 1.0),
                "weight_decay": 0.2 if name in decayed else 0.0,
            }
            for name, value in plain.items()
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    buckets = make_buckets(mine, GROUPS, bucket_bytes=64)
    optimizer = ShardedAdamW(buckets, config)
    for step in range(5):
        for name, gradient in fill(buckets, step).items():
            plain[name].grad = gradient / scale
        optimizer.step(0.01, scale=scalar(scale), skip=scalar(0.0))
        reference.step()
    assert optimizer.updates == 5
    for spec in mine:
        torch.testing.assert_close(spec.parameter.detach(), plain[spec.name].detach())


def test_a_skipped_step_leaves_values_moments_and_count_alone() -> None:
    mine = specs()
    buckets = make_buckets(mine, GROUPS)
    optimizer = ShardedAdamW(buckets, OptimConfig())
    fill(buckets, 0)
    optimizer.step(0.01, scale=scalar(1.0), skip=scalar(0.0))
    before = [bucket.values.clone() for bucket in buckets]
    moments = [m.clone() for i in range(len(buckets)) for m in optimizer.moments(i)]
    for bucket in buckets:
        bucket.gradients.fill_(float("nan"))
    optimizer.step(0.01, scale=scalar(1.0), skip=scalar(1.0))
    assert optimizer.updates == 1
    assert all(torch.equal(a, b.values) for a, b in zip(before, buckets, strict=True))
    after = [m for i in range(len(buckets)) for m in optimizer.moments(i)]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_bf16_parameters_follow_fp32_masters() -> None:
    mine = specs(torch.bfloat16)
    buckets = make_buckets(mine, GROUPS)
    optimizer = ShardedAdamW(buckets, OptimConfig(weight_decay=0.0))
    start = mine[2].parameter.detach().float().clone()
    for step in range(20):
        fill(buckets, 0)
        optimizer.step(1e-4, scale=scalar(1.0), skip=scalar(0.0))
        assert optimizer.updates == step + 1
    for bucket, master in zip(buckets, optimizer.masters, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(bucket.values, master.bfloat16())
    # twenty steps of 1e-4 add up, though one alone is less than bf16 can see of a value near 1
    moved = (mine[2].parameter.detach().float() - start).abs()
    assert float(moved.max()) > 1e-3


def test_the_count_of_updates_can_be_restored() -> None:
    optimizer = ShardedAdamW(make_buckets(specs(), GROUPS), OptimConfig())
    optimizer.updates = 41
    assert optimizer.updates == 41


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimConfig(lr=1.0, lr_min_ratio=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warm_up_ends_at_the_peak_after_its_steps(schedule: Schedule) -> None:
    values = rates(100, schedule=schedule, warmup=10)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1.0
    assert max(values) == 1.0


def test_a_cosine_is_half_way_in_the_middle_and_ends_at_its_least() -> None:
    values = rates(111, schedule=Schedule.cosine, warmup=10)
    assert values[60] == pytest.approx(0.1 + 0.9 / 2)
    assert values[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(values[10:]))
    by_hand = [0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 100)) for step in range(10, 111)]
    assert values[10:] == pytest.approx(by_hand)


def test_warmup_stable_decay_falls_in_a_line_over_its_last_share() -> None:
    values = rates(100, schedule=Schedule.wsd, warmup=10, decay=0.2)
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([1 - 0.9 * (step + 1) / 20 for step in range(20)])


def test_a_constant_rate_stays() -> None:
    assert rates(50, schedule=Schedule.constant, warmup=0) == [1.0] * 50


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (5, 5), (5, 50)])
def test_short_runs_have_rates_above_zero(schedule: Schedule, steps: int, warmup: int) -> None:
    for value in rates(steps, schedule=schedule, warmup=warmup):
        assert 0 < value <= 1


class ApexLike(torch.optim.AdamW):
    """Apex's FusedAdam as far as its interface goes: steps counted in groups, no scale, no skip."""

    def __init__(self, groups: list[dict[str, object]], *, adam_w_mode: bool, **settings: object):
        assert adam_w_mode
        super().__init__(groups, **settings)  # type: ignore[arg-type]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            done = group.setdefault("step", 0)
            for parameter in group["params"]:
                self.state[parameter]["step"] = torch.tensor(float(done))
            group["step"] = done + 1
        super().step()


def test_the_optimizer_of_apex_gives_the_updates_of_torch() -> None:
    config = OptimConfig(weight_decay=0.2)
    parts = [make_buckets(specs(), GROUPS) for _ in range(2)]
    torchs = ShardedAdamW(parts[0], config)
    apexs = ShardedAdamW(parts[1], config, apex_adam=ApexLike)
    for step, skip in enumerate((0.0, 1.0, 0.0)):
        for buckets, optimizer in zip(parts, (torchs, apexs), strict=True):
            fill(buckets, step)
            optimizer.step(0.01, scale=scalar(4.0), skip=scalar(skip))
            if step == 1:  # as after a checkpoint was loaded
                optimizer.updates = optimizer.updates
    for mine, theirs in zip(parts[0], parts[1], strict=True):
        torch.testing.assert_close(mine.values, theirs.values)
    assert torchs.updates == apexs.updates == 2
