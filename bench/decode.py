"""Tokens per second of decoding, by precision.

`python -m bench.decode --device cuda` makes Llama-shaped random models of 1.1 B and 8 B on the device (no
files), and measures a decode step eagerly and as a CUDA graph at batch 1, 8 and 32, the prefill, and what
switching precisions costs, beside the floor that the bytes of a step imply at the copy bandwidth of the same
run. `--device cpu` decodes with the engine (its own file, `_decode_cpu.py`): the demo model and a random 1.1
B, in under 4 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench import _random_llama, _record
from pmpd.decode.sampling import highest
from pmpd.weights.base import Segment

CUDA = torch.device("cuda")
SHAPES = {
    "135M": _random_llama.LLAMA_135M,
    "1.1B": _random_llama.LLAMA_1B,
    "8B": _random_llama.LLAMA_8B,
}
CONTEXT = 512


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of `run`, device work included; the median of `repeats` after two warm-ups."""
    seconds = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


class RandomLlama:
    """A model of random weights on the device: quantized (4, 3, 2 bits) for `kernel`, or `dense` float16."""

    def __init__(
        self, shape: _random_llama.Shape, kernel: str, rows: int, length: int,
        device: torch.device = CUDA,
    ) -> None:  # fmt: skip
        from bench._contenders import random_weights, twin
        from pmpd.decode.llama_cuda import CudaForward, Dense, Layer, LlamaWeights, Weight
        from pmpd.kernels.cuda.matrix import CudaMatrix
        from pmpd.kernels.triton import TritonMatrix

        hidden, heads, kv_heads = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
        layers, intermediate, vocabulary = shape.num_hidden_layers, shape.intermediate_size, shape.vocab_size
        self.device, self.dim, self.layers, self.kv_heads = device, hidden // heads, layers, kv_heads
        self.head_weights = vocabulary * hidden
        self.matrix_weights = 0
        self.head_bits = 16

        made: dict[tuple[int, int], TritonMatrix] = {}

        def matrix(n: int, k: int) -> Weight:
            self.matrix_weights += n * k
            if kernel == "dense":
                return Dense((0.02 * torch.randn(n, k, device=device)).half())
            if (n, k) not in made:
                form = CudaMatrix if kernel == "cuda" else TritonMatrix
                made[n, k] = form(random_weights(n, k, (4, 3, 2), n, device), torch.float16)
            return twin(made[n, k])

        ones = torch.ones(hidden, device=device, dtype=torch.float16)
        qkv = (heads + 2 * kv_heads) * self.dim
        stack = [
            Layer(
                ones,
                matrix(qkv, hidden),
                matrix(hidden, hidden),
                ones,
                matrix(2 * intermediate, hidden),
                matrix(hidden, intermediate),
            )
            for _ in range(layers)
        ]
        table = (0.02 * torch.randn(vocabulary, hidden, device=device)).half()
        frequencies = 1.0 / 10000 ** (torch.arange(0, self.dim, 2, device=device).float() / self.dim)
        self.forward = CudaForward(
            LlamaWeights(table, stack, ones, table, frequencies, heads, kv_heads, self.dim, 1e-5)
        )
        cache = (rows, kv_heads, length, self.dim)
        self.keys, self.values = (
            [torch.randn(cache, device=device, dtype=torch.float16) for _ in range(layers)] for _ in range(2)
        )

    def give_byte_head(self) -> None:
        """From now on the head has 8 bits."""
        from pmpd.kernels.byte_rows import byte_rows
        from pmpd.kernels.triton_bytes import TritonByteMatrix

        self.head_bits = 8
        self.forward.weights.head = TritonByteMatrix(byte_rows(self.forward.weights.embedding))

    def step_bytes(self, bits: int, rows: int) -> float:
        """What a decode step must read: matrices, head, and each row's cache at CONTEXT tokens."""
        cache = rows * CONTEXT * self.layers * self.kv_heads * self.dim * 2 * 2
        return self.matrix_weights * bits / 8 + self.head_bits / 8 * self.head_weights + cache

    def step(self, buffers, layout) -> None:
        """Greedy: reads and moves on the buffers only."""
        segments, longest = layout
        logits = self.forward(
            buffers["ids"], buffers["slots"], buffers["positions"], segments, self.keys, self.values, longest
        )
        buffers["ids"].copy_(highest(logits)[1])
        buffers["positions"].add_(1)
        buffers["positions"].clamp_(max=longest - 1)


