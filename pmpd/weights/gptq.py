"""GPTQ checkpoints, one precision a folder, as AutoGPTQ and GPTQModel write them (Frantar et al., "GPTQ",
ICLR 2023).

Legend: K in_features, N out_features, G groups of inputs that share a scale and a zero, b bits of a code.

Weight[k, n] = scales[g(k), n] · (code[k, n] − zero[g(k), n]). Codes are packed along K, zeros along N, little
end first: 32 values fill b words, and for b = 3 two of them straddle a word boundary. Checkpoint format
`gptq` stores zero − 1, as its writer subtracts (see `_minus_one`), `gptq_v2` the zero itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pmpd.errors import UserError
from pmpd.kernels import dispatch
from pmpd.kernels import gptq as codes
from pmpd.kernels.gptq import PackedGPTQ
from pmpd.weights.base import PrecisionState
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.lazy import LazyLinear

if TYPE_CHECKING:
    from pmpd.weights.naming import NamedTensors

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
_WORDS_OF_THREE_BITS = (0x24924924, 0x92492492, 0x49249249)
"""What some writers subtract from every three words of 3-bit zeros: not a 1 at the place of each value, but
it can be added again."""


def settings_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantizer's settings, checked; None where the folder is no GPTQ checkpoint. ValueError: settings
    that can't be read."""
    name = "quantize_config.json"
    separate = (checkpoint.folder / name).is_file()
    settings = checkpoint.read_json(name) if separate else checkpoint.config_json.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise UserError(
            f"checkpoint {checkpoint.folder}: quantization_config is {settings!r}; it must be an object"
        )
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(values, dict) for values in dynamic.values()):
        raise UserError(
            f"checkpoint {checkpoint.folder}: dynamic is {dynamic!r}; it must map patterns of names to "
            f"settings"
        )
    _check(checkpoint.folder, settings)
    return settings


def _method(settings: Mapping[str, Any]) -> str:
    """Who quantized it. Old writers of GPTQ and of bitsandbytes do not say."""
    by_name = settings.get("quant_method") or settings.get("method")
    unnamed = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(settings) else "gptq"
    return str(by_name or unnamed)


def _check(folder: Path, settings: dict[str, Any]) -> None:
    """ValueError naming a setting that can't be read, of the checkpoint or of one module."""
    for name, value, allowed in (
        ("quant_method", _method(settings), ("gptq",)),
        ("bits", settings.get("bits"), BITS),
        ("checkpoint_format", _format(settings), FORMATS),
    ):
        if value not in allowed:
            raise UserError(
                f"checkpoint {folder}: {name} is {value!r}; allowed: "
                f"{', '.join(map(str, allowed))}; give the unquantized model, or quantize that with "
                f"`pmpd quantize`"
            )
    size = settings.get("group_size", -1)
    if size not in (-1, None) and not (type(size) is int and size > 0):
        raise UserError(
            f"checkpoint {folder}: group_size is {size!r}; allowed: -1 for whole rows, or a number of inputs"
        )


