"""What only a CUDA device can prove (`pytest -m gpu`): compiled kernels, real graphs, the engine on the
device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pmpd import PMPDForCausalLM, demo, gpu
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Completion, Request
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.triton import DIGITS_BITS, ROUTES
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.curves import ForcedRow, forced_rows
from pmpd.labeling.label import LabelPlan
from tests import test_kernels_triton as kernels
from tests import test_lean_cuda as lean
from tests import test_regression_scheduler as prompts_seen
from tests import test_step_attention as attention
from tests import test_triton_bytes as heads
from tests.gpu_replays import assert_replays_equal
from tests.test_engine import random_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BITS_ROUTES = [
    (bits, route) for bits in range(2, 9) for route in ROUTES if bits in DIGITS_BITS or route != "digits"
]


@pytest.mark.parametrize(("bits", "route"), BITS_ROUTES)
def test_every_route_multiplies_as_the_reference_at_model_sizes(bits, route):
    packed = kernels.packed_weights(1040, 4096, tuple({bits, 8}), bias=True)
    for dtype in (torch.float16, torch.bfloat16):
        matrix = kernels.TritonMatrix(packed, dtype)
        assert torch.equal(matrix.dequantize(bits), kernels.ReferenceMatrix(packed, dtype).dequantize(bits))
        for tokens in (1, 2, 3, 8, 16, 33, 64):
            x = kernels.activations(tokens, 4096, dtype=dtype, seed=tokens)
            y = matrix.multiply(x, bits, route)
            assert kernels.error(y, kernels.expected_product(packed, x, bits)) < kernels.TOLERANCE[dtype], (
                f"{dtype}, {tokens} tokens"
            )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, act_order):
    kernels.test_gptq_codes_scales_and_zeros(bits, act_order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [5, 8])
def test_look_ups_in_shared_memory_with_any_number_of_warps(bits, dtype):
    """Columns that fill no tile, more tokens than a program takes, an outlier of 3000 standard deviations."""
    packed = kernels.packed_weights(200, 2912, tuple({bits, 8}), bias=True)
    matrix = CudaMatrix(packed, dtype)
    for tokens in (8, 37):
        x = kernels.activations(tokens, 2912, dtype=dtype, seed=tokens)
        x[:, 970] += 3000.0
        for warps in (4, 16):
            y = matrix.multiply(x, bits, "halves", warps)
            off = kernels.error(y, kernels.expected_product(packed, x, bits))
            assert off < kernels.TOLERANCE[dtype], f"{tokens} tokens, {warps} warps: {off:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (4096, 128), (2912, 416)])
def test_gptq_of_eight_bits_in_bytes(columns, group_size, dtype):
    matrix, weight = kernels.gptq_matrix(200, columns, 8, group_size, True, dtype)
    assert torch.equal(matrix.dequantize().cpu(), weight.to(dtype))
    for tokens in (8, 37):
        x = kernels.activations(tokens, columns, dtype=dtype, seed=tokens)
        off = kernels.error(matrix.multiply(x, "halves"), x.double() @ weight.to(kernels.DEVICE).double().T)
        assert off < kernels.TOLERANCE[dtype], f"{tokens} tokens: {off:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "part"),
    [
        (32, 8, 128, None, None), (32, 4, 64, None, None), (7, 7, 128, None, 2048), (15, 5, 64, None, 64),
        (16, 1, 128, 200, None), (8, 1, 80, 40, 64),
    ],
)  # fmt: skip
def test_rotation_cache_write_attention_and_join_in_one_launch(heads, kv_heads, dim, window, part, dtype):
    positions = (0, 1500, 1024, 63)
    attention.check(heads, kv_heads, dim, window, part, dtype, positions, capacity=2048)


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_attention_launches_that_overlap_give_the_same_bits_a_thousand_times(rows):
    """16 launches in a row that share their counters and write caches of their own, in a graph."""
    attend = attention.StepAttention(attention.inverse_frequencies(128), 32, 8, 128)
    caches = [
        tuple(kernels.activations(3, 8, 2048, 128, seed=2 * layer + part) for part in range(2))
        for layer in range(16)
    ]
    qkv = [kernels.activations(rows, 48 * 128, seed=100 + layer) for layer in range(16)]
    slots = torch.tensor([2, 0, 1], device="cuda")[:rows]
    positions = torch.tensor([1537, 0, 640], device="cuda")[:rows]

    def run() -> torch.Tensor:
        return torch.stack(
            [attend(x, *cache, slots, positions, 2048) for x, cache in zip(qkv, caches, strict=True)]
        )

    eager = run()
    for y, x, cache in zip(eager, qkv, caches, strict=True):
        for row in range(rows):
            slot, position = int(slots[row]), int(positions[row])
            expected, *_ = attention.by_definition(x[row], *cache, slot, position, 32, None, 1.0)
            assert kernels.error(y[row].view(32, 128), expected) < 2e-3
    assert_replays_equal(run, eager)  # else a part was joined before it was there
    assert not attend._counters(rows).any(), "counters are not as they were"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17, 33, 64, 100])
def test_a_head_of_bytes_multiplies_as_its_definition(tokens, dtype):
    heads.check_product(32003, 2048, tokens, dtype)
    heads.check_product(1000, 1056, tokens, dtype)


def test_a_model_with_a_head_of_bytes_decodes_in_graphs_and_gives_the_tokens_of_its_dequantized_head():
    from pmpd import PMPDForCausalLM, demo

    prompts = ["The farm", "Once upon a time there was", "In the morning", "He said"]
    answers = []
    for head_bits in (8, 16):
        model = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float16, head_bits=head_bits).eval().cuda()
        if head_bits == 8:
            values = model.model.lm_head.rows().dequantize()
        else:
            model.model.lm_head.weight = torch.nn.Parameter(values.half(), requires_grad=False)
        rows = [model.tokenizer(text, return_tensors="pt").input_ids.cuda() for text in prompts]
        answers.append([model.generate(ids, 32).completions[0].tokens for ids in rows])
        assert model._engine is not None
        assert model._engine.steps is not None
    assert sum(a == b for a, b in zip(*answers, strict=True)) >= len(prompts) - 1, "near ties may part"


@torch.inference_mode()
def test_a_step_replayed_a_thousand_times_gives_the_same_bits():
    lean.check_replays(kernels.TritonMatrix)


@torch.inference_mode()
def test_a_graph_of_decode_steps_gives_the_tokens_of_eager_steps_and_of_transformers():
    """Two layers in float16, 12 steps, a mixed batch: rows 0 and 1 at 4 bits, row 2 at 3."""
    from pmpd.decode.graphs import StepGraphs
    from pmpd.weights.base import Segment

    model, packed = lean.small_model(layers=2, dtype=torch.float16)
    forward = lean.lean(model, packed, torch.float16)
    shape = (4, lean.KV_HEADS, 64, lean.DIM)

    def decode(captured: bool) -> tuple[torch.Tensor, str | None]:
        keys, values = (
            [torch.zeros(shape, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in range(2)
        )

        def buffers(rows):
            return {
                "ids": torch.arange(rows, device="cuda") + 3,
                "slots": torch.arange(rows, device="cuda"),
                "positions": torch.zeros(rows, dtype=torch.int64, device="cuda"),
            }

        def step(static, layout):
            logits = forward(static["ids"], static["slots"], static["positions"], layout, keys, values, 64)
            static["ids"].copy_(logits.argmax(-1))
            static["positions"].add_(1)

        graphs = StepGraphs(step, buffers, buckets=(3,), **({} if captured else {"capture": None}))
        tokens = [graphs.run(3, (Segment(0, 2, 4), Segment(2, None, 3)))["ids"].clone() for _ in range(12)]
        return torch.stack(tokens, 1), graphs.why_eager

    (graph_tokens, why), (eager_tokens, _) = decode(True), decode(False)
    assert why is None, f"the step was not captured: {why}"
    assert torch.equal(graph_tokens, eager_tokens)


def test_capturing_keeps_the_memory_that_is_cached():
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del kept
    before = torch.cuda.memory_reserved()
    gpu.capture(lambda: None)
    assert torch.cuda.memory_reserved() >= before


def test_graphs_can_be_captured_after_all_others_are_gone():
    count = torch.zeros(1, device="cuda")
    for _ in range(2):
        replay = gpu.capture(lambda: count.add_(torch.ones(1, device="cuda")))
        count.zero_()
        replay()
        assert count.item() == 1
        del replay


@pytest.fixture(scope="module")
def demo_models():
    """The demo model in float32, whose products differ from the reference's by rounding only: on the device,
    and the reference."""
    from pmpd import PMPDForCausalLM, demo

    on_device = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float32).eval().cuda()
    return on_device, PMPDForCausalLM(demo.ANYPREC, dtype=torch.float32, kernel="reference").eval()


def test_the_engine_on_the_device_gives_the_tokens_of_the_reference_on_the_cpu(demo_models):
    from pmpd import Scheduler

    same = 0
    prompts = ["The farm", "Once upon a time there was", "In the morning"]
    for prompt in prompts:
        ids = demo_models[0].tokenizer(prompt, return_tensors="pt").input_ids
        outputs = []
        for candidate in demo_models:
            candidate.scheduler = Scheduler.get_scheduler("naive", precisions=[3, 2], high_bit_steps=8)
            outputs.append(
                candidate.generate(ids.to(candidate.device), 32, prefill_bit=3).completions[0].tokens
            )
        same += outputs[0] == outputs[1]
    assert same >= len(prompts) - 1, "tokens may part at a near tie only"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_a_mixed_batch_on_the_device_decode_as_they_do_alone(dtype, demo_models):
    """Ten rows in four slots, each with switch steps of its own, ending at the end token or at the limit:
    graphs of many layouts."""
    from pmpd import PMPDForCausalLM, Scheduler, demo
    from pmpd.decode.engine import Engine
    from pmpd.decode.requests import Request

    model = (
        demo_models[0] if dtype == torch.float32 else PMPDForCausalLM(demo.ANYPREC, dtype=dtype).eval().cuda()
    )
    words = [
        "The",
        "farm",
        "was",
        "quiet",
        "and",
        "the",
        "river",
        "ran",
        "on",
        "past",
        "the",
        "old",
        "stone",
        "mill",
    ]
    requests = [Request(str(i), model.tokenizer(" ".join(words[: i + 1])).input_ids, 40) for i in range(10)]
    scheduler = Scheduler.get_scheduler("random", precisions=[4, 3, 2], seed=1)
    plain = Engine(model.model, slots=1, max_length=128, sync_every=1)
    alone = {c.key: c for c in plain.run(requests, scheduler, 4, ())}
    ends = frozenset(alone["3"].tokens[20:21])  # now and then a row ends before its limit
    mixed = Engine(model.model, slots=4, max_length=128, sync_every=8)
    assert mixed.steps is not None
    together = {c.key: c for c in mixed.run(requests, scheduler, 4, ends)}
    same = 0
    for key, one in alone.items():
        stop = next((i + 1 for i, token in enumerate(one.tokens) if token in ends), len(one.tokens))
        assert together[key].error is None
        same += together[key].tokens == one.tokens[:stop]
        assert together[key].finish_reason == ("eos" if together[key].tokens[-1] in ends else "length")
    assert any(c.finish_reason == "eos" for c in together.values())
    # rows alone and rows together take kernels that round differently, so float16 may part at near ties
    assert same >= (9 if dtype == torch.float32 else 6), f"{same} of 10 rows decode as they do alone"


def test_rows_in_tiles_of_dequantized_weights_have_the_tokens_of_those_weights_alone():
    """Twenty rows, three precisions, one graph a number of tiles; the same weights, a row at a time,
    multiplied by cuBLAS."""
    from pmpd import PMPDForCausalLM, Scheduler, demo
    from pmpd.decode.engine import Engine
    from pmpd.decode.requests import Request

    model = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float16, kernel="dense").eval().cuda()
    ids = model.tokenizer("The river ran on past the old stone mill and the farm was quiet").input_ids
    requests = [Request(str(i), ids[i % 3 : 6 + i % 7], 40) for i in range(20)]
    scheduler = Scheduler.get_scheduler("random", precisions=[4, 3, 2], seed=1)
    tiled = Engine(model.model, slots=20, max_length=128, sync_every=8)
    assert tiled.steps is not None
    assert tiled.steps.forward.tiled == (4, 3, 2)
    together = {c.key: c.tokens for c in tiled.run(requests, scheduler, 4, ())}
    assert tiled.steps._graphs.why_eager is None
    plain = Engine(model.model, slots=1, max_length=128, lean=False)
    alone = {c.key: c.tokens for c in plain.run(requests, scheduler, 4, ())}
    same = sum(together[key] == tokens for key, tokens in alone.items())
    assert same >= 14, f"{same} of 20 rows decode as they do alone: more than near ties in float16"


def label_requests(prompts: int = 20) -> tuple[LabelPlan, list[Request]]:
    plan = LabelPlan(LabelConfig(max_new_tokens=24, slots=8))
    return plan, [plan.request(str(i), ids) for i, ids in enumerate(random_prompts(prompts, 30, seed=2))]


def test_labelling_makes_the_host_wait_for_nothing_but_tokens():
    """Not in a prefill, at a fork or at a row's end: PyTorch says where an operation waits for the device."""
    model = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float16, kernel="dense").eval().cuda()
    plan, requests = label_requests()
    engine = Engine(model.model, 8, 128, sync_every=8)

    def decode(ends: set[int]) -> list[Completion]:
        return list(engine.run(requests, plan.scheduler, 4, ends))

    ends = set(sorted({done.tokens[11] for done in decode(set())})[:2])
    decode(ends)  # compiles and captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = decode(ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(done) == 20 * plan.trajectories
    assert {c.finish_reason for c in done} == {"eos", "length"}