def buffers_at(rows: int) -> dict[str, torch.Tensor]:
    device = torch.device("cuda")
    return {
        "ids": torch.arange(rows, device=device),
        "slots": torch.arange(rows, device=device),
        "positions": torch.full((rows,), CONTEXT, device=device),
    }


def measure_large(name: str, bandwidth: float, batches: list[int]) -> Iterator[dict]:
    """A step of many rows by the kernel that a command takes unasked, and by cuBLAS in float16."""
    from pmpd.kernels.dispatch import choose

    unasked = choose(torch.device("cuda"), torch.float16).name
    for kernel in ("dense", unasked):
        model = RandomLlama(SHAPES[name], kernel, max(batches), 1024)
        for batch in batches:
            for bits in (16,) if kernel == "dense" else (4, 3, 2):
                yield measure_step(model, name, bits, batch, bandwidth) | {"kernel": kernel}
        del model
        torch.cuda.empty_cache()


def measure_model(name: str, bandwidth: float, head_bits: int, kernels: Sequence[str]) -> Iterator[dict]:
    """Steps by each of `kernels`; switching and the prefill by the last."""
    from pmpd.kernels.cuda.matrix import unavailable

    why = unavailable(torch.device("cuda"), torch.float16)
    if why and "cuda" in kernels:
        print(f"kernel cuda is left out: {why}", flush=True)
        kernels = [kernel for kernel in kernels if kernel != "cuda"]
    for kernel in kernels:
        model = RandomLlama(SHAPES[name], kernel, 32, 1024)
        for batch in (1, 2, 8, 32):
            for bits in (16,) if kernel == "dense" else (4, 3, 2):
                yield measure_step(model, name, bits, batch, bandwidth) | {"kernel": kernel}
        if kernel == kernels[-1] != "dense":
            yield measure_switch(model, name) | {"kernel": kernel}
            for row in measure_prefill(model, name):
                yield row | {"kernel": kernel}
        if kernel != "dense" and head_bits == 8:
            model.give_byte_head()
            for batch in (1, 2, 8, 32):
                for bits in (4, 3, 2):
                    yield measure_step(model, name, bits, batch, bandwidth) | {"kernel": kernel}
        del model
        torch.cuda.empty_cache()


def measure_step(
    model: RandomLlama, name: str, bits: int, batch: int, bandwidth: float, steps: int = 32
) -> dict:
    """One decode step of `batch` rows, as a graph and eagerly, against its floor."""
    from pmpd.decode.graphs import StepGraphs

    layout = ((Segment(0, None, bits),), 1024)
    graphs = StepGraphs(model.step, buffers_at, buckets=(batch,))
    eager = StepGraphs(model.step, buffers_at, buckets=(batch,), capture=None)

    def run(runner: StepGraphs, count: int) -> None:
        runner.buffers(batch)["positions"].fill_(CONTEXT)
        for _ in range(count):
            runner.run(batch, layout)

    with torch.inference_mode():
        graph_seconds = median(lambda: run(graphs, steps), 5) / steps
        eager_seconds = median(lambda: run(eager, 8), 3) / 8
    floor = model.step_bytes(bits, batch) / bandwidth
    print(
        f"{name} b={bits:<2} head={model.head_bits:<2} batch={batch:<3} graph {graph_seconds * 1e3:7.3f} ms  "
        f"eager {eager_seconds * 1e3:7.3f} ms  "
        f"{batch / graph_seconds:8.0f} tokens/s  floor {floor * 1e3:6.3f} ms "
        f"({100 * floor / graph_seconds:.0f} %)",
        flush=True,
    )
    return {
        "model": name, "bits": bits, "head_bits": model.head_bits, "batch": batch,
        "step_ms": graph_seconds * 1e3,
        "eager_ms": eager_seconds * 1e3,
        "tokens_s": batch / graph_seconds, "floor_ms": floor * 1e3, "of_floor": floor / graph_seconds,
        "why_eager": graphs.why_eager,
    }  # fmt: skip


