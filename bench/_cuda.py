"""Kernels on a CUDA device: correctness, then microseconds and GB/s against the copy bandwidth of the same run.

`python bench/_cuda.py --out bench/results/kernels_cuda.json` runs alone; `bench/linear.py --device cuda` calls `main`.
Weights rotate over several matrices so that they come from memory, not from the second-level cache; times are those of CUDA-graph
replays, launch gaps between the kernels of one multiplication included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from pmpd.kernels.base import PackedWeights
from pmpd.kernels.reference import CacheBudget, ReferenceMatrix
from pmpd.kernels.triton import GPTQMatrix, TritonMatrix, decode_attention, settings_file, split_activations

SHAPES = {  # name: (out_features, in_features)
    "8b.qkv": (6144, 4096), "8b.o": (4096, 4096), "8b.gate_up": (28672, 4096), "14336x4096": (14336, 4096), "8b.down": (4096, 14336),
    "1.1b.qkv": (2560, 2048), "1.1b.gate_up": (11264, 2048), "1.1b.down": (2048, 5632),
}  # fmt: skip
ROTATE_BYTES = 400e6


def random_weights(rows: int, columns: int, precisions: tuple[int, ...], seed: int, device: torch.device) -> PackedWeights:
    draw = torch.Generator(device).manual_seed(seed)
    planes = torch.randint(-(2**31), 2**31, (max(precisions), rows, columns // 32), generator=draw, device=device, dtype=torch.int32)
    tables = {b: (0.02 * torch.randn(rows, 2**b, generator=draw, device=device)).sort(1).values.half() for b in precisions}
    return PackedWeights(planes, tables, None)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read plus written, of a 4 GB device-to-device copy by a kernel (a graph's copy node may take the slower copy engine)."""
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


def median_seconds(calls: list[Callable[[], object]], repeats: int = 15, rounds: int = 1) -> float:
    """Seconds of one call: all of `calls`, `rounds` times, captured in one CUDA graph; median over replays."""
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


def twin(matrix: TritonMatrix) -> TritonMatrix:
    """The same matrix at another address."""
    tiles = matrix._tiles
    return matrix._with(type(tiles)(tiles.planes.clone(), tiles.shape, tiles.bias), matrix._tables, matrix._digits)


def clones(matrix: TritonMatrix, weight_bytes: float) -> list[TritonMatrix]:
    """Copies of `matrix`, enough to fill `ROTATE_BYTES`."""
    return [matrix, *(twin(matrix) for _ in range(min(47, int(ROTATE_BYTES / weight_bytes))))]


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def variants(columns: int, bits: int, tokens: int) -> list[tuple[int, bool]]:
    blocks = -(-columns // 256)
    warps = [w for w in (2, 4, 8, 16) if blocks / 8 <= w <= blocks]
    merges = (False, True) if bits == 4 else (True,)
    return [(w, m) for w in warps for m in merges if tokens <= 4 or m]


def digits_call(matrix: TritonMatrix, x: torch.Tensor, bits: int, warps: int, merge: bool) -> Callable[[], torch.Tensor]:
    y = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device)

    def call() -> torch.Tensor:
        matrix.multiply_split(split_activations(x), bits, y, warps, merge)
        return y

    return call


def product_call(matrix: TritonMatrix, x: torch.Tensor, bits: int, warps: int, merge: bool) -> Callable[[], torch.Tensor]:
    """As `digits_call`, without the splitting of the activations (a layer that shares its input pays for that once)."""
    y = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device)
    split = split_activations(x)

    def call() -> torch.Tensor:
        matrix.multiply_split(split, bits, y, warps, merge)
        return y

    return call


def compile_one(job: tuple[int, int, int, int, int, bool]) -> None:
    """In a process of its own: fills Triton's cache on disk."""
    _, columns, bits, tokens, warps, merge = job
    device = torch.device("cuda")
    matrix = TritonMatrix(random_weights(64, columns, (4, 3, 2), 0, device), torch.float16)
    digits_call(matrix, torch.randn(tokens, columns, device=device).half(), bits, warps, merge)()
    torch.cuda.synchronize()


