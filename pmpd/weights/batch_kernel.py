"""Which kernel a model multiplies with where many rows decode together."""

from __future__ import annotations

import os

import torch
from torch import nn

from pmpd import gpu
from pmpd.kernels import dispatch
from pmpd.weights.anyprec import AnyPrecisionLinear

MANY_ROWS = 64
"""From so many rows on a GPU's products of packed weights were no faster than 16-bit ones, or slower
(docs/guides/gpu-farm.md)."""

MOST_OF_MEMORY = 0.25
"""Of the free memory, that dequantized copies may take."""


def prefer_dense(model: nn.Module, device: torch.device, rows: int | None) -> str:
    """Makes Any-Precision layers on a GPU multiply with weights dequantized once (`pmpd.kernels.dense`),
    where `rows` decode together (None: as many as memory holds), many of them, and a copy for each precision
    takes little of the free memory. What was chosen and why, in words; "" where there is nothing to choose.

    Before the first multiplication. PMPD_KERNEL goes first.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, AnyPrecisionLinear)]
    if device.type != "cuda" or not layers or os.environ.get(dispatch.ENVIRONMENT):
        return ""
    dtype = next(model.parameters()).dtype
    chosen = dispatch.choose(device, dtype).name
    if rows is not None and rows < MANY_ROWS:
        return f"kernel {chosen}: {rows} rows decode together, dense is for {MANY_ROWS} and more"
    copies = sum(
        layer.in_features * layer.out_features * len(layer.precisions) * dtype.itemsize for layer in layers
    )
    free = gpu.free_bytes(device)
    told = f"dequantized copies of {len(layers[0].precisions)} precisions take {copies / 1e9:.1f} GB"
    if dtype == torch.float32 or copies > MOST_OF_MEMORY * free:
        return f"kernel {chosen}: {told} of {free / 1e9:.0f} free, in {str(dtype).removeprefix('torch.')}"
    for layer in layers:
        layer.use_kernel("dense")
    many = "many rows" if rows is None else f"{rows} rows"
    return f"kernel dense: {many} decode together, {told} of {free / 1e9:.0f} free"
