"""Rows of several precisions in one launch: dequantized weights, tiles of rows of one precision each. On the
GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pmpd import PMPDForCausalLM, Scheduler, gpu
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.graph_steps import TILE_BUCKETS, GraphSteps, tiles_of
from pmpd.decode.requests import Request
from pmpd.kernels import dispatch
from pmpd.kernels.dense import LEFT_OF_MEMORY, DenseMatrix, program_of
from pmpd.weights.anyprec import AnyPrecisionLinear
from pmpd.weights.base import Segment
from pmpd.weights.batch_kernel import prefer_dense
from tests.helpers import write_anyprec, write_dense
from tests.test_graph_steps import Graphs
from tests.test_kernels_triton import DEVICE, TOLERANCE, activations, error, interpreter_only_here

NEW_TOKENS = 8
DTYPES = [torch.float16, torch.bfloat16 if torch.cuda.is_available() else torch.float32]
"""The interpreter's dots take bfloat16 for integers."""


@interpreter_only_here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "bias"), [(64, 64, False), (80, 96, True)])
def test_each_tile_is_multiplied_at_its_own_precision(rows, columns, bias, dtype):
    weights = {bits: activations(rows, columns, dtype=dtype, seed=bits) for bits in (4, 3, 2)}
    matrix = DenseMatrix(weights, activations(rows, dtype=dtype) if bias else None)
    which = torch.tensor([2, 0, 1, 0], dtype=torch.int32, device=DEVICE)
    x = activations(64, columns + 32, dtype=dtype)[:, :columns]
    y = matrix.multiply_tiles(x, which)
    for tile, index in enumerate(which.tolist()):
        part = slice(16 * tile, 16 * tile + 16)
        expected = matrix.multiply(x[part].float().to(dtype), matrix.precisions[index])
        assert error(y[part], expected) < TOLERANCE[dtype], f"tile {tile}"


@interpreter_only_here
def test_a_row_does_not_depend_on_the_tiles_beside_it():
    matrix = DenseMatrix({bits: activations(64, 128, seed=bits) for bits in (4, 2)}, None)
    x = activations(64, 128)
    together = matrix.multiply_tiles(x, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE))
    alone = matrix.multiply_tiles(x[32:48], torch.tensor([1], dtype=torch.int32, device=DEVICE))
    assert torch.equal(together[32:48], alone)


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_a_program_fits_the_shared_memory_of_every_gpu(shared):
    """Of compute capability 8.9, 8.0 and 9.0."""
    for rows in (576, 2048, 3072, 11264):
        for tokens in (16, 32, 64):
            found = program_of(rows, tokens, 2, shared)
            assert found.stages >= 2
            assert (found.rows + tokens) * found.columns * 2 * found.stages <= shared - LEFT_OF_MEMORY


def test_rows_have_tiles_of_their_precision_that_fit_a_bucket():
    """Whatever the mix: each row has a place of its own, in a tile of its precision."""
    draw = np.random.default_rng(0)
    for size in (32, 64):
        for _ in range(200):
            counts = draw.integers(0, draw.choice([6, 40, 300]), 3)
            bits = np.repeat([4, 3, 2], counts)
            if not len(bits):
                continue
            stops = np.cumsum(counts)
            segments = [
                Segment(int(stop - count), int(stop), b)
                for b, stop, count in zip((4, 3, 2), stops, counts, strict=True)
                if count
            ]
            places, which, tile = tiles_of(segments, len(bits), (4, 3, 2), size)
            assert len(set(places.tolist())) == len(bits)
            assert np.array_equal(np.asarray([4, 3, 2])[which[places // tile]], bits)
            bucket = next(b for b in TILE_BUCKETS if b >= len(which) * tile)
            assert bucket % tile == 0, f"{bucket} rows do not divide into tiles of {tile}"


@interpreter_only_here
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has real graphs")
def test_rows_of_all_precisions_share_one_captured_step_and_have_the_tokens_of_the_oracle(
    tmp_path, monkeypatch
):
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    packed = write_anyprec(tmp_path / "anyprec", write_dense(tmp_path / "dense", seed=3, **shape))
    model, plain = (
        PMPDForCausalLM(packed, dtype=torch.float32, kernel=kernel).eval()
        for kernel in ("dense", "reference")
    )
    graphs = Graphs()
    monkeypatch.setattr(gpu, "capture", graphs)
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[2, 2])
    prompts = [[5, 6, 7], [9], [70, 80, 90, 100, 3]]
    engine = Engine(model.model, slots=3, max_length=32, sync_every=4, lean=False)
    engine.slots, engine.steps = 2, GraphSteps.of(model.model)  # as on a GPU: the third slot is spare
    assert engine.steps is not None
    assert engine.steps.forward.tiled == (4, 3, 2)
    requests = [Request(str(i), prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)]
    completions = {c.key: c for c in engine.run(requests, scheduler, 4, ())}
    for i, prompt in enumerate(prompts):
        truth = oracle.decode(plain.model, prompt, NEW_TOKENS, 4, (), scheduler, key=str(i))
        assert completions[str(i)].tokens == truth.tokens, f"row {i}"
    mixes = 3 + 3  # of one precision, of two
    assert graphs.replays > mixes
    assert graphs.captures < mixes, "a step was captured for every mix of precisions"


@pytest.mark.parametrize(
    ("rows", "free", "kernel"),
    [
        (64, 1 << 30, "dense"),
        (None, 1 << 30, "dense"),
        (63, 1 << 30, "reference"),
        (64, 1 << 10, "reference"),
    ],
)
def test_many_rows_multiply_with_dequantized_weights_where_memory_allows(
    anyprec_folder, monkeypatch, rows, free, kernel
):
    monkeypatch.setattr(gpu, "free_bytes", lambda device: free)
    monkeypatch.setattr(dispatch, "choose", lambda *_: dispatch.Choice("reference", "a test"))
    model = PMPDForCausalLM(anyprec_folder(), dtype=torch.float16)
    told = prefer_dense(model, torch.device("cuda"), rows)
    assert told.startswith(f"kernel {kernel}: ")
    layers = [module for module in model.modules() if isinstance(module, AnyPrecisionLinear)]
    assert layers
    assert all((layer._kernel == "dense") == (kernel == "dense") for layer in layers)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert prefer_dense(model, torch.device("cuda"), rows) == "", "PMPD_KERNEL goes first"
    assert prefer_dense(model, torch.device("cpu"), rows) == ""
