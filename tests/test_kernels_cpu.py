"""The native CPU kernels against the definition: dequantize by table, multiply in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.kernels import cpu, native, pages
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.bitplanes import pack
from pmpd.kernels.byte_rows import byte_rows
from pmpd.kernels.cpu_fixed import TABLE_MAX, ByteMatrix, FixedMatrix, quantize_tables
from pmpd.kernels.reference import ReferenceMatrix

CPU = torch.device("cpu")
PROBLEM = cpu.unavailable(CPU, torch.float32)
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

HIGHEST = -1 if PROBLEM else native.functions().pmpd_highest_level()
LEVELS = native.LEVELS[: HIGHEST + 1]

# Errors are measured against sum(|x| |w|), what a sum of products can be off by whatever its own size.
FLOAT32_TOLERANCE = 2e-6
BFLOAT16_TOLERANCE = 6e-3  # 2⁻⁹ for the tables of the reference and again for the result


def random_packed(
    rows: int, columns: int, parent: int, seed: int, bias: bool, extreme: bool = False
) -> PackedWeights:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**parent, (rows, columns), dtype=torch.uint8, generator=generator)
    tables = {}
    for bits in range(2, parent + 1):
        table = torch.randn(rows, 2**bits, generator=generator)
        if extreme:  # the largest and smallest numbers of float16, zero rows, in any order
            choices = torch.tensor([65504.0, -65504.0, 6e-8, -6e-5, 0.0, 1.0])
            table = choices[torch.randint(0, len(choices), table.shape, generator=generator)]
            table[0] = 0.0
        tables[bits] = table.half()
    return PackedWeights(
        pack(codes, parent), tables, torch.randn(rows, generator=generator) if bias else None
    )


def relative_error(
    y: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    beside: torch.Tensor | float = 0.0,
) -> float:
    """`beside`: an error [M, N] that is allowed apart from this one."""
    x, w = x.double(), w.double()
    exact, scale = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    return float((((y.double() - exact).abs() - beside).clamp(min=0) / scale.clamp(min=1e-30)).max())


def fixed_point_error(x: torch.Tensor, w: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[M, N], as `pmpd.kernels.cpu_fixed` states it: 1/62, 1/126 or 1/254 of the row's range, and 1/254 of
    the largest of 256 columns of the token."""
    steps = 2 * (2 ** (table.shape[1].bit_length() + 2) - 1)
    x, w, table = x.double().abs(), w.double().abs(), table.double()
    largest = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in x.split(256, dim=1)], dim=1)
    # the token's own rounding meets the rounded table, whose values are at most half a step larger
    reach = table.amax(1) - table.amin(1)
    rounded = largest.sum(1, keepdim=True) * reach / steps
    return x.sum(1, keepdim=True) * reach / steps + (largest @ w.T + rounded) / 254


def allowed(matrix, x: torch.Tensor, w: torch.Tensor, packed: PackedWeights, bits: int):
    return fixed_point_error(x, w, packed.tables[bits]) if isinstance(matrix, FixedMatrix) else 0.0


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    monkeypatch.setenv(native.LEVEL_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parent", range(2, 9))
def test_every_level_equals_the_reference_at_every_precision(level, dtype, parent):
    packed = random_packed(7, 1056, parent, seed=parent, bias=True)
    matrix, reference = cpu.build(packed, dtype), ReferenceMatrix(packed, dtype)
    for bits in packed.tables:
        w = reference.dequantize(bits)
        assert torch.equal(matrix.dequantize(bits), w)
        x = torch.randn(3, 1056).to(dtype)
        tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
        beside = allowed(matrix, x, w, packed, bits)
        assert relative_error(matrix.multiply(x, bits), x, w, packed.bias, beside) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 13),
    words=st.integers(1, 40),
    parent=st.integers(2, 8),
    tokens=st.integers(1, 19),
    bias=st.booleans(),
    extreme=st.booleans(),
    outlier=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_shape_multiplies_as_the_reference(
    dtype, rows, words, parent, tokens, bias, extreme, outlier, seed, data
):
    bits = data.draw(st.integers(2, parent))
    packed = random_packed(rows, 32 * words, parent, seed, bias, extreme)
    x = torch.randn(tokens, 32 * words, generator=torch.Generator().manual_seed(seed))
    if outlier:
        x[:, seed % len(x[0])] *= 1000
    x = x.to(dtype)
    w = ReferenceMatrix(packed, dtype).dequantize(bits)
    tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
    for name in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(native.LEVEL_VARIABLE, name)
            matrix = cpu.build(packed, dtype)
        assert torch.equal(matrix.dequantize(bits), w), name
        beside = allowed(matrix, x, w, packed, bits)
        assert relative_error(matrix.multiply(x, bits), x, w, packed.bias, beside) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 32])
