"""Kernels on a CUDA device: correctness, then microseconds and GB/s against the copy bandwidth of the same
run.

`python -m bench.linear --device cuda` runs it. Weights rotate over several matrices so that they come from
memory, not from the second-level cache; times are those of CUDA-graph replays, launch gaps between the
kernels of one multiplication included.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import _bars, _clusters, _read_roof, _record, _step_cuts, _team_cuts, _timing
from bench._contenders import (
    ROTATE_BYTES,
    clones,
    contenders,
    random_weights,
    taken,
    variants,
)
from bench._peers import humming, humming_version, peers
from bench._timing import Refused, relative_error
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.cuda import compiler
from pmpd.kernels.cuda.cut import MOST_TOKENS, Cut
from pmpd.kernels.cuda.halves import SOURCE, HalvesCut
from pmpd.kernels.cuda.launch import gpu_of
from pmpd.kernels.cuda.matrix import CudaMatrix, cut_of, unavailable
from pmpd.kernels.reference import CacheBudget, ReferenceMatrix
from pmpd.kernels.step_attention import StepAttention
from pmpd.kernels.triton import (
    DIGITS_BITS,
    FUSED_TOKENS,
    ROUTES,
    GPTQMatrix,
    TritonMatrix,
    settings_file,
)

SHAPES = {  # name: (out_features, in_features)
    "8b.qkv": (6144, 4096), "8b.o": (4096, 4096), "8b.gate_up": (28672, 4096), "14336x4096": (14336, 4096),
    "8b.down": (4096, 14336),
    "1.1b.qkv": (2560, 2048), "1.1b.gate_up": (11264, 2048), "1.1b.down": (2048, 5632),
}  # fmt: skip
WIDE = SHAPES["14336x4096"]
WIDE_BITS = (5, 6, 7, 8)
WIDE_WARPS = (4, 8, 16)
BYTES_WARPS = (2, 4, 8, 16)

HUMMING_TOKENS = (1, 8, 32)

READING = "reading alone"
"""The roof of a product's launch, in the tables."""


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read plus written, of a 4 GB device-to-device copy by a kernel (a graph's copy node may take
    the slower copy engine)."""
    source = torch.empty(1 << 30, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.bitwise_not(source, out=target)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(seconds[2:])


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of a sum over 4 GB, which only reads: the roof of a multiplication."""
    source = torch.ones(1 << 30, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        source.sum()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return source.nbytes / statistics.median(seconds[2:])


def median_seconds(calls: list[Callable[[], object]], repeats: int = 15, rounds: int = 1) -> float:
    """Seconds of one call: all of `calls`, `rounds` times, captured in one CUDA graph; median over
    replays. For what is no product: `_timing.seconds_of` checks more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    seconds = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:]) / (len(calls) * rounds)


def usable(device: torch.device) -> bool:
    """Whether `CudaMatrix` runs there."""
    return unavailable(device, torch.float16) is None


def compile_one(job: tuple[int, int, int, str, int]) -> None:
    """In a process of its own: fills Triton's cache on disk."""
    columns, bits, tokens, route, warps = job
    device = torch.device("cuda")
    packed = random_weights(64, columns, DIGITS_BITS if bits in DIGITS_BITS else (bits,), 0, device)
    as_timed = CudaMatrix if bits not in DIGITS_BITS and usable(device) else TritonMatrix
    matrix = as_timed(packed, torch.float16)
    matrix.multiply(torch.randn(tokens, columns, device=device).half(), bits, route, warps)
    torch.cuda.synchronize()


def random_gptq(rows: int, columns: int, bits: int, copies: int, device: torch.device) -> list[GPTQMatrix]:
    """Copies of one matrix with groups of 128."""
    groups = columns // 128

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int32)

    codes, zeros = words(columns * bits // 32, rows), words(groups, rows * bits // 32)
    scales = (0.001 + 0.01 * torch.rand(groups, rows, device=device)).half()
    return [GPTQMatrix(codes, zeros, scales, None, bits, 1, torch.float16) for _ in range(copies)]


def compile_gptq(tokens: int, warps: int) -> None:
    """As `compile_one`, of 8 bits."""
    device = torch.device("cuda")
    matrix = random_gptq(64, WIDE[1], 8, 1, device)[0]
    matrix.multiply(torch.randn(tokens, WIDE[1], device=device).half(), "halves", warps)
    torch.cuda.synchronize()


def compile_plan(instance: str, capability: tuple[int, int], source: str) -> None:
    """In a process of its own: fills the CUDA kernels' cache on disk."""
    compiler.compiled(instance, capability, source)


def compile_cuts(pool: ProcessPoolExecutor, cuts: Iterable[Cut | HalvesCut]) -> list[Future]:
    capability = torch.cuda.get_device_capability()
    instances = {
        (cut.template("FLOAT16"), compiler.SOURCE if isinstance(cut, Cut) else SOURCE) for cut in cuts
    }
    return [pool.submit(compile_plan, name, capability, source) for name, source in instances]


def check_one(job: tuple[int, int, torch.dtype, float, int]) -> dict:
    """Every route and M at one b against the definition in float64, on fresh random inputs with an
    outlier."""
    n, k, dtype, limit, bits = job
    device = torch.device("cuda")
    packed = random_weights(n, k, (2, 3, 4, 5, 6, 7, 8), 7 * bits, device)
    matrix, weight = (
        TritonMatrix(packed, dtype),
        ReferenceMatrix(packed, torch.float32, CacheBudget(0)).dequantize(bits),
    )
    same = torch.equal(matrix.dequantize(bits).float(), weight.to(dtype).float())
    worst: dict[str, float] = {}
    for tokens in (1, 2, 3, 8, 16, 33, 64):
        x = torch.randn(tokens, k, device=device).to(dtype)
        x[:, 5] *= 100
        expected = x.double() @ weight.double().T
        for route in ROUTES:
            if route == "digits" and bits not in DIGITS_BITS:
                continue
            error = relative_error(matrix.multiply(x, bits, route), expected)
            worst[route] = max(worst.get(route, 0.0), error if error == error else float("inf"))
    passed = same and all(error < limit for error in worst.values())
    return {"check": f"{n}x{k} {dtype} b={bits}", "dequantize_exact": same, "worst": worst, "passed": passed}


def prepare(
    shapes: list[tuple[int, int]], tokens: list[int], workers: int, wide: bool, check: tuple[int, ...]
) -> list[dict]:
    """In many processes: compiles what will be timed (into Triton's cache on disk; `wide`: by `time_wide`
    too), and checks results at the precisions `check`. Returns the checks."""
    started = time.perf_counter()
    jobs = {  # one kernel serves several numbers of tokens
        (k, b, 1 if route == "digits" else min(32, max(8, m)), route, w)
        for _, k in shapes for b in DIGITS_BITS for m in tokens for route, w in variants(k, m)
    }  # fmt: skip
    if wide:
        jobs |= {(WIDE[1], b, m, "halves", w) for b in WIDE_BITS for m in (8, 32) for w in WIDE_WARPS}
    checks = [
        (n, k, dtype, limit, bits)
        for n, k in ((4096, 4096), (1000, 2912))
        for dtype, limit in ((torch.float16, 1.5e-3), (torch.bfloat16, 8e-3))
        for bits in check
    ]
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        checking = [pool.submit(check_one, job) for job in checks]
        compiling = [pool.submit(compile_one, job) for job in sorted(jobs, key=lambda job: -job[2])]
        compiling += [pool.submit(compile_gptq, tokens, w) for tokens in (8, 32) for w in BYTES_WARPS]
        device = torch.device("cuda")
        if usable(device):
            shaped = [
                (n, k, (b,) * m) for n, k in shapes for b in DIGITS_BITS for m in tokens if m <= MOST_TOKENS
            ]
            chosen = [cut_of(_record.hardware("cuda"), device, *job) for job in shaped]
            compiling += compile_cuts(pool, [cut for cut in chosen if cut is not None])
        for job, future in zip(checks, checking, strict=True):
            try:
                rows.append(future.result())
            except Exception as error:
                rows.append(
                    {
                        "check": str(job),
                        "passed": False,
                        "error": f"{type(error).__name__}: {str(error)[:1500]}",
                    }
                )
            worst = {route: f"{error:.1e}" for route, error in rows[-1].get("worst", {}).items()}
            print(
                f"{'ok  ' if rows[-1]['passed'] else 'FAIL'} {rows[-1]['check']}: {worst} "
                f"{rows[-1].get('error', '')}",
                flush=True,
            )
        failures = [str(future.exception())[:1500] for future in compiling if future.exception() is not None]
    print(
        f"{len(compiling)} variants compiled, {len(failures)} failed, {time.perf_counter() - started:.0f} s "
        f"{failures[:1]}",
        flush=True,
    )
    return rows


def time_kernels(
    device: torch.device, bandwidth: float, shapes: dict[str, tuple[int, int]], tokens_of: Sequence[int],
    swept: Sequence[int],
) -> Iterator[dict]:  # fmt: skip
    """A row for each kernel that can be believed (`_timing`), and for each that can't one that says why.
    Every route for the numbers of tokens in `swept`, for the others what the product takes and the peer's."""
    for name, (n, k) in shapes.items():
        packed = random_weights(n, k, DIGITS_BITS, 1, device)
        plain = CudaMatrix(packed, torch.float16) if usable(device) else None
        matrices = TritonMatrix(packed, torch.float16), plain
        inputs = {tokens: torch.randn(tokens, k, device=device).half() for tokens in tokens_of}
        dense = torch.randn(n, k, device=device).half()
        copies = [dense, *(dense.clone() for _ in range(min(12, int(ROTATE_BYTES / dense.nbytes))))]
        for tokens, x in inputs.items():
            calls: list[_timing.Call] = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in copies]
            expected = x.double() @ dense.double().T
            yield timed_row(name, n, k, 16, tokens, "torch", calls, expected, dense.nbytes, bandwidth)
        del copies, dense
        seen: dict[tuple[int, str], dict[float, float]] = {}
        for bits in sorted(DIGITS_BITS, reverse=True):
            yield time_reading(name, n, k, bits, packed, bandwidth)
            for tokens, x in inputs.items():
                moved, expected = moved_bytes(n, k, bits, tokens), exact_product(packed, x, bits)
                of_product = None if plain is None else taken(plain, tokens, bits)
                for impl, calls in contenders(name, packed, *matrices, x, bits, tokens in swept):
                    theirs = impl == "any-precision"
                    queued = theirs and not _timing.holds(calls[0])
                    found = timed_row(
                        name, n, k, bits, tokens, impl, calls, expected, moved, bandwidth,
                        machine=_timing.Queued() if queued else None,
                    )  # fmt: skip
                    if theirs:
                        found["launches"] = (
                            "default stream, in a queue" if queued else "current stream, in a graph"
                        )
                    if impl == of_product:
                        found["taken"] = True
                    if "us" in found:
                        seen.setdefault((tokens, impl), {})[moved] = found["us"] / 1e6
                    yield found
            if humming_version():
                served = {tokens: x for tokens, x in inputs.items() if tokens in HUMMING_TOKENS}
                yield from time_humming(name, n, k, bits, served, device, bandwidth)
        if n * k >= 14336 * 4096:  # smaller matrices may be bound by the launch
            for (tokens, impl), of in seen.items():
                try:
                    _timing.check_growth(of, bandwidth)
                except Refused as why:
                    yield refused(name, 0, tokens, impl, why)
        torch.cuda.empty_cache()


