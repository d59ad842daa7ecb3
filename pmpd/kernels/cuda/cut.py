"""How `bits.cu` is cut for a shape: the numbers that its templates and its launch take.

Legend: N out_features, K in_features, b bits of a token, T tiles of a warp, as in `bits.cu`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

TILE_ROWS, TILE_COLUMNS = 16, 256
BITS = (2, 3, 4, 5, 6)
"""Precisions the kernel multiplies at. A plane more doubles its work: 7 and 8 bits take other kernels."""
MOST_TOKENS = 2
RESERVED_BYTES = 1024
"""Shared memory of each block that the driver keeps for itself."""


class Gpu(NamedTuple):
    """What a cut asks of a GPU."""

    multiprocessors: int
    block_bytes: int
    """Shared memory that one block may have."""
    multiprocessor_bytes: int
    """Shared memory of a multiprocessor."""


H100 = Gpu(132, 232448, 233472)
"""H100 and H200, SXM."""


@dataclass(frozen=True)
class Cut:
    """One instance of the kernel, for one K and the precisions of its tokens."""

    bits: tuple[int, ...]
    """Of each token; the first one's is the highest."""
    tiles: int
    """K / 256, rounded up."""
    warps: int
    """Of a block; they share the columns."""
    slots: int
    """Tiles in a warp's ring."""
    chunk: int
    """Tiles that the passes of a row block go over together: at most `slots` where there are several."""
    blocks: int
    """Blocks of a multiprocessor that the compiler leaves registers for."""
    resident: int
    """Blocks of a multiprocessor in a launch; where more would fit, the next launch's find room beside them."""

    @property
    def per_warp(self) -> int:
        """Tiles of a warp, T."""
        return math.ceil(self.tiles / self.warps)

    @property
    def passes(self) -> int:
        return sum(1 << max(0, bits - 3) for bits in self.bits)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring, and the bits of the activations."""
        ring = self.warps * self.slots * self.bits[0] * 512
        return ring + len(self.bits) * self.per_warp * self.warps * 512

    @property
    def static_bytes(self) -> int:
        """`Room` in bits.cu."""
        table = 16 * sum(1 << bits for bits in set(self.bits))
        return 8 * table + len(self.bits) * self.warps * (2 * 16 + 2) * 4

    def block_bytes(self) -> int:
        return self.shared_bytes + self.static_bytes

    def template(self, dtype: str, front: str = "PLAIN", back: str = "STORE") -> str:
        """The instance's name in C++."""
        second = self.bits[1] if len(self.bits) > 1 else 0
        numbers = (self.bits[0], second, self.tiles, self.warps, self.slots, self.chunk, self.blocks)
        return f"bits_product<{dtype}, {front}, {back}, {', '.join(map(str, numbers))}>"

    def grid(self, row_blocks: int, gpu: Gpu) -> int:
        return min(row_blocks, self.resident * gpu.multiprocessors)


def cut(
    columns: int,
    bits: tuple[int, ...],
    gpu: Gpu = H100,
    warps: int | None = None,
    slots: int | None = None,
    blocks: int | None = None,
    resident: int | None = None,
) -> Cut | None:
    """The instance for K = `columns` and tokens of `bits` (the highest first); None: K is too large for a
    block's shared memory. `warps`, `slots`, `blocks`, `resident`: as measured, else by the rules below."""
    tiles = math.ceil(columns / TILE_COLUMNS)
    several = sum(1 << max(0, b - 3) for b in bits) > 1
    if warps is None:  # fewer have a smaller ring, but more columns under one scale
        small = 4 if several and len(bits) == 1 and tiles <= 16 else 8  # two blocks of eight would spill
        for most in (small,) if tiles <= 64 else (16, 8):
            fewest = math.ceil(tiles / math.ceil(tiles / most))  # for as many tiles each
            if made := cut(columns, bits, gpu, fewest, slots, blocks, resident):
                return made
        return None
    per_warp = math.ceil(tiles / warps)
    if slots is None:  # one row block: a tile's slot is a constant; the next kernel's ring has room
        slots = per_warp
    for size in range(slots, 0, -1):
        chunk = min(per_warp, size) if several else per_warp
        # the ring may take all that the activations leave; more registers for long chunks at 4 bits
        registers = blocks or (1 if warps > 8 or (several and per_warp > 4) else 2)
        made = Cut(bits, tiles, warps, size, chunk, registers, 1)
        if made.block_bytes() <= gpu.block_bytes:
            fit = gpu.multiprocessor_bytes // (made.block_bytes() + RESERVED_BYTES)
            most = min(registers, fit, resident or 2)
            return Cut(bits, tiles, warps, size, chunk, registers, max(1, most))
    return None
