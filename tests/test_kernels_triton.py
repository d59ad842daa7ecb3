"""The Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is first imported, so `tests/__init__.py` sets TRITON_INTERPRET=1 where
there is no GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmpd.kernels.base import PackedWeights
from pmpd.kernels.bitplanes import pack
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.kernels.triton import (
    GPTQMatrix,
    TritonMatrix,
    padded_rows,
    split_activations,
    table_digits,
    unavailable,
)

triton = pytest.importorskip("triton")
interpreter_only_here = pytest.mark.skipif(
    not torch.cuda.is_available() and type(triton.language.zeros).__name__ != "InterpretedFunction",
    reason="no GPU, and triton was imported before TRITON_INTERPRET=1 was set",
)
pytestmark = interpreter_only_here
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 2e-4}
"""Of ‖y - reference‖ / ‖reference‖: the rounding of weights and results to the type (float32: of the tables'
digits)."""


def packed_weights(
    rows: int, columns: int, precisions: tuple[int, ...], bias: bool = False, seed: int = 0
) -> PackedWeights:
    draw = torch.Generator().manual_seed(seed)
    parent = max(precisions)
    codes = torch.randint(0, 2**parent, (rows, columns), generator=draw, dtype=torch.uint8)
    tables = {b: (0.05 * torch.randn(rows, 2**b, generator=draw)).half().to(DEVICE) for b in precisions}
    return PackedWeights(
        pack(codes, parent).to(DEVICE), tables, torch.randn(rows, generator=draw).to(DEVICE) if bias else None
    )


def activations(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(dtype).to(DEVICE)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    assert y.shape == expected.shape
    y, expected = y.double(), expected.double()
    return float((y - expected).norm() / expected.norm())


def expected_product(packed: PackedWeights, x: torch.Tensor, bits: int) -> torch.Tensor:
    reference = ReferenceMatrix(packed, torch.float32)
    return reference.multiply(x.float(), bits)


@pytest.mark.parametrize("shape", [(16, 256), (5, 32), (40, 288), (17, 1056)])
def test_dequantized_weights_are_exactly_the_table_values(shape):
    packed = packed_weights(*shape, (2, 3, 4, 5, 8))
    matrix = TritonMatrix(packed, torch.float16)
    for bits in packed.precisions:
        assert torch.equal(
            matrix.dequantize(bits), ReferenceMatrix(packed, torch.float16).dequantize(bits)
        ), f"{shape}, {bits} bits"


def routes_and_widths():
    """Digits hold tables of 2, 3 and 4 bits; the interpreter is slow where many planes unroll."""
    for route in ("digits", "halves", "fused", "dense"):
        for bits in (2, 3, 4) if route == "digits" else range(2, 9):
            slow = DEVICE.type == "cpu" and (bits == 4 or (route, bits) == ("halves", 3) or bits in (6, 7))
            yield pytest.param(route, bits, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("route", "bits"), routes_and_widths())
def test_every_route_multiplies_as_the_reference(route, bits):
    packed = packed_weights(20, 544, (bits, 8) if bits < 8 else (8,), bias=True)
    matrix = TritonMatrix(packed, torch.float16)
    for tokens in (1, 3):
        x = activations(tokens, 544)
        y = matrix.multiply(x, bits, route)
        assert y.dtype == x.dtype
        assert error(y, expected_product(packed, x, bits)) < TOLERANCE[torch.float16], (
            f"{route}, {bits} bits, {tokens} tokens"
        )


@pytest.mark.parametrize("tokens", [2, 7, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 17))])
def test_any_number_of_tokens(tokens):
    packed = packed_weights(9, 96, (2, 3, 4))
    matrix = TritonMatrix(packed, torch.float16)
    x = activations(tokens, 96)
    assert error(matrix.multiply(x, 3), expected_product(packed, x, 3)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activation_types(dtype):
    # the interpreter has no bfloat16 dot
    routes = ["digits"] if DEVICE.type == "cpu" and dtype == torch.bfloat16 else ["digits", "fused"]
    packed = packed_weights(16, 224, (2, 3, 4))
    matrix = TritonMatrix(packed, dtype)
    x = activations(2, 224, dtype=dtype)
    for route in routes:
        assert error(matrix.multiply(x, 4, route), expected_product(packed, x, 4)) < TOLERANCE[dtype]


def test_columns_beyond_the_warps_of_a_program_are_added():
    packed = packed_weights(16, 256 * 3, (2, 3, 4))
    matrix = TritonMatrix(packed, torch.float32)
    x = activations(1, 256 * 3, dtype=torch.float32)
    for warps in (1, 2):
        y = torch.empty(1, 16, device=DEVICE)
        matrix.multiply_split(split_activations(x), 4, y, warps)
        assert error(y, expected_product(packed, x, 4)) < TOLERANCE[torch.float32], f"{warps} warps"


def test_an_outlier_does_not_drown_the_other_activations():
    """One activation 1000 times the rest: three bytes keep the rest to 2^-14, two would not."""
    packed = packed_weights(16, 256, (2, 3, 4))
    x = activations(1, 256, dtype=torch.float32)
    spike = x.clone()
    spike[0, 7] = 1000.0
    alone = torch.zeros_like(x)
    alone[0, 7] = 1000.0
    matrix = TritonMatrix(packed, torch.float32)
    rest = matrix.multiply(spike, 4) - matrix.multiply(alone, 4)
    x[0, 7] = 0
    assert error(rest, expected_product(packed, x, 4)) < 2e-3


def test_a_leading_shape_is_kept_and_no_tokens_give_no_rows():
    packed = packed_weights(20, 96, (2, 3))
    matrix = TritonMatrix(packed, torch.float32)
    x = activations(2, 3, 96, dtype=torch.float32)
    assert matrix.multiply(x, 3).shape == (2, 3, 20)
    assert matrix.multiply(x[:0], 3).shape == (0, 3, 20)


def test_tables_with_one_value_only():
    packed = packed_weights(16, 64, (2, 3))
    flat = PackedWeights(packed.planes, {b: torch.full_like(t, 0.25) for b, t in packed.tables.items()})
    x = activations(1, 64, dtype=torch.float32)
    assert (
        error(TritonMatrix(flat, torch.float32).multiply(x, 3), expected_product(flat, x, 3))
        < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_table_digits_are_bytes_below_128(bits):
    """prmt must return 0 for a code of the other half table: it repeats the sign bit."""
    words, scale, offset = table_digits(torch.randn(20, 2**bits, dtype=torch.float16), bits)
    assert words.shape == (32, {2: 2, 3: 4, 4: 8}[bits])
    assert scale.shape == offset.shape == (32,)
    assert not (words.long() & 0x80808080).any()


@pytest.mark.parametrize(
    ("tokens", "warps", "shape"),
    [(3, 2, (20, 544)), (11, 1, (16, 512)), (19, 2, (33, 512)), (37, 4, (9, 96))],
)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_halves_for_any_number_of_tokens_warps_and_columns(tokens, warps, shape, dtype):
    """Columns that do and do not fill the warps, more tokens than one program takes, rows of x that lie apart
    in memory."""
    packed = packed_weights(*shape, (2, 3, 4), bias=True)
    matrix = TritonMatrix(packed, dtype)
    x = padded_rows(tokens, shape[1], dtype, DEVICE)
    x.copy_(activations(tokens, shape[1], dtype=dtype))
    bits = (2, 3, 4)[tokens % 3]
    y = matrix.multiply(x, bits, "halves", warps)
    assert y.dtype == dtype
    assert error(y, expected_product(packed, x, bits)) < TOLERANCE[dtype], f"{bits} bits"
    assert torch.equal(y, matrix.multiply(x.clone()[:, :], bits, "halves", warps)), (
        "the stride of x changes nothing"
    )


@pytest.mark.parametrize("bits", [5, 8])
def test_halves_of_more_than_four_bits(bits):
    """As above, on planes whose columns are at the same bit of every plane."""
    from pmpd.kernels.cuda.matrix import CudaMatrix

    packed = packed_weights(20, 544, (bits, 8) if bits < 8 else (8,), bias=True)
    for matrix in (TritonMatrix(packed, torch.float16), CudaMatrix(packed, torch.float16)):
        x = activations(17, 544)
        y = matrix.multiply(x, bits, "halves", 2)
        assert error(y, expected_product(packed, x, bits)) < TOLERANCE[torch.float16], type(matrix).__name__
        expected = ReferenceMatrix(packed, torch.float16).dequantize(bits)
        assert torch.equal(matrix.dequantize(bits), expected), type(matrix).__name__


def test_kernels_compile_for_a_gpu_and_spill_nothing():
    """Without one: the interpreter runs none of the inline machine code. Look-ups of more than four bits have
    their tables in shared memory that is declared there. Element = thread must hold within the loop, since
    operands of the tensor cores are where the threads are."""
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_for_h100.py")],
        capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    kernels = json.loads(found.stdout)
    assert {name: of["spilled"] for name, of in kernels.items()} == dict.fromkeys(kernels, 0)
    for name, of in kernels.items():
        assert of["registers"] <= 128, name
        assert of["tables"] == (32768 if name == "halves 8" else 0), name
        layout = "#ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>"
        assert of["layouts"] == ([] if "dequantize" in name else [layout]), f"{name}: element is not thread"


def test_activations_that_are_not_aligned_are_copied_first():
    packed = packed_weights(16, 96, (2, 3))
    matrix = TritonMatrix(packed, torch.float16)
    x = activations(4, 101)[:, 3:99]
    assert error(matrix.multiply(x, 3, "halves"), expected_product(packed, x, 3)) < TOLERANCE[torch.float16]


def test_few_tokens_take_digits_more_take_halves_and_float32_takes_neither():
    packed = packed_weights(16, 64, (2, 3, 5))
    matrix, exact = TritonMatrix(packed, torch.float16), TritonMatrix(packed, torch.float32)
    assert [matrix.route(tokens, 3) for tokens in (1, 2, 3, 64, 65)] == [
        "digits",
        "digits",
        "halves",
        "halves",
        "dense",
    ]
    assert [matrix.route(tokens, 5) for tokens in (1, 64, 65)] == ["halves", "halves", "dense"]
    assert [exact.route(tokens, 5) for tokens in (1, 64, 65)] == ["fused", "fused", "dense"]
    assert [exact.route(tokens, 3) for tokens in (1, 16, 17)] == ["digits", "digits", "fused"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_codes_scales_and_zeros(bits, act_order):
    columns, rows, group_size = 192, 32, 64
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (columns, rows), generator=draw)
    zeros = torch.randint(0, 2**bits, (columns // group_size, rows), generator=draw)
    scales = (0.01 + 0.02 * torch.rand(columns // group_size, rows, generator=draw)).half()
    g_idx = torch.arange(columns) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=draw)]
    weight = (scales[g_idx].float() * (codes - zeros[g_idx]).float()).T.contiguous()

    stored = (zeros - 1) % 2**bits  # format `gptq`
    weight_stored = (scales[g_idx].float() * (codes - (stored + 1)[g_idx]).float()).T.contiguous()
    matrix = GPTQMatrix(
        gptq_words(codes.T, bits).T.contiguous().to(DEVICE), gptq_words(stored, bits).to(DEVICE),
        scales.to(DEVICE),
        g_idx.int().to(DEVICE) if act_order else None, bits, 1, torch.float32,
    )  # fmt: skip
    assert torch.allclose(matrix.dequantize().cpu(), weight_stored)
    v2 = GPTQMatrix(
        gptq_words(codes.T, bits).T.contiguous().to(DEVICE), gptq_words(zeros, bits).to(DEVICE),
        scales.to(DEVICE),
        g_idx.int().to(DEVICE), bits, 0, torch.float32,
    )  # fmt: skip
    for tokens in (1, 5, 70):
        x = activations(tokens, columns, dtype=torch.float32)
        assert error(v2.multiply(x), x @ weight.T.to(DEVICE)) < 1e-5


@pytest.mark.parametrize(
    ("bits", "group_size", "act_order"),
    [
        (4, 64, True), (3, 32, False), (8, 32, True), (8, 192, False),
        pytest.param(4, 192, False, marks=pytest.mark.slow),
        pytest.param(2, 128, True, marks=pytest.mark.slow),
        pytest.param(8, 480, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gptq_halves_multiply_as_the_dequantized_matrix(bits, group_size, act_order):
    """Float16 groups of any size that is a multiple of 32, which may begin anywhere in a tile, the last one
    possibly shorter; columns in any order of groups."""
    columns = 480
    matrix, weight = gptq_matrix(20, columns, bits, group_size, act_order, torch.float16)
    assert torch.equal(matrix.dequantize().cpu(), weight.half())
    for tokens in (1, 12):
        x = activations(tokens, columns)
        for route in ("halves", "fused", "dense"):
            assert (
                error(matrix.multiply(x, route), x.float() @ weight.T.to(DEVICE)) < TOLERANCE[torch.float16]
            ), (route, tokens)


def gptq_matrix(
    rows: int, columns: int, bits: int, group_size: int, act_order: bool, dtype: torch.dtype
) -> tuple[GPTQMatrix, torch.Tensor]:
    """A random matrix of at least `rows` rows, as many as fill words, and its weights in float32."""
    rows = math.lcm(rows, 32 // math.gcd(32, bits))
    draw = torch.Generator().manual_seed(bits)
    groups = math.ceil(columns / group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
    zeros = torch.randint(0, 2**bits, (groups, rows), generator=draw)
    scales = (0.01 + 0.02 * torch.rand(groups, rows, generator=draw)).half()
    g_idx = torch.arange(columns) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=draw)]
    weight = (scales[g_idx].float() * (codes.T - zeros[g_idx]).float()).T
    words = gptq_words(codes, bits).T.contiguous().to(DEVICE), gptq_words(zeros, bits).to(DEVICE)
    return GPTQMatrix(*words, scales.to(DEVICE), g_idx.int().to(DEVICE), bits, 0, dtype), weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group_size", "act_order"), [(64, True), (192, False)])
def test_gptq_weights_of_eight_bits_are_rounded_once(group_size, act_order, dtype):
    """Also where the product takes them: by columns of the identity."""
    matrix, weight = gptq_matrix(20, 480, 8, group_size, act_order, dtype)
    assert torch.equal(matrix.dequantize().cpu(), weight.to(dtype))
    assert matrix.packed_bytes() < 1.4 * 32 * 512, "one copy: 32 rows and 512 columns with padding"
    columns = [0, 31, 32, 127, 128, 191, 192, 255, 256, 479]
    x = torch.eye(480, dtype=dtype, device=DEVICE)[columns]
    assert torch.equal(matrix.multiply(x, "halves").T.cpu(), weight[:, columns].to(dtype))


def gptq_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] -> int32 [R, C bits / 32], little end first, by string of bits (the definition, slowly)."""
    out = []
    for row in values.tolist():
        stream = "".join(format(value, f"0{bits}b")[::-1] for value in row)
        words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        out.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(out, dtype=torch.int32)


def test_gptq_names_what_does_not_fit():
    with pytest.raises(ValueError, match="2, 3, 4 and 8"):
        GPTQMatrix(
            torch.zeros(8, 32).int(), torch.zeros(1, 4).int(), torch.zeros(1, 32), None, 5, 1, torch.float16
        )
    with pytest.raises(ValueError, match="do not agree"):
        GPTQMatrix(
            torch.zeros(8, 32).int(), torch.zeros(1, 3).int(), torch.zeros(1, 32), None, 4, 1, torch.float16
        )


def test_unavailable_says_why():
    assert unavailable(DEVICE, torch.float16) is None
    assert "float64" in unavailable(DEVICE, torch.float64)
    assert "CUDA" in unavailable(torch.device("meta"), torch.float16)
