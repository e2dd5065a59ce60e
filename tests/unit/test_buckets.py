"""Buckets and the reducer on one rank: views, order, and what each pass leaves behind."""

import pytest
import torch
from torch import Tensor, nn

from gatewise.parallel.buckets import Bucket, make_buckets
from gatewise.parallel.collectives import NO_GROUP, Group, Traffic
from gatewise.parallel.dims import ExpertGroups, Groups, ReduceGroups
from gatewise.parallel.parameters import Label, Owner, ParameterSpec
from gatewise.parallel.reducer import GradientReducer, gradient_squares

ALONE = ReduceGroups(NO_GROUP, NO_GROUP)


def groups(shard: int = 1) -> Groups:
    """Describe the second of `shard` ranks, without any communication."""
    pieces = ReduceGroups(Group(None, min(1, shard - 1), shard, Traffic()), NO_GROUP)
    return Groups(NO_GROUP, ExpertGroups(NO_GROUP), pieces, ALONE, None)


def spec(name: str, value: Tensor, label: Label = "dense", *, decay: bool = True) -> ParameterSpec:
    parameter = nn.Parameter(value)
    owner: Owner = "expert" if label == "expert" else "all"
    return ParameterSpec(name, parameter, label, owner, decay, tuple(value.shape))


def three() -> list[ParameterSpec]:
    return [spec(name, torch.randn(2, 3)) for name in ("a", "b", "c")]


def names(bucket: Bucket) -> list[str]:
    return [slot.spec.name for slot in bucket.slots]


def test_parameters_become_views_with_their_values() -> None:
    mine = three()
    before = {s.name: s.parameter.detach().clone() for s in mine}
    (bucket,) = make_buckets(mine, groups())
    assert names(bucket) == ["c", "b", "a"]  # as the backward pass finishes them
    for slot in bucket.slots:
        assert torch.equal(slot.spec.parameter, before[slot.spec.name])
        assert slot.spec.parameter.is_leaf
        bucket.values[slot.offset] = 99.0
        assert slot.spec.parameter.detach().flatten()[0] == 99.0
        slot.gradient.fill_(3.0)
    assert (bucket.gradients == 3.0).all()


def test_kinds_do_not_share_a_bucket_and_full_buckets_are_closed() -> None:
    mine = [
        *three(),
        spec("gain", torch.ones(3), decay=False),
        spec("experts", torch.ones(2, 2, 2), "expert"),
        spec("small", torch.ones(4, dtype=torch.bfloat16)),
        *[spec(f"{name}2", torch.ones(2, 3)) for name in "abc"],
    ]
    buckets = make_buckets(mine, groups(), bucket_bytes=48)
    assert [names(bucket) for bucket in buckets] == [
        ["c2", "b2"],
        ["small"],
        ["experts"],
        ["gain"],
        ["a2", "c"],
        ["b", "a"],
    ]
    assert {slot.gradient.dtype for b in buckets for slot in b.slots} == {torch.float32}


def test_a_shard_owns_an_equal_slice_of_a_padded_bucket() -> None:
    (bucket,) = make_buckets(three(), groups(shard=4))
    assert bucket.values.numel() == 20
    assert bucket.owned == slice(5, 10)
    assert not bucket.values[18:].any()


def loss(mine: list[ParameterSpec], factor: float = 1.0) -> Tensor:
    return sum(((s.parameter * factor) ** 2).sum() for s in mine)  # type: ignore[return-value]


def test_gradients_of_several_passes_add_up_and_the_next_step_starts_anew() -> None:
    mine = three()
    (bucket,) = make_buckets(mine, groups())
    reducer = GradientReducer([bucket], ranks=1)
    bucket.gradients.fill_(float("nan"))  # the first gradient overwrites
    for _ in range(2):
        for last in (False, True):
            reducer.begin(reduce=last)
            loss(mine).backward()
        reducer.finish()
        torch.testing.assert_close(bucket.gradients, 2 * 2 * bucket.values)
        assert all(s.parameter.grad is None for s in mine)
        reducer.clear()


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    mine = three()
    (bucket,) = make_buckets(mine, groups())
    reducer = GradientReducer([bucket], ranks=1)
    bucket.gradients.fill_(float("nan"))
    reducer.begin(reduce=True)
    loss(mine[:2]).backward()
    reducer.finish()
    assert not reducer.slot(mine[2].parameter).gradient.any()
    assert torch.isfinite(bucket.gradients).all()


def test_a_gradient_written_twice_in_a_pass_is_an_error() -> None:
    mine = three()
    reducer = GradientReducer(make_buckets(mine, groups()), ranks=1)
    reducer.begin(reduce=False)
    reducer.written(mine[0].parameter)
    with pytest.raises(RuntimeError, match="gradient of a was written twice"):
        reducer.written(mine[0].parameter)
    reducer.begin(reduce=True)
    reducer.written(mine[0].parameter)


def test_bf16_gradients_are_collected_in_fp32() -> None:
    mine = [spec("a", torch.ones(4, dtype=torch.bfloat16))]
    (bucket,) = make_buckets(mine, groups())
    reducer = GradientReducer([bucket], ranks=1)
    for index in range(300):
        reducer.begin(reduce=index == 299)
        mine[0].parameter.sum().backward()
    reducer.finish()
    assert bucket.gradients.tolist() == [300.0] * 4  # bf16 alone would stop at 256


def test_squares_are_summed_by_label_and_owner() -> None:
    mine = [*three(), spec("experts", torch.ones(2, 2), "expert")]
    buckets = make_buckets(mine, groups(shard=2))
    for bucket in buckets:
        bucket.gradients.fill_(2.0)
    squares = gradient_squares(buckets)
    assert {label: float(value) for label, value in squares.items()} == {
        "dense": pytest.approx(9 * 4.0),  # the second half of 18
        "expert": pytest.approx(4 * 4.0),
    }
