"""Other projects' kernels for the tables of `bench/_cuda.py`, where they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def any_precision() -> Callable[..., Tensor] | None:
    """`matmul_kbit(x [1, M, K], planes, table, b)` -> [1, M, N] of the Any-Precision authors' package: M up
    to 8, float16, planes and tables as `PackedWeights` has them. It adds up in float16."""
    try:
        return importlib.import_module("any_precision_ext").matmul_kbit
    except ImportError:
        return None


def humming_version() -> str | None:
    """Of `humming-kernels`, whose integers of 1 to 8 bits vLLM serves; None: not installed."""
    try:
        return importlib.metadata.version("humming-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_programs(package: str) -> None:
    """RuntimeError: a program that `package` brings may not be run: unpacking it has dropped modes."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("_native/*/*"):
            if path.suffix == "" and not os.access(path, os.X_OK):
                raise RuntimeError(
                    f"{path} may not be run: install the wheel with pip, or `chmod +x` what lies beside it"
                )


def humming(
    rows: int, columns: int, bits: int, copies: int, device: torch.device
) -> tuple[list[Callable[[Tensor], Tensor]], Tensor]:
    """`copies` of a float16 matrix in integers of `bits`, each a function of x [M, K], and the matrix [N, K].
    Its values are whole multiples of a step: what its own quantization still loses is in the error.

    RuntimeError: its compiler may not be run.
    """
    check_programs("humming")
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    most = 2 ** (bits - 1) - 1
    weight = (0.01 * torch.randint(-most, most + 1, (rows, columns), device=device)).half()
    layers = []
    for _ in range(copies):
        layer = HummingLayer(
            shape_n=rows, shape_k=columns, weight_config={"dtype": f"int{bits}"}, torch_dtype=weight.dtype
        ).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    return layers, weight


def peers() -> dict[str, str]:
    """Which of them are here, in words."""
    return {
        "any-precision": "installed" if any_precision() else "any_precision_ext is not installed",
        "humming": humming_version() or "humming-kernels is not installed",
    }
