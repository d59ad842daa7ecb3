"""The engine's decode step on a CUDA device: forward, arg-max and end-of-row bookkeeping, replayed as one
CUDA graph.

A step reads where its rows are (slot, column of the last token, position) from one static tensor, so a replay
costs the host one small copy.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.decode.graphs import Buffers, StepGraphs
from pmpd.decode.precision import token_statistics
from pmpd.decode.slots import SlotCache
from pmpd.schedulers.base import STATISTICS
from pmpd.weights.base import PrecisionState, Segment

if TYPE_CHECKING:
    from pmpd.decode.llama_cuda import CudaForward

_log = logging.getLogger(__name__)

USES_BEFORE_CAPTURE = 4
"""A layout (segments of precisions, bound of the length) runs so often without a graph first: mixed batches
pass through many once."""


class Rows(Protocol):
    """What a step works on: the engine."""

    slots: int
    max_length: int
    device: torch.device
    state: PrecisionState
    cache: SlotCache
    tokens: Tensor  # int64 [slots + 1, columns]
    bad: Tensor  # bool [slots + 1]


class GraphSteps:
    """Decode steps of one model. `GraphSteps.of` gives None for a model that has no capturable forward."""

    def __init__(self, forward: CudaForward) -> None:
        self.forward = forward
        self._engine: Rows | None = None
        self._uses: Counter[Hashable] = Counter()

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
        statistics: tuple[str, ...],
        sampled: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Decode forward `step` int [n] of the rows in slots `at` int [n], at `position` int [n]: appends
        their greedy tokens on the device.

        Returns the `statistics` float32 [n, k] asked for, if any, and where `sampled` the logits [n, V].
        """
        if self._engine is not engine:
            self._engine = engine
            self._graphs = StepGraphs(self._step, self._make_buffers, capture=gpu.capture)
            self._eager = StepGraphs(self._step, self._make_buffers, capture=None)
        n = len(at)
        *others, last = engine.state.segments
        longest = 1 << int(position.max()).bit_length()
        layout = (
            (*others, Segment(last.start, None, last.bits)),
            min(longest, engine.max_length),
            statistics,
            sampled,
        )
        self._uses[self._graphs.bucket(n), layout] += 1
        graphs = (
            self._graphs if self._uses[self._graphs.bucket(n), layout] > USES_BEFORE_CAPTURE else self._eager
        )
        buffers = graphs.buffers(n)
        where = np.empty((3, graphs.bucket(n)), dtype=np.int64)
        where[:, :n] = at, step - 1, position
        where[:, n:] = [[engine.slots], [0], [0]]  # unused rows work in the spare slot
        buffers["where"].copy_(torch.from_numpy(where))
        if sampled and "logits" not in buffers:
            head = self.forward.weights.head
            buffers["logits"] = head.new_zeros(graphs.bucket(n), len(head))
        graphs.run(n, layout)
        return (
            buffers["statistics"][:n, : len(statistics)] if statistics else None,
            buffers["logits"][:n] if sampled else None,
        )

    def _make_buffers(self, rows: int) -> dict[str, Tensor]:
        assert self._engine is not None
        device = self._engine.device
        where = torch.tensor([[self._engine.slots], [0], [0]], device=device).repeat(1, rows)
        return {"where": where, "statistics": torch.zeros(rows, len(STATISTICS), device=device)}

    def _step(self, buffers: Buffers, layout: Hashable) -> None:
        engine = self._engine
        assert engine is not None
        assert isinstance(layout, tuple)
        segments, longest, statistics, sampled = layout
        slots, columns, positions = buffers["where"]
        cache = engine.cache
        logits = self.forward(
            engine.tokens[slots, columns], slots, positions, segments, cache.keys, cache.values, longest
        )
        top, tokens = logits.max(dim=-1)
        engine.tokens[slots, columns + 1] = tokens
        engine.bad[slots] |= ~torch.isfinite(top)
        if statistics:
            buffers["statistics"][:, : len(statistics)] = token_statistics(statistics, logits)
        if sampled:
            buffers["logits"].copy_(logits)
