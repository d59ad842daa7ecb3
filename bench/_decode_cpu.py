"""The CPU part of `bench.decode`: the engine's tokens per second by precision and schedule, and of its
prefill.

Models compute in bfloat16: the demo model, and a Llama-shaped one of 1.1 B random weights that is written
into a temporary folder. The roof comes first: copy bandwidth measured in the same run, and the bytes that a
step has to read. Then every contender is timed in turn, round after round, so that a disturbance hits all of
them; figures are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import _random_llama, _record
from bench.linear import copy_bandwidth
from pmpd import PMPDForCausalLM, Scheduler, demo
from pmpd.decode.requests import Request
from pmpd.demo.texts import MIN_PROMPT_CHARACTERS, documents_of
from pmpd.kernels import native
from pmpd.schedulers.artefact import ArtefactConfig, save_artefact
from pmpd.schedulers.base import Scheduler as AnyScheduler
from pmpd.schedulers.chain import class_steps
from pmpd.schedulers.classifier import KVCacheClassifier

PRECISIONS = (4, 3, 2)
BATCHES = (1, 8)


@dataclass(frozen=True)
class DecodeCpuConfig:
    """What to measure."""

    threads: int = 2
    rounds: int = 3
    prompt_tokens: int = 32
    demo_tokens: int = 97
    """New tokens of each row on the demo model."""
    tokens: int = 17
    """The same on the 1.1 B model."""
    layers: int = 22
    """Of the 1.1 B model (fewer: a trial run)."""


@dataclass(frozen=True)
class Contender:
    """One way to decode: a model, its prefill precision, and a schedule."""

    name: str
    model: PMPDForCausalLM
    bits: int
    scheduler: AnyScheduler | None = None


def contenders(
    dense: PMPDForCausalLM, quantized: PMPDForCausalLM, new_tokens: int, classifiers: Path | None = None
) -> list[Contender]:
    """`classifiers`: the artefact of the learned schedule; None = the demo's."""
    third, two_thirds = class_steps(new_tokens)[1:3]
    static = Scheduler.get_scheduler("naive", precisions=list(PRECISIONS), high_bit_steps=[third, two_thirds])
    found = [Contender("16", dense, 16), *(Contender(str(bits), quantized, bits) for bits in PRECISIONS)]
    found.append(Contender("static", quantized, PRECISIONS[0], static))
    scheduler = Scheduler.get_scheduler("kv_cache", precisions=list(PRECISIONS), save_dir=classifiers)
    found.append(Contender("learned", quantized, PRECISIONS[0], quantized.decide(scheduler, None)[0]))
    return found


def write_untrained(folder: Path, model: PMPDForCausalLM) -> Path:
    """Classifiers of random weights for `model`: their decisions mean nothing, their cost is that of trained
    ones."""
    pairs = tuple(pairwise(PRECISIONS))
    config = ArtefactConfig(model.head_dim, model.kv_heads, pairs)
    draw = torch.Generator().manual_seed(0)
    save_artefact(
        folder,
        config,
        {
            pair: KVCacheClassifier(config.dim, config.num_heads, generator=draw).state_dict()
            for pair in pairs
        },
    )
    return folder


def run_once(
    contender: Contender, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, float, float]:
    """Seconds of the prefill, seconds of a decode step of all rows on the wall, and the mean precision of the
    decode steps."""
    engine = contender.model.engine(max(BATCHES), len(prompts[0]) + new_tokens)
    requests = [Request(str(index), prompt, new_tokens) for index, prompt in enumerate(prompts)]
    start = time.perf_counter()
    done = list(engine.run(requests, contender.scheduler, contender.bits, ()))
    seconds = time.perf_counter() - start
    failed = [completion.error for completion in done if completion.error]
    if failed:
        raise RuntimeError(failed[0])
    prefill = sum(completion.prefill_seconds for completion in done)
    used = sum(
        bits * count for completion in done for bits, count in completion.precision_trace
    ) - contender.bits * len(done)
    return prefill, (seconds - prefill) / (new_tokens - 1), used / (len(done) * (new_tokens - 1))