def time_reading(name: str, n: int, k: int, bits: int, packed: PackedWeights, bandwidth: float) -> dict:
    """A row of a launch that reads as many bytes of codes, and does nothing with them."""
    planes = packed.planes[:bits]
    copies = [planes, *(planes.clone() for _ in range(min(47, int(ROTATE_BYTES / planes.nbytes))))]
    calls, expected = _read_roof.calls(copies)
    return timed_row(name, n, k, bits, 1, READING, calls, expected, planes.nbytes, bandwidth, 1e-12)


def time_humming(
    name: str, n: int, k: int, bits: int, inputs: dict[int, torch.Tensor], device: torch.device,
    bandwidth: float,
) -> Iterator[dict]:  # fmt: skip
    """A row for each number of tokens. It is another project's: what fails there ends no run of ours."""
    copies = max(2, min(48, int(ROTATE_BYTES / (n * k * bits / 8))))
    layers: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for tokens, x in inputs.items():
        try:
            if not layers:
                layers, weight = humming(n, k, bits, copies, device)
            layers[0](x)  # compiles
        except Exception as why:
            yield refused(name, bits, tokens, "humming", why)
            continue
        calls: list[_timing.Call] = [lambda layer=layer, x=x: layer(x) for layer in layers]
        expected, moved = x.double() @ weight.double().T, moved_bytes(n, k, bits, tokens)
        yield timed_row(name, n, k, bits, tokens, "humming", calls, expected, moved, bandwidth, 0.5)