def layer(
    checkpoint: NamedTensors,
    settings: dict[str, Any],
    name: str,
    linear: nn.Linear,
    state: PrecisionState,
    dtype: torch.dtype,
    kernel: str | None,
) -> tuple[GPTQLinear, list[str]]:
    """The layer in place of `linear`, without its bias, and what is wrong with its tensors. `settings` as of
    `settings_of`."""
    whole, settings = settings, {**settings, **_override(settings, name)}
    _check(checkpoint.folder, settings)
    bits, (columns, rows) = settings["bits"], (linear.in_features, linear.out_features)
    size = settings.get("group_size", -1)
    groups = 1 if size in (-1, None) else -(-columns // size)
    has_index = f"{name}.g_idx" in checkpoint.names()

    def tensor(part: str) -> Tensor:
        return checkpoint.tensor(f"{name}.{part}")

    def read() -> PackedGPTQ:
        qzeros = tensor("qzeros")
        if _format(settings) == "gptq":
            qzeros = _add_one(qzeros, *_minus_one(whole, bits))
        in_order = torch.arange(columns, dtype=torch.int32) // (size if groups > 1 else columns)
        g_idx = tensor("g_idx").to(torch.int32) if has_index else in_order
        return PackedGPTQ(tensor("qweight"), qzeros, tensor("scales"), g_idx, bits)

    problems = []
    expected = {
        "qweight": [columns * bits // 32, rows],
        "qzeros": [groups, rows * bits // 32],
        "scales": [groups, rows],
        "g_idx": [columns],
    }
    for part, shape in expected.items():
        if f"{name}.{part}" in checkpoint.names():
            found = tensor(part)
            if list(found.shape) != shape or found.is_floating_point() != (part == "scales"):
                problems.append(
                    f"{name}.{part} is {found.dtype} {list(found.shape)}, expected {shape} for {bits} bits, "
                    f"group size {size}"
                )
            elif part == "g_idx" and not 0 <= int(found.min()) <= int(found.max()) < groups:
                problems.append(
                    f"{name}.g_idx has groups {int(found.min())} to {int(found.max())}, not 0 to {groups - 1}"
                )
        elif part != "g_idx":
            problems.append(f"{name}.{part} is missing")
        elif settings.get("desc_act") and groups > 1:
            problems.append(f"{name}.g_idx is missing, which desc_act needs")
    return GPTQLinear((rows, columns), (bits,), state, read, dtype, kernel), problems


def _add_one(qzeros: Tensor, bits: int, by_word: bool) -> Tensor:
    """`qzeros` of format `gptq` as `gptq_v2` has them: the inverse of what `_minus_one` says of their
    writer."""
    if by_word:
        ones = _WORDS_OF_THREE_BITS if bits == 3 else (sum(1 << shift for shift in range(0, 32, bits)),)
        words = torch.tensor([ones[column % len(ones)] for column in range(qzeros.shape[1])])
        return (qzeros + words).to(torch.int32)  # int64 sums, cut to their lowest 32 bits
    return codes.pack(
        (codes.unpack(qzeros.T, bits, qzeros.shape[1] * 32 // bits) + 1) & (2**bits - 1), bits
    ).T.contiguous()


class GPTQLinear(LazyLinear[PackedGPTQ]):
    """One quantized linear at one precision, without bias: with Triton's kernel where that is the choice for
    the device, else plain PyTorch."""

    def _pack(self, packed: PackedGPTQ, device: torch.device, dtype: torch.dtype) -> Any:
        packed = packed.to(device)
        if dispatch.choose(device, dtype, self._kernel).name in ("triton", "cuda"):
            from pmpd.kernels.triton import GPTQMatrix

            return GPTQMatrix(*packed[:4], packed.bits, 0, dtype)
        return codes.ReferenceGPTQ(packed, dtype)

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        return self.matrix.multiply(x)

    def dequantize(self, bits: int) -> Tensor:
        return self.matrix.dequantize()

    def bias_vector(self) -> Tensor | None:
        return None


def _format(settings: dict[str, Any]) -> str:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"


def _override(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """GPTQModel's `dynamic`: settings of the modules whose name matches a regular expression ("+:" is
    optional, "-:" skips the module)."""
    for pattern, values in (settings.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return values
    return {}


def _minus_one(settings: dict[str, Any], bits: int) -> tuple[int, bool]:
    """How the writer of a checkpoint took 1 from the zeros of a module of `bits`: as if they were zeros of
    how many bits, and whether by one subtraction a word, in which a zero of 0 borrows from its neighbour.

    Value by value, where no writer says in `meta.quantizer` who it is (AutoGPTQ up to 0.7). By word, those
    that say so: AutoGPTQ's last versions and GPTQModel, for all modules with the bits of the whole
    checkpoint, whatever `dynamic` says (GPTQModel since 7.3.2: with the module's). For 3 bits GPTQModel does
    it value by value since 7.0; before, it subtracted `_WORDS_OF_THREE_BITS`.
    """
    meta = settings.get("meta")
    quantizer = (meta.get("quantizer") if isinstance(meta, dict) else None) or ()
    for name in [quantizer] if isinstance(quantizer, str) else quantizer:
        writer, _, version = str(name).partition(":")
        if writer in ("gptqmodel", "autogptq", "auto_gptq"):
            numbers = (
                [int(number) for number in re.findall(r"\d+", version)[:3]] if writer == "gptqmodel" else []
            )
            bits = bits if numbers >= [7, 3, 2] else settings["bits"]
            return bits, bits != 3 or numbers < [7]
    return bits, False
