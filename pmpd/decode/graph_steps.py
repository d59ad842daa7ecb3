"""The engine's decode step on a CUDA device: forward, arg-max and end-of-row bookkeeping, replayed as one
CUDA graph.

A step reads where its rows are (slot, column of the last token, position) from one static tensor and moves it
on by itself, so steps of the same rows and precisions cost the host one small copy and a replay each.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.decode.graphs import BUCKETS, Buffers, StepGraphs
from pmpd.decode.precision import token_statistics
from pmpd.decode.sampling import highest
from pmpd.decode.slots import NEVER, SlotCache
from pmpd.schedulers.base import STATISTICS
from pmpd.weights.base import PrecisionState, Segment

if TYPE_CHECKING:
    from pmpd.decode.llama_cuda import CudaForward

_log = logging.getLogger(__name__)

USES_BEFORE_CAPTURE = 4
"""A layout (segments of precisions, bound of the length) runs so often without a graph first: mixed batches
pass through many once."""


SEGMENT_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of one precision in a captured step of several precisions: fewer sizes than `graphs.BUCKETS`, since
every combination is a layout. More rows than the largest have a layout for each number."""


class Rows(Protocol):
    """What a step works on: the engine."""

    slots: int
    max_length: int
    device: torch.device
    state: PrecisionState
    cache: SlotCache
    tokens: Tensor  # int64 [slots + 1, columns]
    bad: Tensor  # int64 [slots + 1]: the first new token whose logits were not finite, or NEVER


def padded(segments: Sequence[Segment], rows: int) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """Room for `rows` in segments of a few sizes, so that batches of several precisions come back to layouts
    that have been captured: (where each row goes, int [rows], ascending; the segments, the last of them
    open)."""
    if len(segments) == 1:
        return np.arange(rows), (segments[0]._replace(stop=None),)
    places, wider, start = np.empty(rows, dtype=np.int64), [], 0
    for segment in segments:
        stop = rows if segment.stop is None else segment.stop
        places[segment.start : stop] = np.arange(start, start + stop - segment.start)
        size = next((s for s in SEGMENT_SIZES if s >= stop - segment.start), stop - segment.start)
        wider.append(Segment(start, start + size, segment.bits))
        start = wider[-1].stop or 0
    return places, (*wider[:-1], wider[-1]._replace(stop=None))


SMALL_TILE, FEW_ROWS = 16, 64
"""Up to so many rows lie in tiles of so many, more in tiles of `CudaForward.tile_rows`."""

TILE_BUCKETS = (*range(16, 65, 16), *range(96, 512, 32), *range(512, 1024, 64), *range(1024, 4097, 128))
"""Rows of a captured step of tiles: little more than are wanted, since one step serves all mixes of
precisions. Every number of whole tiles of 64 finds one of whole tiles."""


