"""A matrix for `bits.cu` (one or two tokens at 2 to 4 bits) and `halves.cu` (3 to 32 tokens, where that was
measured to be faster); more tokens and more bits take the routes of `pmpd.kernels.triton`, over the same
resident planes.

Memory of a matrix [N, K]: planes N K P / 8 bytes, the only copy; and for each precision b, a row, 4 2^b bytes
of coefficients (`bits`, up to 4 bits), 2 2^b of values (`dense`, and `halves` from 5 bits on), 2 2^b of the
same values by bytes (`halves`, up to 4 bits). At P = 4, K = 4096 that is 11 % beside the planes, half of it
the float32 coefficients.

Bytes of one multiplication: N K b / 8 + N 2^b 4 + 2 M (K + N). What it reaches: bench/results/gpu.md.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import compiler, halves, launch, teams
from pmpd.kernels.cuda.coefficients import coefficients
from pmpd.kernels.cuda.cut import BITS, MOST_TOKENS, Cut
from pmpd.kernels.cuda.cut import cut as cut_of_rules
from pmpd.kernels.triton import DIGITS_BITS, TritonMatrix, table_halves

MEASURED = ("warps", "splits", "slots", "live", "blocks", "resident")
"""What the autotune table says of a cut."""
CAPABILITIES = ((8, 0), (9, 0))
"""The first and the last compute capability with 1-bit tensor cores; later ones emulate them, far slower."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Needs what Triton's kernels need, NVRTC, a GPU with 1-bit tensor cores, float16 or bfloat16."""
    if dtype not in launch.TYPES:
        return f"the CUDA kernels compute in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"the CUDA kernels run on CUDA devices, not on {device.type}"
    capability = gpu.capability(device)
    if not CAPABILITIES[0] <= capability <= CAPABILITIES[1]:
        return (
            f"the CUDA kernels need 1-bit tensor cores, which compute capability 8.0 to 9.0 has; "
            f"{device} has {'.'.join(map(str, capability))}"
        )
    return triton.unavailable(device, dtype) or compiler.problem()


def only_asked(device: torch.device, dtype: torch.dtype) -> str | None:
    """Unasked it is taken where it was measured beside Triton's: compute capability 9.0."""
    capability = ".".join(map(str, gpu.capability(device)))
    if capability == "9.0":
        return None
    return (
        f"the CUDA kernels were measured on capability 9.0, not on {capability}: --kernel cuda asks for them"
    )


class CudaMatrix(TritonMatrix):
    """An Any-Precision matrix whose planes every route reads; see the module's text."""

    PLAIN = True
    HAS_DIGITS = False

    def fits(self, bits: tuple[int, ...]) -> bool:
        """Whether `multiply_each` takes tokens of these precisions."""
        return len(bits) <= MOST_TOKENS and self._cut(tuple(sorted(bits, reverse=True))) is not None

    def route(self, tokens: int, bits: int) -> str:
        """`bits`, `teams` or `clusters` (of `halves.cu`), or one of Triton's routes."""
        if 0 < tokens <= MOST_TOKENS and self._cut((bits,) * tokens) is not None:
            return "bits"
        if bits not in DIGITS_BITS or tokens > triton.FUSED_TOKENS:
            return super().route(tokens, bits)
        if self._teams_cut(tokens, bits):
            return "teams"
        return "clusters" if self._halves_cut(tokens, bits) else "halves"

    def multiply(self, x: Tensor, bits: int, route: str | None = None, warps: int | None = None) -> Tensor:
        """As in the base class. `route` forces one."""
        x_MK = x.reshape(-1, self.shape[1])
        route = route or self.route(len(x_MK), bits)
        if route == "bits":
            y_MN = self.multiply_each(x_MK, (bits,) * len(x_MK))
        elif route == "teams":
            y_MN = self.multiply_teams(x_MK, bits)
        elif route == "clusters":
            cut, tables = self._halves_cut(len(x_MK), bits), self._tables[bits]["halves"]
            assert cut is not None, f"{len(x_MK)} tokens, {bits} bits: no cut in the autotune table"
            x_MK, bias = launch.aligned(x_MK), self._tiles.bias
            y_MN = halves.product(cut, self._tiles.planes, tables, x_MK, self.shape[0], bias)
        else:
            return super().multiply(x, bits, route, warps)
        return y_MN.view(*x.shape[:-1], self.shape[0])

    def multiply_each(
        self, x: Tensor, bits: tuple[int, ...], norm: launch.Norm | None = None, gated: bool = False,
        cut: Cut | None = None,
    ) -> Tensor:  # fmt: skip
        """`x` [M, K], M one or two -> [M, N], each row at a precision of its own, in one launch. The planes
        are read once, as many as the highest precision has. `norm` and `gated` as of `launch.product`, `cut`
        another than the one chosen."""
        made = cut or self._cut(tuple(sorted(bits, reverse=True)))
        assert made is not None, f"{bits} bits, {self.shape[1]} columns"
        x, rows = launch.aligned(x), self.shape[0]
        y = x.new_empty(len(bits), rows // 2 if gated else rows)
        worth = [self._tables[b]["coefficients"] for b in dict.fromkeys(made.bits)]
        reverse = made.bits != bits
        launch.product(made, self._tiles.planes, worth, x, y, rows, self._tiles.bias, norm, gated, reverse)
        return y

    def multiply_teams(
        self, x: Tensor, bits: int, cut: teams.TeamsCut | None = None, gated: bool = False
    ) -> Tensor:
        """`x` [M, K] -> [M, N] by `teams_product`; `cut` another than the one of the autotune table; `gated`
        as of `teams.product`."""
        made, tables = cut or self._teams_cut(len(x), bits), self._tables[bits]["halves"]
        assert made is not None, f"{len(x)} tokens, {bits} bits: no cut in the autotune table"
        x, rows = launch.aligned(x), self.shape[0]
        return teams.product(made, self._tiles.planes, tables, x, rows, self._tiles.bias, gated)

    def gates(self, tokens: int, bits: int) -> bool:
        """Whether `multiply_teams` takes these tokens, `gated`."""
        return self.shape[0] % 32 == 0 and self.route(tokens, bits) == "teams"

    def _cut(self, bits: tuple[int, ...]) -> Cut | None:
        """None: these precisions take another route."""
        if any(b not in BITS or b not in self._tables for b in bits):
            return None
        return cut_of(self._gpu_name, self._tiles.planes.device, *self.shape, bits)

    def _halves_cut(self, tokens: int, bits: int) -> halves.HalvesCut | None:
        return halves.cut_of(self._gpu_name, self._tiles.planes.device, *self.shape, bits, tokens)

    def _teams_cut(self, tokens: int, bits: int) -> teams.TeamsCut | None:
        return teams.cut_of(self._gpu_name, self._tiles.planes.device, *self.shape, bits, tokens)

    def _tables_of(self, table: Tensor, bits: int) -> dict[str, Tensor]:
        tables = {"values": triton.table_values(table, self.dtype)}
        if bits in BITS:
            tables["coefficients"] = coefficients(table, bits)
        if bits in DIGITS_BITS:
            tables["halves"] = table_halves(table, bits, self.dtype)
        return tables


@lru_cache(maxsize=1024)
def cut_of(gpu_name: str, device: torch.device, rows: int, columns: int, bits: tuple[int, ...]) -> Cut | None:
    """As measured for this GPU and shape, else by the rules."""
    key = f"{rows}x{columns}x{'+'.join(map(str, bits))}"
    known = triton.measured(gpu_name, "bits", key, MEASURED)
    return cut_of_rules(rows, columns, bits, launch.gpu_of(device), **known)
