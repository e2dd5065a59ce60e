"""Codes to bytes and back, exactly as many bytes as `formats.py` computes.

Within a plane of p bits, column j lies in byte j // (8 / p), its low bit at (j % (8 / p)) * p.
Ternary codes are the digits of a number in base 3, the first column the lowest digit.

Shapes:  N rows   K columns   M bytes of a row's codes
"""

import torch
from torch import Tensor

from gatewise.compression.formats import TERNARY, largest_code, planes, row_bytes

__all__ = ["pack_codes", "pack_codes_reference", "unpack_codes", "unpack_codes_reference"]


def pack_codes(code_NK: Tensor, bits: float) -> Tensor:
    """Pack codes.

    Args:
        code_NK: uint8, from 0 to `largest_code(bits)`.
        bits: one of `WIDTHS`.

    Returns:
        uint8 (N, M); the bits after the last column are 0.

    Raises:
        ValueError: if a code is too large for the width.
    """
    if code_NK.numel() and int(code_NK.max()) > largest_code(bits):
        raise ValueError(
            f"a code is {int(code_NK.max())}; codes of {bits:g} bits end at {largest_code(bits)}"
        )
    if bits == TERNARY:
        return _pack_digits(code_NK, base=3, digits=5)
    parts, shift = [], 0
    for plane in planes(bits):
        part_NK = (code_NK >> shift) & ((1 << plane) - 1)
        parts.append(_pack_digits(part_NK, base=1 << plane, digits=8 // plane))
        shift += plane
    return torch.cat(parts, 1)


def unpack_codes(packed_NM: Tensor, bits: float, columns: int) -> Tensor:
    """Return the codes (N, columns), uint8, of what `pack_codes` returned."""
    if bits == TERNARY:
        return _unpack_digits(packed_NM, columns, base=3, digits=5)
    code_NK = torch.zeros(packed_NM.shape[0], columns, dtype=torch.uint8, device=packed_NM.device)
    start, shift = 0, 0
    for plane in planes(bits):
        end = start + -(-columns * plane // 8)
        part_NK = _unpack_digits(
            packed_NM[:, start:end], columns, base=1 << plane, digits=8 // plane
        )
        code_NK |= part_NK << shift
        start, shift = end, shift + plane
    return code_NK


def _pack_digits(digit_NK: Tensor, *, base: int, digits: int) -> Tensor:
    """Put `digits` neighbouring columns into a byte, the first one lowest."""
    rows, columns = digit_NK.shape
    padded_NK = digit_NK.new_zeros(rows, -(-columns // digits) * digits)
    padded_NK[:, :columns] = digit_NK
    power_d = torch.tensor(
        [base**place for place in range(digits)], dtype=torch.uint8, device=digit_NK.device
    )
    return (padded_NK.view(rows, -1, digits) * power_d).sum(2, dtype=torch.uint8)


def _unpack_digits(packed_NM: Tensor, columns: int, *, base: int, digits: int) -> Tensor:
    """Undo `_pack_digits`."""
    wide_NM = packed_NM.to(torch.int16)  # uint8 cannot hold a base of 256
    places = [(wide_NM // base**place % base).to(torch.uint8) for place in range(digits)]
    return torch.stack(places, 2).flatten(1)[:, :columns].contiguous()


def pack_codes_reference(rows: list[list[int]], bits: float) -> list[bytes]:
    """Pack codes bit by bit in plain Python; what `pack_codes` is held to."""
    packed = []
    for row in rows:
        stream = bytearray()
        if bits == TERNARY:
            for start in range(0, len(row), 5):
                stream.append(sum(code * 3**i for i, code in enumerate(row[start : start + 5])))
        else:
            low = 0
            for plane in planes(bits):
                text = "".join(
                    str(code >> bit & 1) for code in row for bit in range(low, low + plane)
                )
                for start in range(0, len(text), 8):
                    stream.append(int(text[start : start + 8][::-1], 2))
                low += plane
        assert len(stream) == row_bytes(bits, len(row))
        packed.append(bytes(stream))
    return packed


def unpack_codes_reference(packed: list[bytes], bits: float, columns: int) -> list[list[int]]:
    """Unpack codes bit by bit in plain Python; what `unpack_codes` is held to."""
    rows = []
    for stream in packed:
        codes = [0] * columns
        if bits == TERNARY:
            codes = [stream[j // 5] // 3 ** (j % 5) % 3 for j in range(columns)]
        else:
            first_byte, low = 0, 0
            for plane in planes(bits):
                for j in range(columns):
                    for bit in range(plane):
                        place = j * plane + bit
                        value = stream[first_byte + place // 8] >> (place % 8) & 1
                        codes[j] |= value << (low + bit)
                first_byte += -(-columns * plane // 8)
                low += plane
        rows.append(codes)
    return rows
