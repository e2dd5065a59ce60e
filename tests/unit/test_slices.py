"""Slices of gradient sums: every gradient is sent once, in its turn, in the window or beside it."""

import pytest
import torch
from torch import nn

from gatewise.parallel.buckets import Bucket, make_buckets
from gatewise.parallel.collectives import NO_GROUP, Group, Traffic
from gatewise.parallel.dims import ExpertGroups, Groups, ReduceGroups
from gatewise.parallel.parameters import ParameterSpec
from gatewise.parallel.slices import held_buckets, leftover_ranges, plan_turns

ROWS = 128  # 128 x 128 numbers of 4 bytes are 64 KiB
BYTES = ROWS * ROWS * 4


def buckets(shard: int = 1) -> list[Bucket]:
    """Return the buckets of an embedding and three blocks with a matrix, a gain and an expert."""
    replicate = Group(None, 0, 2, Traffic())
    dense = ReduceGroups(Group(None, 0, shard, Traffic()) if shard > 1 else NO_GROUP, replicate)
    alone = ReduceGroups(NO_GROUP, NO_GROUP)
    groups = Groups(NO_GROUP, ExpertGroups(NO_GROUP), dense, alone, None, 2)
    specs = [spec("embedding", "embedding", (ROWS, ROWS))]
    for block in range(3):
        specs.append(spec(f"blocks.{block}.w", "dense", (ROWS, ROWS)))
        specs.append(spec(f"blocks.{block}.gain", "dense", (8,)))
        specs.append(spec(f"blocks.{block}.expert", "expert", (ROWS, ROWS)))
    return make_buckets(specs, groups)


def spec(name: str, label: str, shape: tuple[int, ...]) -> ParameterSpec:
    parameter = nn.Parameter(torch.zeros(shape))
    owner = "expert" if label == "expert" else "all"
    return ParameterSpec(name, parameter, label, owner, len(shape) > 1, shape)  # type: ignore[arg-type]


READY = {f"blocks.{b}.{n}": 3 - b for b in range(3) for n in ("w", "gain", "expert")}


def covered(turns: list, all_buckets: list[Bucket]) -> dict[int, list[int]]:  # type: ignore[type-arg]
    """Return how often each number of each held bucket is sent."""
    times = {i: [0] * all_buckets[i].gradients.numel() for i in held_buckets(all_buckets)}
    ranges = [r for turn in turns for part in (*turn.window, turn.beside) for r in part]
    for r in (*ranges, *leftover_ranges(all_buckets, turns)):
        for place in range(r.start, r.end):
            times[r.bucket][place] += 1
    return times


@pytest.mark.parametrize("window", [0.0, 1000.0, BYTES / 2, BYTES, 10.0 * BYTES])
@pytest.mark.parametrize("shares", [(1.0,), (0.25, 0.75)])
def test_every_dense_gradient_is_sent_once(window: float, shares: tuple[float, ...]) -> None:
    made = buckets()
    turns = plan_turns(made, READY, turns=3, window_bytes=window, shares=shares)
    assert all(set(times) == {1} for times in covered(turns, made).values())
    for turn in turns:
        assert len(turn.window) == len(shares)
        for share, part in zip(shares, turn.window, strict=True):
            assert sum((r.end - r.start) * 4 for r in part) <= window * share


def test_a_gradient_travels_no_earlier_than_it_is_complete() -> None:
    made = buckets()
    turns = plan_turns(made, READY, turns=3, window_bytes=BYTES, shares=(1.0,))
    for number, turn in enumerate(turns):
        for r in (*turn.window[0], *turn.beside):
            for slot in made[r.bucket].slots:
                if slot.offset < r.end and slot.end > r.start:
                    assert READY[slot.spec.name] <= number
    assert not turns[0].window[0]  # nothing lies behind the last layer
    assert turns[1].window[0]


def test_what_does_not_fit_into_the_window_is_sent_beside() -> None:
    turns = plan_turns(buckets(), READY, turns=3, window_bytes=BYTES / 4, shares=(1.0,))
    (inside,), (beside,) = turns[1].window[0], turns[1].beside
    assert (inside.end - inside.start, beside.end - beside.start) == (
        ROWS * ROWS // 4,
        3 * ROWS * ROWS // 4,
    )
    assert inside.end == beside.start


def test_small_gradients_experts_and_embeddings_wait_for_the_end() -> None:
    made = buckets()
    turns = plan_turns(made, READY, turns=3, window_bytes=BYTES, shares=(1.0,))
    sent = {r.bucket for turn in turns for part in (*turn.window, turn.beside) for r in part}
    assert {made[i].label for i in sent} == {"dense"}
    assert all(made[i].decay for i in sent)  # not the gains
    assert "expert" not in {made[i].label for i in held_buckets(made)}


def test_sharded_states_have_no_slices() -> None:
    made = buckets(shard=2)
    assert held_buckets(made) == []
    turns = plan_turns(made, READY, turns=3, window_bytes=BYTES, shares=(1.0,))
    assert all(turn.beside == () and turn.window == ((),) for turn in turns)
