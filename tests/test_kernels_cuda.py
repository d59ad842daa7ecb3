"""The CUDA kernel `bits.cu` without a GPU: its arithmetic in plain PyTorch against float64, and its very
source, run on the CPU thread by thread, against that."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.kernels import dispatch
from pmpd.kernels.cuda import compiler, emulation
from pmpd.kernels.cuda.coefficients import coefficients, subset_codes
from pmpd.kernels.cuda.cut import BITS, H100, TILE_COLUMNS, Cut, Gpu, cut
from pmpd.kernels.cuda.launch import Norm
from pmpd.kernels.cuda.matrix import CudaMatrix, unavailable
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.kernels.triton import merge, tile_codes
from tests.host_kernel import COMPILER, HostKernel, Instance, stand_in
from tests.test_kernels_triton import TOLERANCE, interpreter_only_here, packed_weights

A100, ADA = Gpu(108, 166912, 167936), Gpu(142, 101376, 102400)


def random_codes(rows: int, columns: int, parent: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**parent, (rows, columns), generator=draw, dtype=torch.uint8)


def random_table(rows: int, bits: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed + bits)
    return (0.02 * torch.randn(rows, 2**bits, generator=draw)).sort(1).values.half()


def random_x(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(codes: torch.Tensor, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    return torch.gather(table.double(), 1, codes.long()) @ x.double()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_table_is_the_sum_of_its_coefficients_over_subsets_of_the_code(bits):
    table = random_table(20, bits)
    worth = coefficients(table, bits)
    assert worth.shape == (32, 2**bits)
    assert worth.dtype == torch.float32
    codes = subset_codes(bits)
    for code in (0, 1, 2**bits - 1, 2**bits // 3):
        value = sum(worth[:20, s].double() for s, has in enumerate(codes) if code & has == has)
        assert torch.allclose(value, table[:, code].double(), atol=1e-7 * 2**bits)


@pytest.mark.parametrize("outlier", [0, 1000, 3000])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_arithmetic_rounds_no_more_than_the_type_of_the_result(bits, outlier):
    """16-bit fixed point with a scale a warp: of the size of a float16 result's rounding. A warp's n columns
    are rounded in steps of 1 / 32767 of their largest activation: sqrt(n / 12) steps in all."""
    codes, table, x = random_codes(64, 4096, bits), random_table(64, bits), random_x(4096)
    if outlier:
        x[1234] = float(outlier)
    worth, expected = coefficients(table, bits), exact(codes, table, x)
    made = cut(64, 4096, (bits,))
    assert error(emulation.product(codes, worth, x, made, bits), expected) < 6e-4
    steps = math.sqrt(made.per_warp * TILE_COLUMNS / 12)
    assert error(emulation.product(codes, worth, x.float(), made, bits), expected) < 1.3 * steps / 32767


def test_coefficients_of_16_bits_would_cost_more_than_the_rounding_of_the_result():
    """Why they are float32: differences of table values lose what the values themselves keep."""
    codes, table, x = random_codes(64, 4096, 4), random_table(64, 4), random_x(4096)
    worth, expected = coefficients(table, 4), exact(codes, table, x)
    wide, short = (
        error(emulation.product(codes, some, x.float(), cut(64, 4096, (4,)), 4), expected)
        for some in (worth, worth.half().float())
    )
    assert short > 5 * wide
    assert short > error(expected.half(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    codes, table, x = random_codes(16, 512, 3), random_table(16, 3), random_x(512)
    x[77] = value
    y = emulation.product(codes, coefficients(table, 3), x, cut(16, 512, (3,)), 3)
    assert not y.isfinite().any()


# -- cuts


@pytest.mark.parametrize("gpu", [H100, A100, ADA])
def test_every_plan_fits_the_gpu_and_covers_all_columns(gpu):
    for columns in (32, 256, 288, 576, 1536, 2048, 2912, 4096, 5632, 8192, 11008, 14336, 18944, 28672):
        for bits in [(b,) for b in BITS] + [(b, c) for b in (2, 3, 4) for c in range(2, b + 1)]:
            made = cut(4096, columns, bits, gpu)
            if made is None and len(bits) == 2 and columns * 4 > gpu.block_bytes / 2:
                continue  # two tokens' activations leave no room for a ring: each takes a launch
            assert made is not None, f"K = {columns}, {bits} bits: no cut"
            assert made.block_bytes() <= gpu.block_bytes
            assert made.splits * made.per_warp * 256 >= columns
            assert (made.splits - 1) * made.per_warp < made.tiles or made.splits <= made.tiles
            assert made.teams * made.splits == made.warps <= 16
            assert made.slots <= made.per_warp
            assert made.live in (1, made.passes)


def test_a_team_has_two_row_blocks_and_no_more_columns_under_one_scale_than_allowed():
    for rows, columns, bits, warps, splits in (
        (28672, 4096, 3, 16, 4), (14336, 4096, 3, 16, 8), (14336, 4096, 4, 8, 4), (4096, 14336, 2, 16, 16),
        (1 << 20, 4096, 2, 16, 1), (1 << 20, 14336, 2, 16, 4), (576, 576, 3, 16, 2),
    ):  # fmt: skip
        made = cut(rows, columns, (bits,), H100)
        assert (made.warps, made.splits) == (warps, splits), f"{rows} x {columns}, {bits} bits"
        assert made.per_warp * TILE_COLUMNS <= 4096


def test_fewer_resident_blocks_leave_room_for_the_next_launch():
    full, half = (cut(1 << 20, 4096, (3,), warps=8, slots=4, blocks=2, resident=n) for n in (2, 1))
    assert (full.resident, half.resident) == (2, 1)
    assert half.template("FLOAT16") == full.template("FLOAT16"), "the same machine code"
    assert half.grid(1 << 16, H100) == H100.multiprocessors == full.grid(1 << 16, H100) // 2


def test_a_k_that_no_ring_has_room_for_has_no_plan():
    assert cut(64, 1 << 20, (4,), H100) is None


# -- the source itself, thread by thread


def own(bits: tuple[int, ...], tiles: int, warps: int, splits: int, slots: int, live: int = 1) -> Cut:
    return Cut(bits, tiles, warps, splits, slots, live, 1, 1)


def cases() -> list[tuple[str, Instance, int, int, int]]:
    """name, instance, rows, columns, blocks: rings as long as a row block and shorter, one team and several,
    passes together and one after the other, ragged last tiles, rows and columns that fill no tile, more and
    fewer row blocks than teams."""
    half, brain = torch.float16, torch.bfloat16
    return [
        ("two bits, one team", Instance(own((2,), 4, 2, 2, 2)), 100, 1024, 2),
        ("two bits, a team a warp", Instance(own((2,), 3, 2, 1, 3)), 90, 672, 2),
        ("three bits, ragged, bfloat16", Instance(own((3,), 5, 2, 2, 3), brain), 70, 1280 - 32, 2),
        ("three bits, short ring, two teams", Instance(own((3,), 7, 4, 2, 2)), 150, 1792 - 64, 1),
        ("three bits, more teams than row blocks", Instance(own((3,), 2, 4, 1, 1)), 40, 512, 2),
        ("four bits, both passes", Instance(own((4,), 6, 4, 2, 2, 2)), 200, 1536, 2),
        ("four bits, both passes, ragged", Instance(own((4,), 7, 4, 4, 1, 2)), 100, 1792 - 224, 3),
        ("four bits, a pass after the other", Instance(own((4,), 7, 2, 2, 3)), 50, 1792 - 224, 1),
        ("four bits, a team a warp, chunks", Instance(own((4,), 9, 2, 1, 4)), 70, 2304, 1),
        ("five bits", Instance(own((5,), 3, 2, 2, 2)), 33, 544, 1),
        ("six bits, two teams", Instance(own((6,), 2, 4, 2, 1)), 33, 320, 2),
        ("two tokens of three bits", Instance(own((3, 3), 4, 2, 1, 3), brain), 60, 1024, 1),
        ("two tokens of two bits", Instance(own((2, 2), 3, 2, 2, 2)), 40, 576, 2),
        ("two tokens of four bits", Instance(own((4, 4), 4, 4, 2, 2)), 40, 1024, 2),
        ("tokens of four and three bits", Instance(own((4, 3), 5, 2, 2, 2)), 70, 1280 - 96, 1),
        ("tokens of four and two bits", Instance(own((4, 2), 2, 1, 1, 1)), 33, 512, 1),
        ("tokens of three and two bits", Instance(own((3, 2), 3, 4, 2, 1)), 100, 640, 2),
        ("one warp, one tile", Instance(own((4,), 1, 1, 1, 1, 2), half), 5, 32, 1),
        ("as cut for SmolLM2", Instance(cut(576, 576, (4,))), 64, 576, 2),
    ]  # fmt: skip


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostKernel:
    return HostKernel(tmp_path_factory.mktemp("host"), {case[1].name: case[1].threads for case in cases()})


@needs_compiler
@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_the_source_gives_what_the_emulation_says(host, case):
    _, instance, rows, columns, grid = case
    bits, dtype = instance.cut.bits, instance.dtype
    codes, x = random_codes(rows, columns, bits[0]), random_x(len(bits), columns, dtype=dtype)
    bias = random_x(rows, dtype=dtype, seed=3)
    worth = {b: coefficients(random_table(rows, b), b) for b in bits}
    planes = tile_codes(codes, bits[0], plain=True)
    spaced = torch.full((len(bits), columns + 8), float("nan"), dtype=dtype)
    spaced[:, :columns] = x
    worths = [worth[b] for b in sorted(worth, reverse=True)]
    y = host.product(instance, planes, worths, spaced[:, :columns], rows, grid, bias)
    for token, b in enumerate(bits):
        expected = emulation.product(codes >> (bits[0] - b), worth[b], x[token], instance.cut, b, bias)
        assert torch.equal(y[token], expected), f"token {token}: {error(y[token], expected.double()):.1e}"
        truth = exact(codes >> (bits[0] - b), random_table(rows, b), x[token]) + bias.double()
        assert error(y[token], truth) < (8e-4 if dtype == torch.float16 else 6e-3)


def norm_by_definition(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new residual and its RMS norm, rounded where transformers rounds."""
    total = x if delta is None else (x.float() + delta.float()).to(x.dtype)
    wide = total.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return total, weight * normal.to(x.dtype)


