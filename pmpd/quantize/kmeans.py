"""Weighted one-dimensional k-means of every row of a matrix, as a tree: 2**seed clusters, then each split in
two per added bit.

The scheme is that of Any-Precision LLM (Park et al., 2024, arXiv:2402.10517): what a lower precision sees of
a code, its top bits, is a clustering of its own. In one dimension clusters are intervals of the sorted row,
and prefix sums give the error of any interval in constant time, so the search is exact where that is cheap:

* seed clusters: dynamic programming over a subset of the possible borders, then Lloyd's iteration over all of
  them;
* a split: the best of all positions inside the cluster, for all clusters of all rows at once.

Centroids are float16, as they are stored, before weights are assigned to them: every code is the nearest
centroid of what its parent code allows, and the errors stated are those of the file.

Legend: R rows of a chunk, N rows, K columns, C clusters, G border candidates; a border is a position 0..K in
the sorted row, cluster c is `sorted[borders[c]:borders[c + 1]]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.quantize.config import check_precisions

CANDIDATES = 128
"""Borders the dynamic programming chooses from. Lloyd's iteration moves them: a quarter as many cost 0.1 % of
error, no more."""

_SEARCHED_BITS = 4
"""Dynamic programming goes up to 2**4 clusters; a seed precision above is split from there, then settled as a
whole."""

_SETTLE_ROUNDS = 50
_CHUNK_ELEMENTS = 512 * 1024
"""Weights of one chunk of rows: its float64 prefix sums (4 MB each) stay in a CPU's cache."""

_GPU_CHUNKS = (16, 64)
"""A GPU takes so many times as many at once, at least and at most: its time goes into launches otherwise."""

_GPU_CHUNK_BYTES = 4 * 64 * 2**20
"""Of free memory for each of these times; a quarter of it is used."""

_WEIGHT_FLOOR = 1e-6
"""Of the row's mean weight: keeps the means of clusters defined whose gradients are all zero."""