def test_bits_of_a_result_do_not_depend_on_threads(level, dtype, bits, tokens):
    packed = random_packed(301, 704, bits, seed=1, bias=True)
    matrix, x = cpu.build(packed, dtype), torch.randn(tokens, 704).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(matrix.multiply(x, bits))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_bits_of_a_token_do_not_depend_on_its_batch_mates(level, dtype, bits):
    packed = random_packed(9, 1120, bits, seed=2, bias=False)
    matrix, x = cpu.build(packed, dtype), torch.randn(16, 1120).to(dtype)
    alone = torch.cat([matrix.multiply(x[i : i + 1], bits) for i in range(16)])
    for tokens in (2, 3, 5, 8, 11, 16):
        assert torch.equal(matrix.multiply(x[:tokens], bits), alone[:tokens]), (
            f"{tokens} tokens at once differ from one at a time"
        )


def test_many_tokens_and_leading_dimensions_work(level):
    packed = random_packed(37, 96, 4, seed=3, bias=True)
    matrix = cpu.build(packed, torch.float32)
    x = torch.randn(4, 20, 96)
    y = matrix.multiply(x, 3)
    assert y.shape == (4, 20, 37)
    assert (
        relative_error(y.view(-1, 37), x.view(-1, 96), matrix.dequantize(3), packed.bias) < FLOAT32_TOLERANCE
    )
    assert matrix.multiply(x[:0], 3).shape == (0, 20, 37)
    sliced = torch.randn(3, 200)[:, 8:104]  # rows with a stride
    assert (
        relative_error(matrix.multiply(sliced, 4), sliced, matrix.dequantize(4), packed.bias)
        < FLOAT32_TOLERANCE
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(level, dtype, bad):
    matrix = cpu.build(random_packed(4, 544, 2, seed=4, bias=False), dtype)
    x = torch.randn(2, 544).to(dtype)
    x[1, 530] = bad
    y = matrix.multiply(x, 2)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


def test_nothing_of_the_source_is_kept():
    packed = random_packed(8, 512, 4, seed=5, bias=True)
    matrix = cpu.build(packed, torch.float32)
    x = torch.randn(1, 512)
    before = matrix.multiply(x, 4)
    packed.planes.zero_()
    for table in packed.tables.values():
        table.zero_()
    assert torch.equal(matrix.multiply(x, 4), before)
    assert matrix.packed_bytes() < 2 * (4 * 8 * 512 // 8 + 4 * 8 * (4 + 8 + 16))


def test_wrong_inputs_are_refused_with_what_is_allowed():
    matrix = cpu.build(random_packed(4, 64, 3, seed=6, bias=False), torch.float32)
    with pytest.raises(ValueError, match="at 3, 2"):
        matrix.multiply(torch.zeros(1, 64), 4)
    with pytest.raises(ValueError, match="64"):
        matrix.multiply(torch.zeros(1, 32), 2)
    with pytest.raises(ValueError, match=r"holds 3, 2"):
        matrix.dequantize(5)
    assert "float16" in cpu.unavailable(CPU, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_gets_no_memory_says_so_instead_of_answering(level, dtype):
    packed, x = random_packed(8, 512, 4, seed=8, bias=False), torch.randn(2, 512).to(dtype)
    matrix = cpu.build(packed, dtype)
    cache, one = torch.randn(1, 2, 16, 32), torch.tensor([1])
    calls = {"pack": lambda: cpu.build(packed, dtype)}
    calls["attention"] = lambda: cpu.decode_attention(cache[:, :, 0], cache, cache, one - 1, one, 1.0)
    if dtype == torch.bfloat16:
        calls["multiply"] = lambda: matrix.multiply(x, 3)
    if isinstance(matrix, FixedMatrix):
        calls["dequantize"] = lambda: matrix.dequantize(3)
    native.functions().pmpd_limit_memory(0)
    try:
        for name, call in calls.items():
            with pytest.raises(MemoryError, match=name):
                call()
    finally:
        native.functions().pmpd_limit_memory(-1)
    for call in calls.values():
        call()


@pytest.mark.skipif("avx2" not in LEVELS, reason="fixed point needs AVX2")
def test_a_matrix_of_bytes_multiplies_as_stated():
    weight, x = torch.randn(37, 416) + 0.3, torch.randn(9, 416).bfloat16()
    matrix = ByteMatrix(byte_rows(weight.bfloat16()))
    w = matrix.rows.dequantize()
    reach = weight.amax(1) - weight.amin(1)
    assert ((w - weight.bfloat16().float()).abs() <= reach[:, None] / 500).all()
    y = matrix.multiply(x)
    beside = fixed_point_error(x, w, torch.zeros(37, 16))
    assert relative_error(y, x, w, None, beside) < BFLOAT16_TOLERANCE
    assert torch.equal(torch.cat([matrix.multiply(row[None]) for row in x]), y)


def test_tables_of_few_bits_are_nearer_to_their_integers_than_any_fixed_grid_has_them():
    for bits, top in TABLE_MAX.items():
        table = torch.randn(200, 2**bits, generator=torch.Generator().manual_seed(bits))
        integers, lines = quantize_tables(table, bits)
        found = integers[:, : 2**bits].float() * lines[:, :1] + lines[:, 1:]
        reach = table.amax(1) - table.amin(1)
        error = (found - table).abs().amax(1) / reach
        assert int(integers.max()) <= top
        assert error.max() <= 0.5001 / top
        if bits < 4:
            grid = (table - table.amin(1, keepdim=True)) / reach[:, None] * top
            assert error.mean() < 0.75 * float((grid - grid.round()).abs().amax(1).mean()) / top


def test_weights_lie_in_memory_of_their_own_that_goes_with_them():
    first, second = pages.zeros(100), pages.zeros(1 << 20)
    assert not first.any()
    assert not second.any()
    assert all(piece.data_ptr() % 64 == 0 and pages.holds(piece) for piece in (first, second))
    first.fill_(7)
    second.fill_(9)
    assert int(first.sum()) == 700
    large = pages.zeros(pages.CHUNK_BYTES + 1)
    assert len(large) == pages.CHUNK_BYTES + 1
    assert pages.zeros(64).untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    weight = torch.randn(3, 5).bfloat16()
    assert torch.equal(pages.moved(weight), weight)


def test_a_forced_level_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(native.LEVEL_VARIABLE, "avx9000")
    with pytest.raises(ValueError, match="portable"):
        native.active_level()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_library_brings_no_second_openmp_runtime():
    script = (
        "import torch\n"
        "from pmpd.kernels import cpu, native\n"
        "from tests.test_kernels_cpu import random_packed\n"
        "torch.set_num_threads(2)\n"
        "cpu.build(random_packed(1024, 1024, 4, 0, False), torch.float32).multiply(torch.zeros(1, "
        "1024), 4)\n"
        "lines = open('/proc/self/maps').read().split()\n"
        "print(len({w for w in lines if any(n in w for n in ('libgomp', 'libomp', 'libiomp'))}), "
        "native.library().threads)\n"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert out.stdout.strip() == "1 torch's OpenMP threads", out.stdout + out.stderr


def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(native._sources, "fingerprint", lambda: "0" * 16)
    path, problem = native._find()
    assert path is None
    assert "pip install" in problem


def attention_by_definition(q, keys, values, slots, lengths, scale, window):
    rows = []
    for i in range(q.shape[0]):
        stop = int(lengths[i])
        start = max(stop - window, 0) if window else 0
        k, v = (cache[slots[i], :, start:stop].unsqueeze(0).double() for cache in (keys, values))
        query = q[i].unsqueeze(0).unsqueeze(2).double()
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)[
                0, :, 0
            ]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("query_heads", "key_heads", "dim"), [(6, 2, 32), (4, 4, 16), (8, 1, 128)])
def test_ragged_attention_equals_torch_row_by_row(level, query_heads, key_heads, dim, window):
    generator = torch.Generator().manual_seed(7)
    # a cache whose strides are not those of its shape, and rubbish past the lengths
    keys, values = (torch.randn(5, 70, key_heads, dim, generator=generator).transpose(1, 2) for _ in range(2))
    slots, lengths = torch.tensor([4, 0, 2, 1]), torch.tensor([1, 70, 33, 16])
    for slot, length in zip(slots, lengths, strict=True):
        keys[slot, :, length:] = float("nan")
        values[slot, :, length:] = float("nan")
    q = 3 * torch.randn(4, query_heads, dim, generator=generator)
    expected = attention_by_definition(q, keys, values, slots, lengths, 0.3, window)
    result = cpu.decode_attention(q, keys, values, slots, lengths, 0.3, window)
    assert torch.allclose(result.double(), expected, atol=3e-6)
    out = torch.empty_like(q)
    assert (
        cpu.decode_attention(q[:2], keys, values, slots[:2], lengths[:2], 0.3, window, out=out[:2]).data_ptr()
        == out.data_ptr()
    )
    assert torch.equal(out[:2], result[:2]), "a row's attention depends on the other rows"


def test_attention_outside_the_cache_is_refused():
    q, cache = torch.zeros(1, 2, 16), torch.zeros(3, 2, 8, 16)
    for slot, length in ((3, 4), (-1, 4), (0, 9), (0, 0)):
        with pytest.raises(ValueError, match="of a cache"):
            cpu.decode_attention(q, cache, cache, torch.tensor([slot]), torch.tensor([length]), 1.0)
    assert "multiple of 16" in cpu.attention_unavailable(CPU, torch.float32, 24)
