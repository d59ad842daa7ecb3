"""Perplexity of a checkpoint on a text, at every precision that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pmpd.weights.model_spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import Console

    from pmpd.evaluation.perplexity import Perplexity
from pmpd.cli.flags.perplexity import PerplexityJob


def main(config: PerplexityJob, console: Console | None = None) -> dict[int, Perplexity]:
    """Measures and prints. UserError: no such model or texts, precisions that the model does not hold."""
    import torch
    from rich.console import Console

    from pmpd import PMPDForCausalLM, gpu, plugins
    from pmpd.cli.steps import Steps
    from pmpd.evaluation.perplexity import by_precision, count_windows, token_stream
    from pmpd.labeling.prompts import PromptConfig, records
    from pmpd.weights.base import shared_state

    console = console or Console()
    plugins.load(config.plugins)
    source = PromptConfig(config.dataset, config.dataset_config, config.split)
    source.kind  # noqa: B018 - raises for a dataset that is not there, before any work
    device = torch.device("cuda" if gpu.available() else "cpu")
    spec = ModelSpec(
        config.model_path,
        config.model_path.endswith(".json"),
        config.precisions or None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        head_bits=config.head_bits,
    )
    model = PMPDForCausalLM.from_spec(spec, device).eval()
    texts = (text for _, text, problem in records(source) if problem is None)
    stream = token_stream(texts, model.tokenizer, config.tokens)
    window = min(config.window, model.max_positions)
    stride = min(config.stride or window, window)
    total = count_windows(len(stream), window, stride) * len(model.precisions)
    done = 0

    def on_window(count: int) -> None:
        nonlocal done
        done += count
        steps("windows", done, total)

    with Steps(console) as steps:
        found = by_precision(
            model.model,
            model.precisions,
            shared_state(model.model).set_uniform,
            stream,
            window,
            stride,
            config.batch_size,
            on_window,
        )
    dtype = str(spec.compute_dtype(device)).removeprefix("torch.")
    console.print(f"perplexity of {config.model_path} on {config.dataset}", soft_wrap=True)
    console.print(table(found))
    scored = next(iter(found.values())).tokens
    console.print(
        f"{scored:,} tokens scored, windows of {window}, stride {stride}, {dtype} on {device}, "
        f"head of {config.head_bits} bits"
    )
    if config.output is not None:
        _write(config, found, window, stride)
    return found


def table(found: dict[int, Perplexity]):  # -> rich.table.Table, imported late
    """One line a precision."""
    from rich.table import Table

    result = Table()
    result.add_column("precision", justify="right")
    result.add_column("perplexity", justify="right")
    for bits, value in found.items():
        result.add_row(str(bits), f"{value.value:,.2f}")
    return result


def _write(config: PerplexityJob, found: dict[int, Perplexity], window: int, stride: int) -> None:
    content = {
        "model_path": config.model_path,
        "dataset": config.dataset,
        "window": window,
        "stride": stride,
        "perplexity": {bits: value.value for bits, value in found.items()},
        "tokens": next(iter(found.values())).tokens,
        "head_bits": config.head_bits,
    }
    assert config.output is not None
    Path(config.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
