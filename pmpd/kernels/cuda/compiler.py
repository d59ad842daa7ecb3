"""Compiles `bits.cu` for a GPU with NVRTC, one instance at a time, and keeps the machine code on disk.

NVRTC and its Python bindings come with PyTorch's CUDA wheels (`nvidia-cuda-nvrtc`, `cuda-bindings`); the
source needs no header of the CUDA toolkit. An instance takes a second or two, once for each machine.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from pmpd.errors import UserError

FOLDER = Path(__file__).parent
SOURCE, HEADER = "bits.cu", "instructions.cuh"
CACHE_VARIABLE = "PMPD_CUDA_CACHE"
"""Environment variable: the folder of compiled kernels, default `pmpd/cuda` in the user's cache folder."""
OPTIONS = ("--std=c++17", "--fmad=false")
"""No contraction: the source says where a multiply-add is, so that results are the oracle's bit for bit."""


class Binary(NamedTuple):
    """Machine code of one instance."""

    symbol: str
    """Its name in the machine code."""
    code: bytes


def bindings(name: str) -> Any:
    """Module `name` (`nvrtc`, `driver`) of `cuda.bindings`. ImportError where it is missing."""
    return importlib.import_module(f"cuda.bindings.{name}")


@functools.cache
def problem() -> str | None:
    """Why nothing can be compiled here, in words; None where it can."""
    try:
        _version()
    except ImportError as error:
        return f"the Python package cuda-bindings can't be imported ({error}); PyTorch's CUDA wheels bring it"
    except Exception as error:  # the bindings load libnvrtc when it is first asked something
        return f"NVRTC can't be used ({error}); the Python package nvidia-cuda-nvrtc brings it"
    return None


def compiled(instance: str, capability: tuple[int, int], source: str = SOURCE) -> Binary:
    """The machine code of `instance` (`Cut.template`) of file `source` for a compute capability: from disk,
    or compiled now. UserError: NVRTC is missing. RuntimeError: it does not compile, with the compiler's
    words."""
    if why := problem():
        raise UserError(f"kernel 'cuda': {why}")
    architecture = f"sm_{capability[0]}{capability[1]}"
    path = cache_folder() / f"{cache_key(instance, architecture, _version(), source)}.cubin"
    try:
        symbol, _, code = path.read_bytes().partition(b"\n")
        return Binary(symbol.decode(), code)
    except OSError:  # not there, or not to be read
        pass
    made = compile_now(instance, architecture, source)
    _write(path, made.symbol.encode() + b"\n" + made.code)
    return made


def cache_folder() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pmpd" / "cuda"


def cache_key(instance: str, architecture: str, version: tuple[int, int], source: str = SOURCE) -> str:
    """Over everything that the machine code depends on."""
    digest = hashlib.sha256()
    for name in (source, HEADER):
        digest.update((FOLDER / name).read_bytes() + b"\0")
    digest.update(repr((instance, architecture, version, OPTIONS)).encode())
    return digest.hexdigest()[:32]


def compile_now(instance: str, architecture: str, source: str = SOURCE) -> Binary:
    """Without the cache."""
    nvrtc = bindings("nvrtc")
    text, header = ((FOLDER / name).read_bytes() for name in (source, HEADER))
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 1, [header], [HEADER.encode()]))
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, instance.encode()))
        options = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in OPTIONS)]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(code):
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            words = log.decode(errors="replace")
            raise RuntimeError(f"{instance} does not compile for {architecture}:\n{words}")
        symbol = _checked(nvrtc.nvrtcGetLoweredName(program, instance.encode()))
        binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return Binary(symbol.decode(), binary)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def _version() -> tuple[int, int]:
    code, major, minor = bindings("nvrtc").nvrtcVersion()
    if int(code):
        raise RuntimeError(f"NVRTC answers with error {int(code)}")
    return major, minor


def _checked(answer: tuple) -> Any:
    code, *values = answer
    if int(code):
        raise RuntimeError(f"NVRTC answers with {code}")
    return values[0] if values else None


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, whoever else writes the same. A folder that can't be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:
        return