def chunk_factor(device: torch.device) -> int:
    """How many times as many weights `device` takes at once as a CPU, whose chunks fit its cache."""
    if device.type == "cpu":
        return 1
    least, most = _GPU_CHUNKS
    return max(least, min(most, gpu.free_bytes(device) // _GPU_CHUNK_BYTES))


@dataclass(frozen=True)
class QuantizedRows:
    """`codes` uint8 [N, K] at the parent precision; `tables` precision b -> float16 [N, 2**b], ascending in
    each row."""

    codes: Tensor
    tables: dict[int, Tensor]

    def dequantize(self, bits: int) -> Tensor:
        """float32 [N, K] at precision `bits`."""
        return self.tables[bits].float().gather(1, (self.codes >> (max(self.tables) - bits)).long())


@torch.no_grad()
def quantize_rows(
    weight: Tensor,
    importance: Tensor | None,
    seed_bits: int,
    parent_bits: int,
    candidates: int = CANDIDATES,
) -> QuantizedRows:
    """Cluster every row of `weight` [N, K] so that Σ importance · (weight − centroid)² is small at each
    precision seed..parent.

    `importance` [N, K] ≥ 0 or None for equal importance; a row of zeros counts as equal importance.
    `candidates`: borders that the search chooses from before all are tried. Works on the device of `weight`.
    ValueError: bad precisions, or values that are not finite or beyond float16.
    """
    check_precisions(seed_bits, parent_bits)
    if weight.dim() != 2:
        raise UserError(f"a matrix is needed, got shape {list(weight.shape)}")
    if importance is not None and importance.shape != weight.shape:
        raise UserError(
            f"importance has shape {list(importance.shape)}, the weights {list(weight.shape)}: they must be "
            f"equal"
        )
    if not bool((weight.abs() <= torch.finfo(torch.float16).max).all()):
        raise UserError(
            "weights hold NaN or values beyond ±65504: their centroids cannot be stored as float16"
        )
    if importance is not None and not bool(((importance >= 0) & importance.isfinite()).all()):
        raise UserError("importance holds NaN, infinite or negative values")
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    tables = {
        bits: torch.empty(rows, 2**bits, dtype=torch.float16, device=weight.device)
        for bits in range(seed_bits, parent_bits + 1)
    }
    step = max(1, _CHUNK_ELEMENTS * chunk_factor(weight.device) // columns)

    def quantize_chunk(start: int) -> None:
        part = slice(start, start + step)
        chunk = _SortedChunk(weight[part].float(), None if importance is None else importance[part])
        searched = min(seed_bits, _SEARCHED_BITS)
        borders = _search_borders(chunk, 2**searched, candidates)
        for _ in range(searched, seed_bits):
            borders = _split(chunk, borders)
        borders, table = _settle(chunk, borders, within_parents=False)
        tables[seed_bits][part] = table
        for bits in range(seed_bits + 1, parent_bits + 1):
            borders, table = _settle(chunk, _split(chunk, borders), within_parents=True)
            tables[bits][part] = table
        codes[part].scatter_(1, chunk.order, chunk.members(borders).to(torch.uint8))

    _each(quantize_chunk, range(0, rows, step), weight.device)
    return QuantizedRows(codes, tables)


def _each(work: Callable[[int], None], starts: Sequence[int], device: torch.device) -> None:
    """`work` for every chunk; on a CPU one chunk per thread, since a chunk's many small operations gain
    nothing from sharing threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(starts) == 1:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, starts))
    torch.set_num_threads(threads)  # the pool's setting also holds for threads that are yet to come


def weighted_error(
    weight: Tensor, importance: Tensor | None, quantized: QuantizedRows, bits: int
) -> tuple[float, float]:
    """(Σ importance · (weight − its centroid at `bits`)², Σ importance · weight²); their ratio is the
    relative error."""
    weight_NK = weight.float()
    squares = (weight_NK - quantized.dequantize(bits)).square()
    total = weight_NK.square()
    if importance is not None:
        squares, total = squares * importance, total * importance
    return float(squares.sum(dtype=torch.float64)), float(total.sum(dtype=torch.float64))


class _SortedChunk:
    """Some rows, sorted, with the prefix sums that give any interval's weight and mean."""

    def __init__(self, values_RK: Tensor, importance_RK: Tensor | None) -> None:
        self.order = _argsort(values_RK)  # int64 [R, K]
        self.values = values_RK.gather(1, self.order)  # float32 [R, K], ascending
        if importance_RK is None:
            self.weights = torch.ones_like(self.values, dtype=torch.float64)
        else:
            weights = importance_RK.gather(1, self.order).double()
            mean = weights.mean(1, keepdim=True)
            self.weights = torch.where(mean > 0, weights / mean + _WEIGHT_FLOOR, 1.0)
        self.weight_sums = _prefix(self.weights)  # float64 [R, K + 1]
        self.value_sums = _prefix(self.weights * self.values)

    def means(self, borders: Tensor) -> Tensor:
        """float64 [R, C]: the weighted mean of each cluster; of an empty one, the value just below it."""
        weight = self.weight_sums.gather(1, borders).diff(dim=1)
        below = self.values.gather(1, (borders[:, :-1] - 1).clamp_(min=0))
        return torch.where(
            weight > 0, self.value_sums.gather(1, borders).diff(dim=1) / weight, below.double()
        )

    def members(self, borders: Tensor) -> Tensor:
        """int64 [R, K]: the cluster of each position of the sorted row."""
        rows, columns = self.values.shape
        steps = torch.zeros(rows, columns + 1, dtype=torch.int64, device=borders.device)
        inner = borders[:, 1:-1]
        return steps.scatter_add_(1, inner, torch.ones_like(inner))[:, :-1].cumsum(1)


def _argsort(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # numpy sorts with vector instructions: six times faster than torch here
        return torch.from_numpy(np.argsort(values.numpy(), axis=1))
    return values.argsort(dim=1)


def _prefix(values: Tensor) -> Tensor:
    result = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, 1, out=result[:, 1:])
    return result


def _search_borders(chunk: _SortedChunk, clusters: int, most: int) -> Tensor:
    """int64 [R, C + 1]: the best borders among the candidates, by dynamic programming.

    Minimizing the squared error is maximizing Σ over clusters of (Σ w·x)² / Σ w.
    """
    candidates = _candidates(chunk, most)  # [R, G + 1], ascending, from 0 to K
    weight = chunk.weight_sums.gather(1, candidates)
    value = chunk.value_sums.gather(1, candidates)
    value = value - weight * (value[:, -1:] / weight[:, -1:])  # centred: float32 is enough from here
    weight, value = weight.float(), value.float()
    count = candidates.shape[1]
    gain = (
        value.unsqueeze(2) - value.unsqueeze(1)
    ).square_()  # [R, j, i]: the cluster from candidate i to candidate j
    gain /= (weight.unsqueeze(2) - weight.unsqueeze(1)).clamp_(
        min=1e-6 * chunk.values.shape[1]
    )  # below: rounding noise
    gain.masked_fill_(torch.ones(count, count, dtype=torch.bool, device=gain.device).triu_(1), -torch.inf)
    best = [gain[:, :, 0]]
    for _ in range(clusters - 2):
        best.append((gain + best[-1].unsqueeze(1)).amax(2))
    at = torch.full((candidates.shape[0], 1, 1), count - 1, dtype=torch.int64, device=candidates.device)
    path = [at[:, 0]]
    for earlier in reversed(best):
        row = gain.gather(1, at.expand(-1, 1, count))[:, 0]
        at = (row + earlier).argmax(1).view(-1, 1, 1)
        path.append(at[:, 0])
    path.append(torch.zeros_like(path[0]))
    return candidates.gather(1, torch.cat(path[::-1], 1))


def _candidates(chunk: _SortedChunk, most: int) -> Tensor:
    """Half of them evenly in rank, where most weights are; half evenly in value, so that the tails have
    some."""
    rows, columns = chunk.values.shape
    if columns <= most:
        return torch.arange(columns + 1, device=chunk.values.device).expand(rows, -1).contiguous()
    half = most // 2
    by_rank = torch.linspace(0, columns, half + 1, device=chunk.values.device).round().long().expand(rows, -1)
    fractions = torch.linspace(0, 1, half + 2, device=chunk.values.device)[1:-1]
    low, high = chunk.values[:, :1], chunk.values[:, -1:]
    by_value = torch.searchsorted(chunk.values, low + (high - low) * fractions)
    return torch.cat([by_rank, by_value], 1).sort(1).values


def _split(chunk: _SortedChunk, borders: Tensor) -> Tensor:
    """int64 [R, 2C + 1]: every cluster cut in two where that lowers its squared error most (all positions
    tried)."""
    start, end = borders[:, :-1], borders[:, 1:]
    member = chunk.members(borders)
    columns = member.shape[1]
    # With r = x − mean of the cluster, Σ w·r is zero over each cluster: one prefix sum over the row serves
    # all clusters.
    residual = chunk.values - chunk.means(borders).gather(1, member)
    left_sum = torch.cumsum(residual.mul_(chunk.weights), 1, out=residual)
    sums = chunk.weight_sums
    left = sums[:, 1:] - sums.gather(1, start).gather(1, member)
    right = sums.gather(1, end).gather(1, member) - sums[:, 1:]
    gain = left_sum.square_().div_(
        left.mul_(right)
    )  # of a cut behind this position, divided by the cluster's weight
    gain.scatter_(1, (end - 1) % columns, 0.0)  # behind a cluster's last position is no cut
    # The gain is at most a quarter of the squared range: scaled by it, cluster number + gain ascends from
    # cluster to cluster, so that the running maximum at a cluster's end is the cluster's own.
    scale = (
        (chunk.values[:, -1:] - chunk.values[:, :1])
        .double()
        .square()
        .clamp_(min=torch.finfo(torch.float64).tiny)
    )
    where = gain.div_(scale).add_(member).cummax(1).indices
    cut = where.gather(1, (end - 1).clamp(min=0)) + 1
    cut = torch.minimum(torch.maximum(cut, start), end)
    return torch.cat([torch.stack([start, cut], 2).flatten(1), borders[:, -1:]], 1)


def _settle(chunk: _SortedChunk, borders: Tensor, within_parents: bool) -> tuple[Tensor, Tensor]:
    """Lloyd's iteration with rounded centroids -> (borders [R, C + 1], table float16 [R, C]); borders match
    the table returned.

    `within_parents`: only every second border, the one between the two halves of a parent cluster, moves.
    """
    for _ in range(_SETTLE_ROUNDS):
        table = chunk.means(borders).half()
        middle = (table[:, :-1].float() + table[:, 1:].float()) / 2
        moved = borders.clone()
        if within_parents:
            found = torch.searchsorted(chunk.values, middle[:, ::2].contiguous(), right=True)
            moved[:, 1::2] = torch.minimum(torch.maximum(found, borders[:, :-1:2]), borders[:, 2::2])
        else:
            moved[:, 1:-1] = torch.searchsorted(chunk.values, middle, right=True)
        if torch.equal(moved, borders):
            break
        borders = moved
    return borders, table
