"""Runs the kernels of `pmpd/kernels/cuda` on the CPU, thread by thread, as `tests/cuda_host/host.h` says."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pmpd.kernels.cuda import compiler, halves, launch, matrix, teams
from pmpd.kernels.cuda.cut import H100, Cut, Gpu
from pmpd.kernels.cuda.halves import HalvesCut
from pmpd.kernels.cuda.launch import TYPES, Arguments, Norm, arguments_of
from pmpd.kernels.cuda.teams import TeamsCut

COMPILER = shutil.which("g++")
FOLDER = Path(__file__).parent / "cuda_host"
ORDERS = ((0, 0), (1, 1), (2, 1), (3, 1))
"""(order of the threads, whether copies land late): results may depend on neither."""


@dataclass(frozen=True)
class Instance:
    cut: Cut
    dtype: torch.dtype = torch.float16
    front: str = "PLAIN"
    back: str = "STORE"

    @property
    def threads(self) -> int:
        return 32 * self.cut.warps

    @property
    def name(self) -> str:
        return self.cut.template(TYPES[self.dtype], self.front, self.back)


class HostKernel:
    """A library with some instances."""

    def __init__(
        self, folder: Path, threads: dict[str, int], source: str = "bits.cu", arguments: type = Arguments
    ) -> None:
        """`threads` of a block, by name of an instance in `source`, which takes `arguments`."""
        self.names = list(threads)
        lines = [f"{{{name}, {count}}}," for name, count in threads.items()]
        text = folder / "instances.cpp"
        text.write_text(
            f'#define KERNEL_SOURCE "{Path(compiler.__file__).parent / source}"\n'
            f'#include "{FOLDER / "run.h"}"\nconst Instance instances[] = {{\n' + "\n".join(lines) + "\n};\n"
        )
        assert COMPILER
        library = folder / "kernel.so"
        # each library has variables of its own: the linker would make those of one name one
        options = ["-std=c++17", "-O0", "-w", "-fPIC", "-fno-gnu-unique", "-shared"]
        command = [COMPILER, *options, "-o", str(library), str(text)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.launch.restype = ctypes.c_char_p
        assert self.library.arguments_bytes() == ctypes.sizeof(arguments), f"Arguments is not {source}'s"

    def launch(
        self, name: str, arguments: ctypes.Structure, grid: int, shared_bytes: int, order: tuple[int, int],
        constants: list[Tensor], written: list[Tensor], results: list[Tensor], cluster: int = 1,
    ) -> None:  # fmt: skip
        """AssertionError: what the emulated machine found."""
        self.library.forget()
        for kind, tensors in enumerate((constants, written, results)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                self.library.allow(
                    ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()), kind
                )
        problem = self.library.launch(
            self.names.index(name),
            ctypes.byref(arguments),
            grid,
            ctypes.c_int64(shared_bytes),
            *order,
            cluster,
        )
        assert problem is None, f"{name}: {problem.decode()}"

    def product(
        self, instance: Instance, planes: Tensor, coefficients: list[Tensor], x: Tensor, rows: int, grid: int,
        bias: Tensor | None = None, norm: Norm | None = None, reverse: bool = False,
    ) -> Tensor:  # fmt: skip
        """As `launch.product`, in all `ORDERS`, whose results must agree; `grid` blocks. -> y [M, N], which
        was NaN before."""
        gated = instance.back == "GATED"
        row_blocks = planes.shape[1] // (2 if gated else 1)
        outputs = []
        for order in ORDERS:
            wide = torch.full((len(x), (rows // 2 if gated else rows) + 3), float("nan"), dtype=x.dtype)
            y = wide[:, :-3]
            arguments = arguments_of(planes, coefficients, x, y, rows, row_blocks, bias, norm, reverse)
            constants = [planes, *coefficients, *([] if bias is None else [bias])]
            written, results = [x], [wide]
            if norm:
                norm.residual.fill_(float("nan"))
                constants.append(norm.weight)
                written += [] if norm.delta is None else [norm.delta]
                results.append(norm.residual)
            self.launch(
                instance.name, arguments, grid, instance.cut.shared_bytes, order, constants, written, results
            )
            assert wide[:, -3:].isnan().all(), "the kernel wrote past its rows"
            outputs.append(torch.cat([y, norm.residual], dim=1) if norm else y)
        for order, other in zip(ORDERS[1:], outputs[1:], strict=True):
            assert torch.equal(outputs[0], other), f"threads in order {order} give another result"
        return y


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """From now on, what is launched on a GPU of three multiprocessors runs on the CPU instead: `bits.cu` as
    it is, compiled by g++. Returns the list that the launched instances are added to."""
    launched: list[str] = []
    libraries: dict[str, HostKernel] = {}

    def run(instance: str, cut: Cut, arguments: Arguments, grid: int, device: torch.device) -> None:
        if instance not in libraries:
            at = folder / str(len(libraries))
            at.mkdir()
            libraries[instance] = HostKernel(at, {instance: 32 * cut.warps})
        libraries[instance].launch(instance, arguments, grid, cut.shared_bytes, ORDERS[1], [], [], [])
        launched.append(instance)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "gpu_of", lambda device: Gpu(3, *H100[1:]))
    monkeypatch.setattr(matrix, "cut_of", matrix.cut_of.__wrapped__)
    return launched


def stand_in_halves(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """The same for `halves.cu`, which 3 to 32 tokens then take, in two clusters of two blocks."""
    launched: list[str] = []
    libraries: dict[str, HostKernel] = {}

    def cut_of(
        gpu_name: str, device: object, rows: int, columns: int, bits: int, tokens: int
    ) -> HalvesCut | None:
        if not 2 < tokens <= halves.MOST_TOKENS:
            return None
        return HalvesCut(bits, halves.octets_of(tokens), -(-columns // 256), 2, 1, 2, 1, 2, 1)

    def run(cut: HalvesCut, dtype: str, arguments: halves.Arguments, row_blocks: int, device: object) -> None:
        name = cut.template(dtype)
        if name not in libraries:
            at = folder / f"halves{len(libraries)}"
            at.mkdir()
            libraries[name] = HostKernel(at, {name: cut.threads}, halves.SOURCE, halves.Arguments)
        bytes_ = cut.shared_bytes
        libraries[name].launch(name, arguments, 2 * cut.parts, bytes_, ORDERS[1], [], [], [], cut.parts)
        launched.append(name)

    monkeypatch.setattr(halves, "run", run)
    monkeypatch.setattr(halves, "cut_of", cut_of)
    monkeypatch.setattr(launch, "gpu_of", lambda device: Gpu(3, *H100[1:]))
    monkeypatch.setattr(matrix, "cut_of", matrix.cut_of.__wrapped__)
    return launched


def stand_in_teams(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """The same for `teams_product`, which 3 to 32 tokens then take, in blocks of two teams of a warp."""
    launched: list[str] = []
    libraries: dict[str, HostKernel] = {}

    def cut_of(
        gpu_name: str, device: object, rows: int, columns: int, bits: int, tokens: int
    ) -> TeamsCut | None:
        if not 2 < tokens <= halves.MOST_TOKENS:
            return None
        tiles = -(-columns // 256)
        return TeamsCut(bits, halves.octets_of(tokens), tiles, 2, 1, 2, 1, min(2, tiles), 1, 1)

    def run(
        cut: TeamsCut, instance: str, arguments: halves.Arguments, row_blocks: int, device: object
    ) -> None:
        if instance not in libraries:
            at = folder / f"teams{len(libraries)}"
            at.mkdir()
            libraries[instance] = HostKernel(at, {instance: 64}, halves.SOURCE, halves.Arguments)
        grid = cut.grid(row_blocks, Gpu(3, *H100[1:]))
        libraries[instance].launch(instance, arguments, grid, cut.shared_bytes, ORDERS[1], [], [], [])
        launched.append(instance)

    monkeypatch.setattr(teams, "run", run)
    monkeypatch.setattr(teams, "cut_of", cut_of)
    monkeypatch.setattr(launch, "gpu_of", lambda device: Gpu(3, *H100[1:]))
    monkeypatch.setattr(matrix, "cut_of", matrix.cut_of.__wrapped__)
    return launched
