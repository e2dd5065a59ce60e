"""Products with packed weights: exact in integers, near the dequantised numbers, every engine."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from packed_weights import codes, made_up, mixed_experts, relative
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops import native, packed
from gatewise.moe.ops.activate import activate
from gatewise.moe.ops.native_packed import InstructionSet, PackedKernels
from gatewise.moe.ops.packed import (
    packed_ffn,
    packed_ffn_reference,
    packed_linear,
    quantise_rows,
    unpack_weight,
    unpack_weight_reference,
)
from gatewise.moe.ops.panels import pack_panels, unpack_panels

BITS = (1, 2, 3, 4, 8)
# rows, columns, group: whole blocks, one row, short last groups, groups that are no block
SHAPES = [(32, 256, 128), (1, 128, 128), (1, 1, 8), (5, 131, 64), (40, 100, 16), (17, 60, 24)]
KINDS = ("random", "least", "largest")


@pytest.fixture(params=["torch", *InstructionSet.__members__])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with torch and with each instruction set that this machine has."""
    name: str = request.param
    kernels = None if name == "torch" else kernels_of(InstructionSet[name])
    monkeypatch.setattr(packed, "load_packed_kernels", lambda: kernels)
    return name


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def kernels_of(instructions: InstructionSet) -> PackedKernels:
    kernels = native.load_kernels()
    if kernels is None or instructions not in PackedKernels.sets(kernels.library):
        pytest.skip(f"no compiler, or a processor without {instructions.name}")
    return PackedKernels(kernels.library, instructions)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_panels_give_back_what_was_packed(
    shape: tuple[int, int, int], kind: str, bits: int
) -> None:
    rows, columns, group = shape
    code_NK = codes(kind, rows, columns, bits)
    scale_NG = torch.rand(rows, -(-columns // group)).half()
    for zero_NG in (None, torch.rand_like(scale_NG), torch.full_like(scale_NG, 3).byte()):
        constant = 0.5 if zero_NG is None else None
        weight = pack_panels(code_NK, scale_NG, zero_NG, bits=bits, group=group, zero=constant)
        found_NK, found_scale_NG, found_zero_NG = unpack_panels(weight)
        assert torch.equal(found_NK, code_NK)
        assert torch.equal(found_scale_NG, scale_NG)
        if zero_NG is None:
            assert found_zero_NG is None
        else:
            assert found_zero_NG is not None
            assert torch.equal(found_zero_NG, zero_NG.half())
        widths = [min(group, columns - start) for start in range(0, columns, group)]
        grid = 32 * len(widths) * (1 if zero_NG is None else 2)
        planes = (2, 1) if bits == 3 else (bits,)
        vectors = sum(math.ceil(width / (32 / plane)) for plane in planes for width in widths)
        assert weight.nbytes == math.ceil(rows / 16) * 64 * (math.ceil(grid / 64) + vectors)


@pytest.mark.parametrize("bits", BITS)
def test_whole_panels_take_no_more_than_their_codes_scales_and_zeros(bits: int) -> None:
    weight = made_up(64, 512, 128, bits)
    grid = 2 * 64 * 4 * (2 if bits > 1 else 1)
    assert weight.nbytes == 64 * 512 * bits // 8 + grid


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_values_of_the_reference_bit_for_bit(
    engine: str, shape: tuple[int, int, int], bits: int
) -> None:
    weight = made_up(*shape, bits)
    wanted_NK = unpack_weight_reference(weight)
    for dtype in (torch.float32, torch.bfloat16):
        found_NK = unpack_weight(weight, torch.empty(shape[:2], dtype=dtype))
        assert torch.equal(found_NK, wanted_NK.to(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_come_out_exactly(
    engine: str, shape: tuple[int, int, int], kind: str, bits: int
) -> None:
    rows, columns, group = shape
    code_NK = codes(kind, rows, columns, bits)
    one_NG = torch.ones(rows, -(-columns // group)).half()
    weight = pack_panels(code_NK, one_NG, None, bits=bits, group=group, zero=0.0)
    generator = torch.Generator().manual_seed(columns)
    x_MK = torch.randint(-127, 128, (3, columns), generator=generator)
    x_MK[:, ::group] = 127  # the scale of each group is 1
    x_MK[1] = 127
    x_MK[2] = -127
    assert torch.equal(packed_linear(x_MK.float(), weight).long(), x_MK @ code_NK.long().T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_dequantised_numbers(
    engine: str, shape: tuple[int, int, int], bits: int
) -> None:
    weight = made_up(*shape, bits)
    x_MK = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(1))
    row_MK = quantise_rows(x_MK, weight.group).dequantise().double()
    wanted_MN = row_MK @ unpack_weight_reference(weight, torch.float64).T
    assert relative(packed_linear(x_MK, weight), wanted_MN) < 1e-5
    found_MN = packed_linear(x_MK.bfloat16(), weight)
    assert found_MN.dtype == torch.bfloat16


def test_quantised_rows_differ_from_the_rows_by_half_a_step() -> None:
    x_MK = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    rows = quantise_rows(x_MK, 64)
    step_MK = rows.scale_MG.repeat_interleave(64, 1)[:, :200]
    assert bool(((rows.dequantise() - x_MK).abs() <= 0.5001 * step_MK).all())
    assert relative(rows.dequantise(), x_MK.double()) < 0.01


def test_rows_that_are_zero_tiny_huge_or_not_finite_come_out_as_such(engine: str) -> None:
    weight = made_up(20, 96, 32, 3)
    value_NK = unpack_weight_reference(weight)
    x_MK = torch.zeros(5, 96)
    x_MK[1, 40] = 1e-35  # below what counts
    x_MK[2, 40] = 1e25
    x_MK[3, 40] = float("nan")
    x_MK[4, 40] = float("inf")
    y_MN = packed_linear(x_MK, weight)
    assert torch.equal(y_MN[:2], torch.zeros(2, 20))
    assert relative(y_MN[2], 1e25 * value_NK[:, 40].double()) < 1e-5
    assert not bool(torch.isfinite(y_MN[3:]).any())


def test_all_instruction_sets_give_the_same_bits() -> None:
    kernels = [kernels_of(instructions) for instructions in InstructionSet]
    for bits in BITS:
        weight = made_up(48, 300, 64, bits)
        x_MK = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
        first_MN, *others = (engine.linear(x_MK, weight) for engine in kernels)
        assert all(torch.equal(first_MN, other_MN) for other_MN in others)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_of_mixed_widths_in_one_call(
    engine: str, activation: Activation, top_k: int
) -> None:
    w_in, w_out = mixed_experts(activation)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(6, 96, generator=generator) / 20
    expert_TK = torch.rand(6, 5, generator=generator).topk(top_k).indices
    weight_TK = torch.rand(6, top_k, generator=generator)
    expert_TK[1, 0] = -1
    expert_TK[2] = -1
    found_TD = packed_ffn(x_TD, expert_TK, weight_TK, w_in, w_out, activation)
    wanted_TD = torch.zeros(6, 96, dtype=torch.float64)
    for token in range(6):
        for expert, weight in zip(expert_TK[token].tolist(), weight_TK[token], strict=True):
            if expert < 0:
                continue
            first, second = w_in.weights[expert], w_out.weights[expert]
            x_1K = quantise_rows(x_TD[token : token + 1], first.group).dequantise().double()
            hidden_1G = x_1K @ unpack_weight_reference(first, torch.float64).T
            inner_1F = activate(hidden_1G, activation).float()
            row_1F = quantise_rows(inner_1F, second.group).dequantise().double()
            out_1D = row_1F @ unpack_weight_reference(second, torch.float64).T
            wanted_TD[token] += weight.double() * out_1D[0]
    # a number at the middle between two codes may be rounded either way: one step of one code
    assert relative(found_TD, wanted_TD) < 1e-3
    close_TD = (found_TD.double() - wanted_TD).norm(dim=1) <= 1e-5 * wanted_TD.norm(dim=1)
    assert int(close_TD.sum()) >= 4
    assert torch.equal(found_TD[2], torch.zeros(96))


@pytest.mark.parametrize("engine", InstructionSet.__members__, indirect=True)
def test_a_token_depends_on_no_other_token_and_not_on_threads(
    engine: str, threads: Callable[[int], None]
) -> None:
    w_in, w_out = mixed_experts(Activation.swiglu)
    generator = torch.Generator().manual_seed(4)
    x_TD = torch.randn(7, 96, generator=generator)
    expert_TK = torch.rand(7, 5, generator=generator).topk(2).indices
    weight_TK = torch.rand(7, 2, generator=generator)

    def run(tokens: slice) -> Tensor:
        operands = (x_TD[tokens], expert_TK[tokens], weight_TK[tokens])
        return packed_ffn(*operands, w_in, w_out, Activation.swiglu)

    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(slice(0, 7)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(run(slice(3, 4)), results[0][3:4])


def test_kernels_and_torch_agree() -> None:
    if packed.load_packed_kernels() is None:
        pytest.skip("no compiler, or another processor")
    w_in, w_out = mixed_experts(Activation.swiglu)
    x_TD = torch.randn(3, 96, generator=torch.Generator().manual_seed(5)) / 20
    expert_TK, weight_TK = torch.tensor([[0, 4], [1, 2], [3, 0]]), torch.rand(3, 2)
    operands = (x_TD, expert_TK, weight_TK)
    found_TD = packed_ffn(*operands, w_in, w_out, Activation.swiglu)
    wanted_TD = packed_ffn_reference(*operands, w_in.weights, w_out.weights, Activation.swiglu)
    assert relative(found_TD, wanted_TD.double()) < 1e-3


@pytest.mark.parametrize(("bits", "zero"), [(5, 0.5), (2, None)])
def test_what_cannot_be_packed_is_refused(bits: int, zero: float | None) -> None:
    with pytest.raises(ValueError, match=r"bits is 5|give either zero"):
        pack_panels(
            codes("least", 1, 8, 1), torch.ones(1, 1).half(), None, bits=bits, group=8, zero=zero
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 33}, r"data is torch.uint8\[.*\]; 33 x 100 codes of 3 bits in groups of 32 are"),
        ({"columns": 200}, "32 x 200 codes"),
        ({"bits": 4}, "codes of 4 bits"),
        ({"bits": 5}, "bits is 5; it must be one of 1, 2, 3, 4, 8"),
        ({"group": 16}, "in groups of 16 are"),
        ({"group": 0}, "group is 0; it must be at least 1"),
        ({"zero": 0.5}, "data is"),
    ],
)
def test_bytes_that_are_not_the_matrix_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(made_up(32, 100, 32, 3), **changes)


def test_data_of_another_type_or_with_gaps_is_refused() -> None:
    good = made_up(32, 64, 32, 2)
    with pytest.raises(ValueError, match=r"data is torch.int8"):
        replace(good, data=good.data.view(torch.int8))
    spread = torch.zeros(2 * len(good.data), dtype=torch.uint8)[::2]
    with pytest.raises(ValueError, match="not contiguous"):
        replace(good, data=spread)
    with pytest.raises(ValueError, match=r"scale_NG is \[32, 3\]; .* have \[32, 2\]"):
        pack_panels(
            codes("least", 32, 64, 2),
            torch.ones(32, 3).half(),
            None,
            bits=2,
            group=32,
            zero=0.5,
        )


@pytest.mark.parametrize(
    ("x_MK", "message"),
    [
        (torch.zeros(2, 95), r"x is \[2, 95\]; the matrix multiplies rows of 96 numbers"),
        (torch.zeros(96), r"x is \[96\]"),
        (torch.zeros(2, 96, dtype=torch.int64), "x is torch.int64; it must be a floating type"),
        (torch.zeros(2, 96, device="meta"), "x is on meta, but the matrix on cpu"),
    ],
)
def test_rows_that_do_not_fit_the_matrix_are_refused(
    engine: str, x_MK: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        packed_linear(x_MK, made_up(40, 96, 32, 2))


def test_a_matrix_is_unpacked_only_into_its_own_shape(engine: str) -> None:
    weight = made_up(40, 96, 32, 2)
    with pytest.raises(ValueError, match=r"out_NK is \[40, 95\]; the matrix is \[40, 96\]"):
        unpack_weight(weight, torch.empty(40, 95))
    with pytest.raises(ValueError, match=r"out_NK is torch\.uint8"):
        unpack_weight(weight, torch.empty(40, 96, dtype=torch.uint8))
    wide_NK = torch.empty(96, 40).t()  # the same shape with other strides
    assert torch.equal(unpack_weight(weight, wide_NK), unpack_weight_reference(weight))


def test_rows_with_gaps_between_their_numbers_give_the_same(engine: str) -> None:
    weight = made_up(40, 96, 32, 2)
    wide_MK = torch.randn(3, 192, generator=torch.Generator().manual_seed(3))[:, ::2]
    assert torch.equal(packed_linear(wide_MK, weight), packed_linear(wide_MK.clone(), weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 95)}, r"x is \[3, 95\]; the matrix multiplies rows of 96"),
        ({"expert": torch.tensor([[5], [0], [0]])}, "expert_TK goes from 0 to 5; with 5 experts"),
        ({"expert": torch.tensor([[-2], [0], [0]])}, r"from -2 to 0; .* from -1 \(none\) to 4"),
        ({"expert": torch.zeros(3, 1, dtype=torch.int32)}, "expert_TK is torch.int32"),
        ({"expert": torch.zeros(2, 1, dtype=torch.int64)}, "a row for each of 3 tokens"),
        ({"weight": torch.zeros(3, 2)}, r"weight_TK \[3, 2\]; both must have"),
        ({"weight": torch.zeros(3, 1, dtype=torch.int64)}, "weight_TK is torch.int64"),
        ({"weight": torch.zeros(3, 1, device="meta")}, "weight_TK on meta"),
    ],
)
def test_choices_that_these_experts_cannot_serve_are_refused(
    engine: str, changes: dict[str, Tensor], message: str
) -> None:
    w_in, w_out = mixed_experts(Activation.swiglu)
    good = {
        "x": torch.zeros(3, 96),
        "expert": torch.zeros(3, 1, dtype=torch.int64),
        "weight": torch.zeros(3, 1),
    }
    given = good | changes
    with pytest.raises(ValueError, match=message):
        packed_ffn(given["x"], given["expert"], given["weight"], w_in, w_out, Activation.swiglu)
