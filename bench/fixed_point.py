"""What fixed point and an 8-bit head cost in quality: perplexity of the demo model on held-out texts.

`python -m bench.fixed_point` feeds the texts token by token through decode steps: the model's modules in
float32 with the reference kernel, then bfloat16 with the reference kernel, then the native step with a head
of 16 and of 8 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import _record
from pmpd import PMPDForCausalLM, demo
from pmpd.decode.engine import Engine
from pmpd.decode.slots import TokenPlaces
from pmpd.demo.texts import documents_of

ROWS = 16


def loss_of(engine: Engine, tokens_RT: torch.Tensor, bits: int) -> float:
    """Mean negative log likelihood of each token after the first, in nats."""
    rows, length = tokens_RT.shape
    total = torch.zeros((), dtype=torch.float64)
    for position in range(length - 1):
        engine.state.set_uniform(bits)
        where = torch.full((rows,), position)
        plan = TokenPlaces(torch.arange(rows), where, position + 1, rows)
        logits = engine.forward(tokens_RT[:, position], plan, None).double()
        total += torch.nn.functional.cross_entropy(logits, tokens_RT[:, position + 1], reduction="sum")
    return float(total / (rows * (length - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of each of 16 texts")
    parser.add_argument("--out", type=Path, default=_record.RESULTS, help="folder of the JSON")
    options = parser.parse_args()

    def model(dtype: torch.dtype, kernel: str | None) -> PMPDForCausalLM:
        return PMPDForCausalLM(demo.ANYPREC, dtype=dtype, kernel=kernel).eval()

    tokenizer = model(torch.float32, "reference").tokenizer
    encoded = (tokenizer(document.text).input_ids for document in documents_of("held_out"))
    texts = [ids[: options.tokens] for ids in encoded if len(ids) >= options.tokens][:ROWS]
    tokens_RT = torch.tensor(texts)
    native = model(torch.bfloat16, None)
    engines = {
        "float32, exact tables": Engine(
            model(torch.float32, "reference").model, ROWS, options.tokens, lean=False
        ),
        "bfloat16, exact tables": Engine(
            model(torch.bfloat16, "reference").model, ROWS, options.tokens, lean=False
        ),
        "fixed point, head of 16 bits": Engine(native.model, ROWS, options.tokens),
        "fixed point, head of 8 bits": Engine(native.model, ROWS, options.tokens, head_bits=8),
    }
    rows = []
    for bits in (4, 3, 2):
        first = None
        for name, engine in engines.items():
            loss = loss_of(engine, tokens_RT, bits)
            first = loss if first is None else first
            perplexity, change = (
                float(torch.tensor(loss).exp()),
                100 * (float(torch.tensor(loss - first).exp()) - 1),
            )
            rows.append({"bits": bits, "name": name, "perplexity": perplexity, "change_percent": change})
            print(f"{bits} bits, {name:30}: perplexity {perplexity:.3f} ({change:+.2f} %)", flush=True)
    result = {"texts": len(texts), "tokens": options.tokens, "rows": rows}
    print(_record.write("fixed_point_cpu", result, folder=options.out))


if __name__ == "__main__":
    main()
