"""Kernels for CUDA devices, in Triton: y = x Wᵀ + bias with W as bitplanes and tables (`TritonMatrix`) or as
GPTQ codes (`GPTQMatrix`).

Legend: M tokens, N out_features, K in_features, b bits, P planes. A *tile* is 16 rows x 256 columns.

Memory layout (made once at load): planes int32 [P, N/16, K/256, 32 lanes, 4], rows and columns padded. Lane 4
g + t, word 2 h + r of a tile holds row 8 r + g, columns 128 h + 32 s + 8 t + i (s = 0..3, i = 0..7), so a
warp reads one plane of a tile as 512 consecutive bytes, 16 a thread, the tiles of a row block follow each
other, and the four threads of a row read 32 activations side by side. Bit 8 s + i of a word of plane p is at
position (4 i + 3 - p - s) mod 32: then one to two logical operations per eight weights and plane turn words
of planes into words of nibbles, one code a nibble.

Four ways to multiply, chosen by M, b and type:

*digits* (M <= 2, b = 2, 3, 4; up to 16 in float32). A table's values become 14-bit fixed point of the row's
range, as two 7-bit digits, an activation three signed bytes (24 bits, one scale a token); products run on the
int8 tensor cores and add up exactly in int32; what is left is one multiply-add in float32 a row. Why: at b =
4 a memory-bound kernel must decode about 33 weights a clock and multiprocessor (H200: 4.3 TB/s over 132
multiprocessors at 1.98 GHz), at b = 2 about 66, with 64 logical operations a clock: one to two operations a
weight. A table look-up in shared memory or the first-level cache is slower than that. `prmt` looks up four
bytes in an 8-byte table held in two registers, and four such bytes *are* an operand register of the int8
tensor cores: no widening, no interleaving, no multiply-add. Operations a weight (logical, shift, prmt;
counted in the machine code for sm_90): b = 2: 1.0, b = 3: 1.1, b = 4: 1.7 (a code >= 8 makes `prmt` return 0,
so the products of two half tables add up in the accumulators). Error: tables 2^-15 of the row's range,
activations 2^-24 of the token's largest; below float16's own rounding.

*halves* (2 < M <= 64, b = 2, 3, 4, float16 and bfloat16). `prmt` looks up the low and the high bytes of four
table values and puts them together: exact values of the type, operands of its tensor cores, eight tokens a
product. Operations a weight: b = 2, 3: 1.5, b = 4: 2.5. GPTQ in float16 (M <= 64, groups of a multiple of 32
columns) looks up its codes in the same way, then subtracts and scales pairs.

At b = 5..8 (M <= 64) tables of 64 to 512 bytes fit no registers: *halves* keeps a copy for each lane in
shared memory, in the lane's own bank, so that a warp looks up 32 values a clock. 32 KiB for 16 rows, made
once for all their columns. 6.5 instructions a weight (b = 8), one of them the look-up: some 15 us at 14336 x
4096.

GPTQ of 8 bits (float16 and bfloat16, groups as above) is stored as bytes in the order of the operands
(`tile_bytes`), once: a byte becomes a float by `prmt`, then an addition and a multiplication. 1.5 operations
a weight in float16, 3.5 in bfloat16: memory bounds it.

*fused* (float32, GPTQ with other groups; up to M = 64): decodes a tile with one table load a weight, then a
tensor-core dot (a float32 sum for M < 4).

*dense* (larger M; at b = 5..8 from where the GPU's autotune table says): writes the matrix in the
activations' type, then cuBLAS. In 16-bit types a weight takes some 8 instructions, so that writing bounds it.

Bytes of one multiplication: N K b / 8 planes + N 2^b 2 tables (digits: N (8, 16, 32) + 8 N) + 2 M (K + N)
activations; digits adds 4 M K for the split activations. FLOP: 2 M N K. Memory bounds all of it for M <= 16.
Floors at the 4.3 TB/s that a copy reaches on an H200:

    matrix             b = 2            b = 3            b = 4           float16
    4096 x 4096        4.3 MB, 1.0 us   6.4 MB, 1.5 us   8.6 MB, 2.0 us  33.6 MB,  7.8 us
    14336 x 4096      14.9 MB, 3.5 us  22.4 MB, 5.2 us  29.9 MB, 7.0 us 117.4 MB, 27.3 us
    8B step, M = 1     1.8 GB, 0.42 ms  2.6 GB, 0.61 ms  3.5 GB, 0.82 ms 14.0 GB,  3.3 ms   (6.98e9 weights)
    with 16-bit head   2.8 GB, 0.66 ms  3.7 GB, 0.86 ms  4.6 GB, 1.06 ms 15.0 GB,  3.5 ms   (128256 x 4096)

Attention of a decode step reads each cached key and value once: 2 H D T 2 bytes a layer and row (8B: 128 KiB
a token over all layers, so 0.03 ms a row at T = 1000), FLOP 4 Hq D T.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.kernels import gptq
from pmpd.kernels.base import BitplaneMatrix, PackedWeights
from pmpd.kernels.bitplanes import unpack

_log = logging.getLogger(__name__)

TILE_ROWS = 16
TILE_COLUMNS = 256
DIGITS_BITS = (2, 3, 4)
DIGITS_TOKENS = 16
MOST_WARPS = 16
SPLIT_TOKENS = 2
"""Up to so many tokens 16-bit types take `digits` too; for more, `halves` is faster."""
FUSED_TOKENS = 64
HALVES_TOKENS = 32
"""Tokens of one program of `halves`."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUTES = ("digits", "halves", "fused", "dense")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Needs Triton, a CUDA device of compute capability 8.0 or later (or Triton's interpreter), float16,
    bfloat16 or float32."""
    if importlib.util.find_spec("triton") is None:
        return "the Python package triton is not installed"
    if dtype not in DTYPES:
        return f"Triton kernels compute in float16, bfloat16 or float32, not {dtype}"
    if device.type == "cuda":
        capability = gpu.capability(device)
        return (
            None
            if capability >= (8, 0)
            else f"Triton kernels need compute capability 8.0 or later, {device} has {capability}"
        )
    if device.type == "cpu" and _interpreted():
        return None
    return f"Triton kernels run on CUDA devices, not on {device.type}"


# -- layout
# ------------------------------------------------------------------------------------------------------------


def _position(plane: int, column: Tensor) -> Tensor:
    """The bit of a word that holds column `column` (0..31) of plane `plane`."""
    return (4 * (column % 8) + 3 - plane % 4 - column // 8) % 32


def tile_codes(codes_NK: Tensor, bits: int, plain: bool = False) -> Tensor:
    """Codes uint8 [N, K], each < 2**bits -> planes int32 [bits, N/16, K/256, 32, 4], rows and columns padded
    with zeros. `plain`: a column is at the same bit in every plane, that of plane 0."""
    rows, columns = codes_NK.shape
    row_blocks, blocks = math.ceil(rows / TILE_ROWS), math.ceil(columns / TILE_COLUMNS)
    codes = torch.nn.functional.pad(
        codes_NK, (0, blocks * TILE_COLUMNS - columns, 0, row_blocks * TILE_ROWS - rows)
    )
    # [row block, r, g, block, h, s, t, i] -> [row block, block, g, t, h, r, s and i: column in word]
    codes = (
        codes.view(row_blocks, 2, 8, blocks, 2, 4, 4, 8)
        .permute(0, 3, 2, 6, 4, 1, 5, 7)
        .reshape(row_blocks, blocks, 8, 4, 2, 2, 32)
    )
    planes = torch.zeros(bits, *codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for plane in range(bits):
        for column, position in enumerate(_position(0 if plain else plane, torch.arange(32)).tolist()):
            planes[plane] |= ((codes[..., column] >> (bits - 1 - plane)) & 1).to(torch.int32) << position
    return planes.view(bits, row_blocks, blocks, 32, 4)


def tile_bytes(codes_NK: Tensor) -> Tensor:
    """Codes uint8 [N, K] -> int32 [8, N/16, K/256, 32, 4], padded with zeros: the shape of eight planes, but
    part 4 h + s of lane 4 g + t of a tile holds bytes: columns 128 h + 32 s + 8 t + 0..7 of row g, then of
    row g + 8."""
    rows, columns = codes_NK.shape
    row_blocks, blocks = math.ceil(rows / TILE_ROWS), math.ceil(columns / TILE_COLUMNS)
    codes = torch.nn.functional.pad(
        codes_NK, (0, blocks * TILE_COLUMNS - columns, 0, row_blocks * TILE_ROWS - rows)
    )
    # [row block, r, g, block, h, s, t, i] -> [h, s, row block, block, g, t, r, i]
    codes = codes.view(row_blocks, 2, 8, blocks, 2, 4, 4, 8).permute(4, 5, 0, 3, 2, 6, 1, 7)
    return codes.reshape(8, row_blocks, blocks, 32, 16).view(torch.int32)


def _table_words(high: Tensor, low: Tensor, bits: int) -> Tensor:
    """Bytes int64 [N, 2**bits], the high and the low ones of a table -> int32 [N, words] in the order
    `_triton_kernels._table` reads."""
    high, low = high.view(len(high), -1, 4), low.view(len(low), -1, 4)  # [N, 2**bits / 4, 4]
    if bits == 4:
        octets = torch.stack(
            [high[:, 0], high[:, 1], low[:, 0], low[:, 1], high[:, 2], high[:, 3], low[:, 2], low[:, 3]],
            dim=1,
        )
    else:
        octets = torch.cat([high, low], dim=1)
    return (octets << torch.tensor([0, 8, 16, 24], device=high.device)).sum(-1).to(torch.int32).contiguous()


def table_values(table: Tensor, dtype: torch.dtype) -> Tensor:
    """`table` [N, 2**bits] with rows padded, in `dtype` where that has 16 bits, else as given."""
    padded = torch.nn.functional.pad(table, (0, 0, 0, -len(table) % TILE_ROWS)).contiguous()
    return padded if dtype == torch.float32 else padded.to(dtype)


def table_halves(table: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`table` [N, 2**bits] as 16-bit floats of `dtype` -> their bytes int32 [N padded, words]."""
    padded = torch.nn.functional.pad(table.to(dtype), (0, 0, 0, -len(table) % TILE_ROWS))
    patterns = padded.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    return _table_words(patterns >> 8, patterns & 0xFF, bits)


