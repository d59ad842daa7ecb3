"""One linear layer: native kernels against torch's dense matrix multiplication, and against what memory can
deliver.

`python -m bench.linear` measures on the CPU, `--device cuda` on a GPU (its own file, `_cuda.py`, and
options). The roof comes first: copy bandwidth measured in the same run, and the bytes that each precision has
to read. Then medians over rounds in which every contender is timed in turn, so that a disturbance hits all of
them. Weights rotate over copies, so they come from memory, not from a cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench import _record
from pmpd.kernels import cpu
from pmpd.kernels import native as library
from pmpd.kernels.base import PackedWeights

BITS = (4, 3, 2)


@dataclass(frozen=True)
class LinearBenchConfig:
    """What to measure on the CPU (`--device cuda --help` tells of a GPU)."""

    shapes: tuple[str, ...] = ("4096x4096", "11008x4096")
    """out_features x in_features."""
    tokens: tuple[int, ...] = (1, 8)
    """Tokens per multiplication."""
    threads: int = 2
    """Threads of torch and of the kernels."""
    rounds: int = 15
    """Rounds the medians are taken over."""
    rotate_bytes: int = 256 << 20
    """Weights of each contender, at least, in bytes."""
    clock: Literal["wall", "cpu"] = "wall"
    """Seconds on the wall, or of processor time of the calling thread (with 1 thread: for a machine that
    others use)."""
    name: str | None = None
    """Name of the result file; default by the number of threads."""

    @property
    def result_name(self) -> str:
        return self.name or f"linear_cpu_{self.threads}_thread{'s' * (self.threads != 1)}"


def main(config: LinearBenchConfig) -> None:
    if config.clock == "cpu" and config.threads > 1:
        raise ValueError("--clock cpu counts the calling thread only: add --threads 1")
    torch.set_num_threads(config.threads)
    clock = time.thread_time if config.clock == "cpu" else time.perf_counter
    bandwidth = copy_bandwidth(clock)
    print(
        f"{_record.hardware()}; {library.describe()}\nroof: a copy moves {bandwidth / 1e9:.1f} GB/s (read + "
        f"written)"
    )
    rows = []
    for shape in config.shapes:
        out_features, in_features = map(int, shape.split("x"))
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(config, out_features, in_features, dtype, bandwidth, clock)
    bars = check_bars(rows)
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']:.2f}")
    settings = {
        "threads": config.threads,
        "clock": config.clock,
        "rounds": config.rounds,
        "kernel": library.LEVELS[library.active_level()],
    }
    print(
        _record.write(
            config.result_name, {**settings, "copy_gb_per_s": bandwidth / 1e9, "rows": rows, "bars": bars}
        )
    )


def copy_bandwidth(clock: Callable[[], float]) -> float:
    """Bytes/s, read plus written, of a copy of 256 MiB; the best of some."""
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    seconds = []
    for _ in range(7):
        start = clock()
        target.copy_(source)
        seconds.append(clock() - start)
    return 2 * source.nbytes / min(seconds)


def measure(
    config: LinearBenchConfig,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    bandwidth: float,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """One row per number of tokens and contender: median and best milliseconds, ratios to dense, error
    against float64."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.randint(
        -(2**31),
        2**31 - 1,
        (max(BITS), out_features, in_features // 32),
        dtype=torch.int32,
        generator=generator,
    )
    tables = {
        b: (0.02 * torch.randn(out_features, 2**b, generator=generator)).sort(1).values.half() for b in BITS
    }
    packed = PackedWeights(planes, tables)
    native = cpu.build(packed, dtype)
    exact = {b: cpu.NativeMatrix(packed, torch.float32).dequantize(b) for b in BITS}
    copies = [
        native,
        *(
            cpu.build(packed, dtype)
            for _ in range(config.rotate_bytes // (out_features * in_features * 2 // 8))
        ),
    ]
    dense = [native.dequantize(4)]
    dense += [dense[0].clone() for _ in range(config.rotate_bytes // dense[0].nbytes)]
    rows = []
    for tokens in config.tokens:
        x = torch.randn(tokens, in_features, generator=generator).to(dtype)
        contenders: dict[str, tuple[list[Callable[[], Tensor]], int]] = {
            "dense": ([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense], dense[0].nbytes)
        }
        for bits in BITS:
            read = out_features * (in_features * bits // 8 + 2**bits * dense[0].element_size())
            contenders[str(bits)] = ([lambda m=m, b=bits, x=x: m.multiply(x, b) for m in copies], read)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(config.rounds):
            for name, (calls, _) in contenders.items():
                some = [calls[(turn * 4 + i) % len(calls)] for i in range(4)]
                start = clock()
                for call in some:
                    call()
                seconds[name].append((clock() - start) / len(some))
        base, best_base = statistics.median(seconds["dense"]), min(seconds["dense"])
        for name, (_, read) in contenders.items():
            median, best = statistics.median(seconds[name]), min(seconds[name])
            row = {
                "shape": f"{out_features}x{in_features}",
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "weights": name,
                "median_ms": median * 1e3,
                "best_ms": best * 1e3,
                "times_dense": base / median,
                "times_dense_best": best_base / best,
                "mib_read": read / 2**20,
                "part_of_roof": read / best / bandwidth,
            }
            if name != "dense":
                y, expected = native.multiply(x, int(name)).double(), x.double() @ exact[int(name)].double().T
                row["relative_error"] = float((y - expected).norm() / expected.norm())
            rows.append(row)
            print(
                f"{row['shape']:>11} {row['dtype']:8} M={tokens:<2} {name:>5}: {row['median_ms']:8.3f} ms "
                f"(best {row['best_ms']:.3f}), "
                f"{row['times_dense']:5.2f} x dense (best {row['times_dense_best']:.2f}), "
                f"{row['mib_read']:6.1f} MiB"
                + (f", error {row['relative_error']:.1e}" if "relative_error" in row else "")
            )
    return rows


def check_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, and what came out (ratios of medians)."""
    by_key = {(row["shape"], row["dtype"], row["tokens"], row["weights"]): row for row in rows}
    bars = []

    def add(bar: str, measured: float, least: float) -> None:
        bars.append({"bar": f"{bar} at least {least:g}", "measured": measured, "met": measured >= least})

    for shape, dtype, tokens in dict.fromkeys(key[:3] for key in by_key):
        at = {weights: by_key[shape, dtype, tokens, weights] for weights in ("dense", "4", "3", "2")}
        name = f"{shape} {dtype} M={tokens}"
        if tokens == 1:
            for bits, least in (("2", 6), ("4", 3)) if dtype == "bfloat16" else (("2", 8), ("4", 4)):
                add(f"{name}: {bits} bits, times faster than dense,", at[bits]["times_dense"], least)
            if dtype == "bfloat16":
                add(f"{name}: 2 bits, times faster than 4,", at["4"]["median_ms"] / at["2"]["median_ms"], 1.8)
        elif tokens == 8:
            for bits in ("4", "3", "2"):
                add(f"{name}: {bits} bits, times faster than dense,", at[bits]["times_dense"], 1)
    for dtype, most in (("float32", 1e-5), ("bfloat16", 1e-2)):
        worst = max(
            (row["relative_error"] for row in rows if row["dtype"] == dtype and "relative_error" in row),
            default=0.0,
        )
        bars.append(
            {"bar": f"{dtype}: relative error below {most:g}", "measured": worst, "met": worst < most}
        )
    return bars


def command_line() -> None:
    """`--device` chooses, the rest is the business of the chosen one."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options, rest = parser.parse_known_args()
    if options.device == "cuda":
        from bench import _cuda

        _cuda.main(rest)
    else:
        import tyro  # a GPU machine may lack it

        main(tyro.cli(LinearBenchConfig, args=rest))


if __name__ == "__main__":
    command_line()
