"""A kernel that is added from outside: a class, its `unavailable()` and one registration are enough."""

from __future__ import annotations

import pytest
import torch

from pmpd import PMPDForCausalLM
from pmpd.cli import kernels
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from pmpd.errors import UserError
from pmpd.kernels import dispatch
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.reference import ReferenceMatrix


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
