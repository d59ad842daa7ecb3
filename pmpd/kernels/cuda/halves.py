"""How `halves.cu` is cut for a shape, and its launch: y = x W' + bias for 3 to 32 tokens.

Taken only where the autotune table of the GPU names a cut, that is where it was measured to be faster than
Triton's `halves`. Legend: N out_features, K in_features, M tokens; an octet is eight tokens; the rest as in
`halves.cu`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import compiler, launch
from pmpd.kernels.cuda.cut import TILE_COLUMNS, Gpu

SOURCE = "halves.cu"
MOST_TOKENS = 32


@dataclass(frozen=True)
class HalvesCut:
    """One instance of the kernel, for one K, precision and number of octets."""

    bits: int
    octets: int
    tiles: int
    """K / 256, rounded up."""
    parts: int
    """Blocks of a cluster; they share the columns. A power of two, at most 8."""
    warps: int
    """Warps of a block that share its columns."""
    rows: int
    """Such sets of warps in a block, each for row blocks of its own."""
    share: int
    """Row blocks that a warp multiplies by the activations that it loads once."""
    slots: int
    """Tiles in a warp's ring, of each of its row blocks."""
    blocks: int
    """Blocks of a multiprocessor that the compiler leaves registers for."""

    @property
    def per_warp(self) -> int:
        """Tiles of a warp."""
        return math.ceil(self.tiles / (self.parts * self.warps))

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.rows

    @property
    def row_blocks(self) -> int:
        """Of a pass."""
        return self.rows * self.share

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rings, activations, sums, tables."""
        ring = self.warps * self.rows * self.slots * self.share * self.bits * 512
        activations = self.per_warp * self.warps * self.octets * 4096
        owned = math.ceil(self.row_blocks * self.octets / self.parts)
        sums = 2 * owned * self.parts * self.warps * 512
        return ring + activations + sums + 3 * self.row_blocks * 16 * 2 * 2**self.bits

    def fits(self, gpu: Gpu) -> bool:
        """Whether the kernel can be cut so, and the GPU holds it."""
        return self.parts in (1, 2, 4, 8) and self.threads <= 1024 and self.shared_bytes <= gpu.block_bytes

    def template(self, dtype: str) -> str:
        """The instance's name in C++."""
        numbers = (
            self.bits, self.octets, self.tiles, self.parts, self.warps, self.rows, self.share, self.slots,
            self.blocks,
        )  # fmt: skip
        return f"halves_product<{dtype}, {', '.join(map(str, numbers))}>"


def octets_of(tokens: int) -> int:
    """1, 2 or 4: what the instances tell apart."""
    return max(1, (1 << (tokens - 1).bit_length()) // 8)


@functools.lru_cache(maxsize=1024)
def cut_of(
    gpu_name: str, device: torch.device, rows: int, columns: int, bits: int, tokens: int
) -> HalvesCut | None:
    """The cut measured for this GPU and shape; None: these tokens take another kernel."""
    if device.type != "cuda" or gpu.capability(device) != (9, 0) or not 2 < tokens <= MOST_TOKENS:
        return None
    octets = octets_of(tokens)
    shape = f"{rows}x{columns}x{bits}x{8 * octets}"
    measured = triton.settings(gpu_name).get("clusters", {}).get(shape)
    if measured is None:
        return None
    numbers = measured.get("cut") if isinstance(measured, dict) else None
    if isinstance(numbers, list) and len(numbers) == 6 and all(type(n) is int and n > 0 for n in numbers):
        made = HalvesCut(bits, octets, math.ceil(columns / TILE_COLUMNS), *numbers)
        if made.fits(launch.gpu_of(device)):
            return made
    triton.warn_of_entry(gpu_name, "clusters", shape)
    return None


class Arguments(ctypes.Structure):
    """`Arguments` of halves.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("planes", "tables", "bias", "x", "y")),
        *((name, ctypes.c_int64) for name in ("plane_stride", "x_stride", "y_stride")),
        *((name, ctypes.c_int32) for name in ("tokens", "rows", "columns", "row_blocks")),
    )


def product(
    cut: HalvesCut, planes: Tensor, tables: Tensor, x: Tensor, rows: int, bias: Tensor | None
) -> Tensor:
    """x W' + bias [M, N]. `tables` int32 [N padded, words] of `table_halves`; `x` [M, K] 16-byte aligned, its
    stride a multiple of 8; `rows` N."""
    y = x.new_empty(len(x), rows)
    arguments = arguments_of(planes, tables, x, y, rows, bias)
    run(cut, launch.TYPES[x.dtype], arguments, planes.shape[1], x.device)
    return y


def arguments_of(
    planes: Tensor, tables: Tensor, x: Tensor, y: Tensor, rows: int, bias: Tensor | None
) -> Arguments:
    """What the kernel is handed; the tensors must live until it has run."""
    return Arguments(
        planes=planes.data_ptr(), tables=tables.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        x=x.data_ptr(), y=y.data_ptr(), plane_stride=planes.stride(0) // 4, x_stride=x.stride(0),
        y_stride=y.stride(0), tokens=len(x), rows=rows, columns=x.shape[1], row_blocks=planes.shape[1],
    )  # fmt: skip


def run(cut: HalvesCut, dtype: str, arguments: Arguments, row_blocks: int, device: torch.device) -> None:
    """One launch on PyTorch's current stream of the device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    passes = math.ceil(row_blocks / cut.row_blocks)
    grid = cut.parts * min(passes, clusters_of(cut, dtype, index))
    kernel = launch.function(cut.template(dtype), cut.shared_bytes, index, SOURCE)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        launch.make_current(index)
        launch.launch(
            kernel, arguments, grid, cut.threads, cut.shared_bytes, stream, launch.overlaps(device),
            cut.parts,
        )  # fmt: skip


@functools.cache
def clusters_of(cut: HalvesCut, dtype: str, device: int) -> int:
    """Clusters that can run at once."""
    driver = compiler.bindings("driver")
    kernel = launch.function(cut.template(dtype), cut.shared_bytes, device, SOURCE)
    config = launch.config_of(cut.parts, cut.threads, cut.shared_bytes, 0, False, cut.parts)
    with torch.cuda.device(device):
        launch.make_current(device)
        return max(1, int(launch.checked(driver.cuOccupancyMaxActiveClusters(kernel, config))))
