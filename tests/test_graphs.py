"""Captured steps touch static memory only, and running through graphs changes no result. A stand-in plays the
graph on a CPU."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pmpd import PMPDForCausalLM, gpu
from pmpd.decode.graph_steps import padded
from pmpd.decode.graphs import StepGraphs
from pmpd.weights.base import PrecisionLinear, PrecisionState, Segment


class _Watch(TorchDispatchMode):
    """Notes every storage that an operation reads or writes and that none of the operations before it
    made."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: set[int] = set()
        self.made: set[int] = set()
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.made:
                self.outside.add(leaf.untyped_storage().data_ptr())
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.outside:
                self.made.add(leaf.untyped_storage().data_ptr())
                self.kept.append(leaf)
        return result


class FakeGraphs:
    """Stands in for `cuda.capture`: a replay runs the step again and fails if it touches memory that was not
    there at capture."""

    def __init__(self, *static: torch.Tensor) -> None:
        self.static = {tensor.untyped_storage().data_ptr() for tensor in static}
        self.captures = self.replays = 0

    def __call__(self, step, reset):
        self.captures += 1
        reset()
        step()
        reset()
        with _Watch() as watch:
            step()
        strangers = watch.outside - self.static
        if strangers:
            raise AssertionError(
                f"the captured step touches {len(strangers)} tensor(s) that are not static: a replay would "
                f"read stale memory"
            )

        def replay() -> None:
            self.replays += 1
            step()

        return replay


WEIGHT = torch.arange(12.0).view(4, 3)
MADE: list[torch.Tensor] = []


def make_buffers(rows: int) -> dict[str, torch.Tensor]:
    buffers = {
        "x": torch.zeros(rows, 4),
        "y": torch.zeros(rows, 3),
        "count": torch.zeros(1, dtype=torch.int64),
    }
    MADE.extend(buffers.values())
    return buffers


def step(buffers, layout) -> None:
    buffers["y"].copy_(buffers["x"] @ WEIGHT * layout)
    buffers["count"] += 1


@pytest.fixture
def fake(monkeypatch):
    MADE.clear()
    fake = FakeGraphs(WEIGHT)
    original = make_buffers

    def registering(rows):
        buffers = original(rows)
        fake.static |= {tensor.untyped_storage().data_ptr() for tensor in buffers.values()}
        return buffers

    fake.make_buffers = registering
    return fake


def run(graphs: StepGraphs, x: torch.Tensor, layout: int) -> torch.Tensor:
    graphs.buffers(len(x))["x"][: len(x)] = x
    return graphs.run(len(x), layout)["y"][: len(x)].clone()


def test_a_graph_gives_what_eager_gives_and_is_captured_once_for_each_layout_and_bucket(fake):
    graphs = StepGraphs(step, fake.make_buffers, buckets=(1, 2, 4), capture=fake)
    eager = StepGraphs(step, make_buffers, buckets=(1, 2, 4), capture=None)
    for rows in (1, 3, 4, 2, 1, 3):
        for layout in (1, 2):
            x = torch.randn(rows, 4)
            assert torch.equal(run(graphs, x, layout), run(eager, x, layout))
    assert fake.captures == 6, "three buckets, two layouts"
    assert fake.replays == 12
    assert graphs.why_eager is None
    assert eager.why_eager == "graphs are switched off"


def test_the_runs_before_the_recording_leave_no_trace(fake):
    graphs = StepGraphs(step, fake.make_buffers, buckets=(2,), capture=fake)
    for expected in (1, 2, 3):
        assert graphs.run(2, 1)["count"].item() == expected, "a warm-up counted as a step"


def test_buffers_keep_their_address(fake):
    graphs = StepGraphs(step, fake.make_buffers, buckets=(4,), capture=fake)
    before = {name: tensor.data_ptr() for name, tensor in graphs.buffers(3).items()}
    for rows in (1, 4, 2):
        run(graphs, torch.randn(rows, 4), 1)
    assert {name: tensor.data_ptr() for name, tensor in graphs.buffers(4).items()} == before


def test_a_step_that_reads_memory_of_its_own_is_caught(fake):
    """What the stand-in is for: the weight here is made anew for every step, so a real graph would read freed
    memory."""
    fresh = [WEIGHT.clone()]

    def wrong(buffers, layout):
        buffers["y"].copy_(buffers["x"] @ fresh[0])

    with pytest.raises(AssertionError, match="not static"):
        StepGraphs(wrong, fake.make_buffers, capture=fake).run(1, 0)


