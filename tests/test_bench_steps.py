"""The benchmark of steps of three precisions runs to its end: on the GPU where there is one, else in Triton's
interpreter, where a captured step is the step itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import mixed_steps
from bench._random_llama import Shape
from pmpd.decode.graphs import StepGraphs
from pmpd.kernels import dispatch
from tests.test_kernels_triton import DEVICE, interpreter_only_here

TINY = Shape(32, 1, 2, 1, 32, 128)


@interpreter_only_here
def test_a_step_of_three_precisions_is_timed_in_every_way(monkeypatch):
    steps = []

    def graphs(step, make, buckets):
        return StepGraphs(step, make, buckets, capture=lambda step, reset: step)

    def seconds(run, repeats):
        steps.append(run())
        return 1.0

    of_bench = {
        "SHAPES": {"tiny": TINY}, "StepGraphs": graphs, "median": seconds, "STEPS": 1, "CONTEXT": 8,
        "LONGEST": 64,
    }  # fmt: skip
    for name, value in of_bench.items():
        monkeypatch.setattr(mixed_steps, name, value)
    # Triton's products take half a minute in its interpreter
    monkeypatch.setattr(dispatch, "choose", lambda device, dtype: SimpleNamespace(name="dense"))
    config = mixed_steps.Config(models=("tiny",), batches=(4,))
    (row,) = mixed_steps.measure("tiny", config, torch.device(DEVICE))
    assert len(steps) == 4
    assert {name for name, value in row.items() if value == 1e3} == {
        "16 bits", "dequantized", "tiles", "packed (dense)",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["135M", "1.1B", "8B"])
def test_models_of_a_name_have_one_shape(name):
    from bench import _step_cuts, decode

    shape = decode.SHAPES[name].linears()
    gate_up, down, qkv, out = (place.shape for place in _step_cuts.places(name))
    assert gate_up == (2 * shape["mlp.up_proj"][0], shape["mlp.up_proj"][1])
    assert down == shape["mlp.down_proj"]
    assert out == shape["self_attn.o_proj"]
    assert qkv[0] == sum(shape[f"self_attn.{part}_proj"][0] for part in "qkv")


@pytest.mark.parametrize("there", [0, 1])
def test_the_farms_benchmark_ends_at_once_where_workers_would_wait_for_gpus(monkeypatch, tmp_path, there):
    from bench import farm_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(farm_gpu, "ray_of", lambda *_: pytest.fail("a Ray was started"))
    told = r"--workers 2, but 1 GPU" if there else "needs a CUDA device"
    with pytest.raises(SystemExit, match=told):
        farm_gpu.main(farm_gpu.FarmBench(workers=(1, 2), results=tmp_path))
