"""A kernel that is added from outside: a class, its `unavailable()` and one registration are enough."""

from __future__ import annotations

import pytest
import torch

from pmpd import PMPDForCausalLM, Scheduler
from pmpd.cli import kernels
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from pmpd.errors import UserError
from pmpd.kernels import dispatch
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.dense import DenseMatrix, merge
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.weights.base import PrecisionLinear


class CountingMatrix(ReferenceMatrix):
    calls = 0

    def multiply(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        CountingMatrix.calls += 1
        return super().multiply(x, bits)

    def dequantize(self, bits: int) -> torch.Tensor:
        CountingMatrix.calls += 1
        return super().dequantize(bits)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else "it counts in float32 only"


def build(packed: PackedWeights, dtype: torch.dtype) -> CountingMatrix:
    return CountingMatrix(packed, dtype)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(dispatch, "KERNELS", dict(dispatch.KERNELS))
    dispatch.register("counting", dispatch.Kernel(unavailable, build, devices=("cpu",)))
    CountingMatrix.calls = 0


def tokens_of(model: PMPDForCausalLM) -> list[int]:
    (done,) = Engine(model.model, 1, 32).run([Request("a", [5, 6, 7], 8)], None, 3, ())
    return done.tokens


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_a_registered_kernel_multiplies_in_every_forward(anyprec_folder, counting, architecture):
    folder = anyprec_folder(architecture)
    expected = tokens_of(PMPDForCausalLM(folder, kernel="reference").eval())
    assert CountingMatrix.calls == 0
    assert tokens_of(PMPDForCausalLM(folder).eval()) == expected
    assert CountingMatrix.calls > 0


def test_it_is_chosen_where_it_can_run_and_explained(counting, monkeypatch, capsys):
    cpu = torch.device("cpu")
    assert dispatch.choose(cpu, torch.float32).name == "counting"
    assert dispatch.choose(cpu, torch.bfloat16).name != "counting"
    with pytest.raises(UserError, match="it counts in float32 only"):
        dispatch.choose(cpu, torch.bfloat16, "counting")
    kernels.main(kernels.KernelsJob())
    assert "counting: the native kernel for cpu, float32" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        dispatch.register("counting", dispatch.KERNELS["reference"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_that_are_dequantized_once_give_the_reference_tokens(anyprec_folder, architecture):
    """And take what they say: the type's size for every weight and precision."""
    folder = anyprec_folder(architecture)
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[2, 5])
    requests = [Request(str(i), [5 + i, 6, 7], 10) for i in range(3)]
    plain, fast = (PMPDForCausalLM(folder, kernel=kernel).eval() for kernel in ("reference", "dense"))
    expected, found = (
        {done.key: done.tokens for done in Engine(model.model, 3, 32).run(requests, scheduler, 4, ())}
        for model in (plain, fast)
    )
    assert found == expected
    layers = [module for module in fast.modules() if isinstance(module, PrecisionLinear)]
    for layer in layers:
        assert isinstance(layer.matrix, DenseMatrix)
        assert layer.packed_bytes() == 3 * 4 * layer.in_features * layer.out_features


def test_merged_dense_matrices_are_their_parts_and_hold_nothing_twice():
    draw = torch.Generator().manual_seed(1)
    biases = [None, torch.tensor([0.5, 0.25])]
    parts = [
        DenseMatrix({bits: torch.randn(rows, 8, generator=draw) for bits in (4, 2)}, bias)
        for rows, bias in zip((3, 2), biases, strict=True)
    ]
    x = torch.randn(5, 8, generator=draw)
    before = {bits: torch.cat([part.multiply(x, bits) for part in parts], dim=1) for bits in (4, 2)}
    whole = merge(parts)
    for bits, expected in before.items():
        torch.testing.assert_close(whole.multiply(x, bits), expected)
        torch.testing.assert_close(torch.cat([part.multiply(x, bits) for part in parts], 1), expected)
        storages = {part.weights[bits].untyped_storage().data_ptr() for part in (whole, *parts)}
        assert len(storages) == 1
