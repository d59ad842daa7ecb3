"""`bench.decode --device cpu --peer llama.cpp` and `--profile`: forwards of the 1.1 B model alone, without
the engine.

The roof comes first: the read bandwidth of this run. Contenders take turns, step by step, so a disturbance
hits all of them; figures are medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import _llama_cpp, _random_llama, _record
from pmpd import PMPDForCausalLM
from pmpd.decode.engine import Engine
from pmpd.decode.slots import Stretch, TokenPlaces
from pmpd.kernels import llama_step, native

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


def read_bandwidth(clock: Callable[[], float], threads: int) -> float:
    """Bytes/s that a product of one row reads: a dense float32 matrix of 256 MiB times a vector; the best of
    some."""
    matrix, x = torch.ones(1 << 15, 1 << 11), torch.ones(1 << 11)
    seconds = []
    for _ in range(9):
        start = clock()
        torch.mv(matrix, x)
        seconds.append(clock() - start)
    return matrix.nbytes / min(seconds)


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
    contenders: dict[str, Ours | Theirs], config: PeerConfig, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Medians of steps of 1 and of ROWS rows, and of a prefill."""
    rows = []
    for count in (1, ROWS):
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():
            if isinstance(contender, Theirs):
                contender.peer.clear()
            for position in range(PROMPT):  # keys and values to attend to
                contender.step(count, position)
        for turn in range(config.steps):
            for name, contender in contenders.items():
                start = clock()
                contender.step(count, PROMPT + turn)
                seconds[name].append(clock() - start)
        rows += [row_of(name, f"step of {count}", some) for name, some in seconds.items()]
    if config.prefill_tokens:
        for name, contender in contenders.items():
            if not name.endswith((" 4", "Q4_K", "Q4_0")):
                continue
            seconds[name] = []
            for _ in range(2):
                start = clock()
                contender.prefill(config.prefill_tokens)
                seconds[name].append(clock() - start)
            rows.append(row_of(name, f"prefill of {config.prefill_tokens}", seconds[name]))
    return rows


def row_of(name: str, what: str, seconds: list[float]) -> dict[str, Any]:
    row = {
        "name": name,
        "what": what,
        "median_ms": statistics.median(seconds) * 1e3,
        "best_ms": min(seconds) * 1e3,
    }
    print(f"{what:>14} {name:>15}: {row['median_ms']:9.2f} ms (best {row['best_ms']:.2f})", flush=True)
    return row


def check_bars(rows: list[dict[str, Any]], floors: dict[int, float], prefill: int) -> list[dict[str, Any]]:
    """What was promised, and what came out (ratios of medians)."""
    at = {(row["name"], row["what"]): row["median_ms"] for row in rows}
    bars = []

    def add(bar: str, measured: float, least: float) -> None:
        bars.append({"bar": f"{bar}, at least {least:g}", "measured": measured, "met": measured >= least})

    def theirs(bits: int, what: str) -> float | None:
        found = [
            at[f"llama.cpp {kind}", what]
            for kind in _llama_cpp.MIXES[bits]
            if (f"llama.cpp {kind}", what) in at
        ]
        return min(found, default=None)

    for bits in BITS:
        for count, least in ((1, 1.15), (ROWS, 1.0)):
            best = theirs(bits, f"step of {count}")
            if best is not None:
                add(
                    f"{bits} bits, {count} rows: times llama.cpp's best",
                    best / at[f"pmpd {bits}", f"step of {count}"],
                    least,
                )
    add("2 bits, times 4 bits", at["pmpd 4", "step of 1"] / at["pmpd 2", "step of 1"], 1.7)
    add("4 bits: part of the roof", floors[4] / at["pmpd 4", "step of 1"], 0.7)
    what = f"prefill of {prefill}"
    best = theirs(4, what)
    if best is not None and ("pmpd 4", what) in at:
        add(f"{what}: times llama.cpp's best", best / at["pmpd 4", what], 0.8)
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']:.2f}")
    return bars


def main(config: PeerConfig, peer: bool, show_profile: bool, output: Path = _record.RESULTS) -> None:
    if config.clock == "cpu" and config.threads > 1:
        raise ValueError("--clock cpu counts the calling thread only: add --threads 1")
    torch.set_num_threads(config.threads)
    clock = time.thread_time if config.clock == "cpu" else time.perf_counter
    bandwidth = read_bandwidth(clock, config.threads)
    shape = _random_llama.Shape(**{**vars(_random_llama.LLAMA_1B), "num_hidden_layers": config.layers})
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
    with tempfile.TemporaryDirectory(prefix="pmpd-peer-") as name:
        folder = Path(name)
        _random_llama.write(folder / "quantized", shape, BITS)
        model = PMPDForCausalLM(folder / "quantized", dtype=torch.bfloat16, head_bits=config.head_bits).eval()
        length = max(config.prefill_tokens, PROMPT + config.steps) + 1
        engine = Engine(model.model, ROWS, length)
        profiles = profile(engine, config, bandwidth, step_bytes, clock) if show_profile else []
        contenders: dict[str, Ours | Theirs] = {f"pmpd {bits}": Ours(engine, bits) for bits in BITS}
        problem = _llama_cpp.missing() if peer else "not asked for"
        if problem:
            print(f"llama.cpp: {problem}")
        else:
            for kind in (kind for kinds in _llama_cpp.MIXES.values() for kind in kinds):
                path = folder / f"{kind}.gguf"
                _llama_cpp.write(path, shape, kind, _llama_cpp.HEADS[config.head_bits])
                contenders[f"llama.cpp {kind}"] = Theirs(_llama_cpp.Peer(path, config.threads, ROWS, length))
        with torch.inference_mode():
            rows = measure(contenders, config, clock)
    bars = check_bars(rows, floors, config.prefill_tokens)
    result = {
        **vars(config), "kernel": native.LEVELS[native.active_level()],
        "load": [load, os.getloadavg()[0]], "read_gb_per_s": bandwidth / 1e9, "roof_ms": floors,
        "peer": problem or "llama.cpp",
        "profile": profiles, "rows": rows, "bars": bars,
    }  # fmt: skip
    print(_record.write(f"decode_cpu_peer_head{config.head_bits}", result, folder=output))
