"""What only a GPU can prove of `pmpd.kernels.cuda` (`pytest -m gpu`): the machine code, real launches that
overlap, graphs. `tests/sanitize_cuda.sh` runs the smaller ones under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch

from bench._contenders import random_weights
from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import emulation, halves, teams
from pmpd.kernels.cuda.cut import BITS
from pmpd.kernels.cuda.launch import Norm
from pmpd.kernels.cuda.matrix import CudaMatrix, unavailable
from pmpd.kernels.reference import ReferenceMatrix
from tests import test_lean_cuda as lean
from tests.gpu_replays import assert_replays_equal
from tests.test_kernels_cuda import error, norm_by_definition
from tests.test_kernels_triton import TOLERANCE, activations, packed_weights

CUDA = torch.device("cuda")


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return unavailable(CUDA, torch.float16)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
COLUMNS = (32, 288, 2048, 2912, 4096, 5632, 14336, 28672)
"""One tile and less, ragged last tiles, chunks, more tiles than registers keep."""


def exact(packed, x: torch.Tensor, bits: int) -> torch.Tensor:
    y = x.double() @ ReferenceMatrix(packed, torch.float32).dequantize(bits).double().T
    return y if packed.bias is None else y + packed.bias.to(x.dtype).double()


@pytest.mark.parametrize("columns", COLUMNS)
def test_errors_against_float64(columns):
    """Both types, one and two tokens, every precision, an outlier of 3000 standard deviations; N fills no
    tile."""
    packed = packed_weights(1000 if columns < 10000 else 200, columns, BITS, bias=True)
    for dtype in (torch.float16, torch.bfloat16):
        matrix = CudaMatrix(packed, dtype)
        for bits in BITS:
            for tokens in (1, 2):
                if not matrix.fits((bits,) * tokens):
                    assert columns > 14336, "a cut is missing"
                    continue
                for outlier in (0.0, 3000.0):
                    x = activations(tokens, columns, dtype=dtype, seed=bits)
                    x[:, columns // 3] += outlier
                    y = matrix.multiply(x, bits, "bits")
                    off = error(y, exact(packed, x, bits))
                    assert off < TOLERANCE[dtype] / 2, (
                        f"{dtype}, {bits} bits, {tokens} tokens, {outlier}: {off:.1e}"
                    )


@pytest.mark.parametrize("bits", BITS)
def test_the_machine_code_gives_the_bits_of_the_oracle(bits):
    packed = packed_weights(80, 1184, (bits,), bias=True)
    matrix = CudaMatrix(packed, torch.float16)
    x = activations(1, 1184)
    cut = matrix._cut((bits,))
    codes = emulation_codes(packed, bits)
    expected = emulation.product(
        codes, matrix._tables[bits]["coefficients"].cpu(), x[0].cpu(), cut, bits, packed.bias.half().cpu()
    )
    assert torch.equal(matrix.multiply(x, bits, "bits")[0].cpu(), expected)


def emulation_codes(packed, bits: int) -> torch.Tensor:
    from pmpd.kernels.bitplanes import unpack

    return unpack(packed.planes.cpu(), bits)


def test_rows_of_two_precisions_in_one_launch():
    packed = packed_weights(1000, 4096, (2, 3, 4), bias=True)
    matrix = CudaMatrix(packed, torch.float16)
    x = activations(2, 4096)
    for bits in ((4, 3), (2, 4), (3, 2)):
        y = matrix.multiply_each(x, bits)
        for row, b in enumerate(bits):
            assert error(y[row], exact(packed, x[row : row + 1], b)[0]) < 1e-3, f"{bits}, row {row}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2])
def test_norm_and_silu_within_the_product(tokens, dtype):
    packed = packed_weights(2 * 1008, 4096, (2, 3, 4))
    matrix = CudaMatrix(packed, dtype)
    x, delta = (activations(tokens, 4096, dtype=dtype, seed=s) for s in (1, 2))
    weight = 1 + 0.1 * activations(4096, dtype=dtype, seed=3)
    total, normed = norm_by_definition(x, delta, weight, 1e-5)
    for bits in (2, 3, 4):
        norm = Norm(weight, 1e-5, delta, torch.full_like(x, float("nan")))
        y = matrix.multiply_each(x, (bits,) * tokens, norm, gated=True)
        assert torch.equal(norm.residual, total)
        both = exact(packed, normed, bits)
        expected = torch.nn.functional.silu(both[:, :1008]) * both[:, 1008:]
        assert error(y, expected) < 2 * TOLERANCE[dtype], f"{bits} bits"


def chain(matrices: list[CudaMatrix], x: torch.Tensor, bits: int) -> torch.Tensor:
    for matrix in matrices:
        x = matrix.multiply(x, bits, "bits")
    return x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dependent_launches_that_overlap_give_the_same_bits_a_thousand_times(bits):
    """24 products in a row, each reading what the one in front wrote, in a graph."""
    packed = packed_weights(4096, 4096, (2, 3, 4))
    for table in packed.tables.values():
        table.div_(table.float().std() * 64)  # sums of 4096 terms keep their size
    matrix = CudaMatrix(packed, torch.float16)
    matrices = [matrix, *(CudaMatrix(packed, torch.float16) for _ in range(23))]
    x = activations(1, 4096)
    eager = chain(matrices, x, bits)
    assert eager.isfinite().all()
    assert_replays_equal(lambda: chain(matrices, x, bits), eager)


def test_a_fused_step_gives_the_logits_of_transformers():
    lean.test_two_rows_of_two_precisions_share_the_launches_of_a_fused_step(None, None)


@torch.inference_mode()
def test_a_fused_step_replayed_a_thousand_times_gives_the_same_bits():
    lean.check_replays(CudaMatrix)


@torch.inference_mode()
def test_a_graph_of_fused_steps_gives_the_tokens_of_eager_ones():
    from pmpd.decode.graphs import StepGraphs
    from pmpd.weights.base import Segment

    model, packed = lean.small_model(layers=2, dtype=torch.float16)
    forward = lean.lean(model, packed, torch.float16, CudaMatrix)
    shape = (4, lean.KV_HEADS, 64, lean.DIM)

    def decode(captured: bool) -> tuple[torch.Tensor, str | None]:
        keys, values = ([torch.zeros(shape, device=CUDA).half() for _ in range(2)] for _ in range(2))

        def buffers(rows):
            return {
                "ids": torch.arange(rows, device=CUDA) + 3,
                "slots": torch.arange(rows, device=CUDA),
                "positions": torch.zeros(rows, dtype=torch.int64, device=CUDA),
            }

        def step(static, layout):
            logits = forward(static["ids"], static["slots"], static["positions"], layout, keys, values, 64)
            static["ids"].copy_(logits.argmax(-1))
            static["positions"].add_(1)

        graphs = StepGraphs(step, buffers, buckets=(2,), **({} if captured else {"capture": None}))
        layout = (Segment(0, 1, 4), Segment(1, None, 3))
        tokens = [graphs.run(2, layout)["ids"].clone() for _ in range(12)]
        return torch.stack(tokens, 1), graphs.why_eager

    (graph_tokens, why), (eager_tokens, _) = decode(True), decode(False)
    assert why is None, f"the step was not captured: {why}"
    assert torch.equal(graph_tokens, eager_tokens)


def clusters_or_skip(packed, dtype: torch.dtype, bits: int, tokens: int) -> CudaMatrix:
    """A matrix whose tokens take `halves.cu`."""
    matrix = CudaMatrix(packed, dtype)
    if matrix.route(tokens, bits) != "clusters":
        pytest.skip(f"the autotune table of {gpu.device_name(CUDA)} names no cut for this shape")
    return matrix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [4096, 14336])
def test_errors_of_clusters_against_float64(columns, dtype):
    """Octets that are full and that are not, an outlier of 3000 standard deviations."""
    packed = packed_weights(4096, columns, (2,), bias=True)
    matrix = clusters_or_skip(packed, dtype, 2, 8)
    for tokens in (3, 8, 13, 16, 24, 32):
        x = activations(tokens, columns, dtype=dtype, seed=tokens)
        x[:, columns // 3] += 3000.0
        assert matrix.route(tokens, 2) == "clusters"
        off = error(matrix.multiply(x, 2), exact(packed, x, 2))
        assert off < TOLERANCE[dtype] / 2, f"{tokens} tokens: {off:.1e}"


def test_small_clusters_write_only_their_rows():
    """For the sanitizer: one instance of each kind of cluster, on a few rows."""
    packed = packed_weights(100, 1024, (3,), bias=True)
    tables = CudaMatrix(packed, torch.float16)._tables[3]["halves"]
    planes, bias = CudaMatrix(packed, torch.float16)._tiles.planes, packed.bias.half().to(CUDA)
    for octets, cut in ((1, (1, 2, 2, 1, 2, 1)), (2, (2, 2, 1, 2, 2, 1)), (4, (4, 1, 2, 1, 2, 1))):
        x = activations(8 * octets - 3, 1024)
        y = halves.product(halves.HalvesCut(3, octets, 4, *cut), planes, tables, x, 100, bias)
        assert error(y, exact(packed, x, 3)) < 1e-3, f"{octets} octets"


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_clusters_give_the_same_bits_a_thousand_times(tokens):
    """12 products in a row, each reading what the one in front wrote, in a graph."""
    packed = packed_weights(4096, 4096, (2,))
    for table in packed.tables.values():
        table.div_(table.float().std() * 64)  # sums of 4096 terms keep their size
    matrices = [clusters_or_skip(packed, torch.float16, 2, tokens) for _ in range(12)]
    x = activations(tokens, 4096)

    def chain_of() -> torch.Tensor:
        y = x
        for matrix in matrices:
            y = matrix.multiply(y, 2)
        return y

    eager = chain_of()
    assert eager.isfinite().all()
    assert_replays_equal(chain_of, eager)


TEAMS = {  # octets: cuts for K = 1024: activations kept and changing, teams of several warps and of one
    1: [(8, 2, 2, 1, 2, 2, 2), (8, 1, 3, 1, 2, 1, 1)],
    2: [(16, 4, 2, 1, 1, 1, 1)],
    4: [(8, 1, 2, 1, 2, 1, 1)],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_small_teams_write_only_their_rows(bits, dtype):
    """For the sanitizer too: N fills no tile, an outlier of 3000 standard deviations."""
    packed = packed_weights(1100, 1024, (2, 3, 4), bias=True)
    matrix = CudaMatrix(packed, dtype)
    for octets, cuts in TEAMS.items():
        x = activations(8 * octets - 3, 1024, dtype=dtype, seed=bits)
        x[:, 341] += 3000.0
        for cut in cuts:
            y = matrix.multiply_teams(x, bits, teams.TeamsCut(bits, octets, 4, *cut))
            off = error(y, exact(packed, x, bits))
            assert off < TOLERANCE[dtype] / 2, f"{octets} octets, {cut}: {off:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_within_the_product_of_small_teams(dtype):
    packed = packed_weights(2 * 1008, 1024, (2, 3, 4), bias=True)
    matrix = CudaMatrix(packed, dtype)
    for octets, cuts in TEAMS.items():
        for bits, cut in [(bits, cut) for bits in (2, 3, 4) for cut in cuts]:
            x = activations(8 * octets - 3, 1024, dtype=dtype, seed=bits)
            y = matrix.multiply_teams(x, bits, teams.TeamsCut(bits, octets, 4, *cut), gated=True)
            both = exact(packed, x, bits)
            expected = torch.nn.functional.silu(both[:, :1008]) * both[:, 1008:]
            assert error(y, expected) < 2 * TOLERANCE[dtype], f"{bits} bits, {octets} octets, {cut}"


@pytest.mark.parametrize("held", [2, 4])
@pytest.mark.parametrize("tokens", [8, 16])
def test_teams_give_the_same_bits_a_thousand_times(tokens, held):
    """12 products in a row, each reading what the one in front wrote, in a graph."""
    packed = packed_weights(4096, 4096, (3,))
    for table in packed.tables.values():
        table.div_(table.float().std() * 64)  # sums of 4096 terms keep their size
    matrices = [CudaMatrix(packed, torch.float16) for _ in range(12)]
    cut = teams.TeamsCut(3, tokens // 8, 16, 16, 4, 2, 1, held, 1, 1)
    x = activations(tokens, 4096)

    def chain_of() -> torch.Tensor:
        y = x
        for matrix in matrices:
            y = matrix.multiply_teams(y, 3, cut)
        return y

    eager = chain_of()
    assert eager.isfinite().all()
    assert_replays_equal(chain_of, eager)


def test_every_cut_of_teams_in_the_table_gives_the_product():
    table = triton.settings(gpu.device_name(CUDA)).get("teams", {})
    if not table:
        pytest.skip(f"the autotune table of {gpu.device_name(CUDA)} names no cut of teams")
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for key in table:
        rows, columns, bits, tokens = map(int, key.split("x"))
        shapes.setdefault((rows, columns), []).append((bits, tokens))
    for (rows, columns), cases in shapes.items():
        packed = random_weights(rows, columns, (4, 3, 2), 1, CUDA)
        matrix = CudaMatrix(packed, torch.float16)
        for bits, tokens in cases:
            for m in (tokens, tokens // 2 + 1):
                x = activations(m, columns, seed=m)
                assert matrix.route(m, bits) == "teams"
                off = error(matrix.multiply(x, bits), exact(packed, x, bits))
                assert off < TOLERANCE[torch.float16] / 2, f"{rows}x{columns}, {bits} bits, {m}: {off:.1e}"
