"""Held-out perplexity of the demo model at every precision: `python -m pmpd.demo.perplexity`."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from pmpd import PMPDForCausalLM, demo
from pmpd.demo.texts import documents_of
from pmpd.demo.train import stream_loss, token_stream
from pmpd.weights.base import shared_state


def perplexities() -> dict[int, float]:
    """Precision -> perplexity per token on all held-out documents, in windows of the model's longest
    sequence."""
    result = {}
    for path in (demo.DENSE, demo.ANYPREC):
        model = PMPDForCausalLM(path).eval()
        stream = token_stream(model.tokenizer, documents_of("held_out"))
        for bits in model.precisions:
            shared_state(model.model).set_uniform(bits)
            result[bits] = math.exp(stream_loss(model.model, stream, model.max_positions))
    return result


def main() -> None:
    table = Table(title="held-out perplexity of the demo model")
    values = perplexities()
    for bits in values:
        table.add_column(f"{bits} bits", justify="right")
    table.add_row(*(f"{value:.2f}" for value in values.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
