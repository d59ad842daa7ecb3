"""The lean forward against the model's own modules."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pmpd import PMPDForCausalLM
from pmpd.decode import llama_cpu
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from pmpd.decode.slots import Stretch, TokenPlaces
from pmpd.kernels import cpu, native
from pmpd.kernels.cpu_fixed import fixed_unavailable
from pmpd.schedulers.base import Scheduler
from tests.test_engine import random_prompts

NO_LIBRARY = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
NO_FIXED_POINT = NO_LIBRARY or fixed_unavailable(torch.bfloat16, 4)
needs_fixed_point = pytest.mark.skipif(NO_FIXED_POINT is not None, reason=str(NO_FIXED_POINT))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_lean_forward_gives_the_tokens_of_the_modules(anyprec_model, architecture):
    model = anyprec_model(architecture)
    scheduler = Scheduler.get_scheduler("random", precisions=[4, 3, 2])
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(random_prompts(6, 70, seed=3))]
    results = []
    for use_lean in (True, False):
        engine = Engine(model.model, 4, 100, lean=use_lean)
        assert (engine.lean is not None) == use_lean
        completions = {c.key: c for c in engine.run(requests, scheduler, 4, ())}
        results.append([(completions[r.key].tokens, completions[r.key].precision_trace) for r in requests])
    assert results[0] == results[1]


@pytest.mark.parametrize("architecture", ["phi", "opt", "stablelm", "qwen3", "gpt_neox"])
def test_a_tree_that_is_not_known_exactly_takes_the_generic_path(anyprec_model, architecture):
    assert Engine(anyprec_model(architecture).model, 1, 10).lean is None


def test_a_changed_module_is_not_recognised(anyprec_folder):
    model = PMPDForCausalLM(anyprec_folder("llama"), kernel="reference")
    assert Engine(model.model, 1, 10).lean is not None
    model.model.model.layers[1].mlp.extra = torch.nn.Dropout(0.1)
    assert Engine(model.model, 1, 10).lean is None


@pytest.mark.parametrize("budget", [0, llama_cpu.DENSE_BYTES])
@pytest.mark.parametrize("bits", [4, 2])
def test_lean_forward_in_bfloat16_is_as_near_to_float32_as_the_modules(
    anyprec_folder, monkeypatch, budget, bits
):
    monkeypatch.setattr(llama_cpu, "DENSE_BYTES", budget)  # 0: multiplies from the codes, module by module
    folder, tokens = anyprec_folder("llama"), torch.arange(3, 43)
    places = TokenPlaces(
        torch.zeros_like(tokens), torch.arange(len(tokens)), len(tokens), 1, [Stretch(0, len(tokens), 0, 0)]
    )

    def logits(dtype: torch.dtype, use_lean: bool) -> torch.Tensor:
        engine = Engine(PMPDForCausalLM(folder, dtype=dtype).eval().model, 1, 64, lean=use_lean)
        engine.state.set_uniform(bits)
        return engine.forward(tokens, places, None).float()

    exact = logits(torch.float32, False)
    modules, written_out = (
        (logits(torch.bfloat16, use_lean) - exact).norm() / exact.norm() for use_lean in (False, True)
    )
    assert written_out < max(2 * modules, 1e-2)
    assert modules < 0.1


def prefilled(engine: Engine, rows: int) -> list[int]:
    """Lengths of `rows` slots of `engine` that hold random prompts."""
    prompts = random_prompts(rows, 30, seed=5)
    for slot, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt)
        where = torch.full_like(tokens, slot)
        places = TokenPlaces(
            where, torch.arange(len(tokens)), len(tokens), rows, [Stretch(0, len(tokens), slot, 0)]
        )
        engine.state.set_uniform(4)
        engine.forward(tokens, places, torch.tensor([len(tokens) - 1]))
    return [len(prompt) for prompt in prompts]


def decode(engine: Engine, slots: list[int], lengths: list[int], bits: list[int]) -> torch.Tensor:
    """Logits of one step: slot `s` consumes token 7 + s."""
    positions = torch.tensor([lengths[slot] for slot in slots])
    places = TokenPlaces(torch.tensor(slots), positions, int(positions.max()) + 1, max(slots) + 1)
    engine.state.set_tokens(bits)
    return engine.forward(torch.tensor(slots) + 7, places, None).float()


@needs_fixed_point
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("head_bits", [16, 8])
def test_the_native_step_is_near_the_modules_in_float32(anyprec_folder, architecture, head_bits):
    folder, bits = anyprec_folder(architecture), [4, 4, 3, 3, 2]

    def logits(dtype: torch.dtype, use_lean: bool) -> torch.Tensor:
        bits_of_head = head_bits if use_lean else 16
        model = PMPDForCausalLM(folder, dtype=dtype, head_bits=bits_of_head).eval().model
        engine = Engine(model, 5, 64, lean=use_lean)
        assert (engine.lean is not None and engine.lean.native is not None) == use_lean
        return decode(engine, [0, 1, 2, 3, 4], prefilled(engine, 5), bits)

    exact = logits(torch.float32, False)
    error = (logits(torch.bfloat16, True) - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.08, error  # a wrong angle, head or position gives about 1


@needs_fixed_point
def test_a_row_of_the_native_step_depends_on_neither_batch_mates_nor_threads(anyprec_folder):
    engine = Engine(PMPDForCausalLM(anyprec_folder("llama"), dtype=torch.bfloat16).eval().model, 7, 64)
    lengths, bits = prefilled(engine, 7), [4, 4, 4, 3, 3, 2, 2]
    alone = torch.cat([decode(engine, [slot], lengths, [bits[slot]]) for slot in range(7)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(decode(engine, list(range(7)), lengths, bits), alone), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@needs_fixed_point
def test_a_step_that_gets_no_memory_says_so(anyprec_folder):
    engine = Engine(PMPDForCausalLM(anyprec_folder("llama"), dtype=torch.bfloat16).eval().model, 1, 64)
    lengths = prefilled(engine, 1)
    native.functions().pmpd_limit_memory(0)
    try:
        with pytest.raises(MemoryError, match="a step of 1 tokens"):
            decode(engine, [0], lengths, [4])
    finally:
        native.functions().pmpd_limit_memory(-1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu"), torch.bfloat16) is not None,
    reason="the plain implementation keeps the tensors",
)
def test_a_packed_checkpoint_is_no_longer_mapped(anyprec_folder, tmp_path):
    folder = shutil.copytree(anyprec_folder("llama"), tmp_path / "checkpoint")
    model = PMPDForCausalLM(folder, dtype=torch.bfloat16)
    packed = [module.packed_bytes() for module in model.model.modules() if hasattr(module, "packed_bytes")]
    assert packed
    assert str(folder) not in Path("/proc/self/maps").read_text()