def test_prefills_make_no_plans_of_cudnn():
    """It would make one for every shape that a prefill has."""
    model = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float16).eval().cuda()
    plan, requests = label_requests(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        list(Engine(model.model, 8, 128).run(requests, plan.scheduler, 4, ()))
    kinds = {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
    assert any("flash" in kind or "efficient" in kind for kind in kinds)
    assert not any("cudnn" in kind for kind in kinds)


def test_the_divergence_of_every_plan_on_the_device_is_the_cpus():
    """Rows attend together there, and the host looks at nothing before all forwards are given."""
    prompts = {f"{i}": ids for i, ids in enumerate(random_prompts(7, 60, seed=4))}
    references = {f"{i}": ids for i, ids in enumerate(random_prompts(7, 30, seed=5))}
    references = {key: ids if len(ids) > 1 else [*ids, 3] for key, ids in references.items()}

    def rows(device: str) -> dict[str, ForcedRow]:
        quantized, unquantized = (
            PMPDForCausalLM(path, dtype=torch.float32).eval().to(device)
            for path in (demo.ANYPREC, demo.DENSE)
        )
        return {
            row.key: row for row in forced_rows(quantized, unquantized, prompts, references, (4, 3, 2), 31)
        }

    here, there = rows("cpu"), rows("cuda")
    assert here.keys() == there.keys() == prompts.keys()
    for key, row in here.items():
        for plan, found in row.plans.items():
            np.testing.assert_allclose(there[key].plans[plan], found, rtol=2e-2, atol=1e-4)
        np.testing.assert_allclose(there[key].features[0], row.features[0], rtol=1e-2, atol=1e-2)


def test_the_numbers_of_a_prompt_are_the_cpus_and_looking_changes_no_token():
    """Of a scheduler that looks at prompts, with prefill's logits and with forwards of its own, in batches of
    captured steps."""
    prompts = {f"{i}": ids for i, ids in enumerate(random_prompts(9, 90, seed=2))}
    requests = [Request(key, ids, 24) for key, ids in prompts.items()]

    def run(model: PMPDForCausalLM, spy: prompts_seen.Spy) -> tuple[list[list[float]], list[list[int]]]:
        done = {c.key: c for c in model.engine(4, 128).run(requests, spy, 4, ())}
        assert all(c.error is None for c in done.values())
        seen = [prompts_seen.as_numbers(spy.seen[key]) for key in prompts] if spy.looks else []
        return seen, [done[key].tokens for key in prompts]

    plain = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float32).eval()
    wanted, _ = run(plain, prompts_seen.Spy((4, 3, 2), 6))
    model = PMPDForCausalLM(demo.ANYPREC, dtype=torch.float32).eval().cuda()
    _, tokens = run(model, prompts_seen.Spy((4, 3, 2), 6, looks=False))
    for says_so in (False, True):
        found, again = run(model, prompts_seen.Spy((4, 3, 2), 6, says_so=says_so))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=2e-2, atol=2e-3)
        assert again == tokens
