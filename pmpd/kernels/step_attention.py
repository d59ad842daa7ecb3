"""Rotary embedding, cache write and attention of a decode step, in one Triton launch a layer.

Each cached key and value is read once: 2 H D T 2 bytes a layer and row in 16-bit types (8B: 128 KiB a token
over all layers), FLOP 4 Hq D T. A row's tokens are divided into parts, a program each, so that one row fills
the GPU; the part that ends last joins them. The first tile of every part is asked for before the product in
front has ended.

Legend: n rows, Hq query heads, H KV heads, S slots, T tokens a slot can hold, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmpd.kernels.triton import overlap, padded_rows

PROGRAMS = 1056
"""Enough for eight on each of an H100's multiprocessors."""
MOST_PARTS = 64
TILE_BYTES = 16384
MOST_TILE_TOKENS = 64
JOINED = 8192
"""Values that are joined at a time: 64 registers a thread."""
ROWS = 512
WARPS = 4


class StepAttention:
    """Attention of the rows of a decode step over their slots. `inverse_frequencies` float32 [D / 2];
    `rope_scale` multiplies the sines and cosines."""

    def __init__(
        self, inverse_frequencies: Tensor, heads: int, kv_heads: int, head_dim: int, rope_scale: float = 1.0
    ) -> None:
        self.inverse_frequencies = inverse_frequencies
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_scale = rope_scale
        self._arrivals: list[Tensor] = []
        self._counters(ROWS)

    def _counters(self, rows: int) -> Tensor:
        """Zeros int32 for so many rows and each KV head. Older ones stay: graphs hold their addresses."""
        if not self._arrivals or len(self._arrivals[-1]) < rows * self.kv_heads:
            device = self.inverse_frequencies.device
            self._arrivals.append(torch.zeros(rows * self.kv_heads, dtype=torch.int32, device=device))
        return self._arrivals[-1]

    def __call__(
        self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, longest: int,
        window: int | None = None, part_tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        """`qkv` [n, (Hq + 2 H) D], keys and values [S, H, T, D], slots and positions int [n] -> [n, Hq D].

        Rotates queries and keys to their positions, writes key and value of row i to slots[i] at
        positions[i], and attends to that and the tokens before it (the last `window` in all, if given).
        Everything is read on the device and the launch depends on `longest` only (tokens that any row may
        see, at most T), so a captured graph replays for any rows. `part_tokens`: the length of a part, a
        multiple of a tile, instead of the one chosen.

        Launches overlap where the GPU can: `slots`, `positions` and the cached tokens must have been there
        before the last launch of another kind.
        """
        from pmpd.kernels import _triton_attention as kernels

        rows, dim, group = len(qkv), self.head_dim, self.heads // self.kv_heads
        longest = min(longest, keys.shape[2])
        tile = tile_of(dim, qkv.element_size())
        part = part_tokens or part_of(rows * self.kv_heads, longest, tile)
        parts = math.ceil(longest / part)
        y = padded_rows(rows, self.heads * dim, qkv.dtype, qkv.device)
        found = tops = sums = y  # one part: nothing is joined
        if parts > 1:
            shape = rows, self.kv_heads, parts, group
            found = torch.empty(*shape, dim, dtype=torch.float32, device=qkv.device)
            tops, sums = torch.empty(2, *shape, dtype=torch.float32, device=qkv.device)
        kernels.rotary_attention[(rows, self.kv_heads, parts)](
            qkv, self.inverse_frequencies, slots, positions, keys, values, y, found, tops, sums,
            self._counters(rows),
            dim**-0.5 * math.log2(math.e), self.rope_scale, window or 0, part, parts,
            qkv.stride(0), *keys.stride()[:3], *values.stride()[:3], y.stride(0),
            **form(self.heads, self.kv_heads, dim, tile, part, parts, window is not None),
            num_warps=WARPS, num_stages=1, **overlap(qkv.device),
        )  # fmt: skip
        return y


def tile_of(dim: int, element_bytes: int) -> int:
    """Cached tokens that a program works on at a time."""
    return max(16, min(MOST_TILE_TOKENS, TILE_BYTES // (padded(dim) * element_bytes)))


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def form(
    heads: int, kv_heads: int, dim: int, tile: int, part: int, parts: int, has_window: bool
) -> dict[str, int | bool]:
    """What the kernel is compiled for, beside types and `overlap`."""
    group = heads // kv_heads
    group_joined = 1 << (group - 1).bit_length()
    return {
        "KV_HEADS": kv_heads, "GROUP": group, "GROUP_PADDED": max(16, group_joined),
        "GROUP_JOINED": group_joined, "D": dim, "D_PADDED": padded(dim), "TOKENS": tile, "MORE": part > tile,
        "ONE": parts == 1, "CHUNK": max(1, JOINED // (group_joined * padded(dim))), "HAS_WINDOW": has_window,
    }  # fmt: skip


def part_of(groups: int, longest: int, tile: int) -> int:
    """Tokens of a part, a multiple of `tile`: as many parts as fill the GPU with `groups` rows and KV heads,
    MOST_PARTS at most."""
    tiles = math.ceil(longest / tile)
    parts = max(1, min(tiles, math.ceil(PROGRAMS / groups), MOST_PARTS))
    return math.ceil(tiles / parts) * tile