def test_a_failed_capture_is_logged_and_the_step_runs_eagerly(caplog):
    def refuse(closure, reset):
        closure()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = StepGraphs(step, make_buffers, capture=refuse)
    eager = StepGraphs(step, make_buffers, capture=None)
    x = torch.randn(2, 4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(graphs, x, 1), run(eager, x, 1))
        run(graphs, x, 2)
    assert len(caplog.records) == 1
    assert "without CUDA graphs" in caplog.text
    assert "not permitted" in graphs.why_eager
    assert graphs.buffers(2)["count"].item() == 2, "two steps, although a capture failed in between"


def test_the_least_recently_used_graph_goes(fake):
    graphs = StepGraphs(step, fake.make_buffers, buckets=(1,), capture=fake, most=2)
    for layout in (1, 2, 1, 3, 1):
        graphs.run(1, layout)
    assert fake.captures == 3
    graphs.run(1, 2)
    assert fake.captures == 4


def test_slots_follow_from_free_memory():
    """8B in float16: 128 KiB a token; 100 GiB hold 256 rows of 3,000 tokens and more."""
    token_bytes = 2 * 2 * 32 * 8 * 128
    assert gpu.plan_slots(100 << 30, token_bytes, 3000) == 256
    assert gpu.plan_slots(12 << 30, token_bytes, 2304) == 32
    assert gpu.plan_slots((2 << 30) + token_bytes * 2304, token_bytes, 2304) == 1
    with pytest.raises(ValueError, match=r"one row of 2304 tokens needs 0\.28 GiB"):
        gpu.plan_slots(2 << 30, token_bytes, 2304)


def test_slots_are_planned_after_the_weights_are_packed(anyprec_folder, monkeypatch):
    """Packing takes device memory, which the plan must find taken."""
    model = PMPDForCausalLM(anyprec_folder("llama"), kernel="reference")
    linears = [module for module in model.modules() if isinstance(module, PrecisionLinear)]
    monkeypatch.setattr(PMPDForCausalLM, "device", torch.device("cuda"))
    monkeypatch.setattr(
        gpu, "free_bytes", lambda device: 10 << 30 if all(linear._matrix for linear in linears) else 0
    )
    assert model._planned_slots(128) == 256


def test_a_new_engine_has_room_for_longer_prompts_where_memory_is_plenty(anyprec_folder, monkeypatch):
    """A longer one later on would cost the cache and every captured step."""
    model = PMPDForCausalLM(anyprec_folder("llama"), kernel="reference")
    model.model.config.max_position_embeddings = 8192
    monkeypatch.setattr(PMPDForCausalLM, "device", torch.device("cuda"))
    cache = 64 * 2304 * model._token_bytes
    for free, wanted in ((4 * cache, 2304), (4 * cache - 1, 512)):
        monkeypatch.setattr(gpu, "free_bytes", lambda device, free=free: free)
        assert model._roomy(64, 512) == wanted
        assert model._roomy(64, 4096) == 4096
    model.model.config.max_position_embeddings = 1024
    assert model._roomy(1, 512) == 1024


def test_batches_of_several_precisions_come_back_to_few_layouts():
    """Each row keeps its order and its precision, and few layouts serve all sizes: a layout is captured
    once, and one that never comes back runs eagerly."""
    layouts, sizes = set(), set()
    for seed in range(300):
        draw = random.Random(seed)
        counts = {bits: draw.randint(1, 60) for bits in draw.sample((4, 3, 2), draw.randint(1, 3))}
        bits = np.repeat(list(counts), list(counts.values()))
        state = PrecisionState()
        state.set_tokens(bits)
        places, segments = padded(state.segments, len(bits))
        assert (np.diff(places) > 0).all()
        for place, precision in zip(places.tolist(), bits.tolist(), strict=True):
            own = [s for s in segments if s.start <= place and (s.stop is None or place < s.stop)]
            assert [s.bits for s in own] == [precision]
        if len(counts) == 3:
            layouts.add(tuple(s[:2] for s in segments))
            sizes.add(tuple(counts.values()))
    assert len(layouts) < len(sizes) / 2
    state.set_tokens([4])
    assert padded(state.segments, 1)[1] == (Segment(0, None, 4),), "a single precision stays as it is"


@pytest.mark.parametrize("rows", [64, 256, 512, 1024])
def test_mixed_batches_of_every_split_have_few_layouts(rows: int) -> None:
    layouts = {padded((Segment(0, n, 4), Segment(n, None, 3)), rows)[1] for n in range(1, rows)}
    assert len(layouts) < 40, "a layout of its own for each split is captured for a few steps only"
