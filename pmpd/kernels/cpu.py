"""The native CPU kernels: bitplane weights multiplied without ever being dequantized to memory. The
arithmetic is in `csrc/`.

Legend: M tokens, N out_features, K in_features, b a precision.

The library has no OpenMP runtime of its own: it is handed the functions of the one that torch runs on, so
that both work with the same threads and `torch.set_num_threads` holds for both. Up to FUSED_TOKENS tokens,
results depend neither on the number of threads nor on the other tokens of a call: work is split over rows of
W only, and a token's sums are added in one order whatever M is. More tokens are multiplied by torch, in an
order of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.kernels import _sources
from pmpd.kernels.base import BitplaneMatrix, PackedWeights

LEVELS = ("portable", "avx2", "avx512", "avx512vnni")
"""Instruction sets the library has code for, each including the ones before it."""

LEVEL_VARIABLE = "PMPD_CPU_LEVEL"
"""Environment variable that forces a level (for tests); read when a matrix is built."""

FUSED_TOKENS = 16
"""Up to so many tokens are multiplied straight from the codes; for more, tiles of rows are dequantized and
torch multiplies."""

TILE_BYTES = 4 << 20
"""Size of such a tile."""

GROUP_ROWS, MAX_LEVELS, MAX_BITS, FIXED_MAX = 4, 7, 8, 8191  # as in csrc/bitplane.h

ATTENTION_LANES = 16
"""Head dims that `decode_attention` works on are multiples of this."""

_MIN_PARALLEL_WORK = 1 << 17  # weights times tokens: below, waking another thread costs more than it saves
_DTYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger(__name__)


class _Matrix(ctypes.Structure):  # PmpdMatrix of csrc/bitplane.h
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("planes", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
        ("level", ctypes.c_void_p * MAX_LEVELS),
        ("table", ctypes.c_void_p * (MAX_BITS + 1)),
        ("bias", ctypes.c_void_p),
        ("fixed_table", ctypes.c_void_p * (MAX_BITS + 1)),
        ("fixed_scale", ctypes.c_void_p * (MAX_BITS + 1)),
    )


class _Library(NamedTuple):
    functions: ctypes.CDLL | None
    path: Path | None
    problem: str | None
    threads: str


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this implementation can be used, else the reason in words."""
    if device.type != "cpu":
        return f"the native CPU kernels need tensors on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return (
            f"the native CPU kernels compute in float32 and bfloat16, not in "
            f"{str(dtype).removeprefix('torch.')}"
        )
    return _library().problem


def describe() -> str:
    """Which library, instruction set and threads are in use; or why there are none."""
    library = _library()
    if library.problem:
        return library.problem
    usable = ", ".join(LEVELS[: _functions().pmpd_highest_level() + 1])
    return f"level {LEVELS[active_level()]} of {usable}; {library.threads}; {library.path}"


def active_level() -> int:
    """Index in LEVELS of the instruction set for matrices that are built now. ValueError: a forced one that
    does not exist here."""
    highest = _functions().pmpd_highest_level()
    forced = os.environ.get(LEVEL_VARIABLE)
    if not forced:
        return highest
    if forced not in LEVELS[: highest + 1]:
        raise UserError(f"{LEVEL_VARIABLE}={forced}: this processor has {', '.join(LEVELS[: highest + 1])}")
    return LEVELS.index(forced)


