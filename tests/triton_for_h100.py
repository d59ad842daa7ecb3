"""Compiles kernels of `pmpd.kernels._triton_kernels` for compute capability 9.0, which needs no GPU, and
prints what came out as JSON. A process of its own, and not as a module of `tests`: that chooses Triton's
interpreter, which compiles nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmpd.kernels import _triton_kernels as kernels

COLUMNS, WARPS = 4096, 4


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> dict[str, Any]:
    """`types` of the pointers; other arguments are int32, and divisible by 16 as pointers are."""
    variables = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "i32") for name in variables} | dict.fromkeys(constants, "constexpr")
    places = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        kernel, {name: signature[name] for name in kernel.arg_names},
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in variables},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    use = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED):(\d+)", used.stdout + used.stderr)}
    text = made.asm["ttgir"]
    loop = text[text.index("scf.for") : text.index("scf.yield")] if "scf.for" in text else ""
    names = set(re.findall(r"tensor<[^<>]*, (#\w+)>", loop))
    layouts = [re.search(rf"{name} = (.*)", text) for name in names]
    return {
        "registers": use["REG"],
        "spilled": use["STACK"],
        "tables": max(0, use["SHARED"] - 1024),  # what the GPU takes for itself
        "layouts": sorted({found[1] for found in layouts if found}),
    }


def halves(bits: int, group: int, octets: int = 1, bfloat16: bool = False) -> dict[str, Any]:
    tables = "*i16" if bits > 4 and not group else "*i32"
    float_type = "*bf16" if bfloat16 else "*fp16"
    types = {
        "x": "*i32", "planes": "*i32", "tables": tables, "scales": "*i32", "minus_zeros": "*i32",
        "bias": float_type, "y": float_type,
    }  # fmt: skip
    constants = {
        "BLOCKS": COLUMNS // 256, "TILES": COLUMNS // 256 // WARPS, "BITS": bits, "OCTETS": octets,
        "WARPS": WARPS, "GROUP": group, "EXACT": True, "HAS_BIAS": True, "BFLOAT16": bfloat16,
        "PLAIN": not group, "PDL": True, "EMULATE": False,
    }  # fmt: skip
    return compiled(kernels.halves_matmul, types, constants, WARPS)


def dequantize_words(bits: int) -> dict[str, Any]:
    types = {"planes": "*i32", "values": "*i16", "out": "*i32"}
    constants = {"BLOCKS": COLUMNS // 256, "BITS": bits, "PLAIN": True, "EMULATE": False}
    return compiled(kernels.dequantize_words, types, constants, 8)


def dequantize_bytes() -> dict[str, Any]:
    types = {"words": "*i32", "scales": "*i32", "minus_zeros": "*i32", "out": "*i32"}
    constants = {"BLOCKS": COLUMNS // 256, "GROUP": 128, "BFLOAT16": False, "EMULATE": False}
    return compiled(kernels.dequantize_bytes, types, constants, 8)


if __name__ == "__main__":
    found = {
        "halves 8": halves(8, 0, octets=4),
        "bytes": halves(8, 128),
        "bytes bfloat16": halves(8, 128, bfloat16=True),
        "dequantize 8": dequantize_words(8),
        "dequantize bytes": dequantize_bytes(),
    }
    print(json.dumps(found))