def measure_switch(model: RandomLlama, name: str, steps: int = 32) -> dict:
    """64 steps that switch from 4 to 3 bits half-way, against the mean of both uniform runs; and a mixed
    batch of 8."""
    from pmpd.decode.graphs import StepGraphs

    graphs = StepGraphs(model.step, buffers_at, buckets=(1, 8))
    four, three = ((Segment(0, None, 4),), 1024), ((Segment(0, None, 3),), 1024)
    mixed = ((Segment(0, 4, 4), Segment(4, None, 3)), 1024)

    def run(rows: int, *layouts) -> None:
        graphs.buffers(rows)["positions"].fill_(CONTEXT)
        for layout in layouts:
            graphs.run(rows, layout)

    with torch.inference_mode():
        uniform = [median(lambda b=b: run(1, *[b] * (2 * steps)), 7) for b in (four, three)]
        switched = median(lambda: run(1, *[four] * steps, *[three] * steps), 7)
        alternating = median(lambda: run(1, *[four, three] * steps), 7)
        batches = {
            label: median(lambda b=b: run(8, *[b] * steps), 5) / steps
            for label, b in (("4", four), ("3", three), ("4+3", mixed))
        }
    mean = sum(uniform) / 2
    row = {
        "model": name, "switch_once": switched / mean - 1, "switch_every_step": alternating / mean - 1,
        "batch8_step_ms": {label: seconds * 1e3 for label, seconds in batches.items()},
    }  # fmt: skip
    switches = (
        f"switching once {100 * row['switch_once']:+.1f} %, every step "
        f"{100 * row['switch_every_step']:+.1f} %"
    )
    print(f"{name} {switches}; ms of a step of 8 rows: {row['batch8_step_ms']}", flush=True)
    return row


def measure_prefill(model: RandomLlama, name: str, tokens: int = 2048) -> Iterator[dict]:
    """The matrix products of a prefill of 2048 tokens (attention is PyTorch's own and not in it)."""
    layer = model.forward.weights.layers[0]
    for bits in (4, 2):
        inputs = {
            m: torch.randn(tokens, m.shape[1], device="cuda").half()
            for m in (layer.qkv, layer.out, layer.gate_up, layer.down)
        }
        with torch.inference_mode():
            quantized = median(
                lambda bits=bits, inputs=inputs: [m.multiply(x, bits) for m, x in inputs.items()], 5
            )
            dense = {m: m.dequantize(bits) for m in inputs}
            plain = median(
                lambda inputs=inputs, dense=dense: [
                    torch.nn.functional.linear(x, dense[m]) for m, x in inputs.items()
                ],
                5,
            )
        print(
            f"{name} prefill {tokens} tokens, b={bits}: {quantized * 1e3:.3f} ms a layer, float16 "
            f"{plain * 1e3:.3f} ms",
            flush=True,
        )
        yield {
            "model": name,
            "prefill_bits": bits,
            "tokens": tokens,
            "layer_ms": quantized * 1e3,
            "float16_layer_ms": plain * 1e3,
        }