def check_one(job: tuple[int, int, torch.dtype, float, int]) -> dict:
    """Every route and M at one b against the definition in float64, on fresh random inputs with an outlier."""
    n, k, dtype, limit, bits = job
    device = torch.device("cuda")
    packed = random_weights(n, k, (2, 3, 4, 5, 8), 7 * bits, device)
    matrix, weight = TritonMatrix(packed, dtype), ReferenceMatrix(packed, torch.float32, CacheBudget(0)).dequantize(bits)
    same = torch.equal(matrix.dequantize(bits).float(), weight.to(dtype).float())
    worst: dict[str, float] = {}
    for tokens in (1, 2, 4, 8, 16):
        x = torch.randn(tokens, k, device=device).to(dtype)
        x[:, 5] *= 100
        expected = x.double() @ weight.double().T
        for route in ("digits", "fused", "dense"):
            if route == "digits" and bits > 4:
                continue
            error = relative_error(matrix.multiply(x, bits, route), expected)
            worst[route] = max(worst.get(route, 0.0), error if error == error else float("inf"))
    passed = same and all(error < limit for error in worst.values())
    return {"check": f"{n}x{k} {dtype} b={bits}", "dequantize_exact": same, "worst": worst, "passed": passed}


def prepare(shapes: list[tuple[int, int]], tokens: list[int], workers: int) -> list[dict]:
    """In many processes: compiles what will be timed (into Triton's cache on disk), and checks results. Returns the checks."""
    started = time.perf_counter()
    jobs = {(0, k, b, m, w, merge) for _, k in shapes for b in (2, 3, 4) for m in tokens for w, merge in variants(k, b, m)}
    checks = [
        (n, k, dtype, limit, bits)
        for n, k in ((4096, 4096), (1000, 2912))
        for dtype, limit in ((torch.float16, 1.5e-3), (torch.bfloat16, 8e-3))
        for bits in (2, 3, 4, 5, 8)
    ]
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        checking = [pool.submit(check_one, job) for job in checks]
        compiling = [pool.submit(compile_one, job) for job in sorted(jobs, key=lambda job: -job[3])]
        for job, future in zip(checks, checking, strict=True):
            try:
                rows.append(future.result())
            except Exception as error:
                rows.append({"check": str(job), "passed": False, "error": f"{type(error).__name__}: {str(error)[:1500]}"})
            worst = {route: f"{error:.1e}" for route, error in rows[-1].get("worst", {}).items()}
            print(f"{'ok  ' if rows[-1]['passed'] else 'FAIL'} {rows[-1]['check']}: {worst} {rows[-1].get('error', '')}", flush=True)
        failures = [str(future.exception())[:1500] for future in compiling if future.exception() is not None]
    print(f"{len(compiling)} variants compiled, {len(failures)} failed, {time.perf_counter() - started:.0f} s {failures[:1]}", flush=True)
    return rows


