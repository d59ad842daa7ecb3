"""Memory in huge pages for weights that every decode step reads from front to back.

Such weights are far larger than what a processor keeps of the page table, so with pages of 4 KiB each page
costs a walk through it, and reading ahead stops at each page's end. Linux gives 2 MiB pages where it is asked
for them (`/sys/kernel/mm/transparent_hugepage/enabled`: `madvise` or `always`); elsewhere this is ordinary
memory.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

HUGE_BYTES = 2 << 20
CHUNK_BYTES = 32 << 20
"""One mapping serves many weights, since a huge page is larger than most of them."""

_lock = threading.Lock()
_mappings: set[int] = set()  # addresses of all there have been
_chunk: Tensor | None = None  # the rest of the newest mapping


def zeros(count: int) -> Tensor:
    """uint8 [count] of zeros, aligned to a cache line. Its mapping goes with the last tensor in it."""
    global _chunk
    size = -(-count // 64) * 64
    with _lock:
        if _chunk is None or len(_chunk) < size:
            fresh = _mapped(max(CHUNK_BYTES, size))
            if len(fresh) - size < (0 if _chunk is None else len(_chunk)):
                return fresh[:count]  # more of the old one is left than would be of this
            _chunk = fresh
        piece, _chunk = _chunk[:count], _chunk[size:]
        return piece


def moved(weight: Tensor) -> Tensor:
    """A contiguous copy of `weight` in huge pages."""
    piece = zeros(weight.numel() * weight.element_size()).view(weight.dtype).view(weight.shape)
    return piece.copy_(weight)


def holds(weight: Tensor) -> bool:
    """Whether `weight` is in memory of this module."""
    return weight.untyped_storage().data_ptr() in _mappings


def _mapped(size: int) -> Tensor:
    """uint8, at least `size`, of zeros that are not in memory yet; begins with a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    size = -(-size // HUGE_BYTES) * HUGE_BYTES
    area = mmap.mmap(-1, size + HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    _mappings.add(whole.data_ptr())
    first = -whole.data_ptr() % HUGE_BYTES
    return whole[first : first + size]
