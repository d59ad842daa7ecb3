"""Any-Precision checkpoints: bitplanes and one table per row and precision (Park et al., "Any-Precision LLM",
ICML 2024).

`config.json` has a key `anyprec` with `seed_precision`, `parent_precision` and `arch_config` (which linears
are quantized). The precisions available are seed..parent; a lower one reads fewer planes of the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pmpd.errors import UserError
from pmpd.kernels import dispatch
from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.weights.base import PrecisionState
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.lazy import LazyLinear

if TYPE_CHECKING:
    from pmpd.weights.naming import NamedTensors


class AnyPrecisionLinear(LazyLinear[PackedWeights]):
    """One quantized linear with its bias."""

    def _pack(self, packed: PackedWeights, device: torch.device, dtype: torch.dtype) -> BitplaneMatrix:
        return dispatch.build(packed.to(device), dtype, self._kernel)

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        return self.matrix.multiply(x, bits)

    def dequantize(self, bits: int) -> Tensor:
        return self.matrix.dequantize(bits)

    def bias_vector(self) -> Tensor | None:
        bias = self._read().bias
        return None if bias is None else bias.to(self._probe.device, self._probe.dtype)


def precisions_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Descending. ValueError where the folder is no Any-Precision checkpoint."""
    settings = _settings(checkpoint)
    return tuple(range(settings["parent_precision"], settings["seed_precision"] - 1, -1))


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The key `anyprec` of config.json, complete. ValueError where it is not."""
    settings = checkpoint.config_json.get("anyprec")
    if not isinstance(settings, dict):
        raise UserError(
            f"checkpoint {checkpoint.folder}: its config.json has no key 'anyprec', so it is not an "
            f"Any-Precision checkpoint; "
            "make one with `pmpd quantize`, or pass an unquantized model with precisions 16"
        )
    arch = settings.get("arch_config") or {}
    lacking = [key for key in ("seed_precision", "parent_precision") if key not in settings]
    lacking += [
        f"arch_config.{key}" for key in ("model_name", "layers_name", "module_names") if key not in arch
    ]
    if lacking:
        raise UserError(
            f"checkpoint {checkpoint.folder}: 'anyprec' in its config.json lacks {', '.join(lacking)}; copy "
            f"config.json again from the "
            "tool that wrote the checkpoint, or quantize again with `pmpd quantize`"
        )
    return settings


def check(checkpoint: Checkpoint, precisions: Sequence[int]) -> None:
    """ValueError where the checkpoint does not hold `precisions`, or is of a kind that can't be read."""
    available = precisions_of(checkpoint)
    absent = [bits for bits in precisions if bits not in available]
    if absent:
        lowest, highest = min(precisions), max(precisions)
        again = (
            f", or quantize again with --seed-precision {lowest} --parent-precision {highest}"
            if 2 <= lowest <= highest <= 8
            else ""
        )
        raise UserError(
            f"precisions {list(precisions)}: this checkpoint holds {', '.join(map(str, available))} "
            f"({checkpoint.folder}); "
            f"choose from these{again}"
        )
    settings = _settings(checkpoint)
    outliers = [name for name in sorted(checkpoint.names()) if name.endswith((".rows", ".cols", ".vals"))]
    if outliers or any(value for key, value in settings.items() if "sparse" in key):
        where = f" ({outliers[0]}, …)" if outliers else ""
        raise UserError(
            f"checkpoint {checkpoint.folder}: it keeps sparse outliers beside the quantized weights{where}, "
            f"which are not supported; make it again without them (sparse_numvals 0), or with `pmpd quantize`"
        )
    if settings.get("group_count", 1) != 1:
        count = settings["group_count"]
        raise UserError(
            f"checkpoint {checkpoint.folder}: group_count {count} is not supported, only 1 (one table per "
            f"row)"
        )


def layer(
    checkpoint: NamedTensors,
    parent: int,
    name: str,
    linear: nn.Linear,
    precisions: Sequence[int],
    state: PrecisionState,
    dtype: torch.dtype,
    kernel: str | None,
) -> tuple[AnyPrecisionLinear, list[str]]:
    """The quantized layer in place of `linear` (with a bias if that has one), and what is wrong with its
    tensors."""
    shape, bias = (linear.out_features, linear.in_features), linear.bias is not None
    problems = _mismatches(checkpoint, name, shape, parent, precisions, bias)

    def read() -> PackedWeights:
        packed = PackedWeights(
            # planes below the lowest bit that is used are never read
            planes=checkpoint.tensor(f"{name}.qweight")[: max(precisions)],
            tables={bits: checkpoint.tensor(f"{name}.lut{bits}") for bits in precisions},
            bias=checkpoint.tensor(f"{name}.bias") if bias else None,
        )
        checkpoint.release()  # once this layer is packed, nothing keeps the pages that it was read from
        return packed

    return AnyPrecisionLinear(shape, precisions, state, read, dtype, kernel), problems


def _mismatches(
    checkpoint: NamedTensors,
    name: str,
    shape: tuple[int, int],
    parent: int,
    precisions: Sequence[int],
    bias: bool,
) -> list[str]:
    rows, columns = shape
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        f"{name}.qweight": ((parent, rows, columns // 32), torch.int32)
    }
    expected |= {f"{name}.lut{bits}": ((rows, 2**bits), torch.float16) for bits in precisions}
    if bias:
        expected[f"{name}.bias"] = ((rows,), None)
    problems = []
    for tensor_name, (tensor_shape, dtype) in expected.items():
        if tensor_name not in checkpoint.names():
            problems.append(f"{tensor_name} is missing")
            continue
        tensor = checkpoint.tensor(tensor_name)
        if tuple(tensor.shape) != tensor_shape or (dtype is not None and tensor.dtype != dtype):
            problems.append(
                f"{tensor_name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype or 'float'} "
                f"{list(tensor_shape)}"
            )
    return problems
