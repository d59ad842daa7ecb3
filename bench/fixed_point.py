"""What fixed point and a head of 8 bits cost in quality: perplexity of a text, at each precision.

`python -m bench.fixed_point` cuts the text into rows of equal length. The exact model (float32 and bfloat16
with the reference kernel) forwards them at once; the native step gets them token by token, as it decodes,
with a head of 16 and of 8 bits. `--model-path smollm2/anyprec --dataset texts.jsonl` for another model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench import _record
from pmpd import PMPDForCausalLM, demo
from pmpd.decode.engine import Engine
from pmpd.decode.slots import TokenPlaces
from pmpd.evaluation.perplexity import token_stream
from pmpd.labeling.prompts import PromptConfig, records
from pmpd.weights.base import shared_state

MODELS = {  # dtype, kernel, bits of the head
    "float32, exact tables": (torch.float32, "reference", 16),
    "bfloat16, exact tables": (torch.bfloat16, "reference", 16),
    "fixed point, head of 16 bits": (torch.bfloat16, None, 16),
    "fixed point, head of 8 bits": (torch.bfloat16, None, 8),
}


def logits_at_once(model: PMPDForCausalLM, bits: int, tokens_RT: Tensor) -> Iterator[Tensor]:
    """Logits [T - 1, V] of each row, by the model's modules."""
    shared_state(model.model).set_uniform(bits)
    for row in tokens_RT:
        yield model.model(input_ids=row[None], use_cache=False).logits[0, :-1]


def logits_by_steps(model: PMPDForCausalLM, bits: int, tokens_RT: Tensor) -> Iterator[Tensor]:
    """Logits [R, V] of each position but the last, by decode steps."""
    rows, length = tokens_RT.shape
    engine = Engine(model.model, rows, length)
    assert engine.lean is not None
    assert engine.lean.native is not None, "this model does not decode by native steps"
    for position in range(length - 1):
        engine.state.set_uniform(bits)
        where = torch.full((rows,), position)
        plan = TokenPlaces(torch.arange(rows), where, position + 1, rows)
        yield engine.forward(tokens_RT[:, position], plan, None)


def loss_of(model: PMPDForCausalLM, kernel: str | None, bits: int, tokens_RT: Tensor) -> float:
    """Mean negative log likelihood of each token after the first of its row, in nats."""
    wanted = tokens_RT[:, 1:]
    pieces = logits_at_once if kernel else logits_by_steps
    total = 0.0
    for logits, targets in zip(pieces(model, bits, tokens_RT), wanted if kernel else wanted.T, strict=True):
        total += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return total / wanted.numel()


def parsed(description: str | None, rows: int, tokens: int) -> argparse.Namespace:
    """Flags of a benchmark that forwards `rows` texts of `tokens` tokens through a model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model-path", default=str(demo.ANYPREC), help="Any-Precision checkpoint")
    parser.add_argument("--dataset", default="demo", help="as pmpd perplexity takes it")
    parser.add_argument("--split", default=None, help="of the dataset")
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--tokens", type=int, default=tokens, help="of each row")
    parser.add_argument("--out", type=Path, default=_record.RESULTS, help="folder of the JSON")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    options = parsed(__doc__, rows=16, tokens=128)
    tokens_RT = None
    results: list[dict] = []
    exact: dict[int, float] = {}
    for name, (dtype, kernel, head_bits) in MODELS.items():  # one after the other: one is in memory
        model = PMPDForCausalLM(options.model_path, dtype=dtype, kernel=kernel, head_bits=head_bits).eval()
        if tokens_RT is None:
            source = PromptConfig(options.dataset, None, options.split)
            texts = (text for _, text, problem in records(source) if problem is None)
            size = options.rows * options.tokens
            tokens_RT = token_stream(texts, model.tokenizer, size).view(options.rows, options.tokens)
        for bits in model.precisions:
            started = time.perf_counter()
            loss = loss_of(model, kernel, bits, tokens_RT)
            change = 100 * (math.exp(loss - exact.setdefault(bits, loss)) - 1)
            results.append(
                {"bits": bits, "name": name, "perplexity": math.exp(loss), "change_percent": change}
            )
            print(
                f"{bits} bits, {name:30}: perplexity {math.exp(loss):.3f} ({change:+.2f} %), "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    result = {
        "model": Path(options.model_path).name,
        "dataset": Path(options.dataset).name,
        "rows": options.rows,
        "tokens": options.tokens,
        "figures": results,
    }
    print(_record.write("fixed_point_cpu", result, folder=options.out))


if __name__ == "__main__":
    main()
