"""Tokens per second at batch 1 on a CPU, beside transformers on the unquantized model.

`python -m bench.beside_transformers --model-path smollm2/anyprec --reference-model-path smollm2/hf` generates
greedily from one prompt; contenders take turns, figures are medians of rounds. Without flags: the demo model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench import _record
from pmpd import PMPDForCausalLM, demo
from pmpd.decode.requests import Request

PROMPT_TOKENS = 16


def ours(model: PMPDForCausalLM, bits: int, tokens: int) -> Callable[[], object]:
    engine = model.engine(1, PROMPT_TOKENS + tokens)
    request = Request("0", list(range(5, 5 + PROMPT_TOKENS)), tokens)
    return lambda: list(engine.run([request], None, bits, ()))


def theirs(folder: str, dtype: torch.dtype, tokens: int) -> Callable[[], object]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompt = torch.arange(5, 5 + PROMPT_TOKENS)[None]
    return lambda: model.generate(
        prompt, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default=str(demo.ANYPREC), help="Any-Precision checkpoint")
    parser.add_argument("--reference-model-path", default=str(demo.DENSE), help="the unquantized model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=_record.RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = {
        "transformers, float32": theirs(options.reference_model_path, torch.float32, options.tokens),
        "transformers, bfloat16": theirs(options.reference_model_path, torch.bfloat16, options.tokens),
    }
    dense = PMPDForCausalLM(options.reference_model_path).eval()
    runs["pmpd, float32, 16 bits"] = ours(dense, 16, options.tokens)
    for head_bits in (16, 8):
        model = PMPDForCausalLM(options.model_path, dtype=torch.bfloat16, head_bits=head_bits).eval()
        for bits in model.precisions:
            runs[f"pmpd, {bits} bits, head of {head_bits}"] = ours(model, bits, options.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):  # the first is not counted
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    first = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, some in seconds.items():
        median = statistics.median(some)
        rate, times = options.tokens / median, first / median
        rows.append({"name": name, "tokens_per_second": rate, "times_transformers_float32": times})
        print(f"{name:32} {rate:7.1f} tokens/s, {times:5.2f} times transformers in float32", flush=True)
    result = {
        "model": Path(options.model_path).name, "threads": options.threads, "tokens": options.tokens,
        "rounds": options.rounds, "load": os.getloadavg()[0], "rows": rows,
    }  # fmt: skip
    print(_record.write("beside_transformers_cpu", result, folder=options.out))


if __name__ == "__main__":
    main()
