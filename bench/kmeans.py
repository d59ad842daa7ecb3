"""Our k-means against the package `flash1dkmeans` (numba; what Any-Precision's own tool uses): seconds and
weighted error.

Both cluster the same matrix, in the same run, by the same scheme (seed clusters, then every cluster split in
two per added bit), each doing everything from the unsorted matrix to codes and float16 tables. The weights
are Gaussian with 0.1 % outliers, the importance a squared Gaussian with a log-normal factor per column. The
roof is the time to copy the matrix once, and to sort its rows.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import tyro
from flash1dkmeans import numba_kmeans_1d_k_cluster, numba_kmeans_1d_two_cluster
from torch import Tensor

from pmpd.quantize.kmeans import QuantizedRows, quantize_rows, weighted_error


@dataclass(frozen=True)
class Config:
    rows: int = 4096
    columns: int = 4096
    seed_precision: int = 2
    parent_precision: int = 4
    threads: int = 2
    """Threads of both contestants."""
    repeats: int = 3
    """Runs of each, taken in turn; the median counts."""
    seed: int = 0
    output: Path | None = None
    """Append the JSON line to this file."""


@numba.njit(parallel=True, cache=True)
def _flash_rows(
    values, weights, order, seed_bits, parent_bits, codes, tables
):  # tables [N, Σ 2**b] of all precisions, lowest first
    for row in numba.prange(values.shape[0]):
        x, w = values[row][order[row]], weights[row][order[row]].astype(np.float64)
        weight_sums, sums, squares = np.cumsum(w), np.cumsum(w * x), np.cumsum(w * x * x)
        clusters = 2**seed_bits
        centroids, borders = numba_kmeans_1d_k_cluster(
            x, clusters, 50, weight_sums, sums, squares, 0, x.size, row
        )
        tables[row, :clusters] = centroids
        first = clusters
        for _ in range(seed_bits, parent_bits):
            halves = np.empty(2 * clusters + 1, dtype=borders.dtype)
            for c in range(clusters):
                halves[2 * c] = borders[c]
                if borders[c + 1] > borders[c]:
                    two, cut = numba_kmeans_1d_two_cluster(x, weight_sums, sums, borders[c], borders[c + 1])
                    halves[2 * c + 1] = cut[1]
                    tables[row, first + 2 * c : first + 2 * c + 2] = two
                else:
                    halves[2 * c + 1] = borders[c]
                    tables[row, first + 2 * c : first + 2 * c + 2] = tables[row, first - clusters + c]
            halves[2 * clusters] = x.size
            borders, clusters = halves, 2 * clusters
            first += clusters
        for c in range(clusters):
            codes[row][order[row][borders[c] : borders[c + 1]]] = c


def flash_quantize(weight: Tensor, importance: Tensor, seed_bits: int, parent_bits: int) -> QuantizedRows:
    """The peer, in the form of `quantize_rows`."""
    values = weight.numpy()
    codes = np.empty(values.shape, dtype=np.uint8)
    widths = [2**bits for bits in range(seed_bits, parent_bits + 1)]
    tables = np.empty((values.shape[0], sum(widths)), dtype=np.float32)
    _flash_rows(values, importance.numpy(), np.argsort(values, axis=1), seed_bits, parent_bits, codes, tables)
    parts = torch.from_numpy(tables).half().split(widths, 1)
    return QuantizedRows(
        torch.from_numpy(codes), dict(zip(range(seed_bits, parent_bits + 1), parts, strict=True))
    )


def example(config: Config) -> tuple[Tensor, Tensor]:
    """Weights and importance, float32 [N, K]; the weights have float16 values, as in a checkpoint."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.rows, config.columns)
    weight = 0.02 * torch.randn(shape, generator=generator)
    weight += (torch.rand(shape, generator=generator) < 0.001) * 0.1 * torch.randn(shape, generator=generator)
    column = torch.randn(config.columns, generator=generator).exp()
    importance = 1e-6 * torch.randn(shape, generator=generator).square() * column
    return weight.half().float(), importance


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main(config: Config) -> dict:
    torch.set_num_threads(config.threads)
    numba.set_num_threads(config.threads)
    weight, importance = example(config)
    seed_bits, parent_bits = config.seed_precision, config.parent_precision
    contestants: dict[str, Callable[[], QuantizedRows]] = {
        "pmpd": lambda: quantize_rows(weight, importance, seed_bits, parent_bits),
        "flash1dkmeans": lambda: flash_quantize(weight, importance, seed_bits, parent_bits),
    }
    flash_quantize(weight[:8], importance[:8], seed_bits, parent_bits)  # compiles
    copy_seconds = min(timed(weight.clone)[0] for _ in range(3))
    sort_seconds = timed(lambda: np.argsort(weight.numpy(), axis=1))[0]
    print(
        f"roof: copy {copy_seconds:.3f} s, sort {sort_seconds:.2f} s ({config.rows} x {config.columns}, "
        f"{config.threads} threads)"
    )
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    errors: dict[str, dict[int, float]] = {}
    for _ in range(config.repeats):
        for name, function in contestants.items():
            taken, result = timed(function)
            seconds[name].append(taken)
            if name not in errors:
                pairs = {
                    bits: weighted_error(weight, importance, result, bits)
                    for bits in range(seed_bits, parent_bits + 1)
                }
                errors[name] = {bits: error / total for bits, (error, total) in pairs.items()}
            del result
    median = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    print(f"{'bits':>4}  {'pmpd':>12}  {'flash1dkmeans':>13}  ratio   (relative weighted error)")
    for bits in range(seed_bits, parent_bits + 1):
        ours, theirs = errors["pmpd"][bits], errors["flash1dkmeans"][bits]
        print(f"{bits:>4}  {ours:>12.6f}  {theirs:>13.6f}  {ours / theirs:.3f}")
    print(
        f"seconds: pmpd {median['pmpd']:.2f}, flash1dkmeans {median['flash1dkmeans']:.2f} (medians of "
        f"{config.repeats})"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "benchmark": "kmeans",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "hardware": f"{platform.processor() or platform.machine()}, {config.threads} threads",
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "numba": numba.__version__},
        "shape": [config.rows, config.columns],
        "precisions": [seed_bits, parent_bits],
        "seconds": median,
        "all_seconds": seconds,
        "relative_weighted_error": errors,
    }
    line = json.dumps(record)
    print(line)
    if config.output is not None:
        with config.output.open("a") as file:
            file.write(line + "\n")
    return record


if __name__ == "__main__":
    main(tyro.cli(Config))
