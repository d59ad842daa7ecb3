"""Picks the implementation of the bitplane multiplication, and says which and why."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.kernels.base import BitplaneMatrix, PackedWeights

_CLASSES = {
    "cpu": ("pmpd.kernels.cpu", "NativeMatrix"),
    "triton": ("pmpd.kernels.triton", "TritonMatrix"),
    "reference": ("pmpd.kernels.reference", "ReferenceMatrix"),
}
ENVIRONMENT = "PMPD_KERNEL"


class Choice(NamedTuple):
    name: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype, impl: str | None = None) -> Choice:
    """The implementation for weights on `device` computing in `dtype`.

    `impl`, or the environment variable PMPD_KERNEL, forces one; a forced one that can't run here is a
    ValueError.
    """
    forced = impl or os.environ.get(ENVIRONMENT)
    if forced:
        if forced not in _CLASSES:
            raise UserError(f"kernel {forced!r}: known are {', '.join(_CLASSES)}")
        problem = _module(forced).unavailable(device, dtype)
        if problem:
            raise UserError(f"kernel {forced!r} was asked for, but {problem}")
        return Choice(forced, "asked for" if impl else f"asked for by {ENVIRONMENT}")
    native = "triton" if device.type == "cuda" else "cpu"
    problem = _module(native).unavailable(device, dtype)
    if problem:
        return Choice("reference", f"the slow path, since {problem}")
    return Choice(native, f"the native kernel for {device.type}, {str(dtype).removeprefix('torch.')}")


def build(packed: PackedWeights, dtype: torch.dtype, impl: str | None = None) -> BitplaneMatrix:
    """`packed` in the memory layout of the chosen implementation; it computes in `dtype`."""
    name = choose(packed.planes.device, dtype, impl).name
    return getattr(_module(name), _CLASSES[name][1])(packed, dtype)


def native_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor] | None:
    """`pmpd.kernels.cpu.decode_attention` where it can be used and PMPD_KERNEL does not ask for another
    implementation; else None."""
    if os.environ.get(ENVIRONMENT, "cpu") != "cpu" or device.type != "cpu":
        return None
    cpu = _module("cpu")
    return None if cpu.attention_unavailable(device, dtype, head_dim) else cpu.decode_attention


def explain(device: torch.device, dtype: torch.dtype, impl: str | None = None) -> str:
    """One line: what is in use and why."""
    choice = choose(device, dtype, impl)
    return f"{choice.name}: {choice.reason}"


def _module(name: str):
    return importlib.import_module(_CLASSES[name][0])
