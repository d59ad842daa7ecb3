"""A decode step of many rows of three precisions, as labeling runs it: `python -m bench.mixed_steps`.

Llama-shaped random models on a GPU, rows at 4, 3 and 2 bits side by side. Compared, each as a CUDA graph:
packed weights (a launch a precision), weights dequantized once with a launch a precision (cuBLAS), and with
one launch for all of them over tiles of rows (`pmpd.kernels.dense`). The roof is the same rows at 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from bench import _record
from bench.decode import CONTEXT, CUDA, SHAPES, RandomLlama, median
from pmpd.decode.graph_steps import tiles_of
from pmpd.decode.graphs import StepGraphs
from pmpd.kernels.dense import DenseMatrix
from pmpd.weights.base import Segment

SHARES = {4: 0.35, 3: 0.4, 2: 0.25}
"""Of the rows; about what labeling with the chain 4,3,2 has in mid-unit."""
LONGEST = 1024
STEPS = 32
"""Timed at a time."""


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("135M", "1.1B")
    batches: tuple[int, ...] = (64, 128, 256, 512)
    packed: bool = True
    """Packed weights as well; their kernels take long to compile."""
    out: Path = _record.RESULTS


def segments_of(rows: int) -> tuple[Segment, ...]:
    stops = [round(rows * share) for share in np.cumsum(list(SHARES.values()))]
    starts = [0, *stops[:-1]]
    return tuple(Segment(*row) for row in zip(starts, stops, SHARES, strict=True))


def dequantized(model: RandomLlama) -> None:
    """The model's dense layers become matrices of three precisions (of equal weights: time is the same)."""
    for layer in model.forward.weights.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            weight = getattr(layer, name).weight
            setattr(layer, name, DenseMatrix(dict.fromkeys(SHARES, weight), None))


def step_ms(model: RandomLlama, rows: int, layout: Any, which: torch.Tensor | None = None) -> float:
    """Of a captured step of `rows` rows, tokens read and written on the device."""

    def make(count: int) -> dict[str, torch.Tensor]:
        at = torch.arange(count, device=model.device)
        return {"ids": at % 100, "slots": at, "positions": torch.full_like(at, CONTEXT)}

    def step(buffers: Any, layout: Any) -> None:
        ids, slots, positions = buffers["ids"], buffers["slots"], buffers["positions"]
        logits = model.forward(ids, slots, positions, layout, model.keys, model.values, LONGEST, which)
        ids.copy_(logits.max(dim=-1)[1] % 100)

    graphs = StepGraphs(step, make, buckets=(rows,))

    def run() -> None:
        for _ in range(STEPS):
            graphs.run(rows, layout)

    with torch.inference_mode():
        seconds = median(run, 5) / STEPS
    assert graphs.why_eager is None, graphs.why_eager
    return 1e3 * seconds


def measure(name: str, config: Config, device: torch.device = CUDA) -> list[dict[str, Any]]:
    most = max(config.batches) + 3 * 64
    found: list[dict[str, Any]] = [{"model": name, "rows": rows} for rows in config.batches]
    model = RandomLlama(SHAPES[name], "dense", most, LONGEST, device)
    for row in found:
        row["16 bits"] = step_ms(model, row["rows"], (Segment(0, None, 16),))
    dequantized(model)
    model.forward = type(model.forward)(model.forward.weights)  # looks at the layers when it is made
    for row in found:
        segments = segments_of(row["rows"])
        row["dequantized"] = step_ms(model, row["rows"], segments)
        tile = model.forward.tile_rows(row["rows"])
        places, which, size = tiles_of(segments, row["rows"], model.forward.tiled, tile)
        del places
        row["tiles"] = step_ms(model, len(which) * size, (), torch.from_numpy(which).to(device))
        row["rows of tiles"], row["rows a tile"] = len(which) * size, size
        print(row, flush=True)
    del model
    torch.cuda.empty_cache()
    if config.packed:
        from pmpd.kernels.dispatch import choose

        kernel = choose(device, torch.float16).name
        model = RandomLlama(SHAPES[name], kernel, most, LONGEST, device)
        for row in found:
            row[f"packed ({kernel})"] = step_ms(model, row["rows"], segments_of(row["rows"]))
            print(row, flush=True)
    return found


def main(config: Config) -> None:
    _record.need_cuda()
    rows = [row for name in config.models for row in measure(name, config)]
    print(_record.write("mixed_steps_cuda", rows, "cuda", config.out))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
