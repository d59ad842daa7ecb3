"""Any-Precision checkpoints: bitplanes and one table per row and precision (Park et al., "Any-Precision LLM",
ICML 2024).

`config.json` has a key `anyprec` with `seed_precision`, `parent_precision` and `arch_config` (which linears
are quantized). The precisions available are seed..parent; a lower one reads fewer planes of the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmpd.errors import UserError
from pmpd.kernels import dispatch
from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.weights.base import PrecisionLinear, PrecisionState
from pmpd.weights.checkpoint import Checkpoint, build_skeleton, fill, replace_linears


class AnyPrecisionLinear(PrecisionLinear):
    """One quantized linear. `read` gives its tensors from the (memory-mapped) checkpoint: they are packed for
    the device's kernel at the first multiplication, layer by layer, and again after a move to another device
    or dtype, so nothing is held twice."""

    def __init__(
        self,
        shape: tuple[int, int],
        precisions: Sequence[int],
        state: PrecisionState,
        read: Callable[[], PackedWeights],
        dtype: torch.dtype,
        kernel: str | None = None,
    ) -> None:
        super().__init__(in_features=shape[1], out_features=shape[0], precisions=precisions, state=state)
        self._read = read
        self._kernel = kernel
        self._matrix: BitplaneMatrix | None = None
        self._probe = torch.empty(0, dtype=dtype)  # follows .to(device/dtype) as a buffer would

    @property
    def matrix(self) -> BitplaneMatrix:
        """The weights in the layout of the chosen kernel, built when first asked for."""
        if self._matrix is None:
            packed, device = self._read(), self._probe.device
            packed = PackedWeights(
                planes=packed.planes.to(device),
                tables={bits: table.to(device) for bits, table in packed.tables.items()},
                bias=None if packed.bias is None else packed.bias.to(device),
            )
            self._matrix = dispatch.build(packed, self._probe.dtype, self._kernel)
        return self._matrix

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        return self.matrix.multiply(x, bits)

    def dequantize(self, bits: int) -> Tensor:
        return self.matrix.dequantize(bits)

    def bias_vector(self) -> Tensor | None:
        bias = self._read().bias
        return None if bias is None else bias.to(self._probe.device, self._probe.dtype)

    def packed_bytes(self) -> int:
        return self.matrix.packed_bytes()

    def _apply(self, fn, recurse: bool = True):  # nn.Module's hook behind .to(), .cuda(), .half()
        moved = fn(self._probe)
        if moved.device != self._probe.device or moved.dtype != self._probe.dtype:
            self._probe, self._matrix = moved, None
        return super()._apply(fn, recurse)


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
    if settings.get("group_count", 1) != 1:
        count = settings["group_count"]
        raise UserError(
            f"checkpoint {checkpoint.folder}: group_count {count} is not supported, only 1 (one table per "
            f"row)"
        )


def layer(
    checkpoint: Checkpoint,
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
    problems = _mismatches(
        checkpoint, name, shape, _settings(checkpoint)["parent_precision"], precisions, bias
    )

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


def load(
    checkpoint: Checkpoint, precisions: Sequence[int], dtype: torch.dtype, kernel: str | None = None
) -> PreTrainedModel:
    """The model with `AnyPrecisionLinear`s that offer `precisions`; everything else exists once, as `dtype`,
    on the CPU.

    ValueError naming tensors that are missing or misshapen, or precisions that the checkpoint does not hold.
    """
    check(checkpoint, precisions)
    arch = _settings(checkpoint)["arch_config"]
    prefix = f"{arch['model_name']}.{arch['layers_name']}."
    names, state, problems = checkpoint.names(), PrecisionState(), []
    state.set_uniform(max(precisions))

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        index, _, module = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not index.isdigit() or module not in arch["module_names"]:
            return None
        if f"{name}.qweight" not in names:
            if f"{name}.weight" not in names:
                problems.append(f"{name}.qweight is missing")
            return None  # left unquantized by the tool that wrote the checkpoint
        quantized, wrong = layer(checkpoint, name, linear, precisions, state, dtype, kernel)
        problems.extend(wrong)
        return quantized

    model = build_skeleton(checkpoint)
    replace_linears(model, make)
    if problems:
        raise UserError(
            f"checkpoint {checkpoint.folder} is damaged: {'; '.join(problems[:8])}"
            + (" …" if len(problems) > 8 else "")
        )
    fill(model, checkpoint, dtype)
    checkpoint.release()
    return model


def _mismatches(
    checkpoint: Checkpoint,
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
