"""The native CPU library: found, loaded, and given torch's threads; and which instruction set it uses.

The library has no OpenMP runtime of its own: it is handed the functions of the one that torch runs on, so
that both work with the same threads and `torch.set_num_threads` holds for both.
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
from pmpd.kernels import _sources, pages

LEVELS = ("portable", "avx2", "avx512", "avx512vnni")
"""Instruction sets the library has code for, each including the ones before it."""

LEVEL_VARIABLE = "PMPD_CPU_LEVEL"
"""Environment variable that forces a level (for tests); read when a matrix is built."""

GROUP_ROWS, MAX_STREAMS, MAX_BITS = 4, 7, 8  # as in csrc/bitplane.h

MIN_PARALLEL_WORK = 1 << 17
"""Weights times tokens: below, waking another thread costs more than it saves."""

_DTYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger(__name__)


class Matrix(ctypes.Structure):
    """PmpdMatrix of csrc/bitplane.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("planes", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
        ("stream", ctypes.c_void_p * MAX_STREAMS),
        ("table", ctypes.c_void_p * (MAX_BITS + 1)),
        ("bias", ctypes.c_void_p),
        ("fixed_table", ctypes.c_void_p * (MAX_BITS + 1)),
        ("fixed_scale", ctypes.c_void_p * (MAX_BITS + 1)),
    )


class Library(NamedTuple):
    """What was found."""

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
    return library().problem


def describe() -> str:
    """Which library, instruction set and threads are in use; or why there are none."""
    found = library()
    if found.problem:
        return found.problem
    usable = ", ".join(LEVELS[: functions().pmpd_highest_level() + 1])
    return f"instruction set {LEVELS[active_level()]} of {usable}; {found.threads}; {found.path}"


def pack_streams(planes: Tensor, fixed: bool) -> list[Tensor]:
    """`planes` int32 [P, N, K/32] in the file's order -> one uint8 tensor per stream of csrc/bitplane.h, or
    with `fixed` of csrc/fixed.h."""
    count, rows, words = planes.shape
    planes, library = planes.contiguous(), functions()
    sizes, pack = (
        (library.pmpd_fixed_bytes, library.pmpd_pack_fixed)
        if fixed
        else (library.pmpd_plane_bytes, library.pmpd_pack)
    )
    first, other = ctypes.c_int64(), ctypes.c_int64()
    sizes(rows, words * 32, ctypes.byref(first), ctypes.byref(other))
    streams = [pages.zeros(first.value), *(pages.zeros(other.value) for _ in range(count - 2))]
    matrix = Matrix(rows=rows, columns=words * 32, planes=count)
    for index, stream in enumerate(streams):
        matrix.stream[index] = stream.data_ptr()
    failed = pack(ctypes.byref(matrix), planes.data_ptr(), torch.get_num_threads())
    check(failed, f"pack {rows} rows of {words * 32} columns")
    return streams


def active_level() -> int:
    """Index in LEVELS of the instruction set for matrices that are built now. ValueError: a forced one that
    does not exist here."""
    highest = functions().pmpd_highest_level()
    forced = os.environ.get(LEVEL_VARIABLE)
    if not forced:
        return highest
    if forced not in LEVELS[: highest + 1]:
        raise UserError(f"{LEVEL_VARIABLE}={forced}: this processor has {', '.join(LEVELS[: highest + 1])}")
    return LEVELS.index(forced)


@functools.cache
def library() -> Library:
    """Loads the library once per process; says once where there is none."""
    path, problem = _find()
    loaded, threads = None, ""
    if path is not None:
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            problem = f"the native library can't be loaded ({error})"
        else:
            threads = _prepare(loaded)
    if problem:
        _log.warning("CPU kernels: %s. Low precisions run, but slowly.", problem)
    return Library(loaded, path, problem, threads)


def functions() -> ctypes.CDLL:
    """The loaded library's. UserError where there is none, saying why."""
    found = library()
    if found.functions is None:
        raise UserError(found.problem)
    return found.functions


def check(failed: int, what: str) -> None:
    """MemoryError where a function of the library says that it ran out of memory."""
    if failed:
        raise MemoryError(f"{what}: no memory")


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
    arguments: dict[str, tuple] = {
        "pmpd_linear": (pointer, number, number, size, pointer, size, pointer, number),
        "pmpd_linear_fixed": (pointer, number, number, size, pointer, size, pointer, pointer, number),
        "pmpd_dequantize": (pointer, number, number, size, size, pointer, number),
        "pmpd_dequantize_fixed": (pointer, number, number, size, size, pointer, number),
        "pmpd_pack": (pointer, pointer, number),
        "pmpd_pack_fixed": (pointer, pointer, number),
        "pmpd_attention": (number, *[pointer] * 6, *[size] * 9, ctypes.c_float, number),
        "pmpd_step": (pointer, number, number),
    }
    for name, types in arguments.items():  # these return whether they ran out of memory
        getattr(functions, name).argtypes = types
    functions.pmpd_tokens_bytes.argtypes = (size, size)
    functions.pmpd_tokens_bytes.restype = size
    for name, types in (
        ("pmpd_plane_bytes", (size, size, pointer, pointer)),
        ("pmpd_fixed_bytes", (size, size, pointer, pointer)),
        ("pmpd_set_threads", (pointer, pointer, pointer)),
        ("pmpd_limit_memory", (size,)),
    ):
        getattr(functions, name).argtypes = types
        getattr(functions, name).restype = None
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        # looked up through torch's own library, so that it is the runtime that torch itself is linked with
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions.pmpd_set_threads(*(ctypes.cast(getattr(runtime, name), pointer) for name in names))
    except (OSError, AttributeError):
        return "one thread (torch's OpenMP runtime was not found)"
    return "torch's OpenMP threads"
