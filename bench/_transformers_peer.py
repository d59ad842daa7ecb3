"""transformers' own batched generation, unquantized: the tokens a second that one has without this package.

    python -m bench._transformers_peer MODEL --prompts texts.json --device cuda

Prints one line of JSON. Greedy, in bfloat16 on a GPU, prompts of about one length together, padded on the
left; a row's tokens count up to its own end, what is computed for it after that does not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmpd.decode.ending import end_token_ids


def generate(
    model: Any, prompts: Sequence[Sequence[int]], batch: int, new_tokens: int, ends: Sequence[int], pad: int
) -> int:
    """Decodes all; the number of new tokens."""
    device, total = next(model.parameters()).device, 0
    ordered = sorted(prompts, key=len)
    for first in range(0, len(ordered), batch):
        rows = ordered[first : first + batch]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens,
                do_sample=False, eos_token_id=list(ends) or None, pad_token_id=pad,
            )  # fmt: skip
        is_end = torch.isin(output[:, width:], torch.tensor(sorted(ends), device=device))
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, output.shape[1] - width)
        total += int(lengths.sum())
    return total


def measure(
    path: str, prompts: Sequence[Sequence[int]], batches: Sequence[int], new_tokens: int, device: str
) -> list[dict[str, Any]]:
    """Of each batch size new tokens a second, the first batch (which warms up) not counted."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()  # type: ignore[arg-type]
    ends = sorted(end_token_ids(model, tokenizer))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    results = []
    for batch in batches:
        generate(model, prompts[:batch], batch, min(8, new_tokens), ends, pad)
        begin = time.perf_counter()
        count = generate(model, prompts, batch, new_tokens, ends, pad)
        seconds = time.perf_counter() - begin
        results.append({"batch": batch, "tokens": count, "tokens_per_second": count / seconds})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: token ids of each prompt")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    prompts = json.loads(options.prompts.read_text())
    results = measure(options.model, prompts, options.batch_sizes, options.max_new_tokens, options.device)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
