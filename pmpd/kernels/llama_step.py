"""One decode step of a Llama tree as one call of the native library (csrc/llama_step.h), for matrices in
fixed point.

Legend: n tokens (rows) of the step, C hidden size, Hq query heads, H KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.kernels import native
from pmpd.kernels.cpu_fixed import ByteMatrix, FixedMatrix

PARTS = ("products", "norms", "attention", "head", "waits")
"""What a step's time is divided into: `norms` includes bringing tokens to fixed point, `attention` the
rotation and the cache, `waits` those of the first thread for the others."""

COLUMNS_MULTIPLE = 32
"""The hidden size and the inner size are multiples of this, the head dim of half of it."""


class LayerWeights(NamedTuple):
    """One layer's; norms [C] of any dtype."""

    norm: Tensor
    post_norm: Tensor
    matrices: Sequence[FixedMatrix]
    """As `MATRICES` names them."""
    window: int | None


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class _Layer(ctypes.Structure):  # PmpdLayer of csrc/step.h
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "query", "key", "value", "output", "post_norm")),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "down", "keys", "values")),
        ("window", ctypes.c_int64),
    )


class _Step(ctypes.Structure):  # PmpdStep of csrc/step.h
    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("layer_count", "hidden", "heads", "key_heads", "dim", "inner")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "slot_stride", "head_stride", "position_stride")),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head", "dense_head")),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("tokens", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ids", "slots", "lengths", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("segment_stops", "segment_bits", "logits", "times")),
        ("cpu_clock", ctypes.c_int64),
    )


class NativeStep:
    """The step of one model. All tensors are kept; `embedding` and a dense `head` are bfloat16 [V, C],
    contiguous."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        embedding: Tensor,
        norm: Tensor,
        head: Tensor | ByteMatrix,
        heads: int,
        key_heads: int,
        dim: int,
        epsilon: float,
        scale: float,
    ) -> None:
        self.times: Tensor | None = None
        """int64 [len(PARTS)]: nanoseconds that the first thread spent, added up over steps, where one is
        given."""
        self.cpu_clock = False
        """Count processor time of that thread instead of time on the wall."""
        self._level = native.active_level()
        self._layers = (_Layer * len(layers))()
        self._keep: list[object] = [layers, embedding, head]
        for target, layer in zip(self._layers, layers, strict=True):
            target.norm, target.post_norm = self._float(layer.norm), self._float(layer.post_norm)
            for name, matrix in zip(MATRICES, layer.matrices, strict=True):
                setattr(target, name, matrix.fixed.address)
            target.window = layer.window or 0
        self.vocabulary, hidden = embedding.shape
        self._step = _Step(
            layers=ctypes.addressof(self._layers),
            layer_count=len(layers),
            hidden=hidden,
            heads=heads,
            key_heads=key_heads,
            dim=dim,
            inner=layers[0].matrices[MATRICES.index("gate")].shape[0],
            vocabulary=self.vocabulary,
            embedding=embedding.data_ptr(),
            norm=self._float(norm),
            epsilon=epsilon,
            scale=scale,
        )
        if isinstance(head, ByteMatrix):
            self._step.head = head.fixed.address
        else:
            self._step.dense_head = head.data_ptr()

    def _float(self, weight: Tensor) -> int:
        self._keep.append(weight.detach().float().contiguous())
        return self._keep[-1].data_ptr()  # type: ignore[attr-defined]

    def __call__(
        self,
        ids: Tensor,
        slots: Tensor,
        lengths: Tensor,
        cosine: Tensor,
        sine: Tensor,
        segments: Sequence[tuple[int, int | None, int]],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """Logits float32 [n, V] of the tokens `ids` int64 [n], one a slot; their keys and values go to the
        caches.

        `slots`, `lengths` int64 [n] (a token's position plus 1); `cosine`, `sine` float32 [n, D]; `segments`
        (start, stop, bits) over the tokens; `keys`, `values`: bfloat16 [S, H, T, D] per layer, contiguous,
        of one shape.
        """
        step, n = self._step, len(ids)
        stops = torch.tensor([n if stop is None else stop for _, stop, _ in segments])
        bits = torch.tensor([bits for _, _, bits in segments])
        logits = torch.empty(n, self.vocabulary)
        held = [tensor.contiguous() for tensor in (ids, slots, lengths, cosine, sine, stops, bits, logits)]
        step.ids, step.slots, step.lengths, step.cosine, step.sine = (t.data_ptr() for t in held[:5])
        step.segment_stops, step.segment_bits, step.logits = (t.data_ptr() for t in held[5:])
        step.tokens, step.segments = n, len(segments)
        step.slot_stride, step.head_stride, step.position_stride = keys[0].stride()[:3]
        step.cpu_clock = self.cpu_clock
        step.times = None if self.times is None else self.times.data_ptr()
        for target, layer_keys, layer_values in zip(self._layers, keys, values, strict=True):
            target.keys, target.values = layer_keys.data_ptr(), layer_values.data_ptr()
        failed = native.functions().pmpd_step(ctypes.addressof(step), self._level, torch.get_num_threads())
        native.check(failed, f"a step of {n} tokens")
        return logits
