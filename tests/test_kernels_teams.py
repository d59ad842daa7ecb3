"""`teams_product` of `halves.cu` without a GPU: its very source, run on the CPU thread by thread, against
float64."""

from __future__ import annotations

import json

import pytest
import torch

from bench import _cuda, _team_cuts
from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import halves, launch, teams
from pmpd.kernels.cuda.cut import H100
from pmpd.kernels.cuda.launch import TYPES
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.cuda.teams import MEASURED, TeamsCut
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.kernels.triton import table_halves, tile_codes
from tests.host_kernel import COMPILER, ORDERS, HostKernel, stand_in_teams
from tests.test_kernels_cuda import error, exact, random_codes, random_table, random_x
from tests.test_kernels_triton import TOLERANCE, interpreter_only_here, packed_weights

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")
HALF, BRAIN = torch.float16, torch.bfloat16
CUDA = torch.device("cuda")


def cases() -> list[tuple[str, TeamsCut, torch.dtype, int, int, int, int]]:
    """name ("gated": that too), cut, type, tokens, rows, columns, blocks: ragged last tiles and phases,
    warps without a tile, teams without a row block and with several, rings longer than what a warp has."""
    return [
        ("2 bits, all at once", TeamsCut(2, 1, 3, 4, 2, 2, 2, 1, 1, 1), HALF, 5, 70, 672, 2),
        ("3 bits, kept phases", TeamsCut(3, 1, 5, 4, 2, 3, 1, 3, 1, 1), BRAIN, 8, 180, 1280, 2),
        ("4 bits, phases that change", TeamsCut(4, 2, 7, 4, 2, 2, 1, 2, 1, 1), HALF, 13, 200, 1696, 2),
        ("a shorter last phase", TeamsCut(3, 1, 10, 4, 2, 4, 2, 2, 1, 1), HALF, 8, 150, 2560, 1),
        ("teams of one warp", TeamsCut(3, 2, 3, 4, 1, 2, 2, 2, 1, 1), BRAIN, 16, 300, 608, 2),
        ("one team, a long ring", TeamsCut(2, 1, 5, 4, 4, 6, 1, 2, 1, 1), HALF, 3, 90, 1280, 3),
        ("four octets", TeamsCut(4, 4, 6, 2, 2, 3, 1, 2, 1, 1), HALF, 31, 60, 1536, 1),
        ("gated, kept phases", TeamsCut(3, 2, 4, 4, 1, 2, 2, 2, 1, 1), HALF, 13, 320, 992, 2),
        ("gated, one team", TeamsCut(4, 1, 5, 4, 4, 3, 2, 1, 1, 1), BRAIN, 8, 160, 1280, 2),
        ("gated, phases that change", TeamsCut(2, 1, 6, 4, 2, 2, 1, 2, 1, 1), HALF, 5, 192, 1440, 2),
        ("idle teams", TeamsCut(2, 1, 4, 4, 1, 2, 1, 2, 1, 1), HALF, 8, 40, 1024, 1),
    ]  # fmt: skip


def back(name: str) -> str:
    return "GATED" if name.startswith("gated") else "STORE"


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostKernel:
    names = {cut.template(TYPES[dtype], back(name)): 32 * cut.warps for name, cut, dtype, *_ in cases()}
    return HostKernel(tmp_path_factory.mktemp("teams"), names, halves.SOURCE, halves.Arguments)


@needs_compiler
@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_the_source_gives_the_product_of_the_table_values(host, case):
    name, cut, dtype, tokens, rows, columns, blocks = case
    assert cut.fits(H100)
    codes, bias = random_codes(rows, columns, cut.bits), random_x(rows, dtype=dtype, seed=3)
    planes, table = tile_codes(codes, cut.bits, plain=True), random_table(rows, cut.bits).to(dtype)
    words = table_halves(table, cut.bits, dtype)
    spaced = torch.full((tokens, columns + 8), float("nan"), dtype=dtype)
    spaced[:, :columns] = random_x(tokens, columns, dtype=dtype)
    x, outputs, width = spaced[:, :columns], [], rows // 2 if back(name) == "GATED" else rows
    for order in ORDERS:
        wide = torch.full((tokens, width + 3), float("nan"), dtype=dtype)
        arguments = halves.arguments_of(planes, words, x, wide[:, :-3], rows, bias)
        host.launch(
            cut.template(TYPES[dtype], back(name)), arguments, blocks, cut.shared_bytes, order,
            [planes, bias, words], [spaced], [wide],
        )  # fmt: skip
        assert wide[:, -3:].isnan().all(), "the kernel wrote past its rows"
        outputs.append(wide[:, :-3])
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other), "results depend on the order of threads"
    limit = 4e-4 if dtype == HALF else 3e-3
    for token in range(tokens):
        expected = exact(codes, table, x[token]) + bias.double()
        if width < rows:
            expected, limit = (
                torch.nn.functional.silu(expected[:width]) * expected[width:],
                1e-3 if dtype == HALF else 8e-3,
            )
        off = error(outputs[0][token], expected)
        assert off < limit, f"token {token}: {off:.1e}"