def table_digits(table: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """`table` [N, 2**bits] -> (bytes int32 [N padded, words], scale float32, offset float32 [N padded]).

    value = offset + scale * (128 high + low), digits in 0..127; word order as `_triton_kernels._table` reads
    it.
    """
    rows = table.shape[0]
    padded = math.ceil(rows / TILE_ROWS) * TILE_ROWS
    values = torch.nn.functional.pad(table.double(), (0, 0, 0, padded - rows))
    offset = values.amin(1)
    scale = (values.amax(1) - offset) / (127 * 128 + 127)
    digits = torch.round((values - offset[:, None]) / torch.where(scale > 0, scale, 1.0)[:, None]).to(
        torch.int64
    )
    return _table_words(digits // 128, digits % 128, bits), scale.float(), offset.float()


# -- settings per GPU
# ----------------------------------------------------------------------------------------------------------


def settings_file(gpu_name: str) -> Path:
    return Path(__file__).parent / "autotune" / (gpu_name.replace(" ", "_").replace("/", "_") + ".json")


@lru_cache(maxsize=8)
def settings(gpu_name: str) -> dict[str, dict[str, Any]]:
    """The GPU's autotune table: route -> shape -> what was measured. One that can't be read counts as none,
    and that is logged.

    An entry outlives the source of its kernel: what still fits gives the same products, and was the fastest
    of an older one. Leaving it out until somebody measures again would cost more than that.
    """
    path = settings_file(gpu_name)
    try:
        table = json.loads(path.read_bytes()) if path.is_file() else {}
        return {route: entries for route, entries in table.items() if isinstance(entries, dict)}
    except (ValueError, AttributeError) as error:
        _log.warning("%s: not an autotune table (%s); kernels are cut by rules", path, error)
        return {}


def measured(gpu_name: str, route: str, shape: str, names: tuple[str, ...]) -> dict[str, int]:
    """These numbers of an entry of the autotune table; {} where it has none, or not all of them: then it was
    measured with a kernel that is cut in another way, and that is logged."""
    entry = settings(gpu_name).get(route, {}).get(shape)
    if entry is None:
        return {}
    numbers = [entry.get(name) for name in names] if isinstance(entry, dict) else []
    found = {name: n for name, n in zip(names, numbers, strict=False) if type(n) is int and n > 0}
    if len(found) < len(names):
        warn_of_entry(gpu_name, route, shape)
        return {}
    return found


@lru_cache(maxsize=1024)
def warn_of_entry(gpu_name: str, route: str, shape: str) -> None:
    """Once an entry."""
    told = "%s: %s, %s is not an entry as this version measures them, and is left out"
    _log.warning(told, settings_file(gpu_name), route, shape)


def _gpu_name(device: torch.device) -> str:
    return gpu.device_name(device) if device.type == "cuda" else "interpreter"


def warps_of(gpu_name: str, route: str, rows: int, columns: int, bits: int, tokens: int) -> int:
    """Warps that share a row block's columns: as measured for this GPU, route and shape, else about 2048
    warps in all."""
    known = measured(gpu_name, route, f"{rows}x{columns}x{bits}x{_token_bucket(tokens)}", ("warps",))
    if known:
        return known["warps"]
    blocks = math.ceil(columns / TILE_COLUMNS)
    wanted = max(4, 2048 // math.ceil(rows / TILE_ROWS))
    warps = 4
    while warps < min(MOST_WARPS, max(wanted, math.ceil(blocks / 8)), blocks):
        warps *= 2
    return warps


def dense_from(gpu_name: str, bits: int) -> int:
    """From so many tokens on a matrix of tables is dequantized: as measured for this GPU (5 to 8 bits only),
    else where `halves`, which takes 32 at a time, would decode the planes a third time."""
    return measured(gpu_name, "dense", str(bits), ("from",)).get("from", FUSED_TOKENS + 1)


def _token_bucket(tokens: int) -> int:
    """1, 2, 4, … 32: what the settings and the compiled kernels tell apart."""
    return min(HALVES_TOKENS, 1 << (tokens - 1).bit_length())


def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that may start before the one in front of it has ended (`PDL` in the
    kernels), where the GPU can."""
    overlapping = device.type == "cuda" and gpu.capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if overlapping else {"PDL": False}


# -- matrices
# ------------------------------------------------------------------------------------------------------------


class _TileMatrix:
    """Tiles of planes and the launches over them; tables or group scales come from the owner."""

    def __init__(
        self, planes: Tensor, shape: tuple[int, int], bias: Tensor | None, plain: bool = False
    ) -> None:
        self.planes = planes  # int32 [P, N/16, K/256, 32, 4]
        self.plain = plain  # as of `tile_codes`
        self.shape = shape
        self.bias = bias
        self.row_blocks, self.blocks = planes.shape[1], planes.shape[2]
        self.padded_rows = self.row_blocks * TILE_ROWS

    def fused(
        self,
        x: Tensor,
        bits: int,
        values: Tensor,
        zeros: Tensor | None,
        groups: Tensor | None,
        use_dot: bool | None = None,
    ) -> Tensor:
        from pmpd.kernels import _triton_kernels as kernels

        (rows, columns), tokens = self.shape, x.shape[0]
        use_dot = tokens >= 4 if use_dot is None else use_dot
        token_block = min(64, max(16, 1 << (tokens - 1).bit_length())) if use_dot else 1
        row_block, column_block = (32, 128) if use_dot else (16, 256)
        steps_total = math.ceil(columns / column_block)
        row_programs, token_programs = math.ceil(rows / row_block), math.ceil(tokens / token_block)
        split = 1
        while split < 8 and row_programs * token_programs * split < 528 and steps_total // (2 * split) >= 2:
            split *= 2
        steps = math.ceil(steps_total / split)
        y = x.new_empty(tokens, rows)
        partial = x.new_empty(split, tokens, rows, dtype=torch.float32) if split > 1 else y
        kernels.plain_matmul[(row_programs, split, token_programs)](
            x, self.planes, values, values if zeros is None else zeros,
            self.planes if groups is None else groups,
            y if self.bias is None else self.bias, y, partial,
            tokens, rows, columns, x.stride(0), y.stride(0), self.planes.stride(0), self.padded_rows,
            BLOCKS=self.blocks, BITS=bits, AFFINE=zeros is not None, HAS_BIAS=self.bias is not None,
            ROWS=row_block, COLUMNS=column_block, TOKENS=token_block, STEPS=steps, SPLIT=split,
            USE_DOT=use_dot, PLAIN=self.plain, num_warps=4,
        )  # fmt: skip
        if split > 1:
            total = partial.sum(0)
            y = (total if self.bias is None else total + self.bias.float()).to(x.dtype)
        return y

    def halves(
        self,
        x: Tensor,
        bits: int,
        tables: Tensor,
        warps: int,
        groups: tuple[Tensor, Tensor] | None = None,
        group_size: int = 0,
    ) -> Tensor:
        """`x` [M, K] of 16-bit floats. `tables` as of `table_halves`; with `groups` (scales, minus zeros) as
        the kernel says."""
        from pmpd.kernels import _triton_kernels as kernels

        if x.stride(0) % 8 or x.data_ptr() % 16:  # activations are read 16 bytes at a time
            x = x.clone(memory_format=torch.contiguous_format)
        (rows, columns), tokens = self.shape, x.shape[0]
        octets = max(1, _token_bucket(tokens) // 8)
        scales, minus_zeros = groups or (tables, tables)
        y = x.new_empty(tokens, rows)
        kernels.halves_matmul[(self.row_blocks, math.ceil(tokens / (8 * octets)))](
            x.view(torch.int32), self.planes, tables, scales, minus_zeros,
            y if self.bias is None else self.bias, y,
            tokens, rows, columns, self.planes.stride(0), x.stride(0) // 2, y.stride(0), scales.stride(0),
            len(scales) - 1,
            BLOCKS=self.blocks, TILES=math.ceil(self.blocks / warps), BITS=bits, OCTETS=octets, WARPS=warps,
            GROUP=group_size,
            EXACT=self.blocks % warps == 0 and columns == self.blocks * TILE_COLUMNS,
            HAS_BIAS=self.bias is not None,
            BFLOAT16=x.dtype == torch.bfloat16, PLAIN=self.plain, EMULATE=_interpreted(),
            num_warps=warps, **overlap(y.device),
        )  # fmt: skip
        return y

    def dequantize(
        self, bits: int, values: Tensor, zeros: Tensor | None, groups: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        from pmpd.kernels import _triton_kernels as kernels

        rows, columns = self.shape
        out = torch.empty(rows, columns, dtype=dtype, device=self.planes.device)
        if zeros is None and dtype == values.dtype != torch.float32:
            kernels.dequantize_words[(self.row_blocks, math.ceil(self.blocks / 8))](
                self.planes, values.view(torch.int16), out.view(torch.int32),
                rows, columns, self.planes.stride(0),
                BLOCKS=self.blocks, BITS=bits, PLAIN=self.plain, EMULATE=_interpreted(), num_warps=8,
            )  # fmt: skip
            return out
        kernels.dequantize_tiles[(self.row_blocks, self.blocks)](
            self.planes, values, values if zeros is None else zeros,
            self.planes if groups is None else groups, out,
            rows, columns, self.planes.stride(0), self.padded_rows,
            BLOCKS=self.blocks, BITS=bits, AFFINE=zeros is not None, PLAIN=self.plain, num_warps=4,
        )  # fmt: skip
        return out

    def dequantize_bytes(
        self, scales: Tensor, minus_zeros: Tensor, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        """Of `tile_bytes`, in a 16-bit type; scales and zeros as of `halves`."""
        from pmpd.kernels import _triton_kernels as kernels

        rows, columns = self.shape
        out = torch.empty(rows, columns, dtype=dtype, device=self.planes.device)
        kernels.dequantize_bytes[(self.row_blocks, math.ceil(self.blocks / 8))](
            self.planes, scales, minus_zeros, out.view(torch.int32),
            rows, columns, self.planes.stride(0), scales.stride(0), len(scales) - 1,
            BLOCKS=self.blocks, GROUP=group_size, BFLOAT16=dtype == torch.bfloat16,
            EMULATE=_interpreted(), num_warps=8,
        )  # fmt: skip
        return out


class SplitActivations(NamedTuple):
    """Activations of M tokens as three signed bytes each (`_triton_kernels.split_digits` says how); a slice
    of tokens is one too."""

    digits: Tensor
    """int32 [4 (M + padding), padded K / 4]."""
    scales: Tensor
    """float32 [2, M + padding]: scale and sum of each token."""
    tokens: int

    @classmethod
    def empty(cls, tokens: int, columns: int, device: torch.device) -> SplitActivations:
        padded = math.ceil(columns / (MOST_WARPS * TILE_COLUMNS)) * MOST_WARPS * TILE_COLUMNS
        # A kernel may read past the last token (it never uses that); multiples of 16 keep addresses aligned
        # alike.
        room = (math.ceil(tokens / DIGITS_TOKENS) + 1) * DIGITS_TOKENS
        return cls(
            torch.empty(4 * room, padded // 4, dtype=torch.int32, device=device),
            torch.empty(2, room, dtype=torch.float32, device=device),
            tokens,
        )

    @property
    def stride(self) -> int:
        """Bytes of one row of digits."""
        return 4 * self.digits.shape[1]

    def launch(self) -> dict[str, Any]:
        """Block and warps of the kernels that write this, a program a token."""
        warps = 16 if self.stride <= 4096 else 32
        return {
            "BLOCK": 1 << (self.stride - 1).bit_length(),
            "num_warps": warps,
            **overlap(self.digits.device),
        }

    def narrow(self, start: int, stop: int) -> SplitActivations:
        return SplitActivations(self.digits[4 * start :], self.scales[:, start:], stop - start)


def padded_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, columns] whose rows begin half a cache line apart, so that `halves` reads eight of them
    without bank conflicts."""
    return torch.empty(rows, columns + 64 // dtype.itemsize, dtype=dtype, device=device)[:, :columns]


def split_activations(x: Tensor) -> SplitActivations:
    """`x` [M, K] split for `TritonMatrix.multiply_split`."""
    from pmpd.kernels import _triton_kernels as kernels

    split = SplitActivations.empty(x.shape[0], x.shape[1], x.device)
    kernels.split_digits[(x.shape[0],)](
        x,
        split.digits.view(torch.int8),
        split.scales[0],
        split.scales[1],
        *x.shape,
        x.stride(0),
        split.stride,
        **split.launch(),
    )
    return split


class TritonMatrix(BitplaneMatrix):
    """An Any-Precision matrix for the kernels here; see the module's text."""

    PLAIN = False
    """Whether its planes are `plain` ones (`tile_codes`)."""
    HAS_DIGITS = True
    """Whether `multiply_split` works."""

    def __init__(self, packed: PackedWeights, dtype: torch.dtype) -> None:
        super().__init__(packed.shape, packed.precisions)
        self.dtype = dtype
        parent = max(packed.precisions)
        tiles = tile_codes(unpack(packed.planes, parent), parent, self.PLAIN)
        bias = None if packed.bias is None else packed.bias.to(dtype)
        self._tiles = _TileMatrix(tiles, packed.shape, bias, self.PLAIN)
        self._tables = {bits: self._tables_of(table, bits) for bits, table in packed.tables.items()}
        self._gpu_name = _gpu_name(packed.planes.device)

    def route(self, tokens: int, bits: int) -> str:
        """Which of `ROUTES` a multiplication of `tokens` takes."""
        wide = self.dtype == torch.float32
        if "words" in self._tables[bits] and tokens <= (DIGITS_TOKENS if wide else SPLIT_TOKENS):
            return "digits"
        if tokens >= dense_from(self._gpu_name, bits):
            return "dense"
        return "fused" if wide else "halves"

    def multiply(self, x: Tensor, bits: int, route: str | None = None, warps: int | None = None) -> Tensor:
        """As in the base class. `route` forces one of `ROUTES`, `warps` as in the kernels (default: as
        measured for GPU and shape)."""
        rows, columns = self.shape
        x_MK = x.reshape(-1, columns)
        if x_MK.stride(-1) != 1:
            x_MK = x_MK.contiguous()
        tables = self._tables[bits]
        route = route or self.route(x_MK.shape[0], bits)
        if x_MK.shape[0] == 0:
            y_MN = x_MK.new_empty(0, rows)
        elif route == "digits":
            y_MN = x_MK.new_empty(x_MK.shape[0], rows)
            self.multiply_split(split_activations(x_MK), bits, y_MN, warps)
        elif route == "halves":
            y_MN = self._tiles.halves(
                x_MK,
                bits,
                tables["halves"] if bits in DIGITS_BITS else tables["values"].view(torch.int16),
                warps or self._warps("halves", bits, x_MK.shape[0]),
            )
        elif route == "fused":
            y_MN = self._tiles.fused(x_MK, bits, tables["values"], None, None)
        else:
            y_MN = torch.nn.functional.linear(
                x_MK, self._tiles.dequantize(bits, tables["values"], None, None, x.dtype), self._tiles.bias
            )
        return y_MN.view(*x.shape[:-1], rows)

    def multiply_split(self, x: SplitActivations, bits: int, y: Tensor, warps: int | None = None) -> None:
        """y [M, N] <- the product, any M; `warps` as in the kernel (default: as measured for this GPU and
        shape)."""
        from pmpd.kernels import _triton_kernels as kernels

        tiles, tables = self._tiles, self._tables[bits]
        warps = warps or self._warps("digits", bits, x.tokens)
        for start in range(0, x.tokens, DIGITS_TOKENS):
            tokens = min(DIGITS_TOKENS, x.tokens - start)
            pairs = 1 << ((tokens + 1) // 2 - 1).bit_length()  # 1, 2, 4 or 8
            part = y[start : start + tokens]
            # at 4 warps and 4 bits, fewer registers let all programs of 14336 rows run at once
            kernels.digits_matmul[(tiles.row_blocks,)](
                tiles.planes, tables["words"], tables["scales"], tables["offsets"],
                x.digits[4 * start :], x.scales[0, start:], x.scales[1, start:],
                part if tiles.bias is None else tiles.bias, part,
                tokens, self.shape[0], tiles.planes.stride(0), 4 * x.digits.shape[1], y.stride(0),
                BLOCKS=tiles.blocks, TILES=math.ceil(tiles.blocks / warps), BITS=bits, TOKEN_PAIRS=pairs,
                WARPS=warps,
                HAS_BIAS=tiles.bias is not None, MERGE=pairs > 2, EMULATE=_interpreted(),
                num_warps=warps, maxnreg=72 if bits == 4 and warps == 4 and pairs == 1 else None,
                **overlap(y.device),
            )  # fmt: skip

    def _tables_of(self, table: Tensor, bits: int) -> dict[str, Tensor]:
        """What the kernels look up, by name, each [N padded, …]: `table_values`, the three results of
        `table_digits`, `table_halves`."""
        tables = {"values": table_values(table, self.dtype)}
        if bits in DIGITS_BITS:
            tables["words"], tables["scales"], tables["offsets"] = table_digits(table, bits)
            if self.dtype != torch.float32:
                tables["halves"] = table_halves(table, bits, self.dtype)
        return tables

    def _with(self, tiles: _TileMatrix, tables: dict[int, dict[str, Tensor]]) -> TritonMatrix:
        other = object.__new__(type(self))
        BitplaneMatrix.__init__(other, tiles.shape, self.precisions)
        other.dtype, other._gpu_name, other._tiles, other._tables = self.dtype, self._gpu_name, tiles, tables
        return other

    def _warps(self, route: str, bits: int, tokens: int) -> int:
        return warps_of(self._gpu_name, route, *self.shape, bits, tokens)

    def _rows(self, start: int, stop: int) -> TritonMatrix:
        """A view of rows `start` (a multiple of 16) to `stop`."""
        padded = start + math.ceil((stop - start) / TILE_ROWS) * TILE_ROWS
        bias = None if self._tiles.bias is None else self._tiles.bias[start:stop]
        planes = self._tiles.planes[:, start // TILE_ROWS : padded // TILE_ROWS]
        return self._with(
            _TileMatrix(planes, (stop - start, self.shape[1]), bias, self._tiles.plain),
            {
                bits: {name: part[start:padded] for name, part in parts.items()}
                for bits, parts in self._tables.items()
            },
        )

    def dequantize(self, bits: int) -> Tensor:
        return self._tiles.dequantize(bits, self._tables[bits]["values"], None, None, self.dtype)

    def packed_bytes(self) -> int:
        return self._tiles.planes.nbytes + sum(
            part.nbytes for parts in self._tables.values() for part in parts.values()
        )


class GPTQMatrix:
    """A GPTQ matrix of one precision: weight[n, k] = scale[g(k), n] * (code - zero[g(k), n]).

    `qweight` int32 [K b / 32, N], `qzeros` int32 [G, N b / 32], `scales` float16 [G, N], `g_idx` int32 [K]
    (None: column // group size), bits 2, 3, 4 or 8; `zero_offset` is added to the stored zeros (1 for
    checkpoint format `gptq`, 0 for `gptq_v2`). Bytes a multiplication: N K b / 8 + 4 G N. ValueError: shapes
    that do not agree.
    """

    def __init__(
        self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int,
        zero_offset: int,
        dtype: torch.dtype, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        if bits not in (2, 3, 4, 8):
            raise UserError(f"GPTQ weights of {bits} bits: 2, 3, 4 and 8 are supported")
        columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
        if scales.shape[1] != rows or qzeros.shape != (scales.shape[0], rows * bits // 32):
            raise UserError(
                f"GPTQ tensors do not agree: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, "
                f"scales {list(scales.shape)}, "
                f"{bits} bits; expected qzeros [groups, out * bits / 32] and scales [groups, out]"
            )
        self.shape = (rows, columns)
        self.bits = bits
        self.dtype = dtype
        codes_NK = gptq.unpack(qweight, bits, columns).T  # codes run along K
        self._group_size = (
            math.ceil(columns / scales.shape[0]) if g_idx is None else int(torch.bincount(g_idx).max())
        )
        groups = torch.arange(columns, device=qweight.device) // self._group_size
        self._order: Tensor | None = (
            None  # of the columns in memory, where that is not their own: groups side by side
        )
        if g_idx is not None and not torch.equal(g_idx, groups):
            order = torch.argsort(g_idx, stable=True)
            if torch.equal(g_idx[order], groups):
                self._order, codes_NK = order, codes_NK[:, order]
            else:
                self._group_size, groups = 0, g_idx  # groups of different sizes
        tiles = tile_bytes(codes_NK) if bits == 8 else tile_codes(codes_NK, bits)
        self._tiles = _TileMatrix(tiles, self.shape, None if bias is None else bias.to(dtype))
        pad = self._tiles.padded_rows - rows
        self._scales = torch.nn.functional.pad(scales, (0, pad)).contiguous()  # [G, N padded]
        zeros = gptq.unpack(qzeros.T, bits, rows).T.to(torch.int16) + zero_offset
        self._zeros = torch.nn.functional.pad(zeros, (0, pad)).contiguous()
        self._groups = torch.nn.functional.pad(
            groups.to(torch.int32), (0, self._tiles.blocks * TILE_COLUMNS - columns)
        ).contiguous()
        self._halves: tuple[Tensor, Tensor] | None = None  # scales and minus zeros, as the kernel takes them
        self._codes: Tensor | None = None  # float16 numbers, by which it looks up codes of up to 4 bits
        if self._group_size and self._group_size % 32 == 0:
            if bits in DIGITS_BITS and dtype == torch.float16:
                self._halves = _twice(self._scales), _twice(-self._zeros)
                self._codes = table_halves(torch.arange(2.0**bits, device=qweight.device)[None], bits, dtype)
            elif bits == 8 and dtype != torch.float32:
                self._halves = _byte_groups(self._scales, self._zeros, dtype)
        self._gpu_name = _gpu_name(qweight.device)

    def multiply(self, x: Tensor, route: str | None = None, warps: int | None = None) -> Tensor:
        """`x` [..., K] -> [..., N], bias added. `route`: `halves`, `fused` or `dense` (default: by the number
        of tokens), `warps` as in the kernels (default: as measured for GPU and shape)."""
        rows, columns = self.shape
        x_MK = x.reshape(-1, columns)
        if self._order is not None:
            x_MK = x_MK[:, self._order]
        elif x_MK.stride(-1) != 1:
            x_MK = x_MK.contiguous()
        tokens = x_MK.shape[0]
        few = "fused" if self._halves is None else "halves"
        route = route or (few if tokens <= FUSED_TOKENS else "dense")
        if tokens == 0:
            y_MN = x_MK.new_empty(0, rows)
        elif route == "halves":
            assert self._halves is not None
            table = self._halves[0] if self._codes is None else self._codes  # bytes need none
            kind = "bytes" if self.bits == 8 else "halves"
            warps = warps or warps_of(self._gpu_name, kind, rows, columns, self.bits, tokens)
            y_MN = self._tiles.halves(x_MK, self.bits, table, warps, self._halves, self._group_size)
        elif route == "fused":
            y_MN = self._tiles.fused(x_MK, self.bits, self._scales, self._zeros, self._groups)
        else:
            y_MN = torch.nn.functional.linear(x_MK, self._stored(x.dtype), self._tiles.bias)
        return y_MN.view(*x.shape[:-1], rows)

    def dequantize(self) -> Tensor:
        """The matrix [N, K] in `dtype`."""
        stored = self._stored(self.dtype)
        return stored if self._order is None else stored[:, torch.argsort(self._order)]

    def _stored(self, dtype: torch.dtype) -> Tensor:
        """The matrix with its columns in the order in which they lie in memory."""
        if self.bits == 8 and self._halves is not None and dtype == self.dtype and self.shape[1] % 8 == 0:
            return self._tiles.dequantize_bytes(*self._halves, self._group_size, dtype)
        return self._tiles.dequantize(self.bits, self._scales, self._zeros, self._groups, dtype)

    def packed_bytes(self) -> int:
        parts = [self._tiles.planes, self._scales, self._zeros, self._groups, *(self._halves or ())]
        return sum(part.nbytes for part in parts + ([] if self._codes is None else [self._codes]))


def _byte_groups(scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and minus zeros as `_triton_kernels._byte_weights` takes them for `dtype`."""
    if dtype == torch.float16:
        return _twice(scales), _twice(-1024 - zeros)
    return scales.float().view(torch.int32), (-(2.0**23) - zeros.float()).view(torch.int32)


def _twice(values: Tensor) -> Tensor:
    """int32 words that hold each value as float16 twice."""
    patterns = values.half().view(torch.int16).to(torch.int32) & 0xFFFF
    return (patterns | (patterns << 16)).contiguous()


# -- several layers that read the same input
# -----------------------------------------------------------------------------------


def merge(parts: Sequence[TritonMatrix]) -> TritonMatrix:
    """One matrix whose rows are those of all `parts`, which become views of it (so nothing is held twice).

    ValueError: they differ in K, precisions or dtype, or a part but the last has a number of rows that is no
    multiple of 16.
    """
    first, rows = parts[0], [part.shape[0] for part in parts]
    alike = all(
        (p.shape[1], p.precisions, p.dtype, p.PLAIN)
        == (first.shape[1], first.precisions, first.dtype, first.PLAIN)
        for p in parts
    )
    if not alike or any(count % TILE_ROWS for count in rows[:-1]):
        raise UserError(
            f"matrices of shapes {[p.shape for p in parts]} can't be merged: K, precisions and dtype agree, "
            f"rows are multiples of 16"
        )
    bias = None
    if any(p._tiles.bias is not None for p in parts):
        bias = torch.cat(
            [
                first._tiles.planes.new_zeros(p.shape[0], dtype=first.dtype)
                if p._tiles.bias is None
                else p._tiles.bias
                for p in parts
            ]
        )
    whole = first._with(
        _TileMatrix(
            torch.cat([p._tiles.planes for p in parts], dim=1), (sum(rows), first.shape[1]), bias, first.PLAIN
        ),
        {
            bits: {name: torch.cat([p._tables[bits][name] for p in parts]) for name in names}
            for bits, names in first._tables.items()
        },
    )
    start = 0
    for part in parts:
        view = whole._rows(start, start + part.shape[0])
        part._tiles, part._tables = view._tiles, view._tables
        start += part.shape[0]
    return whole