def fused_cases() -> list[tuple[str, Instance, int, int, int, bool]]:
    """name, instance, rows, columns, blocks, whether something is added before the norm"""
    half, brain = torch.float16, torch.bfloat16
    return [
        ("norm", Instance(own((3,), 3, 2, 2, 2), half, "NORM"), 40, 576, 2, False),
        ("norm, two teams", Instance(own((2,), 6, 4, 2, 2), half, "NORM"), 100, 1536, 1, False),
        ("sum and norm, two tokens", Instance(own((4, 3), 3, 2, 2, 2), brain, "NORM"), 40, 544, 1, True),
        ("gated", Instance(own((2,), 3, 2, 2, 2), half, "PLAIN", "GATED"), 160, 576, 2, False),
        ("gated, teams", Instance(own((4,), 4, 4, 2, 2, 2), half, "NORM", "GATED"), 96, 1024, 3, True),
        ("gated, a team a warp", Instance(own((3,), 1, 2, 1, 1), brain, "NORM", "GATED"), 128, 256, 1, True),
        ("gated, two tokens", Instance(own((4, 2), 3, 4, 2, 2), half, "NORM", "GATED"), 96, 768, 2, True),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def fused_host(tmp_path_factory) -> HostKernel:
    return HostKernel(tmp_path_factory.mktemp("fused"), {c[1].name: c[1].threads for c in fused_cases()})


@needs_compiler
@pytest.mark.parametrize("case", fused_cases(), ids=lambda case: case[0])
def test_what_is_fused_gives_what_its_stages_give(fused_host, case):
    """Norm in front, silu(gate) * up behind: the emulation's product between stages by definition. Their sums
    are added in another order, so values may differ by the last bit of the type."""
    _, instance, rows, columns, grid, adds = case
    bits, dtype = instance.cut.bits, instance.dtype
    codes, x = random_codes(rows, columns, bits[0]), random_x(len(bits), columns, dtype=dtype)
    delta = random_x(len(bits), columns, dtype=dtype, seed=5) if adds else None
    weight = 1 + 0.1 * random_x(columns, dtype=dtype, seed=6)
    bias = random_x(rows, dtype=dtype, seed=3)
    worth = {b: coefficients(random_table(rows, b), b) for b in bits}
    total, normed = norm_by_definition(x, delta, weight, 1e-5) if instance.front == "NORM" else (None, x)
    norm = None if total is None else Norm(weight, 1e-5, delta, torch.empty_like(x))
    planes, worths = tile_codes(codes, bits[0], plain=True), [worth[b] for b in sorted(worth, reverse=True)]
    y = fused_host.product(instance, planes, worths, x, rows, grid, bias, norm)
    if norm:
        assert torch.equal(norm.residual, total)
    for token, b in enumerate(bits):
        plain = emulation.product(codes >> (bits[0] - b), worth[b], normed[token], instance.cut, b, bias)
        expected = plain
        if instance.back == "GATED":
            gate, up = plain[: rows // 2], plain[rows // 2 :]
            expected = torch.nn.functional.silu(gate.float()).to(dtype) * up
        assert error(y[token], expected.double()) < {torch.float16: 3e-4, torch.bfloat16: 2e-3}[dtype]


# -- the matrix: which route, what memory, and every route over one copy of the planes


@pytest.fixture
def launched(monkeypatch, tmp_path) -> list[str]:
    return stand_in(monkeypatch, tmp_path)


@needs_compiler
@interpreter_only_here
def test_every_route_of_the_matrix_reads_the_same_planes(launched):
    packed = packed_weights(9, 96, (4, 5), bias=True)
    matrix, reference = CudaMatrix(packed, torch.float16), ReferenceMatrix(packed, torch.float16)
    assert torch.equal(matrix.dequantize(5), reference.dequantize(5))
    x = random_x(2, 96)
    for route in ("bits", "halves"):
        y = matrix.multiply(x, 4, route)
        assert error(y, reference.multiply(x, 4).double()) < TOLERANCE[torch.float16], route
    assert len(launched) == 1
    assert [matrix.route(tokens, 4) for tokens in (0, 1, 2, 3, 64, 65)] == [
        "halves", "bits", "bits", "halves", "halves", "dense",
    ]  # fmt: skip
    assert [matrix.route(tokens, 5) for tokens in (1, 2, 3)] == ["halves"] * 3


@needs_compiler
@interpreter_only_here
def test_two_rows_of_two_precisions_take_one_launch_in_either_order(launched):
    packed = packed_weights(24, 320, (2, 3, 4), bias=True)
    matrix, reference = CudaMatrix(packed, torch.float16), ReferenceMatrix(packed, torch.float32)
    x = random_x(2, 328)[:, :320]
    for bits in ((4, 2), (2, 4)):
        y = matrix.multiply_each(x, bits)
        for row, b in enumerate(bits):
            expected = reference.multiply(x[row].float(), b)
            assert error(y[row], expected.double()) < TOLERANCE[torch.float16], f"{bits}, row {row}"
    assert len(launched) == 2
    assert len(set(launched)) == 1


@needs_compiler
@interpreter_only_here
def test_merged_matrices_are_views_that_multiply_as_before(launched):
    parts = [packed_weights(rows, 64, (2, 3), bias=rows == 16, seed=rows) for rows in (32, 16, 40)]
    matrices = [CudaMatrix(part, torch.float16) for part in parts]
    x = random_x(1, 64)
    before = [matrix.multiply(x, 3) for matrix in matrices]
    whole = merge(matrices)
    assert type(whole) is CudaMatrix
    assert torch.equal(whole.multiply(x, 3), torch.cat(before, dim=1))
    for matrix, y in zip(matrices, before, strict=True):
        assert torch.equal(matrix.multiply(x, 3), y)
        assert (
            matrix._tiles.planes.untyped_storage().data_ptr()
            == whole._tiles.planes.untyped_storage().data_ptr()
        )


@interpreter_only_here
def test_memory_is_one_copy_of_the_planes_and_eight_bytes_a_table_value():
    rows, columns, precisions = 32, 4096, (2, 3, 4)
    matrix = CudaMatrix(packed_weights(rows, columns, precisions), torch.float16)
    planes = rows * columns * max(precisions) // 8
    tables = rows * sum(8 * 2**bits for bits in precisions)
    assert matrix.packed_bytes() == planes + tables
    assert tables / planes == pytest.approx(0.11, abs=0.005)
    coefficients_share = sum(parts["coefficients"].nbytes for parts in matrix._tables.values()) / planes
    assert coefficients_share == pytest.approx(0.055, abs=0.005)


def test_why_it_can_not_be_used_is_said(monkeypatch):
    cuda = torch.device("cuda")
    assert "not in float32" in unavailable(cuda, torch.float32)
    assert "not on cpu" in unavailable(torch.device("cpu"), torch.float16)
    for capability in ((7, 5), (10, 0), (12, 0)):
        monkeypatch.setattr(gpu, "capability", lambda device, found=capability: found)
        assert "1-bit tensor cores" in unavailable(cuda, torch.float16), capability
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(compiler, "bindings", lambda name: importlib.import_module("no_such_module"))
    for cached in (compiler.problem, compiler._version):
        cached.cache_clear()
    try:
        assert "cuda-bindings" in unavailable(cuda, torch.float16)
        with pytest.raises(UserError, match="cuda-bindings"):
            dispatch.choose(cuda, torch.float16, "cuda")
        choice = dispatch.choose(cuda, torch.float16)
        assert choice.name == "triton"
        assert "cuda-bindings" in choice.reason, "why the faster one is not taken is said"
    finally:
        for cached in (compiler.problem, compiler._version):
            cached.cache_clear()


# -- the compiler


needs_nvrtc = pytest.mark.skipif(compiler.problem() is not None, reason=str(compiler.problem()))


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_it_compiles_for_gpus_with_1_bit_tensor_cores(architecture):
    made = cut(4096, 4096, (4,))
    binary = compiler.compile_now(made.template("BFLOAT16", "NORM", "GATED"), architecture)
    assert binary.code[:4] == b"\x7fELF"
    assert binary.symbol.encode() in binary.code


@needs_nvrtc
def test_machine_code_is_kept_on_disk_by_all_that_it_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    name = cut(64, 256, (2,)).template("FLOAT16")
    first = compiler.compiled(name, (9, 0))
    monkeypatch.setattr(compiler, "compile_now", lambda *_: pytest.fail("compiled again"))
    assert compiler.compiled(name, (9, 0)) == first
    keys = {
        compiler.cache_key(*other)
        for other in (
            (name, "sm_90", (13, 0)),
            (name, "sm_80", (13, 0)),
            (name, "sm_90", (13, 1)),
            ("x", "sm_90", (13, 0)),
        )
    }
    assert len(keys) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    assert compiler.compiled(name, (9, 0)).code[:4] == b"\x7fELF", (
        "a folder that can't be written only costs time"
    )


@needs_nvrtc
def test_what_does_not_compile_is_said_in_the_compilers_words():
    with pytest.raises(RuntimeError, match="bits_product"):
        compiler.compile_now("bits_product<FLOAT16, PLAIN, STORE, 1, 0, 1, 1, 1, 1, 1>", "sm_90")
