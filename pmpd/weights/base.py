"""What a linear layer that holds several precisions can do.

Legend: M tokens, K in_features, N out_features.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


class Segment(NamedTuple):
    """Tokens `start:stop` of a forward run at `bits`."""

    start: int
    stop: int | None
    bits: int


@dataclass
class PrecisionState:
    """The precision of the forward that runs now: one object that all `PrecisionLinear`s of a model share.

    Setting it is one assignment, whatever the number of layers. `segments` lie end to end over the tokens of
    the forward.
    """

    segments: tuple[Segment, ...] = field(default=(Segment(0, None, 16),))
    gathered: tuple[tuple[int, Tensor], ...] = ()
    """(precision, which tokens int64 [m]) in place of many short segments; () where those are few."""

    def set_uniform(self, bits: int) -> None:
        self.segments, self.gathered = (Segment(0, None, bits),), ()

    def set_tokens(self, bits: Sequence[int] | np.ndarray) -> None:
        """One precision per token int [n], equal ones side by side (the engine sorts its rows so)."""
        starts = [0, *(np.flatnonzero(np.diff(bits)) + 1).tolist()]
        stops = [*starts[1:], len(bits)]
        self.segments, self.gathered = (
            tuple(Segment(start, stop, int(bits[start])) for start, stop in zip(starts, stops, strict=True)),
            (),
        )

    def gather(self, device: torch.device) -> None:
        """Whoever can multiplies the tokens of a precision together, wherever they stand: after `set_tokens`
        of precisions that go up and down, where each stretch would be a product of its own."""
        widths = sorted({segment.bits for segment in self.segments})
        places: dict[int, list[int]] = {bits: [] for bits in widths}
        for start, stop, bits in self.segments:
            assert stop is not None
            places[bits].extend(range(start, stop))
        self.gathered = tuple((bits, torch.tensor(at, device=device)) for bits, at in places.items())


class PrecisionLinear(nn.Module, ABC):
    """A linear layer `y = x Wᵀ + bias` whose W exists at several precisions; `state` says which token uses
    which.

    A subclass stores the weights of one format and multiplies; it never looks at `state`.
    """

    def __init__(
        self, in_features: int, out_features: int, precisions: Sequence[int], state: PrecisionState
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.precisions = tuple(sorted(precisions, reverse=True))
        self.state = state

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        segments = self.state.segments
        if len(segments) == 1:
            return self.multiply(x, segments[0].bits)
        x_MK = x.reshape(-1, self.in_features)
        y_MN = x_MK.new_empty(x_MK.shape[0], self.out_features)
        for bits, at in self.state.gathered:
            y_MN[at] = self.multiply(x_MK[at], bits)
        for start, stop, bits in () if self.state.gathered else segments:
            y_MN[start:stop] = self.multiply(x_MK[start:stop], bits)
        return y_MN.view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def multiply(self, x: Tensor, bits: int) -> Tensor:
        """`x` [..., K] times the weights at precision `bits`, plus the bias: [..., N], the dtype of `x`."""

    @abstractmethod
    def dequantize(self, bits: int) -> Tensor:
        """The weight matrix [N, K] at precision `bits`, in the dtype the layer computes in."""

    @abstractmethod
    def bias_vector(self) -> Tensor | None:
        """The bias [N], or None."""

    @abstractmethod
    def packed_bytes(self) -> int:
        """Memory that the packed weights of all precisions take (caches not counted)."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, precisions={self.precisions}"
        )


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its KV cache: `cache`, or `past_key_values` before transformers 5.24 and
    in older model code."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def shared_state(model: nn.Module) -> PrecisionState:
    """The state of the model's `PrecisionLinear`s (a fresh, unused one for a model that has none)."""
    for module in model.modules():
        if isinstance(module, PrecisionLinear):
            return module.state
    return PrecisionState()


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values, which several heads of queries may share."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, float16 on a GPU: what weights are loaded as unless asked otherwise."""
    return torch.float32 if device.type == "cpu" else torch.float16
