"""The cuts of `halves.cu` that are worth timing, and which of them an autotune table keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from pmpd.kernels.cuda.cut import TILE_COLUMNS, Gpu
from pmpd.kernels.cuda.halves import HalvesCut, octets_of, product
from pmpd.kernels.cuda.matrix import CudaMatrix

TOKENS = (8, 16, 32)
"""What the instances tell apart."""
LEAST = 1.08
"""How many times as fast as Triton's `halves` a cut must be for the table to name it."""


def cuts(columns: int, bits: int, tokens: int, gpu: Gpu) -> list[HalvesCut]:
    """Those of 8 to 16 warps a block, one or two tiles a warp, that fit."""
    tiles, octets, found = math.ceil(columns / TILE_COLUMNS), octets_of(tokens), []
    for parts in (1, 2, 4, 8):
        of_block = math.ceil(tiles / parts)
        for warps in {of_block, math.ceil(of_block / 2)}:
            for rows in {8 // warps, 16 // warps} - {0}:
                for share, slots in ((1, 2), (2, 2), (1, 3)):
                    made = HalvesCut(bits, octets, tiles, parts, warps, rows, share, slots, 1)
                    if made.fits(gpu):
                        found.append(made)
    return list(dict.fromkeys(found))


def said(cut: HalvesCut) -> str:
    """The name of a cut in the tables."""
    return f"clusters p{cut.parts} w{cut.warps} r{cut.rows} s{cut.share} l{cut.slots} b{cut.blocks}"


def calls(
    matrices: Sequence[CudaMatrix], x: torch.Tensor, cut: HalvesCut
) -> list[Callable[[], torch.Tensor]]:
    """One a matrix."""
    return [
        lambda m=m: product(cut, m._tiles.planes, m._tables[cut.bits]["halves"], x, m.shape[0], m._tiles.bias)
        for m in matrices
    ]


def best(rows: Iterable[Mapping], halves: Mapping[str, Mapping]) -> dict[str, dict]:
    """Of the timed `rows` the table's entries: the fastest cut of each shape, where it is `LEAST` times as
    fast as what the table says of Triton's `halves`."""
    found: dict[str, dict] = {}
    for r in rows:
        cut = re.fullmatch(r"clusters p(\d+) w(\d+) r(\d+) s(\d+) l(\d+) b(\d+)", r["impl"])
        if cut is None or "us" not in r:
            continue
        key = f"{r['n']}x{r['k']}x{r['bits']}x{r['tokens']}"
        known = halves.get(key, {"us": 0.0})["us"]
        if r["us"] * LEAST <= known and r["us"] < found.get(key, {"us": math.inf})["us"]:
            found[key] = {"cut": [int(number) for number in cut.groups()], "us": round(r["us"], 2)}
    return found
