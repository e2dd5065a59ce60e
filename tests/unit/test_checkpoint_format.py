import pytest
import torch

from gatewise.training.checkpoint_format import (
    FlatRange,
    check_cover,
    dtype_name,
    encode_header,
    parse_dtype,
    read_header_size,
)


def test_a_whole_tensor_is_one_range_that_shares_its_memory() -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    part = FlatRange.whole(weight)
    part.data[5] = 7.0
    assert (part.start, part.shape, part.numel) == (0, (3, 4), 12)
    assert weight[1, 1].item() == 7.0


def test_rows_start_at_their_place_in_the_global_tensor() -> None:
    part = FlatRange.rows(torch.ones(2, 3, 5), first=4, total=8)
    assert (part.start, part.data.numel(), part.shape) == (60, 30, (8, 3, 5))


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3.0), torch.empty(0, 4), torch.ones(1, dtype=torch.int64)],
    ids=["scalar", "empty", "one"],
)
def test_scalars_and_empty_tensors_are_ranges_too(tensor: torch.Tensor) -> None:
    assert FlatRange.whole(tensor).data.numel() == tensor.numel()


@pytest.mark.parametrize(
    ("data", "start"),
    [(torch.zeros(2, 2), 0), (torch.zeros(8)[::2], 0), (torch.zeros(4), 7), (torch.zeros(4), -1)],
    ids=["not flat", "strided", "past the end", "negative"],
)
def test_a_range_that_is_not_inside_its_tensor_is_refused(data: torch.Tensor, start: int) -> None:
    with pytest.raises(ValueError, match="range"):
        FlatRange(data=data, start=start, shape=(10,))


def test_exact_covers_with_replicas_pass() -> None:
    assert check_cover("w", 10, [(4, 10, 1), (0, 4, 0), (4, 10, 2), (0, 4, 3)]) is None
    assert check_cover("w", 0, []) is None


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 6, 0), (4, 10, 1)], "rank 0 holds elements 0 to 6 and rank 1 holds 4 to 10"),
        ([(0, 4, 0), (0, 10, 1)], "overlap"),
        ([(0, 4, 0), (6, 10, 1)], "no rank holds element 4 of 10"),
        ([(0, 9, 0)], "no rank holds element 9 of 10"),
        ([(1, 10, 0)], "no rank holds element 0 of 10"),
        ([], "no rank holds element 0 of 10"),
    ],
)
def test_gaps_and_partial_overlaps_are_named(
    ranges: list[tuple[int, int, int]], words: str
) -> None:
    problem = check_cover("w", 10, ranges)
    assert problem is not None
    assert words in problem
    assert "'w'" in problem


def test_a_header_says_where_the_data_starts() -> None:
    head = encode_header([("a", torch.float32, (3,)), ("b", torch.bool, (5,))], content="test")
    assert read_header_size(head[:8]) == len(head)
    assert len(head) % 8 == 0


def test_types_keep_their_names() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        assert parse_dtype(dtype_name(dtype)) is dtype
    with pytest.raises(ValueError, match="complex64 cannot be saved; allowed: bfloat16"):
        dtype_name(torch.complex64)
    with pytest.raises(ValueError, match="unknown type 'int3'"):
        parse_dtype("int3")