def tiles_of(
    segments: Sequence[Segment], rows: int, precisions: Sequence[int], size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Room for `rows` in tiles of one precision each: (where each row goes, int [rows], ascending; each
    tile's index into `precisions`, int32 [tiles]; rows of a tile). A tile has `size` rows, few rows have
    smaller ones."""
    counts = [(rows if s.stop is None else s.stop) - s.start for s in segments]
    if sum(-(-count // SMALL_TILE) for count in counts) * SMALL_TILE <= FEW_ROWS:
        size = SMALL_TILE
    tiles = [-(-count // size) for count in counts]
    starts = np.cumsum([0, *tiles[:-1]]) * size
    places = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
    which = np.repeat([precisions.index(s.bits) for s in segments], tiles).astype(np.int32)
    return places, which, size


class GraphSteps:
    """Decode steps of one model. `GraphSteps.of` gives None for a model that has no capturable forward."""

    def __init__(self, forward: CudaForward) -> None:
        self.forward = forward
        self._engine: Rows | None = None
        self._uses: Counter[Hashable] = Counter()
        self._buckets = TILE_BUCKETS if forward.tiled else BUCKETS

    @classmethod
    def of(cls, model: PreTrainedModel) -> GraphSteps | None:
        from pmpd.decode.llama_cuda import CudaForward, LlamaWeights, llama_weights

        weights = llama_weights(model)
        if isinstance(weights, LlamaWeights):
            return cls(CudaForward(weights))
        _log.warning("decode steps run eagerly, without CUDA graphs (slower): %s", weights)
        return None

    @torch.inference_mode()
    def run(
        self,
        engine: Rows,
        at: np.ndarray,
        step: np.ndarray,
        position: np.ndarray,
        count: int,
        statistics: tuple[str, ...],
        sampled: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`count` decode forwards from `step` int [n] on of the rows in slots `at` int [n], the first one at
        `position` int [n]: appends their greedy tokens on the device. Every row has room for so many.

        Returns the `statistics` float32 [n, k] asked for, if any, and where `sampled` the logits [n, V], of
        the last one.
        """
        if self._engine is not engine:
            self._engine = engine
            self._graphs = StepGraphs(self._step, self._make_buffers, self._buckets, gpu.capture)
            self._eager = StepGraphs(self._step, self._make_buffers, self._buckets, None)
        segments: tuple[Segment, ...] | int  # or the rows of a tile
        which = np.zeros(0, dtype=np.int32)
        if self.forward.tiled:
            places, which, segments = tiles_of(
                engine.state.segments, len(at), self.forward.tiled, self.forward.tile_rows(len(at))
            )
            n = len(which) * segments
        else:
            places, segments = padded(engine.state.segments, len(at))
            n = int(places[-1]) + 1
        size, last = self._graphs.bucket(n), int(position.max())
        before = 0 if self.forward.tiled else USES_BEFORE_CAPTURE
        filled: Buffers = {}
        for done in range(count):
            longest = 1 << (last + done).bit_length()
            layout = (segments, min(longest, engine.max_length), statistics, sampled)
            self._uses[size, layout] += 1
            graphs = self._graphs if self._uses[size, layout] > before else self._eager
            buffers = graphs.buffers(n)
            if buffers is not filled:
                inputs = np.zeros(buffers["inputs"].shape, dtype=np.int64)
                where = inputs[: 3 * size].reshape(3, size)
                where[0] = engine.slots  # unused rows work in the spare slot
                where[:, places] = at, step - 1 + done, position + done
                inputs[3 * size :].view(np.int32)[: len(which)] = which
                gpu.copy_in(buffers["inputs"], inputs)
                filled = buffers
            if sampled and "logits" not in buffers:
                weights = self.forward.weights
                buffers["logits"] = weights.embedding.new_zeros(size, weights.head.shape[0])
            graphs.run(n, layout)
        if not statistics and not sampled:
            return None, None
        rows = gpu.to_device(places, engine.device)
        return (
            buffers["statistics"][rows, : len(statistics)] if statistics else None,
            buffers["logits"][rows] if sampled else None,
        )

    def _make_buffers(self, rows: int) -> dict[str, Tensor]:
        """`inputs` are `where` and `which`, end to end: one copy for both."""
        assert self._engine is not None
        tiles = rows // SMALL_TILE
        inputs = torch.zeros(3 * rows + (tiles + 1) // 2, dtype=torch.int64, device=self._engine.device)
        where = inputs[: 3 * rows].view(3, rows)
        where[0] = self._engine.slots
        which = inputs[3 * rows :].view(torch.int32)[:tiles]
        statistics = torch.zeros(rows, len(STATISTICS), device=self._engine.device)
        return {"inputs": inputs, "where": where, "which": which, "statistics": statistics}

    def _step(self, buffers: Buffers, layout: Hashable) -> None:
        engine = self._engine
        assert engine is not None
        assert isinstance(layout, tuple)
        segments, longest, statistics, sampled = layout
        slots, columns, positions = buffers["where"]
        cache, which = engine.cache, None
        if isinstance(segments, int):
            which, segments = buffers["which"][: len(slots) // segments], ()
        tokens = engine.tokens[slots, columns]
        logits = self.forward(tokens, slots, positions, segments, cache.keys, cache.values, longest, which)
        top, tokens = highest(logits)
        engine.tokens[slots, columns + 1] = tokens
        first = torch.where(torch.isfinite(top), NEVER, columns + 1)
        engine.bad[slots] = torch.minimum(engine.bad[slots], first)
        if statistics:
            buffers["statistics"][:, : len(statistics)] = token_statistics(statistics, logits)
        if sampled:
            buffers["logits"].copy_(logits)
        buffers["where"][1:].add_(1)
