"""How `teams_product` of `halves.cu` is cut for a shape, and its launch: y = x W' + bias for 3 to 32 tokens.

Taken only where the autotune table of the GPU names a cut, that is where it was measured to be faster than
what else there is. Legend: N out_features, K in_features, M tokens; an octet is eight tokens; the rest as in
`halves.cu`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import launch
from pmpd.kernels.cuda.cut import RESERVED_BYTES, TILE_COLUMNS, Gpu, OfTeams
from pmpd.kernels.cuda.halves import MOST_TOKENS, SOURCE, Arguments, arguments_of, octets_of


@dataclass(frozen=True)
class TeamsCut(OfTeams):
    """One instance of the kernel, for one K, precision and number of octets."""

    bits: int
    octets: int
    tiles: int
    warps: int
    splits: int
    slots: int
    """Tiles in a warp's ring, at least two."""
    phase: int
    """Tiles of a warp between two points at which activations are waited for: at most `per_warp`."""
    held: int
    """Phases whose activations lie in shared memory at once: all of them, or two."""
    blocks: int
    """Blocks of a multiprocessor that the compiler leaves registers for."""
    resident: int
    """Blocks of a multiprocessor in a launch; in the room of more, the next launch fills its rings."""

    @property
    def phases(self) -> int:
        return math.ceil(self.per_warp / self.phase)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rings, activations, sums."""
        ring = self.warps * self.slots * self.bits * 512
        activations = self.held * self.phase * self.splits * self.octets * 4096
        return ring + activations + self.warps * self.octets * 512

    def fits(self, gpu: Gpu) -> bool:
        """Whether the kernel can be cut so, and the GPU holds it."""
        shaped = self.warps % self.splits == 0 and self.slots >= 2 and self.phase <= self.per_warp
        room = self.shared_bytes + RESERVED_BYTES
        held = self.shared_bytes <= gpu.block_bytes and self.resident * room <= gpu.multiprocessor_bytes
        return shaped and self.held in (self.phases, 2) and held

    def template(self, dtype: str, back: str = "STORE") -> str:
        """The instance's name in C++."""
        numbers = (
            self.bits, self.octets, self.tiles, self.warps, self.splits, self.slots, self.phase, self.held,
            self.blocks,
        )  # fmt: skip
        return f"teams_product<{dtype}, {back}, {', '.join(map(str, numbers))}>"

    def grid(self, row_blocks: int, gpu: Gpu) -> int:
        """Rather teams without a row block than a multiprocessor without one."""
        return min(row_blocks, self.resident * gpu.multiprocessors)


MEASURED = ("warps", "splits", "slots", "phase", "held", "blocks", "resident")
"""What the autotune table says of a cut."""


@functools.lru_cache(maxsize=1024)
def cut_of(
    gpu_name: str, device: torch.device, rows: int, columns: int, bits: int, tokens: int
) -> TeamsCut | None:
    """The cut measured for this GPU and shape; None: these tokens take another kernel."""
    if device.type != "cuda" or gpu.capability(device) < (8, 0) or not 2 < tokens <= MOST_TOKENS:
        return None
    octets = octets_of(tokens)
    shape = f"{rows}x{columns}x{bits}x{8 * octets}"
    known = triton.measured(gpu_name, "teams", shape, MEASURED)
    if not known:
        return None
    made = TeamsCut(bits, octets, math.ceil(columns / TILE_COLUMNS), **known)
    if not made.fits(launch.gpu_of(device)):
        triton.warn_of_entry(gpu_name, "teams", shape)
        return None
    return made


def product(
    cut: TeamsCut, planes: Tensor, tables: Tensor, x: Tensor, rows: int, bias: Tensor | None,
    gated: bool = False,
) -> Tensor:  # fmt: skip
    """As `halves.product`. `gated`: the first half of W is gate, the second up, N a multiple of 32, and the
    result silu(gate) * up [M, N / 2]."""
    y = x.new_empty(len(x), rows // 2 if gated else rows)
    name = cut.template(launch.TYPES[x.dtype], "GATED" if gated else "STORE")
    run(cut, name, arguments_of(planes, tables, x, y, rows, bias), planes.shape[1] // (1 + gated), x.device)
    return y


def run(cut: TeamsCut, instance: str, arguments: Arguments, row_blocks: int, device: torch.device) -> None:
    """One launch on PyTorch's current stream of the device; `row_blocks` of the result."""
    index = torch.cuda.current_device() if device.index is None else device.index
    kernel = launch.function(instance, cut.shared_bytes, index, SOURCE)
    grid = cut.grid(row_blocks, launch.gpu_of(device))
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        launch.make_current(index)
        launch.launch(
            kernel, arguments, grid, 32 * cut.warps, cut.shared_bytes, stream, launch.overlaps(device)
        )
