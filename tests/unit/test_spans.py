"""Spans: where a rank's elements lie in a whole tensor, and checkpoints of them in any layout."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.parallel.parameters import Span, cut_spans
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.checkpoint_plan import in_rows
from gatewise.training.checkpointer import Checkpointer, load


def places(spans: Sequence[Span]) -> list[int]:
    """Return the place of each element, one by one."""
    return [
        s.start + row * s.stride + i for s in spans for row in range(s.rows) for i in range(s.run)
    ]


def test_a_cut_of_spans_is_the_cut_of_their_elements() -> None:
    spans = (Span(40, 1, 5), Span(3, 4, 3, 7), Span(100, 2, 1, 9))
    every = places(spans)
    for start in range(len(every) + 1):
        for end in range(start, len(every) + 1):
            found = cut_spans(spans, start, end)
            assert places(found) == every[start:end]
            assert len(found) <= 3 * len(spans)
            assert all(span.numel for span in found)


def test_an_interval_in_rows_is_at_most_three_rectangles() -> None:
    for width in (1, 4, 7):
        for start in range(9):
            for numel in range(1, 23):
                boxes = in_rows(Span(start, 1, numel), width)
                assert places(boxes) == list(range(start, start + numel))
                assert len(boxes) <= 3
                assert all(box.start % width + box.run <= width for box in boxes)
    assert in_rows(Span(3, 2, 4, 9), 9) == [Span(3, 2, 4, 9)]


@pytest.mark.parametrize("activation", [Activation.swiglu, Activation.gelu])
def test_the_parts_of_experts_are_the_whole_once(activation: Activation) -> None:
    whole = GroupedExperts(6, 4, 12, activation)
    for shards in (1, 2, 3):
        for name, weight in whole.named_parameters():
            seen = torch.zeros(weight.numel(), dtype=torch.int64)
            for first in (0, 3):
                for shard in range(shards):
                    part = GroupedExperts(
                        3, 4, 12, activation, first_expert=first, shard=shard, shards=shards
                    )
                    place = torch.tensor(places([part.span(name)]))
                    seen[place] += 1
                    mine = part.part_of(name, weight.detach()[first : first + 3])
                    assert mine.shape == getattr(part, name).shape
                    assert torch.equal(mine.flatten(), weight.detach().flatten()[place])
            assert torch.equal(seen, torch.ones_like(seen))


def test_a_width_that_the_shards_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_width is 12, which 5 shards do not divide"):
        GroupedExperts(2, 4, 12, Activation.relu, shards=5)


def cuts(name: str, shape: tuple[int, ...], layout: str) -> list[list[Span]]:
    """Return what each rank of a layout holds: whole, columns, or columns cut flat at any place."""
    numel, (rows, columns) = math.prod(shape), shape
    if layout == "whole":
        return [[Span(0, 1, numel)]]
    if layout == "flat":
        ends = [0, numel // 3 + 1, numel]
        return [[Span(a, 1, b - a)] for a, b in itertools.pairwise(ends)]
    shards = 3 if layout == "thirds" else 2
    part = columns // shards
    spans = [Span(s * part, rows, part, columns) for s in range(shards)]
    if layout != "ragged":
        return [[span] for span in spans]
    middle = rows * part // 2 + 1
    pairs = [((0, middle), (middle, rows * part)) for _ in spans]
    return [
        cut_spans([span], *cut) for span, both in zip(spans, pairs, strict=True) for cut in both
    ]


LAYOUTS = ("whole", "flat", "halves", "thirds", "ragged")


@pytest.mark.parametrize("saved", LAYOUTS)
def test_columns_are_saved_and_loaded_in_any_layout(saved: str, tmp_path: Path) -> None:
    """Each part of the layout has a name of its own here, as if it were the tensor of a rank."""
    shape = (5, 6)
    whole = torch.randn(shape)
    parts = cuts("w", shape, saved)
    ranges: dict[str, FlatRange] = {}
    # one process cannot hold two ranges of one name, so all parts of the layout are one range here
    spans = tuple(span for part in parts for span in part)
    data = whole.flatten()[torch.tensor(places(spans))]
    ranges["w"] = FlatRange.spread(data, spans, shape)
    checkpointer = Checkpointer(tmp_path, keep_last=2, asynchronous=False)
    for step in (1, 2):  # the second save follows the plan of the first
        checkpointer.save(step, ranges, meta={})
    checkpointer.close()
    for wanted in LAYOUTS:
        for part in cuts("w", shape, wanted):
            target = torch.full((sum(span.numel for span in part),), float("nan"))
            load(tmp_path / "step_00000002", {"w": FlatRange.spread(target, part, shape)})
            assert torch.equal(target, whole.flatten()[torch.tensor(places(part))]), wanted


def test_columns_that_no_rank_holds_and_columns_held_twice_are_named(tmp_path: Path) -> None:
    from gatewise.parallel.errors import CheckpointError

    checkpointer = Checkpointer(tmp_path, keep_last=1, asynchronous=False)

    def save(spans: list[Span]) -> None:
        data = torch.zeros(sum(span.numel for span in spans))
        checkpointer.save(1, {"w": FlatRange.spread(data, spans, (4, 6))}, meta={})

    with pytest.raises(CheckpointError, match="'w': no rank holds 4 of its elements"):
        save([Span(0, 4, 3, 6), Span(3, 4, 2, 6)])
    with pytest.raises(CheckpointError, match="overlap"):
        save([Span(0, 4, 3, 6), Span(2, 4, 3, 6)])
    checkpointer.close()


def test_a_file_with_parts_of_one_tensor_opens_with_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    spans = cut_spans([Span(0, 4, 3, 6)], 1, 12)
    rest = [Span(0, 1, 1, 6), Span(3, 4, 3, 6)]
    data = torch.arange(24.0)
    ranges = {"w": FlatRange.spread(data, [*spans, *rest], (4, 6)), "v": FlatRange.whole(data)}
    checkpointer = Checkpointer(tmp_path, keep_last=1, asynchronous=False)
    checkpointer.save(1, ranges, meta={})
    checkpointer.close()
    found = load_file(tmp_path / "step_00000001" / "shard_00000.safetensors")
    assert sum(value.numel() for value in found.values()) == 48
    assert torch.equal(found["v"], data)
    assert len(found) == 1 + len(spans) + len(rest)
