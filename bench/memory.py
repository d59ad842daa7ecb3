"""Memory of a Llama-2-7B-shaped model with 2 to 4 bits on a CPU: loading it and decoding a few tokens.

    PYTHONPATH=. python -m bench.memory

Writes a checkpoint of random codes into a temporary folder (about 4 GB, deleted afterwards), loads it in a
process of its own and reports the most memory that process ever had resident (VmHWM), mapped pages of the
checkpoint included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import _random_llama, _record

LIMIT_GIB = 6.0
PRECISIONS = (4, 3, 2)


@dataclass(frozen=True)
class MemoryBenchConfig:
    """What to measure."""

    layers: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 8
    threads: int = 2
    folder: Path | None = None
    """Where the temporary folder is made (default: the system's)."""
    output: Path = _record.RESULTS
    load: Path | None = None
    """Internal: be the process that loads this checkpoint."""


def resident() -> dict[str, float]:
    """GiB of this process: most ever, now, and of the latter what is private and what are pages of files."""
    names = {"VmHWM": "peak_gib", "VmRSS": "resident_gib", "RssAnon": "private_gib", "RssFile": "file_gib"}
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {names[name]: int(value.split()[0]) / 2**20 for name, _, value in lines if name in names}


def load_and_decode(config: MemoryBenchConfig, folder: Path) -> dict[str, Any]:
    """Memory after importing, after loading, and after `new_tokens` at each precision in turn."""
    from pmpd import PMPDForCausalLM, Scheduler

    torch.set_num_threads(config.threads)
    stages = {"imported": resident()}
    start = time.perf_counter()
    model = PMPDForCausalLM(folder, dtype=torch.bfloat16).eval()
    seconds = {"load": time.perf_counter() - start}
    stages["loaded"] = resident()
    prompt = torch.arange(config.prompt_tokens)[None] + 5
    model.scheduler = Scheduler.get_scheduler(
        "naive", precisions=list(PRECISIONS), high_bit_steps=config.new_tokens // 3
    )
    model.eos_token_ids = frozenset()
    start = time.perf_counter()
    model.generate(prompt, config.new_tokens)
    seconds["first_generate"] = time.perf_counter() - start
    stages["decoded"] = resident()
    start = time.perf_counter()
    output = model.generate(prompt, config.new_tokens)
    seconds["second_generate"] = time.perf_counter() - start
    packed = sum(module.packed_bytes() for module in model.model.modules() if hasattr(module, "packed_bytes"))
    rest = sum(parameter.nbytes for parameter in model.model.parameters())
    return {
        "peak_gib": resident()["peak_gib"],
        "packed_gib": packed / 2**30,
        "unquantized_gib": rest / 2**30,
        "stages": stages,
        "seconds": seconds,
        "precision_trace": output.precision_trace[0],
    }


def main(config: MemoryBenchConfig) -> None:
    if config.load is not None:
        print(json.dumps(load_and_decode(config, config.load)))
        return
    shape = replace(_random_llama.LLAMA_7B, num_hidden_layers=config.layers)
    with tempfile.TemporaryDirectory(prefix="pmpd-memory-", dir=config.folder) as folder:
        start = time.perf_counter()
        size = _random_llama.write(Path(folder), shape, PRECISIONS)
        print(
            f"checkpoint of {size / 2**30:.2f} GiB written in {time.perf_counter() - start:.0f} s", flush=True
        )
        arguments = [
            "--load",
            folder,
            "--prompt-tokens",
            str(config.prompt_tokens),
            "--new-tokens",
            str(config.new_tokens),
        ]
        command = [sys.executable, "-m", "bench.memory", *arguments, "--threads", str(config.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    for stage, now in measured["stages"].items():
        print(
            f"{stage:9} "
            + ", ".join(f"{name.removesuffix('_gib')} {gib:.2f}" for name, gib in now.items())
            + " GiB"
        )
    met = measured["peak_gib"] <= LIMIT_GIB
    print(
        f"{'met   ' if met else 'MISSED'} peak of {measured['peak_gib']:.2f} GiB resident, {LIMIT_GIB:g} "
        f"allowed"
    )
    bar = {
        "bar": f"7B, 2-4 bits, resident GiB at most {LIMIT_GIB:g}",
        "measured": measured["peak_gib"],
        "met": met,
    }
    shaped = {
        "layers": config.layers,
        "checkpoint_gib": size / 2**30,
        "new_tokens": config.new_tokens,
        "threads": config.threads,
    }
    print(_record.write("memory_cpu", {**shaped, **measured, "bars": [bar]}, folder=config.output))


if __name__ == "__main__":
    main(tyro.cli(MemoryBenchConfig))
