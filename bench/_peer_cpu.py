"""`bench.decode --device cpu --peer llama.cpp` and `--profile`: forwards of the 1.1 B model alone, without
the engine.

The roof comes first: the read bandwidth of this run. Contenders take turns, readers of plain numbers among
them, so a disturbance hits all of them; figures are medians. A turn is a pause (the other's threads stop
spinning), a step that is not timed, and one that is.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from bench import _llama_cpp, _random_llama, _record
from pmpd import PMPDForCausalLM
from pmpd.decode.engine import Engine
from pmpd.decode.slots import Stretch, TokenPlaces
from pmpd.kernels import llama_step, native, pages

BITS = (4, 3, 2)
PROMPT, ROWS = 16, 8


@dataclass(frozen=True)
class PeerConfig:
    """What to measure."""

    threads: int = 2
    steps: int = 9
    """Steps of every contender that a median is taken over."""
    head_bits: Literal[16, 8] = 16
    prefill_tokens: int = 512
    """0: no prefill."""
    layers: int = 22
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu`: time of the calling thread, for one thread on a machine that others use."""
    kinds: tuple[str, ...] = ()
    """llama.cpp's formats; none: all."""
    batches: tuple[int, ...] = (1, ROWS)


PAUSE_SECONDS = 0.02
"""Before each turn: longer than libgomp's threads spin."""


READ_BYTES = 512 << 20


class Reader:
    """Reads READ_BYTES of huge pages once, as a step reads its weights: the roof."""

    def __init__(self, read: Callable[[torch.Tensor], object]) -> None:
        self.read = read

    @staticmethod
    @cache
    def numbers() -> torch.Tensor:
        """float32, READ_BYTES of them, for all readers."""
        return pages.zeros(READ_BYTES).view(torch.float32).fill_(1)

    def step(self, rows: int, position: int) -> None:
        """One pass; `rows` and `position` change nothing."""
        self.read(self.numbers())


READERS = {
    "reading: sum": Reader(torch.sum),
    "reading: dot": Reader(lambda numbers: torch.dot(numbers, numbers)),
    "reading: largest": Reader(torch.amax),
}


def read_bandwidth(clock: Callable[[], float]) -> float:
    """Bytes/s of the fastest reader, before anything else runs."""
    seconds = []
    for _ in range(7):
        for reader in READERS.values():
            start = clock()
            reader.step(1, 0)
            seconds.append(clock() - start)
    return READ_BYTES / min(seconds)


class Ours:
    """The forward of one engine at one precision."""

    def __init__(self, engine: Engine, bits: int) -> None:
        self.engine, self.bits = engine, bits

    def step(self, rows: int, position: int) -> None:
        """One token of each of `rows` rows."""
        where = torch.full((rows,), position)
        self.engine.state.set_uniform(self.bits)
        self.engine.forward(
            torch.arange(rows) + 5, TokenPlaces(torch.arange(rows), where, position + 1, rows), None
        )

    def prefill(self, tokens: int) -> None:
        """One prompt."""
        plan = TokenPlaces(
            torch.zeros(tokens, dtype=torch.int64),
            torch.arange(tokens),
            tokens,
            1,
            [Stretch(0, tokens, 0, 0)],
        )
        self.engine.state.set_uniform(self.bits)
        self.engine.forward(torch.arange(tokens) + 5, plan, torch.tensor([tokens - 1]))


class Theirs:
    """The same of llama.cpp."""

    def __init__(self, peer: _llama_cpp.Peer) -> None:
        self.peer = peer

    def step(self, rows: int, position: int) -> None:
        """One token of each of `rows` rows."""
        self.peer.forward([5 + row for row in range(rows)], list(range(rows)), [position] * rows, True)

    def prefill(self, tokens: int) -> None:
        """One prompt."""
        self.peer.clear()
        for first in range(0, tokens, 512):
            part = range(first, min(first + 512, tokens))
            self.peer.forward([5 + t for t in part], [0] * len(part), list(part), False)


