"""A linear layer whose precisions are stored in different ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from pmpd.weights.base import PrecisionLinear, PrecisionState


class MixedLinear(PrecisionLinear):
    """A linear layer whose precisions are layers of their own: `parts` precision -> layer without bias, None
    for the unquantized weight.

    That weight and the bias exist once, as parameters. The parts are no submodules, so that the tree is the
    same for every format.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, parts: Mapping[int, PrecisionLinear | None], state: PrecisionState
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, tuple(parts), state)
        self._parts = dict(parts)
        self.register_parameter(
            "weight", cast(nn.Parameter, linear.weight) if None in parts.values() else None
        )
        self.register_parameter("bias", linear.bias)

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        part = self._parts[bits]
        if part is None:
            assert self.weight is not None
            return nn.functional.linear(x, self.weight, self.bias)
        y = part.multiply(x, bits)
        return y if self.bias is None else y + self.bias

    def dequantize(self, bits: int) -> Tensor:
        part = self._parts[bits]
        if part is None:
            assert self.weight is not None
            return self.weight
        return part.dequantize(bits)

    def bias_vector(self) -> Tensor | None:
        return self.bias

    def packed_bytes(self) -> int:
        """Of the quantized precisions (the unquantized weight is a parameter)."""
        return sum(part.packed_bytes() for part in self._unique_parts())

    def _unique_parts(self) -> list[PrecisionLinear]:
        return [part for part in dict.fromkeys(self._parts.values()) if part is not None]

    def _apply(self, fn, recurse: bool = True):  # nn.Module's hook behind .to(), .cuda(), .half()
        for part in self._unique_parts():
            part._apply(fn, recurse)
        return super()._apply(fn, recurse)