def time_clusters(
    device: torch.device, bandwidth: float, shapes: dict[str, tuple[int, int]], workers: int
) -> Iterator[dict]:
    """A row for each cut of `halves.cu` worth timing, where the GPU has clusters."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    jobs = [
        (name, n, k, bits, tokens, _clusters.cuts(k, bits, tokens, gpu_of(device)))
        for name, (n, k) in shapes.items() for bits in sorted(DIGITS_BITS, reverse=True)
        for tokens in _clusters.TOKENS
    ]  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        wait(compile_cuts(pool, [cut for job in jobs for cut in job[-1]]))
    for name, n, k, bits, tokens, of in jobs:
        packed = random_weights(n, k, DIGITS_BITS, 1, device)
        x = torch.randn(tokens, k, device=device).half()
        expected, moved = exact_product(packed, x, bits), moved_bytes(n, k, bits, tokens)
        copies = clones(CudaMatrix(packed, torch.float16), n * k * bits / 8)
        for cut in of:
            calls = _clusters.calls(copies, x, cut)
            yield timed_row(name, n, k, bits, tokens, _clusters.said(cut), calls, expected, moved, bandwidth)


def exact_product(packed: PackedWeights, x: torch.Tensor, bits: int) -> torch.Tensor:
    """In float64."""
    return x.double() @ ReferenceMatrix(packed, torch.float32, CacheBudget(0)).dequantize(bits).double().T


def moved_bytes(n: int, k: int, bits: int, tokens: int) -> float:
    """What one multiplication reads and writes."""
    return n * k * bits / 8 + n * (8 + 2 ** (bits + 1)) + 2 * tokens * (n + k)


def timed_row(
    name: str, n: int, k: int, bits: int, tokens: int, impl: str,
    calls: list[Callable[[], torch.Tensor]], expected: torch.Tensor, moved: float, bandwidth: float,
    limit: float = 2e-3, machine: _timing.Machine | None = None,
) -> dict:  # fmt: skip
    """`row`, or the reason why the figure is refused."""
    try:
        seconds, error = _timing.seconds_of(calls, expected, limit, machine, repeats=9)
        _timing.check_bandwidth(seconds, moved, bandwidth)
    except (Refused, RuntimeError, ValueError) as why:
        return refused(name, bits, tokens, impl, why)
    return row(name, n, k, bits, tokens, impl, seconds, moved, bandwidth) | {"error": error}


def row(
    name: str,
    n: int,
    k: int,
    bits: int,
    tokens: int,
    impl: str,
    seconds: float,
    moved: float,
    bandwidth: float,
) -> dict:
    result = {
        "shape": name, "n": n, "k": k, "bits": bits, "tokens": tokens, "impl": impl, "us": seconds * 1e6,
        "bytes": moved,
        "gb_s": moved / seconds / 1e9, "of_copy": moved / seconds / bandwidth,
    }  # fmt: skip
    print(
        f"{name:12} b={bits:<2} M={tokens:<4} {impl:14} {result['us']:8.2f} us {result['gb_s']:7.0f} GB/s "
        f"{100 * result['of_copy']:5.1f} %",
        flush=True,
    )
    return result


def refused(name: str, bits: int, tokens: int, impl: str, why: Exception) -> dict:
    said = str(why) if isinstance(why, Refused) else f"{type(why).__name__}: {str(why)[:500]}"
    print(f"{name:12} b={bits:<2} M={tokens:<4} {impl:14} REFUSED: {said}", flush=True)
    return {"shape": name, "bits": bits, "tokens": tokens, "impl": impl, "refused": said}


def time_attention(device: torch.device, bandwidth: float) -> Iterator[dict]:
    """8B: 32 query, 8 KV heads, D = 128: rotation, cache write and attention in one launch, against PyTorch's
    attention alone over the same slots with a mask."""
    for batch, length in ((1, 1024), (8, 1024), (32, 1024)):

        def cache(shape: tuple[int, ...] = (batch, 8, 2048, 128)) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.float16)

        caches = [(cache(), cache()) for _ in range(max(2, 64 // batch))]
        qkv = torch.randn(batch, 48 * 128, device=device, dtype=torch.float16)
        q = qkv[:, : 32 * 128].view(batch, 32, 1, 128)
        slots = torch.arange(batch, device=device)
        positions = torch.full((batch,), length - 1, device=device)
        mask = (torch.arange(2048, device=device) < length)[None, None, None].expand(batch, 1, 1, -1)
        moved = 2 * 2 * batch * 8 * length * 128
        attend = StepAttention(torch.zeros(64, device=device), 32, 8, 128)  # turns by nothing, as the peer
        found = attend(qkv, *caches[0], slots, positions, 2048)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, *caches[0], attn_mask=mask, enable_gqa=True
        )
        error = relative_error(found, expected[:, :, 0].flatten(1))
        seconds = median_seconds(
            [lambda c=c, x=qkv, s=slots, n=positions, a=attend: a(x, *c, s, n, 2048) for c in caches]
        )
        yield row(f"attn B={batch}", 32, length, 16, batch, "triton", seconds, moved, bandwidth) | {
            "error": error
        }
        peer = median_seconds(
            [
                lambda c=c, q=q, mask=mask: torch.nn.functional.scaled_dot_product_attention(
                    q, *c, attn_mask=mask, enable_gqa=True
                )
                for c in caches
            ]
        )
        yield row(f"attn B={batch}", 32, length, 16, batch, "torch", peer, moved, bandwidth)
        print(f"     attention error {error:.1e}", flush=True)


def time_gptq(device: torch.device, bandwidth: float, widths: Sequence[int] = (2, 3, 4, 8)) -> Iterator[dict]:
    """At 8 bits also other numbers of warps, as `bytes`."""
    n, k = WIDE
    for bits in widths:
        matrices = random_gptq(n, k, bits, max(3, int(2e8 / (n * k * bits / 8))), device)
        routes: list[tuple[str, str, int | None]] = [
            (route, route, None) for route in ("halves", "fused", "dense")
        ]
        if bits == 8:
            routes += [(f"bytes w{warps}", "halves", warps) for warps in BYTES_WARPS]
        for tokens in (1, 8, 32, 64):
            x = torch.randn(tokens, k, device=device).half()
            exact = x.double() @ matrices[0].dequantize().double().T
            for impl, route, warps in routes:
                calls: list[_timing.Call] = [
                    lambda m=m, x=x, r=route, w=warps: m.multiply(x, r, w) for m in matrices
                ]
                yield timed_row("gptq", n, k, bits, tokens, impl, calls, exact, n * k * bits / 8, bandwidth)


def time_wide(device: torch.device, bandwidth: float) -> Iterator[dict]:
    """5 to 8 bits: what is taken for so few tokens, `halves` with each number of warps, and dequantizing."""
    n, k = WIDE
    packed = random_weights(n, k, WIDE_BITS, 1, device)
    matrix = (CudaMatrix if usable(device) else TritonMatrix)(packed, torch.float16)
    matrices = clones(matrix, n * k)
    for bits in packed.tables:
        for tokens in (1, 2, 8, 32, 64):
            x = torch.randn(tokens, k, device=device).half()
            expected, moved = exact_product(packed, x, bits), moved_bytes(n, k, bits, tokens)
            routes: list[tuple[str, int | None]] = [("halves", warps) for warps in WIDE_WARPS]
            routes += [(route, None) for route in dict.fromkeys((matrix.route(tokens, bits), "dense"))]
            for route, warps in routes:
                calls: list[_timing.Call] = [
                    lambda m=m, r=route, w=warps, x=x, b=bits: m.multiply(x, b, r, w) for m in matrices
                ]
                impl = route if warps is None else f"{route} w{warps}"
                yield timed_row("14336x4096", n, k, bits, tokens, impl, calls, expected, moved, bandwidth)


def dense_from(rows: list[dict]) -> dict[str, dict[str, int]]:
    """For 5 to 8 bits: from which number of tokens on dequantizing was faster than all else, at that and at
    every larger number that was timed; as `triton.dense_from` reads it."""
    best: dict[str, dict[str, int]] = {}
    for bits in WIDE_BITS:
        times: dict[int, dict[bool, float]] = {}
        for r in (r for r in rows if "us" in r and r["bits"] == bits and r["shape"] != "gptq"):
            of = times.setdefault(r["tokens"], {})
            dense = r["impl"] == "dense"
            of[dense] = min(of.get(dense, math.inf), r["us"])
        first = FUSED_TOKENS + 1
        for tokens, of in sorted(times.items(), reverse=True):
            if of.get(True, math.inf) >= of.get(False, 0.0):
                break
            first = tokens
        if times:
            best[str(bits)] = {"from": first}
    return best


def best_settings(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """The autotune table: for each route, shape, b and number of tokens the warps that were fastest, the best
    cuts of `bits.cu`, and from where on dequantizing is."""
    table: dict[str, dict[str, dict]] = {
        "digits": {}, "halves": {}, "bytes": {}, "bits": _step_cuts.best(rows), "dense": dense_from(rows)
    }  # fmt: skip
    for r in rows:
        if "us" not in r:
            continue
        route, _, warps = r["impl"].partition(" w")
        key = f"{r['n']}x{r['k']}x{r['bits']}x{r['tokens']}"
        if route in table and warps.isdigit() and r["us"] < table[route].get(key, {"us": math.inf})["us"]:
            table[route][key] = {"warps": int(warps), "us": round(r["us"], 2)}
    return table


def write_settings(gpu: str, best: dict[str, dict[str, dict]], rows: list[dict]) -> None:
    """Adds to the autotune table of this GPU: `best_settings` of `rows`, their cuts of `halves.cu`, and with
    which commit they were measured."""
    path = settings_file(gpu)
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    table = known | {"gpu": gpu} | {route: {**known.get(route, {}), **best[route]} for route in best}
    found = best | {"clusters": _clusters.best(rows, table["halves"]), "teams": _team_cuts.best(rows)}
    for route in ("clusters", "teams"):
        table[route] = table.get(route, {}) | found[route]
    measured = {route: _record.commit() for route, entries in found.items() if entries}
    table["commits"] = table.get("commits", {}) | measured
    path.write_text(json.dumps(table, indent=1) + "\n")


def print_table(rows: list[dict], shapes: dict[str, tuple[int, int]], tokens_of: Sequence[int]) -> None:
    print(
        f"\n{'shape':12} {'b':>2} {'M':>3} {'best':14} {'us':>8} {'% copy':>7} {'fp16 us':>8} {'speed-up':>8}"
    )
    for name, bits, tokens in (
        (name, bits, tokens) for name in shapes for bits in (4, 3, 2) for tokens in tokens_of
    ):
        timed = [r for r in rows if "us" in r and (r["shape"], r["tokens"]) == (name, tokens)]
        at = [r for r in timed if r["bits"] in (bits, 16)]
        mine = [r for r in at if r["impl"].startswith(_bars.OURS)]
        peers_at = {r["impl"]: f"{r['us']:.2f}" for r in at if r["impl"] in ("any-precision", "humming")}
        for peer in (r for r in at if r["impl"] == "torch" and mine):
            best = min(mine, key=lambda r: r["us"])
            print(
                f"{name:12} {bits:>2} {tokens:>3} {best['impl']:14} {best['us']:8.2f} "
                f"{100 * best['of_copy']:7.1f} {peer['us']:8.2f} "
                f"{peer['us'] / best['us']:8.2f} {peers_at or ''}"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_record.RESULTS, help="folder of the JSON")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two shapes, M = 1, 8, 32; of M = 2, 4 only what the product takes, and Any-Precision's kernel",
    )
    parser.add_argument(
        "--wide", action="store_true", help="8-bit GPTQ and 5 to 8 bits, and nothing else: about a minute"
    )
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--tune", action="store_true", help="cuts of the CUDA kernels, and nothing else")
    parser.add_argument("--models", nargs="+", default=["8B", "1.1B"], help="with --tune: whose steps")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2], help="with --tune: rows of a step")
    parser.add_argument(
        "--teams", action="store_true", help="with --tune: of teams_product, for 3 to 32 rows"
    )
    parser.add_argument("--clusters", action="store_true", help="with --tune: cuts of halves.cu too")
    parser.add_argument("--write-settings", action="store_true", help="write the autotune table of this GPU")
    options = parser.parse_args(arguments)
    _record.need_cuda()
    device = torch.device("cuda")
    shapes = {name: SHAPES[name] for name in ("8b.o", "14336x4096")} if options.quick else SHAPES
    tokens = (1, 2, 4, 8, 32) if options.quick else (1, 2, 4, 8, 16, 32, 64)
    swept = (1, 8, 32) if options.quick else tokens
    result: dict[str, Any] = {
        "peers": peers(),
        "rows": [],
    }

    def save() -> None:
        _record.write("kernels_cuda", result, "cuda", options.out)

    reading = read_bandwidth(device)
    result["read_gb_s"] = reading / 1e9
    print(f"read {reading / 1e9:.0f} GB/s", flush=True)
    result["predictions"] = _bars.predictions(shapes, reading)
    save()
    if options.wide:
        result["checks"] = prepare([], [], options.workers, True, WIDE_BITS)
    elif not options.tune:
        result["checks"] = prepare(
            list(shapes.values()), list(tokens), options.workers, not options.quick, (2, 3, 4, 5, 8)
        )
    bandwidth = copy_bandwidth(device)
    result["copy_gb_s"] = bandwidth / 1e9
    print(f"{_record.hardware('cuda')}: copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    everything = (
        time_attention(device, bandwidth),
        time_gptq(device, bandwidth),
        time_kernels(device, bandwidth, shapes, tokens, swept),
        () if options.quick else time_wide(device, bandwidth),
    )
    of_steps = _team_cuts if options.teams else _step_cuts
    tuning = (
        of_steps.tune(options.models, tuple(options.tokens), device, options.workers),
        time_clusters(device, bandwidth, shapes if options.clusters else {}, options.workers),
    )
    wide = time_gptq(device, bandwidth, (8,)), time_wide(device, bandwidth)
    for part in tuning if options.tune else wide if options.wide else everything:
        try:
            for found in part:
                result["rows"].append(found)
                save()
        except Exception as error:
            result.setdefault("errors", []).append(f"{type(error).__name__}: {error}")
            print(f"FAILED: {type(error).__name__}: {str(error)[:2000]}", file=sys.stderr, flush=True)
    result["settings"] = best_settings(result["rows"])
    save()
    if options.write_settings:
        write_settings(_record.hardware("cuda"), result["settings"], result["rows"])
    print_table(result["rows"], shapes, tokens)
    result["bars"] = _bars.check(result["rows"], reading, "H200" in _record.hardware("cuda"))
    save()


if __name__ == "__main__":
    main()
