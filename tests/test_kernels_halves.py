"""The CUDA kernel `halves.cu` without a GPU: its very source, run on the CPU thread by thread, against
float64."""

from __future__ import annotations

import pytest
import torch

from bench import _clusters
from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import halves, launch
from pmpd.kernels.cuda.cut import H100
from pmpd.kernels.cuda.halves import HalvesCut, cut_of, octets_of
from pmpd.kernels.cuda.launch import TYPES
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.kernels.triton import table_halves, tile_codes
from tests.host_kernel import COMPILER, ORDERS, HostKernel, stand_in_halves
from tests.test_kernels_cuda import error, exact, random_codes, random_table, random_x
from tests.test_kernels_triton import TOLERANCE, interpreter_only_here, packed_weights

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")
HALF, BRAIN = torch.float16, torch.bfloat16
CUDA = torch.device("cuda")


def cases() -> list[tuple[str, HalvesCut, torch.dtype, int, int, int, int]]:
    """name, cut, type, tokens, rows, columns, clusters: ragged last tiles, warps without a tile, passes that
    row blocks do not fill, fewer and more passes than clusters."""
    return [
        ("2 bits", HalvesCut(2, 1, 3, 1, 2, 1, 1, 2, 1), HALF, 5, 70, 672, 2),
        ("3 bits, cluster", HalvesCut(3, 2, 5, 2, 2, 2, 1, 2, 1), BRAIN, 13, 100, 1280, 2),
        ("4 bits, shared, cluster of four", HalvesCut(4, 4, 4, 4, 1, 1, 2, 3, 1), HALF, 31, 90, 1024, 1),
        ("4 bits, two tiles", HalvesCut(4, 1, 4, 1, 2, 2, 2, 3, 1), HALF, 8, 150, 1024, 2),
        ("fewer tiles than warps", HalvesCut(3, 1, 3, 2, 2, 1, 1, 1, 1), HALF, 3, 33, 544, 5),
        ("more parts than octets", HalvesCut(2, 1, 8, 8, 1, 1, 1, 2, 1), BRAIN, 7, 70, 2048, 2),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostKernel:
    names = {cut.template(TYPES[dtype]): cut.threads for _, cut, dtype, *_ in cases()}
    return HostKernel(tmp_path_factory.mktemp("halves"), names, halves.SOURCE, halves.Arguments)


@needs_compiler
@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_the_source_gives_the_product_of_the_table_values(host, case):
    _, cut, dtype, tokens, rows, columns, clusters = case
    codes, bias = random_codes(rows, columns, cut.bits), random_x(rows, dtype=dtype, seed=3)
    planes, table = tile_codes(codes, cut.bits, plain=True), random_table(rows, cut.bits).to(dtype)
    words = table_halves(table, cut.bits, dtype)
    spaced = torch.full((tokens, columns + 8), float("nan"), dtype=dtype)
    spaced[:, :columns] = random_x(tokens, columns, dtype=dtype)
    x, outputs = spaced[:, :columns], []
    for order in ORDERS:
        wide = torch.full((tokens, rows + 3), float("nan"), dtype=dtype)
        arguments = halves.arguments_of(planes, words, x, wide[:, :-3], rows, bias)
        host.launch(
            cut.template(TYPES[dtype]), arguments, clusters * cut.parts, cut.shared_bytes, order,
            [planes, bias, words], [spaced], [wide], cut.parts,
        )  # fmt: skip
        assert wide[:, -3:].isnan().all(), "the kernel wrote past its rows"
        outputs.append(wide[:, :-3])
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other), "results depend on the order of threads"
    for token in range(tokens):
        expected = exact(codes, table, x[token]) + bias.double()
        off = error(outputs[0][token], expected)
        assert off < (4e-4 if dtype == HALF else 3e-3), f"token {token}: {off:.1e}"


# -- cuts: where it is taken


def test_octets_are_those_that_the_instances_tell_apart():
    assert [octets_of(tokens) for tokens in (1, 3, 8, 9, 16, 17, 32)] == [1, 1, 1, 2, 2, 4, 4]


def test_every_cut_that_is_tried_fits_and_covers_all_columns():
    for columns in (32, 2048, 4096, 5632, 14336):
        for bits in triton.DIGITS_BITS:
            for tokens in _clusters.TOKENS:
                tried = _clusters.cuts(columns, bits, tokens, H100)
                assert tried, f"K = {columns}, {bits} bits, {tokens} tokens: none"
                for made in tried:
                    assert made.shared_bytes <= H100.block_bytes
                    assert made.threads <= 512
                    assert made.parts * made.warps * made.per_warp * 256 >= columns


def test_a_table_names_the_fastest_cut_only_where_triton_is_slower():
    def row(impl: str, us: float, tokens: int = 8) -> dict:
        return {"n": 64, "k": 512, "bits": 2, "tokens": tokens, "impl": impl, "us": us}

    made = HalvesCut(2, 1, 2, 2, 1, 8, 1, 2, 1)
    rows = [
        row(_clusters.said(made), 9.0), row("clusters p1 w2 r4 s1 l3 b1", 8.5),
        row("clusters p1 w2 r8 s1 l3 b1", 8.7), row("clusters p1 w2 r4 s1 l2 b1", 9.9, 16),
        row("halves w4", 7.0),
    ]  # fmt: skip
    known = {"64x512x2x8": {"warps": 4, "us": 10.0}, "64x512x2x16": {"warps": 4, "us": 10.0}}
    assert _clusters.best(rows, known) == {"64x512x2x8": {"cut": [1, 2, 4, 1, 3, 1], "us": 8.5}}
    assert _clusters.best(rows, {}) == {}, "nothing is known of Triton's"


def test_only_measured_shapes_of_gpus_with_clusters_take_it(monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "gpu_of", lambda device: H100)
    try:
        of_h200 = [cut_of("NVIDIA H200", CUDA, 4096, 4096, 2, tokens) for tokens in (2, 3, 8, 9, 32, 33)]
        assert [made and made.octets for made in of_h200] == [None, 1, 1, 2, 4, None]
        assert cut_of("NVIDIA H200", CUDA, 4096, 4096, 4, 8) is None, "Triton's is faster there"
        assert cut_of("NVIDIA H200", CUDA, 4096, 4352, 2, 8) is None
        assert cut_of("another GPU", CUDA, 4096, 4096, 2, 8) is None
        monkeypatch.setattr(gpu, "capability", lambda device: (8, 0))
        cut_of.cache_clear()
        assert cut_of("NVIDIA H200", CUDA, 4096, 4096, 2, 8) is None, "there are no clusters"
    finally:
        cut_of.cache_clear()


@needs_compiler
@interpreter_only_here
def test_the_matrix_takes_it_over_the_same_planes(monkeypatch, tmp_path):
    launched = stand_in_halves(monkeypatch, tmp_path)
    packed = packed_weights(40, 320, (2, 3, 4), bias=True)
    matrix, reference = CudaMatrix(packed, HALF), ReferenceMatrix(packed, torch.float32)
    assert [matrix.route(tokens, 3) for tokens in (2, 3, 32, 33, 65)] == [
        "bits", "clusters", "clusters", "halves", "dense",
    ]  # fmt: skip
    x = random_x(2, 5, 324)[..., :320]  # rows that are not 16-byte aligned
    y = matrix.multiply(x, 3)
    assert y.shape == (2, 5, 40)
    assert error(y, reference.multiply(x.float(), 3).double()) < TOLERANCE[HALF]
    assert len(launched) == 1