def time_kernels(device: torch.device, bandwidth: float, shapes: dict[str, tuple[int, int]], tokens_of: tuple[int, ...]) -> list[dict]:
    rows = []
    for name, (n, k) in shapes.items():
        matrix = TritonMatrix(random_weights(n, k, (2, 3, 4), 1, device), torch.float16)
        dense = torch.randn(n, k, device=device).half()
        copies = [dense, *(dense.clone() for _ in range(min(12, int(ROTATE_BYTES / dense.nbytes))))]
        for tokens in tokens_of:
            x = torch.randn(tokens, k, device=device).half()
            seconds = median_seconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in copies])
            rows.append(row(name, n, k, 16, tokens, "torch", seconds, dense.nbytes, bandwidth))
        del copies, dense
        for bits in (4, 3, 2):
            weight_bytes = n * k * bits / 8
            matrices = clones(matrix, weight_bytes)
            for tokens in tokens_of:
                x = torch.randn(tokens, k, device=device).half()
                bytes_moved = weight_bytes + n * (8 + {2: 8, 3: 16, 4: 32}[bits]) + 2 * tokens * (n + k)
                if tokens <= 16:
                    for warps, merge in variants(k, bits, tokens):
                        for label, make in (("digits", digits_call), ("product", product_call)):
                            calls = [make(m, x, bits, warps, merge) for m in matrices]
                            seconds = median_seconds(calls)
                            rows.append(
                                row(name, n, k, bits, tokens, f"{label} w{warps}{'m' if merge else ''}", seconds, bytes_moved, bandwidth)
                            )
                if tokens in (1, 16, 32, 64) and name == "14336x4096":
                    for route in ("fused", "dense"):
                        calls = [lambda m=m, x=x, bits=bits, route=route: m.multiply(x, bits, route) for m in matrices]
                        rows.append(row(name, n, k, bits, tokens, route, median_seconds(calls), bytes_moved, bandwidth))
            del matrices
        torch.cuda.empty_cache()
    return rows


def row(name: str, n: int, k: int, bits: int, tokens: int, impl: str, seconds: float, moved: float, bandwidth: float) -> dict:
    result = {
        "shape": name, "n": n, "k": k, "bits": bits, "tokens": tokens, "impl": impl, "us": seconds * 1e6, "bytes": moved,
        "gb_s": moved / seconds / 1e9, "of_copy": moved / seconds / bandwidth,
    }  # fmt: skip
    print(
        f"{name:12} b={bits:<2} M={tokens:<4} {impl:14} {result['us']:8.2f} us {result['gb_s']:7.0f} GB/s {100 * result['of_copy']:5.1f} %",
        flush=True,
    )
    return result


def time_attention(device: torch.device, bandwidth: float) -> list[dict]:
    """8B: 32 query, 8 KV heads, D = 128; against PyTorch's attention over the same slots with a mask."""
    rows = []
    for batch, length in ((1, 1024), (8, 1024), (32, 1024)):
        caches = [
            tuple(torch.randn(batch, 8, 2048, 128, device=device, dtype=torch.float16) for _ in range(2))
            for _ in range(max(2, 64 // batch))
        ]
        q = torch.randn(batch, 32, 128, device=device, dtype=torch.float16)
        slots = torch.arange(batch, device=device)
        lengths = torch.full((batch,), length, device=device)
        mask = (torch.arange(2048, device=device) < length)[None, None, None].expand(batch, 1, 1, -1)
        moved = 2 * 2 * batch * 8 * length * 128
        expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], *caches[0], attn_mask=mask, enable_gqa=True)[:, :, 0]
        error = relative_error(decode_attention(q, *caches[0], slots, lengths, 128**-0.5), expected)
        seconds = median_seconds([lambda c=c, q=q, s=slots, n=lengths: decode_attention(q, *c, s, n, 128**-0.5) for c in caches])
        rows.append(row(f"attn B={batch}", 32, length, 16, batch, "triton", seconds, moved, bandwidth) | {"error": error})
        peer = median_seconds(
            [
                lambda c=c, q=q, mask=mask: torch.nn.functional.scaled_dot_product_attention(
                    q[:, :, None], *c, attn_mask=mask, enable_gqa=True
                )
                for c in caches
            ]
        )
        rows.append(row(f"attn B={batch}", 32, length, 16, batch, "torch", peer, moved, bandwidth))
        print(f"     attention error {error:.1e}", flush=True)
    return rows


