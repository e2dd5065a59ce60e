"""The order of training sequences, batches, and evaluation windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.parallel.errors import DataError
from gatewise.training.indexed import TokenFile, TokenFileWriter
from gatewise.training.sequences import SequenceOrder, read_batch, validation_windows


@given(sequence_length=st.integers(2, 9), extra=st.integers(1, 60), seed=st.integers(-3, 1 << 70))
@settings(deadline=None, max_examples=80, derandomize=True)
def test_an_epoch_visits_each_sequence_of_its_cut_once(
    sequence_length: int, extra: int, seed: int
) -> None:
    num_tokens = sequence_length + extra
    order = SequenceOrder(num_tokens, sequence_length, seed)
    size = order.sequences_per_epoch
    for epoch in range(3):
        starts = np.sort(order.starts(range(epoch * size, (epoch + 1) * size)))
        assert 0 <= starts[0] < sequence_length
        assert np.all(np.diff(starts) == sequence_length)
        assert starts[-1] + sequence_length + 1 <= num_tokens  # the last target is inside
    # At most what the offset cuts off at both ends is left out of an epoch.
    assert size * sequence_length + 2 * sequence_length > num_tokens - 1


def test_every_epoch_has_another_order_and_all_offsets_occur() -> None:
    order = SequenceOrder(1000, 8, seed=1)
    size = order.sequences_per_epoch
    epochs = [order.starts(range(e * size, (e + 1) * size)).tolist() for e in range(60)]
    assert len({tuple(epoch) for epoch in epochs}) == 60
    assert {epoch[0] % 8 for epoch in epochs} == set(range(8))
    assert SequenceOrder(1000, 8, seed=2).starts(range(size)).tolist() != epochs[0]


def test_the_order_is_the_same_on_every_version() -> None:
    order = SequenceOrder(1000, 16, seed=0)
    assert order.sequences_per_epoch == 61
    assert [order.start_at(index) for index in (0, 1, 2, 60, 61, 10**9)] == [
        175,
        47,
        319,
        415,
        101,
        198,
    ]


@given(indices=st.lists(st.integers(0, 400), max_size=30))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_a_sample_depends_on_its_number_only(indices: list[int]) -> None:
    fresh = SequenceOrder(500, 16, seed=3)
    in_order = SequenceOrder(500, 16, seed=3).starts(range(401))
    assert fresh.starts(indices).tolist() == [in_order[index] for index in indices]
    assert [fresh.start_at(index) for index in indices] == [in_order[index] for index in indices]


def test_changing_the_number_of_ranks_neither_repeats_nor_skips_samples() -> None:
    single = SequenceOrder(700, 8, seed=5)
    expected = [single.start_at(index) for index in range(12 * 9)]
    consumed: list[int] = []
    cursor = 0
    for world in (4, 4, 4, 2, 2, 3, 3, 1, 6):  # ranks of nine steps of 12 sequences
        share = 12 // world
        for rank in range(world):
            order = SequenceOrder(700, 8, seed=5)  # each rank has its own
            first = cursor + rank * share
            consumed += order.starts(range(first, first + share)).tolist()
        cursor += 12
    assert consumed == expected


def test_too_few_tokens_for_a_sequence_name_the_setting() -> None:
    message = r"training split has 8 tokens.*data\.sequence_length \+ 1 = 9; lower data\.seq"
    with pytest.raises(DataError, match=message):
        SequenceOrder(8, 8, 0)
    assert SequenceOrder(9, 8, 0).sequences_per_epoch == 1


def test_negative_sample_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="they start at 0"):
        SequenceOrder(100, 8, 0).start_at(-1)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    with TokenFileWriter(tmp_path / "t", np.dtype("<u2")) as writer:
        writer.add_document(np.arange(65000, 65000 + 300))
    return TokenFile(tmp_path / "t")


def test_a_batch_has_the_tokens_from_each_start(tokens: TokenFile) -> None:
    order = SequenceOrder(len(tokens), 16, seed=0)
    batch = read_batch(tokens, order, range(5, 45))
    assert batch.shape == (40, 17)
    assert batch.dtype == torch.int64
    for row, index in zip(batch, range(5, 45), strict=True):
        assert row.tolist() == [65000 + order.start_at(index) + place for place in range(17)]
    assert read_batch(tokens, order, []).shape == (0, 17)


@given(num_tokens=st.integers(2, 90), sequence_length=st.integers(1, 12), data=st.data())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_windows_score_every_target_once_with_enough_context(
    num_tokens: int, sequence_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, sequence_length) | st.none(), label="stride")
    windows = validation_windows(num_tokens, sequence_length, stride)
    scored: list[int] = []
    for start, length, first in zip(
        windows.starts, windows.lengths, windows.first_scored, strict=True
    ):
        assert start >= 0
        assert start + length <= num_tokens
        assert 2 <= length <= sequence_length + 1
        assert 0 <= first < length - 1
        targets = range(start + 1 + first, start + length)
        scored += targets
        step = sequence_length if stride is None else stride
        assert targets[0] - start >= min(targets[0], sequence_length - step)  # tokens of context
    assert scored == list(range(1, num_tokens))
    assert len(set(windows.lengths.tolist())) == 1


def test_windows_without_overlap_are_neighbours() -> None:
    windows = validation_windows(22, 7)
    assert windows.starts.tolist() == [0, 7, 14]
    assert windows.lengths.tolist() == [8, 8, 8]
    assert windows.first_scored.tolist() == [0, 0, 0]
    ragged = validation_windows(24, 7)
    assert ragged.starts.tolist() == [0, 7, 14, 16]
    assert ragged.first_scored.tolist() == [0, 0, 0, 5]
    assert len(ragged) == 4


def test_windows_need_a_target_and_a_stride_in_range() -> None:
    with pytest.raises(DataError, match="validation split has 1 tokens, but one target needs 2"):
        validation_windows(1, 8)
    with pytest.raises(ValueError, match=r"stride is 9; it must be in \[1, 8\]"):
        validation_windows(100, 8, 9)