class NativeMatrix(BitplaneMatrix):
    """`packed` in the column order of the kernels; nothing of `packed` is kept.

    `dtype` float32 or bfloat16 is that of tokens and results. With float32 the table values are exact and
    everything is float32. With bfloat16, `dequantize` rounds them to bfloat16 (relative error 2⁻⁹), and so do
    the levels that multiply in float32; the level avx512vnni multiplies in fixed point (errors of 2⁻¹⁴ of the
    largest value of the row, and of 512 columns of the token).
    """

    def __init__(self, packed: PackedWeights, dtype: torch.dtype) -> None:
        super().__init__(packed.shape, packed.precisions)
        problem = unavailable(packed.planes.device, dtype)
        if problem:
            raise UserError(problem)
        rows, columns = packed.shape
        self._dtype = dtype
        self._library = _functions()
        self._level = active_level()
        self._planes = packed.planes.shape[0]
        self._levels = _pack(self._library, packed.planes)
        self._tables = {bits: _index_order(table, bits, dtype) for bits, table in packed.tables.items()}
        self._bias = None if packed.bias is None else packed.bias.to(torch.float32).contiguous()
        self._matrix = _Matrix(
            rows=rows, columns=columns, planes=self._planes, bfloat16=dtype == torch.bfloat16
        )
        for index, level in enumerate(self._levels):
            self._matrix.level[index] = level.data_ptr()
        for bits, table in self._tables.items():
            self._matrix.table[bits] = table.data_ptr()
        self._fixed = {}
        if dtype == torch.bfloat16 and LEVELS[self._level] == "avx512vnni":
            self._fixed = {
                bits: _fixed_point(_index_order(table, bits, torch.float32))
                for bits, table in packed.tables.items()
            }
        for bits, (integers, scale) in self._fixed.items():
            self._matrix.fixed_table[bits], self._matrix.fixed_scale[bits] = (
                integers.data_ptr(),
                scale.data_ptr(),
            )
        if self._bias is not None:
            self._matrix.bias = self._bias.data_ptr()
        self._address = ctypes.addressof(self._matrix)

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        rows, columns = self.shape
        if x.dtype != self._dtype or x.shape[-1] != columns or bits not in self._tables:
            raise UserError(
                f"multiply: {x.dtype} {list(x.shape)} at {bits} bits; this matrix takes {self._dtype} [..., "
                f"{columns}] "
                f"at {', '.join(map(str, self.precisions))}"
            )
        x_MK = x.reshape(-1, columns)
        tokens = x_MK.shape[0]
        if tokens > FUSED_TOKENS:
            return self._multiply_tiles(x_MK, bits).view(*x.shape[:-1], rows)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        if tokens:
            threads = torch.get_num_threads() if rows * columns * tokens >= _MIN_PARALLEL_WORK else 1
            if self._library.pmpd_linear(
                self._address,
                self._level,
                bits,
                tokens,
                x_MK.data_ptr(),
                x_MK.stride(0),
                y.data_ptr(),
                threads,
            ):
                raise MemoryError(f"multiply: no memory for {tokens} tokens of {columns} columns")
        return y

    def dequantize(self, bits: int) -> Tensor:
        return self._dequantize_rows(bits, 0, self.shape[0])

    def packed_bytes(self) -> int:
        tensors = [
            *self._levels,
            *self._tables.values(),
            *(tensor for pair in self._fixed.values() for tensor in pair),
        ]
        return sum(tensor.nbytes for tensor in tensors)

    def _multiply_tiles(self, x_MK: Tensor, bits: int) -> Tensor:
        rows, columns = self.shape
        step = max(TILE_BYTES // (columns * x_MK.element_size()) // GROUP_ROWS, 1) * GROUP_ROWS
        bias = None if self._bias is None else self._bias.to(x_MK.dtype)
        y_MN = x_MK.new_empty(x_MK.shape[0], rows)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            tile = self._dequantize_rows(bits, first, last)
            y_MN[:, first:last] = torch.nn.functional.linear(
                x_MK, tile, None if bias is None else bias[first:last]
            )
        return y_MN

    def _dequantize_rows(self, bits: int, first: int, last: int) -> Tensor:
        if bits not in self._tables:
            raise UserError(
                f"dequantize: {bits} bits; this matrix holds {', '.join(map(str, self.precisions))}"
            )
        dense = torch.empty(last - first, self.shape[1], dtype=self._dtype)
        self._library.pmpd_dequantize(
            self._address, self._level, bits, first, last, dense.data_ptr(), torch.get_num_threads()
        )
        return dense


def attention_unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where `decode_attention` can be used, else the reason in words."""
    if device.type != "cpu" or dtype != torch.float32:
        return (
            f"native attention works on float32 tensors on the CPU, not on "
            f"{str(dtype).removeprefix('torch.')} on {device.type}"
        )
    if head_dim % ATTENTION_LANES:
        return f"native attention needs a head dim that is a multiple of {ATTENTION_LANES}, not {head_dim}"
    return _library().problem


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per row over caches of different lengths, without a mask: a row costs its
    own length.

    `q` float32 [n, Hq, D]; `keys`, `values` float32 [S, Hkv, T, D] with equal strides and D contiguous, Hq a
    multiple of Hkv; `slots` int64 [n], whose cache a row reads; `lengths` int64 [n], at least 1: positions
    0..length-1 are attended to, or with `window` the last `window` of these. -> [n, Hq, D] (`out`, if given).
    ValueError where shapes do not fit.
    """
    rows, query_heads, dim = q.shape
    slots_in_cache, key_heads, positions, _ = keys.shape
    problem = attention_unavailable(q.device, q.dtype, dim)
    if problem:
        raise UserError(problem)
    if (
        keys.shape != values.shape
        or keys.stride() != values.stride()
        or keys.shape[3] != dim
        or keys.stride(3) != 1
        or query_heads % key_heads
    ):
        raise UserError(
            f"attention: queries {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do "
            f"not fit each other"
        )
    if (
        {keys.dtype, values.dtype} != {torch.float32}
        or {slots.dtype, lengths.dtype} != {torch.int64}
        or (window is not None and window < 1)
    ):
        raise UserError("attention: caches must be float32, slots and lengths int64, the window at least 1")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if (
        out.shape != q.shape
        or out.dtype != q.dtype
        or not out.is_contiguous()
        or slots.shape != (rows,)
        or lengths.shape != (rows,)
    ):
        raise UserError(
            f"attention: out must be contiguous float32 {list(q.shape)}, slots and lengths [{rows}]"
        )
    if not rows:
        return out
    shortest, longest = (int(n) for n in lengths.aminmax())
    lowest, highest = (int(n) for n in slots.aminmax())
    if shortest < 1 or longest > positions or lowest < 0 or highest >= slots_in_cache:
        raise UserError(
            f"attention: lengths {shortest}..{longest} and slots {lowest}..{highest} of a cache "
            f"{list(keys.shape)}"
        )
    q, slots, lengths = q.contiguous(), slots.contiguous(), lengths.contiguous()
    threads = torch.get_num_threads() if rows * query_heads * longest * dim >= _MIN_PARALLEL_WORK else 1
    _functions().pmpd_attention(
        *(
            active_level(),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            lengths.data_ptr(),
            out.data_ptr(),
        ),
        *(
            rows,
            query_heads,
            key_heads,
            dim,
            keys.stride(0),
            keys.stride(1),
            keys.stride(2),
            longest,
            window or 0,
            scale,
            threads,
        ),
    )
    return out


def _pack(library: ctypes.CDLL, planes: Tensor) -> list[Tensor]:
    """`planes` int32 [P, N, K/32] in the file's order -> one uint8 tensor per level of csrc/bitplane.h."""
    count, rows, words = planes.shape
    planes = planes.contiguous()
    first, other = ctypes.c_int64(), ctypes.c_int64()
    library.pmpd_level_bytes(rows, words * 32, ctypes.byref(first), ctypes.byref(other))
    levels = [torch.zeros(first.value, dtype=torch.uint8)]
    levels += [torch.zeros(other.value, dtype=torch.uint8) for _ in range(count - 2)]
    matrix = _Matrix(rows=rows, columns=words * 32, planes=count)
    for index, level in enumerate(levels):
        matrix.level[index] = level.data_ptr()
    library.pmpd_pack(ctypes.byref(matrix), planes.data_ptr(), torch.get_num_threads())
    return levels


def _index_order(table: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`table` [N, 2**bits] by code -> by index (bit 0 = plane 1, bit 1 = plane 0, bit p = plane p), rows
    padded to whole groups."""
    codes = []
    for index in range(1 << bits):
        planes = [index >> 1 & 1, index & 1, *(index >> plane & 1 for plane in range(2, bits))]
        codes.append(int("".join(map(str, planes)), 2))
    rows = table.shape[0]
    ordered = torch.zeros(-(-rows // GROUP_ROWS) * GROUP_ROWS, 1 << bits, dtype=dtype)
    ordered[:rows] = table[:, codes].to(dtype)
    return ordered


def _fixed_point(table: Tensor) -> tuple[Tensor, Tensor]:
    """`table` float32 [N, 2**bits] -> integers int16, scale float32 [N]: table ≈ integers * scale, to 2⁻¹⁴ of
    a row's largest value."""
    scale = table.abs().amax(1) / FIXED_MAX
    return torch.round(table / scale.clamp(min=1e-30).unsqueeze(1)).to(torch.int16), scale


@functools.cache
def _library() -> _Library:
    """Loads the library once per process; says once where there is none."""
    path, problem = _find()
    functions, threads = None, ""
    if path is not None:
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            problem = f"the native library can't be loaded ({error})"
        else:
            threads = _prepare(functions)
    if problem:
        _log.warning("CPU kernels: %s. Low precisions run, but slowly.", problem)
    return _Library(functions, path, problem, threads)


def _functions() -> ctypes.CDLL:
    """The loaded library's. ValueError where there is none, saying why."""
    library = _library()
    if library.functions is None:
        raise UserError(library.problem)
    return library.functions


def _find() -> tuple[Path | None, str | None]:
    """The library of these very sources: beside this file, or, for a source tree, in the installed
    package."""
    candidates = [Path(__file__).with_name(_sources.LIBRARY)]
    # several: `pip install .` leaves metadata of its own in the source tree
    installed = importlib.metadata.distributions(name="pmpd")
    candidates += [
        Path(str(distribution.locate_file(f"pmpd/kernels/{_sources.LIBRARY}"))) for distribution in installed
    ]
    wanted, stale = _sources.fingerprint(), None
    for path in candidates:
        if not path.is_file():
            continue
        if wanted.encode() in path.read_bytes():
            return path, None
        stale = path
    if stale:
        return None, f"{stale} was built from other sources; run `pip install .` again"
    return None, (
        "the native library was not built (no C++ compiler, or the build failed: `pip install -v .` shows "
        "why); "
        "install g++ or clang++ and run `pip install .` again"
    )


def _prepare(functions: ctypes.CDLL) -> str:
    """Declares the C functions and hands over torch's threads; returns in words whose threads are used."""
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    functions.pmpd_linear.argtypes = [pointer, number, number, size, pointer, size, pointer, number]
    functions.pmpd_dequantize.argtypes = [pointer, number, number, size, size, pointer, number]
    functions.pmpd_dequantize.restype = None
    functions.pmpd_pack.argtypes = [pointer, pointer, number]
    functions.pmpd_pack.restype = None
    functions.pmpd_level_bytes.argtypes = [size, size, pointer, pointer]
    functions.pmpd_level_bytes.restype = None
    functions.pmpd_attention.argtypes = [number, *[pointer] * 6, *[size] * 9, ctypes.c_float, number]
    functions.pmpd_attention.restype = None
    functions.pmpd_set_threads.argtypes = [pointer, pointer, pointer]
    functions.pmpd_set_threads.restype = None
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        # looked up through torch's own library, so that it is the runtime that torch itself is linked with
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions.pmpd_set_threads(*(ctypes.cast(getattr(runtime, name), pointer) for name in names))
    except (OSError, AttributeError):
        return "one thread (torch's OpenMP runtime was not found)"
    return "torch's OpenMP threads"
