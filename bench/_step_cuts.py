"""Cuts of `bits.cu` timed where they are used: in a decode step of a random Llama, with the norm in front and
silu behind, where a launch that leaves room lets the next one fill its rings. Alone, one launch after the
other of the same kind, other cuts win.

One matrix of the layer after the other tries its cuts while the others keep the best so far.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch

from bench import _timing, decode
from bench._contenders import cuts, rule, said
from pmpd.kernels.cuda import compiler, matrix
from pmpd.kernels.cuda.cut import Cut
from pmpd.kernels.triton import DIGITS_BITS
from pmpd.weights.base import Segment

LAYERS = 6
"""Their weights are more than the second-level cache holds."""
VOCABULARY = 1024
"""A head that takes no time."""
ERROR = 2e-2
"""Of the logits, between two cuts: activations are rounded under other scales."""


class Place(NamedTuple):
    """A matrix of the layer."""

    name: str
    rows: int
    columns: int
    front: str
    back: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


def places(model: str) -> list[Place]:
    """The largest first."""
    shape = decode.SHAPES[model]
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    qkv = (heads + 2 * shape.num_key_value_heads) * (hidden // heads)
    return [
        Place(f"{model}.gate_up", 2 * inner, hidden, "NORM", "GATED"),
        Place(f"{model}.down", hidden, inner, "PLAIN", "STORE"),
        Place(f"{model}.qkv", qkv, hidden, "NORM", "STORE"),
        Place(f"{model}.o", hidden, hidden, "PLAIN", "STORE"),
    ]


def compile_all(models: list[str], tokens: tuple[int, ...], device: torch.device, workers: int) -> None:
    """Fills the kernels' cache on disk, in processes."""
    capability = torch.cuda.get_device_capability(device)
    names = {
        cut.template("FLOAT16", place.front, place.back)
        for model in models for place in places(model) for bits in DIGITS_BITS for m in tokens
        for cut in cuts(*place.shape, bits, m, device)
    }  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        wait([pool.submit(compiler.compiled, name, capability) for name in sorted(names)])


def tune(models: list[str], tokens: tuple[int, ...], device: torch.device, workers: int) -> Iterator[dict]:
    """A row for each cut: `us` of a layer in a step, `best` where it is the fastest of its matrix."""
    compile_all(models, tokens, device, workers)
    for model, llama in llamas(models, max(tokens)):
        for m in tokens:
            for bits in sorted(DIGITS_BITS, reverse=True):
                yield from _tune_step(llama, model, m, bits, device)


def llamas(models: list[str], rows: int) -> Iterator[tuple[str, decode.RandomLlama]]:
    """Each model, of LAYERS layers, with room for so many rows."""
    for model in models:
        shape = replace(decode.SHAPES[model], num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
        with torch.inference_mode():
            llama = decode.RandomLlama(shape, "cuda", rows, 1024)
        yield model, llama


def _tune_step(
    llama: decode.RandomLlama, model: str, tokens: int, bits: int, device: torch.device
) -> Iterator[dict]:
    each = (bits,) * tokens
    chosen = {place.shape: rule(*place.shape, bits, tokens, device) for place in places(model)}

    def cut_of(gpu_name: str, device: torch.device, rows: int, columns: int, bits: tuple[int, ...]) -> Cut:
        assert bits == each
        return chosen[rows, columns]

    with mock.patch.object(matrix, "cut_of", cut_of):
        expected, _ = _timed(llama, tokens, bits)
        for place in places(model):
            rows = []
            for cut in cuts(*place.shape, bits, tokens, device):
                chosen[place.shape] = cut
                logits, seconds = _timed(llama, tokens, bits)
                error = float((logits - expected).norm() / expected.norm())
                row = {
                    "shape": place.name, "n": place.rows, "k": place.columns, "bits": bits, "tokens": tokens,
                    "impl": said(cut), "cut": {name: getattr(cut, name) for name in matrix.MEASURED},
                    "layer_us": seconds * 1e6 / LAYERS, "error": error, "best": False,
                }  # fmt: skip
                if error < ERROR:
                    rows.append((seconds, cut, row))
                yield row
            seconds, chosen[place.shape], best = min(rows, key=lambda found: found[0])
            best["best"] = True
            print(
                f"{place.name:12} b={bits} M={tokens} {said(chosen[place.shape]):24} "
                f"{seconds * 1e6 / LAYERS:7.2f} us a layer; {len(rows)} cuts from "
                f"{max(s for s, _, _ in rows) * 1e6 / LAYERS:.2f}",
                flush=True,
            )


@torch.inference_mode()
def _timed(llama: decode.RandomLlama, tokens: int, bits: int) -> tuple[torch.Tensor, float]:
    """Logits of one step, and its seconds in a graph."""
    buffers = decode.buffers_at(tokens)

    def step() -> torch.Tensor:
        return llama.forward(
            buffers["ids"], buffers["slots"], buffers["positions"], [Segment(0, None, bits)], llama.keys,
            llama.values, 1024,
        )  # fmt: skip

    logits = step().float()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seconds = [_timing.Cuda().seconds(graph.replay) for _ in range(12)]
    return logits, statistics.median(seconds[2:])


def best(rows: list[dict]) -> dict[str, dict]:
    """The table's entries."""
    return {
        f"{r['n']}x{r['k']}x{'+'.join([str(r['bits'])] * r['tokens'])}": r["cut"]
        | {"layer_us": round(r["layer_us"], 2)}
        for r in rows
        if r.get("best")
    }
