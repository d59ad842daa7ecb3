"""A quantized layer whose weights are laid out for the kernel when they are first needed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from pmpd.weights.base import PrecisionLinear, PrecisionState

Packed = TypeVar("Packed")
"""A format's tensors of one layer."""


class LazyLinear(PrecisionLinear, Generic[Packed]):
    """`read` gives the layer's tensors from the (memory-mapped) checkpoint. They are packed for the device's
    kernel at the first multiplication, layer by layer, and again after a move to another device or dtype, so
    nothing is held twice."""

    def __init__(
        self,
        shape: tuple[int, int],
        precisions: Sequence[int],
        state: PrecisionState,
        read: Callable[[], Packed],
        dtype: torch.dtype,
        kernel: str | None = None,
    ) -> None:
        super().__init__(in_features=shape[1], out_features=shape[0], precisions=precisions, state=state)
        self._read = read
        self._kernel = kernel
        self._matrix: Any = None
        self._probe = torch.empty(0, dtype=dtype)  # follows .to(device/dtype) as a buffer would

    @abstractmethod
    def _pack(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> Any:
        """The tensors in the layout of the kernel, on `device`."""

    @property
    def matrix(self) -> Any:
        """The weights in the layout of the chosen kernel, built when first asked for."""
        if self._matrix is None:
            self._matrix = self._pack(self._read(), self._probe.device, self._probe.dtype)
        return self._matrix

    def use_kernel(self, kernel: str) -> None:
        """Another kernel than the one that the layer was made with: packed anew when first needed."""
        self._kernel, self._matrix = kernel, None

    def packed_bytes(self) -> int:
        return self.matrix.packed_bytes()

    def _apply(self, fn, recurse: bool = True):  # nn.Module's hook behind .to(), .cuda(), .half()
        moved = fn(self._probe)
        if moved.device != self._probe.device or moved.dtype != self._probe.dtype:
            self._probe, self._matrix = moved, None
        return super()._apply(fn, recurse)