def check_bars(rows: list[dict]) -> list[dict]:
    """What was promised of the largest model, and what came out, of each kernel."""
    steps = {
        (r["kernel"], r["model"], r["bits"], r["head_bits"], r["batch"]): r for r in rows if "step_ms" in r
    }
    bars: list[dict] = []

    def bar(said: str, least: float, measured: float) -> None:
        bars.append({"bar": f"{said}, at least {least:g}", "measured": measured, "met": measured >= least})

    for (kernel, model, bits, head_bits, batch), row in steps.items():
        dense = steps.get(("dense", model, 16, 16, batch))
        if kernel == "dense" or dense is None:
            continue
        times = dense["step_ms"] / row["step_ms"]
        if batch >= 64:
            bar(f"{kernel} {model} batch {batch}: {bits} bits, times float16", 1, times)
        if model != "8B":
            continue
        if head_bits == 8:
            if batch == 1 and bits == 3:
                bar(f"{kernel} {model} batch 1: 3 bits and a head of 8, times float16", 3.8, times)
        elif batch == 1:
            bar(f"{kernel} {model} batch 1: {bits} bits, part of the floor", 0.8, row["of_floor"])
            if bits == 3:
                bar(f"{kernel} {model} batch 1: 3 bits, times float16", 3.2, times)
        elif batch == 8 and bits == 3:
            bar(f"{kernel} {model} batch 8: 3 bits, times float16", 2.2, times)
        elif batch == 32:
            bar(f"{kernel} {model} batch 32: {bits} bits, times float16", 1, times)
    for one in bars:
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['bar']}: {one['measured']:.2f}", flush=True)
    return bars


def measure_cuda(
    models: list[str], head_bits: int, out: Path, batches: list[int], kernels: Sequence[str]
) -> None:
    """Measures and writes what is there after every row."""
    from bench._cuda import copy_bandwidth

    bandwidth = copy_bandwidth(torch.device("cuda"))
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    result: dict = {"copy_gb_s": bandwidth / 1e9, "context": CONTEXT, "rows": []}
    name_of_file = "decode_cuda_large" if batches else "decode_cuda"
    for name in models:
        rows = (
            measure_large(name, bandwidth, batches)
            if batches
            else measure_model(name, bandwidth, head_bits, kernels)
        )
        for row in rows:
            result["rows"].append(row)
            _record.write(name_of_file, result, "cuda", out)
    result["bars"] = check_bars(result["rows"])
    print(_record.write(name_of_file, result, "cuda", out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--models", nargs="+", default=["1.1B", "8B"], help="CUDA: which random models; 135M too"
    )
    parser.add_argument(
        "--kernels", nargs="+", default=["dense", "triton", "cuda"], choices=["dense", "triton", "cuda"],
        help="CUDA: whose steps; dense is float16",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="CPU: runs that the medians are taken over")
    parser.add_argument("--peer", choices=["llama.cpp"], help="CPU: times this beside, forward by forward")
    parser.add_argument("--profile", action="store_true", help="CPU: where a step's time goes")
    parser.add_argument(
        "--head-bits", type=int, choices=[16, 8], default=16,
        help="CUDA: 8 = heads of 8 bits too, beside those of 16; CPU: with --peer or --profile",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="with --peer or --profile")
    parser.add_argument("--steps", type=int, default=9, help="with --peer or --profile: medians over so many")
    parser.add_argument("--prefill", type=int, default=512, help="with --peer or --profile: tokens; 0 = none")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[],
        help="rows of a step; with --peer: default 1 8; CUDA: these alone, at 4, 3, 2 and 16 bits",
    )  # fmt: skip
    parser.add_argument("--kinds", nargs="+", default=[], help="with --peer: llama.cpp's; default all")
    parser.add_argument("--folder", type=Path, help="with --peer or --profile: models stay there for later")
    parser.add_argument("--prepare", action="store_true", help="with --folder: write the models, no more")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of the thread, on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=_record.RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    if options.device == "cuda":
        _record.need_cuda()
        measure_cuda(options.models, options.head_bits, options.out, options.batches, options.kernels)
    else:
        from bench import _decode_cpu, _peer_cpu

        if options.peer or options.profile:
            settings = _peer_cpu.PeerConfig(
                options.threads,
                options.steps,
                options.head_bits,
                options.prefill,
                clock=options.clock,
                kinds=tuple(options.kinds),
                batches=tuple(options.batches or (1, 8)),
            )
            _peer_cpu.main(
                settings,
                options.peer is not None,
                options.profile,
                options.out,
                options.folder,
                options.prepare,
            )
            return
        _decode_cpu.main(_decode_cpu.DecodeCpuConfig(rounds=options.rounds), options.out)


if __name__ == "__main__":
    main()
