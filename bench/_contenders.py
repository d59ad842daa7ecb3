"""What `bench/_cuda.py` times for a matrix: every route of ours, and other projects' kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch

from bench._peers import any_precision
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.cuda.cut import SCALED_COLUMNS, TILE_ROWS, Cut, passes_of
from pmpd.kernels.cuda.cut import cut as cut_of_rules
from pmpd.kernels.cuda.launch import gpu_of
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.triton import (
    FUSED_TOKENS,
    SPLIT_TOKENS,
    TILE_COLUMNS,
    TritonMatrix,
    split_activations,
)

M = TypeVar("M", bound=TritonMatrix)

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


def twin(matrix: M) -> M:
    """The same matrix at another address."""
    tiles = matrix._tiles
    copy = type(tiles)(tiles.planes.clone(), tiles.shape, tiles.bias, tiles.plain)
    return cast("M", matrix._with(copy, matrix._tables))


def clones(matrix: M, weight_bytes: float) -> list[M]:
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
    sweep: bool = True,
) -> Iterator[tuple[str, list[Callable[[], torch.Tensor]]]]:
    """(kernel, calls over copies of the matrix) for one precision and number of tokens. `sweep`: every route
    of Triton's, not only what the product takes and the peer."""
    columns, tokens = packed.shape[1], len(x)
    weight_bytes = packed.shape[0] * columns * bits / 8
    matrices = clones(matrix, weight_bytes) if sweep else []
    for route, warps in variants(columns, tokens) if sweep else ():
        yield (
            f"{route} w{warps}",
            [lambda m=m, r=route, w=warps: m.multiply(x, bits, r, w) for m in matrices],
        )
        if route == "digits":
            yield f"product w{warps}", [product_call(m, x, bits, warps) for m in matrices]
    if sweep and name == "14336x4096" and tokens in (1, 32, 64):
        for route in ("fused", "dense"):
            yield route, [lambda m=m, r=route: m.multiply(x, bits, r) for m in matrices]
    del matrices
    if plain is not None:
        yield (
            taken(plain, tokens, bits),
            [lambda m=m: m.multiply(x, bits) for m in clones(plain, weight_bytes)],
        )
    theirs = any_precision()
    if theirs is not None and tokens <= 8:
        planes = [packed.planes.clone() for _ in range(max(2, int(ROTATE_BYTES / packed.planes.nbytes)))]
        table = packed.tables[bits]
        yield "any-precision", [lambda p=p: theirs(x[None], p, table, bits)[0] for p in planes]


def taken(matrix: CudaMatrix, tokens: int, bits: int) -> str:
    """The name in the tables of what the product takes for so many tokens."""
    route = matrix.route(tokens, bits)
    if route != "bits":
        return route
    chosen = matrix._cut((bits,) * tokens)  # as measured, else by the rules
    assert chosen is not None, f"{tokens} tokens, {bits} bits"
    return said(chosen)


def rule(rows: int, columns: int, bits: int, tokens: int, device: torch.device) -> Cut:
    """The cut of `bits.cu` that its rules give."""
    made = cut_of_rules(rows, columns, (bits,) * tokens, gpu_of(device))
    assert made is not None, f"{columns} columns"
    return made


def cuts(rows: int, columns: int, bits: int, tokens: int, device: torch.device) -> list[Cut]:
    """Those of `bits.cu` worth timing: that of the rules, and teams of other sizes, shorter and longer rings,
    all passes at once or one after the other, one or two blocks of a multiprocessor, of which the compiler
    leaves registers for up to three: the next launch fills its rings in the room beside them."""
    gpu, each = gpu_of(device), (bits,) * tokens
    row_blocks = -(-rows // TILE_ROWS)
    made: list[Cut | None] = [rule(rows, columns, bits, tokens, device)]
    for warps, splits, (blocks, resident), live in itertools.product(
        (8, 16), (1, 2, 4, 8, 16), ((1, 1), (2, 1), (2, 2), (3, 2)), {1, passes_of(each)}
    ):
        spills = 4 if bits == 2 and tokens == 1 else 3 if live * tokens == 1 or bits == 2 else 2
        if splits > warps or warps * blocks >= 8 * spills:
            continue
        if row_blocks < 0.25 * gpu.multiprocessors * warps / splits:  # most teams would idle
            continue
        per_warp = -(-columns // (TILE_COLUMNS * splits))
        if per_warp * TILE_COLUMNS > SCALED_COLUMNS or splits * TILE_COLUMNS > columns:
            continue
        made += [
            cut_of_rules(rows, columns, each, gpu, warps, splits, slots, live, blocks, resident)
            for slots in {
                min(per_warp, tiles) for tiles in (2, 4, 7, 8) if not per_warp % min(per_warp, tiles)
            }
            or {min(per_warp, 4)}
        ]
    return [cut for cut in dict.fromkeys(made) if cut is not None]


def said(cut: Cut) -> str:
    """The name of a cut in the tables."""
    numbers = (cut.warps, cut.splits, cut.slots, cut.live, cut.blocks, cut.resident)
    return "bits " + " ".join(f"{letter}{number}" for letter, number in zip("wpslbr", numbers, strict=True))
