"""What `bench/_cuda.py` times for a matrix: every route of ours, and other projects' kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench._peers import any_precision
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.cuda.launch import gpu_of
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.cuda.plan import MOST_TOKENS, Plan
from pmpd.kernels.cuda.plan import plan as plan_of_rules
from pmpd.kernels.triton import (
    FUSED_TOKENS,
    SPLIT_TOKENS,
    TILE_COLUMNS,
    TritonMatrix,
    split_activations,
)

ROTATE_BYTES = 400e6
"""Weights of each contender: more than the second-level cache holds."""


def random_weights(
    rows: int, columns: int, precisions: tuple[int, ...], seed: int, device: torch.device
) -> PackedWeights:
    draw = torch.Generator(device).manual_seed(seed)
    planes = torch.randint(
        -(2**31),
        2**31,
        (max(precisions), rows, columns // 32),
        generator=draw,
        device=device,
        dtype=torch.int32,
    )
    tables = {
        b: (0.02 * torch.randn(rows, 2**b, generator=draw, device=device)).sort(1).values.half()
        for b in precisions
    }
    return PackedWeights(planes, tables, None)


def twin(matrix: TritonMatrix) -> TritonMatrix:
    """The same matrix at another address."""
    tiles = matrix._tiles
    copy = type(tiles)(tiles.planes.clone(), tiles.shape, tiles.bias, tiles.plain)
    return matrix._with(copy, matrix._tables)


def clones(matrix: TritonMatrix, weight_bytes: float) -> list[TritonMatrix]:
    """Copies of `matrix`, enough to fill `ROTATE_BYTES`."""
    return [matrix, *(twin(matrix) for _ in range(min(47, int(ROTATE_BYTES / weight_bytes))))]


def variants(columns: int, tokens: int) -> list[tuple[str, int]]:
    """(route, warps) worth timing for so many tokens."""
    blocks = -(-columns // TILE_COLUMNS)
    routes = [
        route
        for route in ("digits", "halves")
        if (tokens <= SPLIT_TOKENS or route == "halves") and tokens <= FUSED_TOKENS
    ]
    return [(route, warps) for route in routes for warps in (2, 4, 8, 16) if blocks / 16 <= warps <= blocks]


def product_call(matrix: TritonMatrix, x: torch.Tensor, bits: int, warps: int) -> Callable[[], torch.Tensor]:
    """`digits` without the splitting of the activations (a decode step splits them in the stage before)."""
    y = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device)
    split = split_activations(x)

    def call() -> torch.Tensor:
        matrix.multiply_split(split, bits, y, warps)
        return y

    return call


def contenders(
    name: str,
    packed: PackedWeights,
    matrix: TritonMatrix,
    plain: CudaMatrix | None,
    x: torch.Tensor,
    bits: int,
    tune: bool,
) -> Iterator[tuple[str, list[Callable[[], torch.Tensor]]]]:
    """(kernel, calls over copies of the matrix) for one precision and number of tokens."""
    columns, tokens = packed.shape[1], len(x)
    weight_bytes = packed.shape[0] * columns * bits / 8
    matrices = clones(matrix, weight_bytes)
    for route, warps in variants(columns, tokens):
        yield (
            f"{route} w{warps}",
            [lambda m=m, r=route, w=warps: m.multiply(x, bits, r, w) for m in matrices],
        )
        if route == "digits":
            yield f"product w{warps}", [product_call(m, x, bits, warps) for m in matrices]
    if name == "14336x4096" and tokens in (1, 32, 64):
        for route in ("fused", "dense"):
            yield route, [lambda m=m, r=route: m.multiply(x, bits, r) for m in matrices]
    del matrices
    if plain is not None and tokens <= MOST_TOKENS:
        copies = clones(plain, weight_bytes)
        for plan in plans(columns, bits, tokens, x.device, tune):
            said = f"bits w{plan.warps} s{plan.slots} b{plan.blocks}"
            yield said, [lambda m=m, p=plan: m.multiply_each(x, p.bits, plan=p) for m in copies]
    theirs = any_precision()
    if theirs is not None and tokens <= 8:
        planes = [packed.planes.clone() for _ in range(max(2, int(ROTATE_BYTES / packed.planes.nbytes)))]
        table = packed.tables[bits]
        yield "any-precision", [lambda p=p: theirs(x[None], p, table, bits)[0] for p in planes]


def plans(columns: int, bits: int, tokens: int, device: torch.device, tune: bool) -> list[Plan]:
    """The plans of `bits.cu` worth timing: that of the rules, and others around it."""
    gpu, found = gpu_of(device), []
    for warps in (None, 4, 8, 16):
        for slots in (None, 2, 4, 6, 8, 12):
            for blocks in (None, 1, 2, 3):
                made = plan_of_rules(columns, (bits,) * tokens, gpu, warps, slots, blocks)
                if (
                    made
                    and made.warps <= made.tiles
                    and made.per_warp <= 14
                    and (
                        made.blocks * 32 * made.warps * 64  # registers: no fewer than 64 a thread
                    )
                    <= 65536
                ):
                    found.append(made)
    first, *others = dict.fromkeys(found)
    return [first, *others] if tune else [first]