def profile(
    engine: Engine,
    config: PeerConfig,
    bandwidth: float,
    step_bytes: Callable[[int], int],
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Where a step's time goes, as the first thread saw it."""
    assert engine.lean is not None
    assert engine.lean.native is not None
    rows = []
    for bits in BITS:
        ours = Ours(engine, bits)
        engine.lean.native.cpu_clock = config.clock == "cpu"
        times = engine.lean.native.times = torch.zeros(len(llama_step.PARTS), dtype=torch.int64)
        ours.step(1, PROMPT)
        times.zero_()
        start = clock()
        for turn in range(config.steps):
            ours.step(1, PROMPT + turn)
        wall = (clock() - start) / config.steps * 1e3
        parts = dict(zip(llama_step.PARTS, (times / 1e6 / config.steps).tolist(), strict=True))
        parts["python"] = wall - sum(parts.values())
        floor = step_bytes(bits) / bandwidth * 1e3
        rows.append({"bits": bits, "step_ms": wall, "roof_ms": floor, "parts_ms": parts})
        print(
            f"profile {bits} bits: step {wall:.2f} ms, roof {floor:.2f} ms; "
            + ", ".join(f"{name} {ms:.2f} ({100 * ms / wall:.0f} %)" for name, ms in parts.items()),
            flush=True,
        )
    engine.lean.native.times = None
    return rows


def measure(
    contenders: dict[str, Ours | Theirs | Reader], config: PeerConfig, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Medians of steps of 1 and of ROWS rows, and of a prefill."""
    rows = []
    for count in config.batches:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():
            if isinstance(contender, Theirs):
                contender.peer.clear()
            for position in range(PROMPT):  # keys and values to attend to
                contender.step(count, position)
        for turn in range(config.steps):
            for name, contender in contenders.items():
                time.sleep(PAUSE_SECONDS)
                contender.step(count, PROMPT + 2 * turn)
                start = clock()
                contender.step(count, PROMPT + 2 * turn + 1)
                seconds[name].append(clock() - start)
        rows += [row_of(name, f"step of {count}", some) for name, some in seconds.items()]
    if config.prefill_tokens:
        chosen = {
            name: contender
            for name, contender in contenders.items()
            if not isinstance(contender, Reader) and name.startswith(("pmpd 4", "llama.cpp Q4_"))
        }
        seconds = {name: [] for name in chosen}
        for _ in range(3):
            for name, contender in chosen.items():
                time.sleep(PAUSE_SECONDS)
                start = clock()
                contender.prefill(config.prefill_tokens)
                seconds[name].append(clock() - start)
        rows += [row_of(name, f"prefill of {config.prefill_tokens}", some) for name, some in seconds.items()]
    return rows


def row_of(name: str, what: str, seconds: list[float]) -> dict[str, Any]:
    row = {
        "name": name,
        "what": what,
        "median_ms": statistics.median(seconds) * 1e3,
        "best_ms": min(seconds) * 1e3,
    }
    print(f"{what:>14} {name:>20}: {row['median_ms']:9.2f} ms (best {row['best_ms']:.2f})", flush=True)
    return row


def check_bars(rows: list[dict[str, Any]], floors: dict[int, float], prefill: int) -> list[dict[str, Any]]:
    """What was promised, and what came out (ratios of medians)."""
    at = {(row["name"], row["what"]): row["median_ms"] for row in rows}
    bars = []

    def add(bar: str, measured: float, least: float) -> None:
        bars.append({"bar": f"{bar}, at least {least:g}", "measured": measured, "met": measured >= least})

    def theirs(bits: int, what: str) -> float | None:
        starts = tuple(f"llama.cpp {kind}" for kind in _llama_cpp.MIXES[bits])
        found = [ms for (name, of), ms in at.items() if of == what and name.startswith(starts)]
        return min(found, default=None)

    for bits in BITS:
        for count, least in ((1, 1.15), (ROWS, 1.0)):
            best = theirs(bits, f"step of {count}")
            if best is not None:
                add(
                    f"{bits} bits, {count} rows: times as fast as llama.cpp's best",
                    best / at[f"pmpd {bits}", f"step of {count}"],
                    least,
                )
    if ("pmpd 4", "step of 1") in at:
        add("2 bits, times as fast as 4", at["pmpd 4", "step of 1"] / at["pmpd 2", "step of 1"], 1.7)
        add("4 bits: part of the roof", floors[4] / at["pmpd 4", "step of 1"], 0.7)
    what = f"prefill of {prefill}"
    best = theirs(4, what)
    if best is not None and ("pmpd 4", what) in at:
        add(f"{what}: times as fast as llama.cpp's best", best / at["pmpd 4", what], 0.8)
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']:.2f}")
    return bars


def write_models(folder: Path, config: PeerConfig, peer: bool) -> dict[str, Path]:
    """Our model and llama.cpp's, by its name; what is there already stays."""
    shape = shape_of(config)
    if not (folder / "quantized").exists():
        _random_llama.write(folder / "quantized.part", shape, BITS)
        (folder / "quantized.part").rename(folder / "quantized")
    found = {}
    kinds = [kind for kinds in _llama_cpp.MIXES.values() for kind in kinds]
    for kind in config.kinds or kinds if peer else ():
        for head in _llama_cpp.HEADS[config.head_bits]:
            found[f"llama.cpp {kind}, head {head}"] = path = folder / f"{kind}-{head}.gguf"
            if not path.exists():
                _llama_cpp.write(path.with_suffix(".part"), shape, kind, head)
                path.with_suffix(".part").rename(path)
    return found


def shape_of(config: PeerConfig) -> _random_llama.Shape:
    return replace(_random_llama.LLAMA_1B, num_hidden_layers=config.layers)


def main(
    config: PeerConfig,
    peer: bool,
    show_profile: bool,
    output: Path = _record.RESULTS,
    folder: Path | None = None,
    prepare: bool = False,
) -> None:
    """`folder`: of the models, which are kept there; None: a temporary one. `prepare`: only write them."""
    problem = _llama_cpp.missing() if peer else "not asked for"
    with tempfile.TemporaryDirectory(prefix="pmpd-peer-") as temporary:
        models = folder or Path(temporary)
        paths = write_models(models, config, problem is None)
        if not prepare:
            measure_all(config, models / "quantized", paths, problem, show_profile, output)


def measure_all(
    config: PeerConfig,
    quantized: Path,
    paths: dict[str, Path],
    problem: str | None,
    show_profile: bool,
    output: Path,
) -> None:
    if config.clock == "cpu" and config.threads > 1:
        raise ValueError("--clock cpu counts the calling thread only: add --threads 1")
    torch.set_num_threads(config.threads)
    clock = time.thread_time if config.clock == "cpu" else time.perf_counter
    bandwidth = read_bandwidth(clock)
    shape = shape_of(config)
    saved = shape.vocab_size * shape.hidden_size * (2 if config.head_bits == 16 else 1)

    def step_bytes(bits: int) -> int:
        return shape.step_bytes(bits) - shape.vocab_size * shape.hidden_size * 2 + saved

    floors = {bits: step_bytes(bits) / bandwidth * 1e3 for bits in BITS}
    load = os.getloadavg()[0]
    print(f"{_record.hardware()}; {native.describe()}; load {load:.1f}")
    print(
        f"roof: {bandwidth / 1e9:.1f} GB/s read; a step reads at least "
        + ", ".join(f"{step_bytes(b) / 2**20:.0f} MiB in {floors[b]:.1f} ms at {b} bits" for b in BITS),
        flush=True,
    )
    model = PMPDForCausalLM(quantized, dtype=torch.bfloat16, head_bits=config.head_bits).eval()
    length = max(config.prefill_tokens, PROMPT + 2 * config.steps) + 1
    engine = Engine(model.model, ROWS, length)
    profiles = profile(engine, config, bandwidth, step_bytes, clock) if show_profile else []
    contenders: dict[str, Ours | Theirs | Reader] = {f"pmpd {bits}": Ours(engine, bits) for bits in BITS}
    contenders |= READERS
    print(f"llama.cpp: {problem or _llama_cpp.build()}", flush=True)
    for name, path in paths.items():
        contenders[name] = Theirs(_llama_cpp.Peer(path, config.threads, ROWS, length))
    with torch.inference_mode():
        rows = measure(contenders, config, clock)
    read = [row["median_ms"] for row in rows if row["name"] in READERS and row["what"] == "step of 1"]
    if read:  # they took turns with the steps
        bandwidth = READ_BYTES / min(read) * 1e3
        floors = {bits: step_bytes(bits) / bandwidth * 1e3 for bits in BITS}
    bars = check_bars(rows, floors, config.prefill_tokens)
    result = {
        **vars(config), "kernel": native.LEVELS[native.active_level()],
        "load": [load, os.getloadavg()[0]], "read_gb_per_s": bandwidth / 1e9, "roof_ms": floors,
        "peer": problem or _llama_cpp.build(),
        "profile": profiles, "rows": rows, "bars": bars,
    }  # fmt: skip
    print(_record.write(f"decode_cpu_peer_head{config.head_bits}", result, folder=output))