# -- cuts: where it is taken


def test_every_cut_that_is_tried_fits_and_is_one_that_the_kernel_takes():
    for model in ("8B", "1.1B"):
        for place in _team_cuts.places(model):
            for bits in triton.DIGITS_BITS:
                for tokens in (8, 16, 32):
                    tried = _team_cuts.cuts(*place.shape, bits, tokens, H100)
                    assert 0 < len(tried) <= _team_cuts.MOST, f"{place}, {bits} bits, {tokens} tokens"
                    for made in tried:
                        assert made.fits(H100)
                        assert made.phases >= made.held
                        assert made.splits * made.per_warp * 256 >= place.columns


def test_a_grid_leaves_no_multiprocessor_idle_while_teams_have_row_blocks():
    made = TeamsCut(3, 1, 16, 16, 4, 2, 1, 4, 1, 1)
    assert made.grid(384, H100) == 132
    assert made.grid(100, H100) == 100


def test_only_measured_shapes_take_it(monkeypatch):
    measured = dict.fromkeys(MEASURED, 1) | {"warps": 8, "splits": 2, "slots": 2, "held": 8, "layer_us": 1.0}
    table = {"teams": {"64x4096x3x8": measured}}
    monkeypatch.setattr(triton, "settings", lambda name: table)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "gpu_of", lambda device: H100)
    teams.cut_of.cache_clear()
    try:
        found = [teams.cut_of("a GPU", CUDA, 64, 4096, 3, tokens) for tokens in (2, 3, 8, 9)]
        assert [made and made.octets for made in found] == [None, 1, 1, None]
        assert found[1] == TeamsCut(3, 1, 16, 8, 2, 2, 1, 8, 1, 1)
        assert teams.cut_of("a GPU", CUDA, 64, 4096, 2, 8) is None
        assert teams.cut_of("a GPU", torch.device("cpu"), 64, 4096, 3, 8) is None
    finally:
        teams.cut_of.cache_clear()


def test_what_was_timed_gets_into_the_table(monkeypatch, tmp_path):
    """The fastest cut of a matrix, where a step gained by it."""
    path = tmp_path / "table.json"
    monkeypatch.setattr(_cuda, "settings_file", lambda gpu: path)
    cut = dict(zip(MEASURED, (8, 2, 2, 1, 8, 1, 1), strict=True))
    row = {"shape": "a", "n": 64, "k": 4096, "bits": 3, "impl": "teams", "cut": cut, "layer_us": 7.123}
    rows = [row | {"tokens": 8, "best_team": True}, row | {"tokens": 16, "best_team": False}]
    _cuda.write_settings("a GPU", _cuda.best_settings(rows), rows)
    assert json.loads(path.read_text())["teams"] == {"64x4096x3x8": cut | {"layer_us": 7.12}}


@needs_compiler
@interpreter_only_here
def test_the_matrix_takes_it_over_the_same_planes(monkeypatch, tmp_path):
    launched = stand_in_teams(monkeypatch, tmp_path)
    packed = packed_weights(64, 320, (2, 3, 4), bias=True)
    taken, reference = CudaMatrix(packed, HALF), ReferenceMatrix(packed, torch.float32)
    assert [taken.route(tokens, 3) for tokens in (2, 3, 32, 33)] == ["bits", "teams", "teams", "halves"]
    x = random_x(2, 5, 324)[..., :320]  # rows that are not 16-byte aligned
    y = taken.multiply(x, 3)
    assert y.shape == (2, 5, 64)
    expected = reference.multiply(x.float(), 3)
    assert error(y, expected.double()) < TOLERANCE[HALF]
    assert taken.gates(10, 3)
    assert not taken.gates(33, 3)
    gate, up = expected.view(10, 64).split(32, 1)
    y = taken.multiply_teams(x.reshape(10, 320), 3, gated=True)
    assert error(y, (torch.nn.functional.silu(gate) * up).double()) < 2 * TOLERANCE[HALF]
    assert len(launched) == 2
