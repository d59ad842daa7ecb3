"""Picks the implementation of the bitplane multiplication, and says which and why.

A new one is a `Kernel` given to `register`: nothing else has to know it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.kernels.base import BitplaneMatrix, PackedWeights

ENVIRONMENT = "PMPD_KERNEL"
"""Environment variable that forces a kernel by name."""


@dataclass(frozen=True)
class Kernel:
    """One implementation."""

    unavailable: Callable[[torch.device, torch.dtype], str | None]
    """None where it can be used on that device with that dtype, else the reason in words."""
    build: Callable[[PackedWeights, torch.dtype], BitplaneMatrix]
    """Weights in its memory layout."""
    devices: tuple[str, ...] = ()
    """Device types where it is taken unless another is asked for; with none, it is taken only when asked
    for."""
    only_asked: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    """Why it is not taken unasked on such a device, though it could be used; else None."""


def _lazy(module: str, function: str) -> Callable:
    """A function of a module that is imported when it is called."""
    return lambda *arguments: getattr(importlib.import_module(module), function)(*arguments)


def _of_module(module: str, build: str, *devices: str, **more: Callable) -> Kernel:
    return Kernel(_lazy(module, "unavailable"), _lazy(module, build), devices, **more)


KERNELS: dict[str, Kernel] = {
    "cpu": _of_module("pmpd.kernels.cpu", "build", "cpu"),
    "triton": _of_module("pmpd.kernels.triton", "TritonMatrix", "cuda"),
    "cuda": _of_module(
        "pmpd.kernels.cuda.matrix",
        "CudaMatrix",
        "cuda",
        only_asked=_lazy("pmpd.kernels.cuda.matrix", "only_asked"),
    ),
    "dense": _of_module("pmpd.kernels.dense", "build"),
    "reference": _of_module("pmpd.kernels.reference", "ReferenceMatrix"),
}
"""By name. Of those for one device the last one that is available is taken."""


def register(name: str, kernel: Kernel) -> None:
    """Adds an implementation. UserError: there is one of that name."""
    if name in KERNELS:
        raise UserError(f"kernel {name!r} exists already; choose another name than {', '.join(KERNELS)}")
    KERNELS[name] = kernel


class Choice(NamedTuple):
    """Which kernel, and why."""

    name: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype, impl: str | None = None) -> Choice:
    """The implementation for weights on `device` computing in `dtype`.

    `impl`, or the environment variable PMPD_KERNEL, forces one; a forced one that can't run here is a
    UserError.
    """
    forced = impl or os.environ.get(ENVIRONMENT)
    if forced:
        if forced not in KERNELS:
            raise UserError(f"kernel {forced!r}: known are {', '.join(KERNELS)}")
        problem = KERNELS[forced].unavailable(device, dtype)
        if problem:
            raise UserError(f"kernel {forced!r} was asked for, but {problem}")
        return Choice(forced, "asked for" if impl else f"asked for by {ENVIRONMENT}")
    problems: list[str] = []
    for name, kernel in reversed(KERNELS.items()):
        if device.type in kernel.devices:
            problem = kernel.unavailable(device, dtype) or kernel.only_asked(device, dtype)
            if not problem:
                native = f"the native kernel for {device.type}, {str(dtype).removeprefix('torch.')}"
                return Choice(name, "; ".join((native, *problems)))
            problems.append(problem)
    return Choice("reference", f"the slow path, since {'; '.join(problems) or f'none is for {device.type}'}")


def build(packed: PackedWeights, dtype: torch.dtype, impl: str | None = None) -> BitplaneMatrix:
    """`packed` in the memory layout of the chosen implementation; it computes in `dtype`."""
    return KERNELS[choose(packed.planes.device, dtype, impl).name].build(packed, dtype)


def native_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor] | None:
    """`pmpd.kernels.cpu.decode_attention` where it can be used and PMPD_KERNEL does not ask for another
    implementation; else None."""
    if os.environ.get(ENVIRONMENT, "cpu") != "cpu" or device.type != "cpu":
        return None
    from pmpd.kernels import cpu

    return None if cpu.attention_unavailable(device, dtype, head_dim) else cpu.decode_attention


def explain(device: torch.device, dtype: torch.dtype, impl: str | None = None) -> str:
    """One line: what is in use and why."""
    choice = choose(device, dtype, impl)
    return f"{choice.name}: {choice.reason}"
