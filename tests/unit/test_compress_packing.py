"""Packing: the identity, the plain reference, and exact sizes."""

import pytest
import torch

from gatewise.compression.formats import (
    TERNARY,
    WIDTHS,
    MatrixFormat,
    ZeroPoint,
    largest_code,
    parse_widths,
    row_bytes,
    stored_bits,
)
from gatewise.compression.packing import (
    pack_codes,
    pack_codes_reference,
    unpack_codes,
    unpack_codes_reference,
)
from gatewise.parallel.errors import ConfigError

SHAPES = [(1, 1), (1, 7), (3, 8), (5, 128), (2, 131), (4, 320)]


def codes(kind: str, rows: int, columns: int, bits: float) -> torch.Tensor:
    if kind == "random":
        generator = torch.Generator().manual_seed(columns)
        shape = (rows, columns)
        return torch.randint(0, largest_code(bits) + 1, shape, generator=generator).to(torch.uint8)
    value = 0 if kind == "least" else largest_code(bits)
    return torch.full((rows, columns), value, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["random", "least", "largest"])
@pytest.mark.parametrize("shape", SHAPES)
def test_c12_unpacking_what_was_packed_gives_the_codes(
    shape: tuple[int, int], kind: str, bits: float
) -> None:
    code_NK = codes(kind, *shape, bits)
    packed_NM = pack_codes(code_NK, bits)
    assert packed_NM.shape == (shape[0], row_bytes(bits, shape[1]))
    assert torch.equal(unpack_codes(packed_NM, bits, shape[1]), code_NK)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_gives_the_bytes_of_the_reference(bits: float) -> None:
    for shape in SHAPES:
        code_NK = codes("random", *shape, bits)
        want = pack_codes_reference(code_NK.tolist(), bits)
        assert [bytes(row) for row in pack_codes(code_NK, bits).tolist()] == want
        assert unpack_codes_reference(want, bits, shape[1]) == code_NK.tolist()


def test_three_bits_take_exactly_three_bits() -> None:
    assert 8 * row_bytes(3.0, 4096) == 3 * 4096
    assert row_bytes(3.0, 128) == 48
    assert row_bytes(TERNARY, 4095) * 8 == stored_bits(TERNARY) * 4095


def test_a_code_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="codes of 2 bits end at 3"):
        pack_codes(torch.tensor([[4]], dtype=torch.uint8), 2.0)


@pytest.mark.parametrize(
    ("bits", "zero", "metadata"),
    [
        (1.0, ZeroPoint.float, 2),
        (TERNARY, ZeroPoint.float, 2),
        (2.0, ZeroPoint.float, 4),
        (3.0, ZeroPoint.int, 3),
        (8.0, ZeroPoint.int, 3),
    ],
)
def test_scales_and_zeros_are_counted(bits: float, zero: ZeroPoint, metadata: int) -> None:
    shape = MatrixFormat(rows=10, columns=200, bits=bits, group=128, zero=zero)
    assert shape.groups == 2
    assert shape.metadata_bytes == 10 * 2 * metadata
    assert shape.bytes == 10 * row_bytes(bits, 200) + shape.metadata_bytes


def test_widths_are_read_in_any_order_and_named_once() -> None:
    assert parse_widths("3,1.58,1") == (1.0, TERNARY, 3.0)
    for text in ("5", "1,1", "", "two"):
        with pytest.raises(ConfigError, match="widths is"):
            parse_widths(text)