def measure_model(
    name: str,
    contenders: list[Contender],
    prompts: list[list[int]],
    new_tokens: int,
    rounds: int,
    floor_ms: dict[str, float],
) -> list[dict[str, Any]]:
    rows = []
    for batch in BATCHES:
        for contender in contenders:  # lays out the weights, and fills oneDNN's caches
            run_once(contender, prompts[:batch], 3)
        measured: dict[str, list[tuple[float, float, float]]] = {
            contender.name: [] for contender in contenders
        }
        for _ in range(rounds):
            for contender in contenders:
                measured[contender.name].append(run_once(contender, prompts[:batch], new_tokens))
        medians = {
            plan: [statistics.median(column) for column in zip(*runs, strict=True)]
            for plan, runs in measured.items()
        }
        for plan, (prefill, step, used) in medians.items():
            row = {
                "model": name,
                "batch": batch,
                "plan": plan,
                "step_ms": step * 1e3,
                "best_step_ms": min(run[1] for run in measured[plan]) * 1e3,
                "tokens_per_s": batch / step,
                "times_16": medians["16"][1] / step,
                "times_4": medians["4"][1] / step,
                "mean_bits": used,
                "prefill_tokens_per_s": batch * len(prompts[0]) / prefill,
            }
            if batch == 1 and plan in floor_ms:
                row["part_of_roof"] = floor_ms[plan] / row["step_ms"]
            rows.append(row)
            print(
                f"{name:5} batch {batch} {plan:>7}: step {row['step_ms']:8.2f} ms (best "
                f"{row['best_step_ms']:.2f}), "
                f"{row['tokens_per_s']:7.1f} tokens/s, {row['times_16']:5.2f} x 16 bits, "
                f"{row['times_4']:5.2f} x 4 bits, "
                f"mean {used:.2f} bits; prefill {row['prefill_tokens_per_s']:6.0f} tokens/s"
                + (f"; {100 * row['part_of_roof']:.0f} % of the roof" if "part_of_roof" in row else ""),
                flush=True,
            )
    return rows


def measure_demo(config: DecodeCpuConfig) -> list[dict[str, Any]]:
    dense, quantized = (
        PMPDForCausalLM(folder, dtype=torch.bfloat16).eval() for folder in (demo.DENSE, demo.ANYPREC)
    )
    texts = (
        document.text for document in documents_of("held_out") if len(document.text) >= MIN_PROMPT_CHARACTERS
    )
    encoded = (quantized.tokenizer(text).input_ids[: config.prompt_tokens] for text in texts)
    long_enough = (ids for ids in encoded if len(ids) == config.prompt_tokens)
    prompts = [next(long_enough) for _ in range(max(BATCHES))]
    plans = contenders(dense, quantized, config.demo_tokens)
    return measure_model("demo", plans, prompts, config.demo_tokens, config.rounds, {})


def measure_random(
    config: DecodeCpuConfig, folder: Path, shape: _random_llama.Shape, bandwidth: float
) -> list[dict[str, Any]]:
    models = []
    for name, precisions in (("dense", None), ("quantized", PRECISIONS)):
        _random_llama.write(folder / name, shape, precisions)
        models.append(PMPDForCausalLM(folder / name, dtype=torch.bfloat16).eval())
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        3, shape.vocab_size, (max(BATCHES), config.prompt_tokens), generator=generator
    ).tolist()
    floor_ms = {str(bits): shape.step_bytes(bits) / bandwidth * 1e3 for bits in (16, *PRECISIONS)}
    plans = contenders(
        models[0], models[1], config.tokens, write_untrained(folder / "classifiers", models[1])
    )
    return measure_model("1.1B", plans, prompts, config.tokens, config.rounds, floor_ms)


def check_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised for the 1.1 B model at batch 1, and what came out."""
    row = next(row for row in rows if (row["model"], row["batch"], row["plan"]) == ("1.1B", 1, "2"))
    bars = []
    for other, key, least in (("bfloat16", "times_16", 3.0), ("4 bits", "times_4", 1.5)):
        bar = f"1.1B, batch 1: 2 bits at least {least:g} x {other}"
        bars.append({"bar": bar, "measured": row[key], "met": row[key] >= least})
    return bars


def main(config: DecodeCpuConfig, output: Path = _record.RESULTS) -> None:
    torch.set_num_threads(config.threads)
    bandwidth = copy_bandwidth(time.perf_counter)
    shape = _random_llama.Shape(**{**vars(_random_llama.LLAMA_1B), "num_hidden_layers": config.layers})
    mib = {str(bits): shape.step_bytes(bits) / 2**20 for bits in (16, *PRECISIONS)}
    print(
        f"{_record.hardware()}; {native.describe()}\nroof: a copy moves {bandwidth / 1e9:.1f} GB/s (read + "
        f"written)"
    )
    print(
        "a step of the 1.1B model reads "
        + ", ".join(f"{size:.0f} MiB at {bits}" for bits, size in mib.items()),
        flush=True,
    )
    rows = measure_demo(config)
    with tempfile.TemporaryDirectory(prefix="pmpd-decode-") as folder:
        rows += measure_random(config, Path(folder), shape, bandwidth)
    bars = check_bars(rows)
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']:.2f}")
    settings = {
        "threads": config.threads, "rounds": config.rounds, "dtype": "bfloat16",
        "kernel": native.LEVELS[native.active_level()],
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": {"demo": config.demo_tokens, "1.1B": config.tokens},
    }  # fmt: skip
    measured = {"copy_gb_per_s": bandwidth / 1e9, "step_mib": mib, "rows": rows, "bars": bars}
    print(_record.write("decode_cpu", {**settings, **measured}, folder=output))
