"""How `bits.cu` is cut for a shape: the numbers that its templates and its launch take.

Legend: N out_features, K in_features, b bits of a token, T tiles of a warp, as in `bits.cu`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

TILE_ROWS, TILE_COLUMNS = 16, 256
BITS = (2, 3, 4)
"""Precisions the kernel is taken for. A plane more doubles its work: at 5 bits looking values up (`halves` of
`pmpd.kernels.triton`) is faster already, 17.9 against 27.0 us at 14336x4096 on an H200."""
MOST_TOKENS = 2
RING_BYTES = 65536
"""Of a block's rings, where row blocks are that long: what must be on its way for memory to be busy; the next
launch's rings have room beside them."""
SCALED_COLUMNS = 4096
"""At most so many columns under one scale: beside an outlier of thousands of standard deviations, each of
them is rounded to as many 32767ths of it."""
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


class OfTeams:
    """What the cuts have in common whose warps form teams."""

    tiles: int
    """K / 256, rounded up."""
    warps: int
    """Of a block."""
    splits: int
    """Warps of a team, which share a row block's columns; divides `warps`."""

    @property
    def teams(self) -> int:
        """Of a block."""
        return self.warps // self.splits

    @property
    def per_warp(self) -> int:
        """Tiles of a warp, T."""
        return math.ceil(self.tiles / self.splits)


@dataclass(frozen=True)
class Cut(OfTeams):
    """One instance of the kernel, for one K and the precisions of its tokens."""

    bits: tuple[int, ...]
    """Of each token; the first one's is the highest."""
    tiles: int
    warps: int
    splits: int
    slots: int
    """Tiles in a warp's ring: at most `per_warp`."""
    live: int
    """Passes whose sums are kept at once: all of them, or one."""
    blocks: int
    """Blocks of a multiprocessor that the compiler leaves registers for."""
    resident: int
    """Blocks of a multiprocessor in a launch; in the room of more, the next launch fills its rings."""

    @property
    def chunk(self) -> int:
        """Tiles of a warp whose counts are added up before the coefficients weigh them."""
        return self.per_warp if self.live == self.passes else self.slots

    @property
    def passes(self) -> int:
        return passes_of(self.bits)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the rings, the bits of the activations, coefficients of two row blocks."""
        rings = self.warps * self.slots * self.bits[0] * 512
        activations = len(self.bits) * math.ceil(self.tiles / self.warps) * self.warps * 512
        table = 16 * sum(1 << bits for bits in set(self.bits))
        return rings + activations + self.teams * 8 * table

    @property
    def static_bytes(self) -> int:
        """`Room` in bits.cu."""
        return len(self.bits) * self.warps * (2 * 16 + 3) * 4

    def block_bytes(self) -> int:
        return self.shared_bytes + self.static_bytes

    def template(self, dtype: str, front: str = "PLAIN", back: str = "STORE") -> str:
        """The instance's name in C++."""
        second = self.bits[1] if len(self.bits) > 1 else 0
        shape = (self.tiles, self.warps, self.splits, self.slots, self.live, self.blocks)
        numbers = (self.bits[0], second, *shape)
        return f"bits_product<{dtype}, {front}, {back}, {', '.join(map(str, numbers))}>"

    def grid(self, row_blocks: int, gpu: Gpu) -> int:
        return min(math.ceil(row_blocks / self.teams), self.resident * gpu.multiprocessors)


def passes_of(bits: tuple[int, ...]) -> int:
    """Sets of planes behind the third; the first token's precision is the highest."""
    return 1 << max(0, bits[0] - 3)


def cut(
    rows: int,
    columns: int,
    bits: tuple[int, ...],
    gpu: Gpu = H100,
    warps: int | None = None,
    splits: int | None = None,
    slots: int | None = None,
    live: int | None = None,
    blocks: int | None = None,
    resident: int | None = None,
) -> Cut | None:
    """The instance for a matrix [N = `rows`, K = `columns`] and tokens of `bits` (the highest first); None: K
    is too large for a block's shared memory. The others: as measured, else by the rules below."""
    tiles, passes = math.ceil(columns / TILE_COLUMNS), passes_of(bits)
    # more sums than these would not fit a thread's registers
    live = live or (passes if passes == 1 or (passes == 2 and len(bits) == 1) else 1)
    few_sums = passes == 1 and (bits[0] == 2 or len(bits) == 1)  # 128 registers hold them
    for of_block in (warps,) if warps else (16, 8, 4) if few_sums or tiles > 64 else (8, 4):
        team = splits or _team(rows, tiles, of_block, gpu)
        longest = max(1, RING_BYTES // (of_block * bits[0] * 512))
        # one block a multiprocessor, with all registers, so that nothing spills
        registers = blocks or 1
        per_warp = math.ceil(tiles / team)
        for size in range(min(slots, per_warp), 0, -1) if slots else _rings(per_warp, longest):
            made = Cut(bits, tiles, of_block, team, size, live, registers, 1)
            if made.block_bytes() <= gpu.block_bytes:
                fit = gpu.multiprocessor_bytes // (made.block_bytes() + RESERVED_BYTES)
                return replace(made, resident=max(1, min(registers, fit, resident or 1)))
    return None


def _rings(per_warp: int, longest: int) -> list[int]:
    """Lengths of a ring, the best first: the longer the better, but a ring that goes around a whole number of
    times in a row block lets the kernel unroll one turn."""
    lengths = range(min(longest, per_warp), 0, -1)
    return sorted(lengths, key=lambda size: -size * (1 if per_warp % size else 2))


def _team(rows: int, tiles: int, warps: int, gpu: Gpu) -> int:
    """Warps of a team: as few as leave every team two row blocks, and no more columns under one scale than
    SCALED_COLUMNS; no more than there are tiles. Within 2 % of the best cut on average in decode steps of
    Llama-shaped models of 1.1B and 8B on an H200."""
    splits = 1
    while splits < warps and 2 * splits <= tiles:
        teams = warps // splits * gpu.multiprocessors
        fits = math.ceil(tiles / splits) * TILE_COLUMNS <= SCALED_COLUMNS
        if fits and 2 * teams * TILE_ROWS <= rows:
            break
        splits *= 2
    return splits
