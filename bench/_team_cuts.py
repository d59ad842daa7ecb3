"""Cuts of `teams_product` (`halves.cu`) timed where they are used, as `_step_cuts` does it for `bits.cu`: in
a decode step of a random Llama of 3 to 32 rows, beside the kernel that is taken without them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from unittest import mock

import torch

from bench import _step_cuts, decode
from bench._step_cuts import LAYERS, places
from pmpd.kernels.cuda import compiler, teams
from pmpd.kernels.cuda.cut import TILE_COLUMNS, TILE_ROWS, Gpu
from pmpd.kernels.cuda.halves import SOURCE, octets_of
from pmpd.kernels.cuda.launch import gpu_of
from pmpd.kernels.cuda.teams import MEASURED, TeamsCut
from pmpd.kernels.triton import DIGITS_BITS

MOST = 20
"""Cuts of a matrix, precision and number of rows."""
GAIN = 1.01
"""How many times as fast a layer must become for the table to name a cut."""
ERROR = 2e-2
"""Of the logits, against the kernel taken without: they add in another order, and layers amplify that."""


def cuts(rows: int, columns: int, bits: int, tokens: int, gpu: Gpu) -> list[TeamsCut]:
    """Those that keep every scheduler about equally busy, with rings of two sizes; activations all at once
    where they fit, waited for at once or in four phases, else in two buffers. The ones with the fewest tiles
    of a scheduler first."""
    octets, tiles = octets_of(tokens), math.ceil(columns / TILE_COLUMNS)
    row_blocks = math.ceil(rows / TILE_ROWS / gpu.multiprocessors)  # of a multiprocessor
    found: dict[TeamsCut, float] = {}
    for warps, splits, (blocks, resident), ring in itertools.product(
        (16, 8), (1, 2, 4, 8, 16), ((1, 1), (2, 1), (2, 2)), (28 << 10, 56 << 10)
    ):
        spare = octets == 4 and blocks == 1  # registers for the sums
        if splits > min(warps, tiles) or (warps * resident < 16 and not spare) or warps * blocks > 16:
            continue
        per_warp, slots = math.ceil(tiles / splits), max(2, math.ceil(ring / resident / (warps * bits * 512)))
        rounds = math.ceil(row_blocks / (resident * warps // splits))
        tiles_of_scheduler = rounds * per_warp * resident * warps / 4
        if slots > 2 and slots >= rounds * per_warp:  # longer than all that a warp has
            continue
        kept = {per_warp, math.ceil(per_warp / 4)}
        for phase, held in [(p, math.ceil(per_warp / p)) for p in kept] + [(1, 2), (2, 2)]:
            made = TeamsCut(bits, octets, tiles, warps, splits, slots, phase, held, blocks, resident)
            if phase <= per_warp and held <= made.phases and made.fits(gpu):
                found[made] = tiles_of_scheduler
    # two buffers only where not everything fits
    kept_ones = {(cut.warps, cut.splits, cut.slots) for cut in found if cut.held == cut.phases}
    found = {
        cut: cost
        for cut, cost in found.items()
        if cut.held == cut.phases or (cut.warps, cut.splits, cut.slots) not in kept_ones
    }
    least = min(found.values(), default=0.0)
    near = [cut for cut in sorted(found, key=lambda cut: found[cut]) if found[cut] <= 1.4 * least]
    return near[:MOST]


def said(cut: TeamsCut | None) -> str:
    """The name of a cut in the tables."""
    if cut is None:
        return "as without teams"
    return "teams " + " ".join(
        f"{letter}{getattr(cut, name)}" for letter, name in zip("wslphbr", MEASURED, strict=True)
    )


def compile_all(models: list[str], tokens: tuple[int, ...], device: torch.device, workers: int) -> None:
    """Fills the kernels' cache on disk, in processes."""
    capability = torch.cuda.get_device_capability(device)
    names = {
        cut.template("FLOAT16", place.back)
        for model in models for place in places(model) for bits in DIGITS_BITS for m in tokens
        for cut in cuts(*place.shape, bits, m, gpu_of(device))
    }  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        wait([pool.submit(compiler.compiled, name, capability, SOURCE) for name in sorted(names)])
    print(f"{len(names)} instances compiled", flush=True)


def tune(models: list[str], tokens: tuple[int, ...], device: torch.device, workers: int) -> Iterator[dict]:
    """A row for each cut: `layer_us` of a layer in a step, `best_team` where it is the fastest of its matrix
    and worth its place in the table."""
    compile_all(models, tokens, device, workers)
    for model, llama in _step_cuts.llamas(models, max(tokens)):
        for m in tokens:
            for bits in sorted(DIGITS_BITS, reverse=True):
                yield from _tune_step(llama, model, m, bits, device)


def _tune_step(
    llama: decode.RandomLlama, model: str, tokens: int, bits: int, device: torch.device
) -> Iterator[dict]:
    chosen: dict[tuple[int, int], TeamsCut | None] = {place.shape: None for place in places(model)}

    def cut_of(
        gpu_name: str, device: torch.device, rows: int, columns: int, bits: int, tokens: int
    ) -> TeamsCut | None:
        return chosen[rows, columns]

    with mock.patch.object(teams, "cut_of", cut_of):
        expected, before = _step_cuts._timed(llama, tokens, bits)
        first = before
        for place in places(model):
            found: list[tuple[float, TeamsCut, dict]] = []
            for cut in cuts(*place.shape, bits, tokens, gpu_of(device)):
                chosen[place.shape] = cut
                try:
                    logits, seconds = _step_cuts._timed(llama, tokens, bits)
                except RuntimeError as why:
                    print(f"{place.name} b={bits} M={tokens} {said(cut)}: {str(why)[:200]}", flush=True)
                    continue
                error = float((logits - expected).norm() / expected.norm())
                row = {
                    "shape": place.name, "n": place.rows, "k": place.columns, "bits": bits, "tokens": tokens,
                    "impl": said(cut), "cut": {name: getattr(cut, name) for name in MEASURED},
                    "layer_us": seconds * 1e6 / LAYERS, "without_us": before * 1e6 / LAYERS,
                    "error": error, "best_team": False,
                }  # fmt: skip
                if error < ERROR:
                    found.append((seconds, cut, row))
                yield row
            none: tuple[float, TeamsCut | None, dict] = (math.inf, None, {})
            seconds, kept, row = min(found, key=lambda one: one[0]) if found else none
            gains = seconds * GAIN <= before
            row["best_team"] = gains
            chosen[place.shape] = kept if gains else None
            slowest = max((us for us, _, _ in found), default=math.inf)
            print(
                f"{place.name:12} b={bits} M={tokens} {said(kept):32} {seconds * 1e6 / LAYERS:7.2f} us "
                f"a layer, without {before * 1e6 / LAYERS:7.2f}; {len(found)} cuts from "
                f"{slowest * 1e6 / LAYERS:.2f}; error {row.get('error', math.nan):.1e}",
                flush=True,
            )
            before = seconds if gains else before
        print(
            f"{model:12} b={bits} M={tokens}: {first * 1e6 / LAYERS:.2f} -> {before * 1e6 / LAYERS:.2f} us "
            "a layer",
            flush=True,
        )


def best(rows: list[dict]) -> dict[str, dict]:
    """The table's entries."""
    return {
        f"{r['n']}x{r['k']}x{r['bits']}x{8 * octets_of(r['tokens'])}": r["cut"]
        | {"layer_us": round(r["layer_us"], 2)}
        for r in rows
        if r.get("best_team")
    }
