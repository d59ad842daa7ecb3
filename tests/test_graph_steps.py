"""The engine with captured decode steps, in Triton's interpreter; a stand-in for the graph checks what a
replay would read."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch

from pmpd import PMPDForCausalLM, Scheduler, gpu
from pmpd.decode import graph_steps, llama_cuda, oracle
from pmpd.decode.engine import Engine
from pmpd.decode.graph_steps import GraphSteps
from pmpd.decode.requests import Request
from pmpd.kernels.triton import TritonMatrix
from tests.helpers import write_anyprec, write_dense
from tests.test_graphs import FakeGraphs
from tests.test_kernels_triton import interpreter_only_here

pytestmark = interpreter_only_here
NEW_TOKENS = 8


class Graphs(FakeGraphs):
    """Static is what is there before the capture: weights, caches, buffers."""

    def __call__(self, step, reset):
        tensors = [
            t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.layout == torch.strided
        ]
        self.static = {t.untyped_storage().data_ptr() for t in tensors if t.device.type == "cpu"}
        return super().__call__(step, reset)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[PMPDForCausalLM, PMPDForCausalLM]:
    """With the Triton kernels, and the same with the reference."""
    folder = tmp_path_factory.mktemp("tiny")
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    dense = write_dense(folder / "dense", seed=3, **shape)
    packed = write_anyprec(folder / "anyprec", dense)
    fast, plain = (
        PMPDForCausalLM(packed, dtype=torch.float32, kernel=kernel).eval()
        for kernel in ("triton", "reference")
    )
    return fast, plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has real graphs")
@pytest.mark.parametrize("name", ["static", pytest.param("confidence", marks=pytest.mark.slow)])
def test_rows_of_a_mixed_batch_get_the_tokens_of_the_oracle(models, monkeypatch, name):
    """Three rows in two slots, so one begins where another has ended; each lowers its precision by itself,
    and may meet an end token."""
    monkeypatch.setattr(llama_cuda, "SPLIT_TOKENS", 0)
    monkeypatch.setattr(graph_steps, "USES_BEFORE_CAPTURE", 1)
    monkeypatch.setattr(
        TritonMatrix, "multiply", lambda self, x, bits: x @ dense(self, bits).T
    )  # the interpreter's takes a second
    dense = cache(TritonMatrix.dequantize)
    (model, plain), graphs = models, Graphs()
    monkeypatch.setattr(gpu, "capture", graphs)
    options = {"static": {"high_bit_steps": [3]}, "confidence": {"threshold": 0.02, "patience": 2}}[name]
    scheduler = Scheduler.get_scheduler(name, precisions=[4, 2], **options)
    prompts = [[5, 6, 7], [9], [70, 80, 90, 100, 3]]
    first = oracle.decode(plain.model, prompts[0], NEW_TOKENS, 4, (), scheduler, key="0")
    ends = frozenset(first.tokens[6:7])
    engine = Engine(model.model, slots=3, max_length=32, sync_every=4, lean=False)
    engine.slots, engine.steps = 2, GraphSteps.of(model.model)  # as on a GPU: the third slot is spare
    requests = [Request(str(i), prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)]
    completions = {c.key: c for c in engine.run(requests, scheduler, 4, ends)}
    for i, prompt in enumerate(prompts):
        truth = oracle.decode(plain.model, prompt, NEW_TOKENS, 4, ends, scheduler, key=str(i))
        assert completions[str(i)].error is None
        assert completions[str(i)].tokens == truth.tokens, f"row {i}"
        assert [
            bits for bits, count in completions[str(i)].precision_trace for _ in range(count)
        ] == truth.bits
    assert completions["0"].finish_reason == "eos"
    assert graphs.captures > 0
    assert graphs.replays > 0, "no step was replayed: the test shows nothing"