def time_gptq(device: torch.device, bandwidth: float) -> list[dict]:
    rows = []
    n, k, group = 14336, 4096, 128
    for bits in (2, 3, 4, 8):
        words = torch.randint(-(2**31), 2**31, (k * bits // 32, n), device=device, dtype=torch.int32)
        zeros = torch.randint(-(2**31), 2**31, (k // group, n * bits // 32), device=device, dtype=torch.int32)
        scales = (0.001 + 0.01 * torch.rand(k // group, n, device=device)).half()
        matrices = [GPTQMatrix(words, zeros, scales, None, bits, 1, torch.float16) for _ in range(max(3, int(2e8 / (n * k * bits / 8))))]
        for tokens in (1, 16):
            x = torch.randn(tokens, k, device=device).half()
            error = relative_error(matrices[0].multiply(x), x.float() @ matrices[0].dequantize().float().T)
            seconds = median_seconds([lambda m=m, x=x: m.multiply(x) for m in matrices])
            rows.append(row("gptq", n, k, bits, tokens, "fused", seconds, n * k * bits / 8, bandwidth) | {"error": error})
    return rows


def best_settings(rows: list[dict]) -> dict:
    """The autotune table: for each shape and b the warps that were fastest at M = 1."""
    table: dict[str, dict] = {}
    for r in rows:
        if r["impl"].startswith("digits w") and r["tokens"] == 1:
            key = f"{r['n']}x{r['k']}x{r['bits']}"
            warps = int(r["impl"].removeprefix("digits w").removesuffix("m"))
            if key not in table or r["us"] < table[key]["us"]:
                table[key] = {"warps": warps, "merge": r["impl"].endswith("m"), "us": round(r["us"], 2)}
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels_cuda.json"), help="JSON to write")
    parser.add_argument("--quick", action="store_true", help="two shapes, M = 1 and 8")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--write-settings", action="store_true", help="write the autotune table of this GPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit}
    shapes = {name: SHAPES[name] for name in ("8b.o", "14336x4096")} if options.quick else SHAPES
    tokens = (1, 8) if options.quick else (1, 2, 8, 16)
    result: dict = {**head, "rows": []}

    def save() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))

    result["checks"] = prepare(list(shapes.values()), [m for m in tokens if m != 2], options.workers)
    save()
    bandwidth = copy_bandwidth(device)
    result["copy_gb_s"] = bandwidth / 1e9
    print(f"{head['gpu']}: copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    parts = (
        lambda: result["rows"].extend(time_attention(device, bandwidth)),
        lambda: result["rows"].extend(time_kernels(device, bandwidth, shapes, tokens)),
        lambda: result["rows"].extend(time_gptq(device, bandwidth)),
    )
    for part in parts:
        try:
            part()
        except Exception as error:
            result.setdefault("errors", []).append(f"{type(error).__name__}: {error}")
            print(f"FAILED: {type(error).__name__}: {str(error)[:2000]}", file=sys.stderr, flush=True)
        save()
    best = best_settings(result["rows"])
    result["settings"] = best
    save()
    if options.write_settings:
        path = settings_file(head["gpu"])
        path.parent.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, "gpu": head["gpu"], "digits": {**known.get("digits", {}), **best}}, indent=1) + "\n")
    print(f"\n{'shape':12} {'b':>2} {'M':>3} {'best':14} {'us':>8} {'% copy':>7} {'fp16 us':>8} {'speed-up':>8}")
    for name in shapes:
        for bits in (4, 3, 2):
            for count in tokens:
                mine = [r for r in result["rows"] if (r["shape"], r["bits"], r["tokens"]) == (name, bits, count) and "digits" in r["impl"]]
                peer = [r for r in result["rows"] if (r["shape"], r["bits"], r["tokens"]) == (name, 16, count)]
                if mine and peer:
                    b = min(mine, key=lambda r: r["us"])
                    print(
                        f"{name:12} {bits:>2} {count:>3} {b['impl']:14} {b['us']:8.2f} {100 * b['of_copy']:7.1f} {peer[0]['us']:8.2f} "
                        f"{peer[0]['us'] / b['us']:8.2f}"
                    )


if __name__ == "__main__":
    main()
