"""Perplexity of a checkpoint on a text, at every precision that it holds.

    pmpd perplexity --model-path anyprec-7b --dataset texts.jsonl

The texts are one stream of tokens, each text followed by the end-of-sequence token, cut into windows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pmpd.errors import UserError
from pmpd.weights.model_spec import Dtype, ModelSpec

if TYPE_CHECKING:
    from rich.console import Console

    from pmpd.evaluation.perplexity import Perplexity

DEMO = str(Path(__file__).parents[1] / "demo" / "anyprec")


@dataclass(frozen=True)
class PerplexityJob:
    """Print the perplexity of a model at each of its precisions."""

    model_path: str = DEMO
    """Checkpoint: a folder, a Hugging Face id, or a JSON file that names a checkpoint for each precision."""
    precisions: tuple[int, ...] = ()
    """Precisions to measure; default: all that the checkpoint holds (16 for an unquantized one)."""
    dataset: str = "demo"
    """Texts: demo (its held-out ones), a local .json[.gz]/.jsonl/.parquet/.txt file, a folder of such, or a
    Hugging Face id."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str | None = None
    """Split of the dataset; default: held_out of the demo, train of others."""
    tokens: int = 32768
    """At most that many tokens of the texts, from the beginning."""
    window: int = 2048
    """Tokens that share a forward (fewer where the model has fewer positions). Perplexity depends on it: more
    tokens before a token make it easier to foretell."""
    stride: int | None = None
    """Tokens from one window's beginning to the next one's; only the last `stride` of a window count.
    Default: the window's length, windows lie end to end."""
    batch_size: int = 1
    """Windows that share a forward."""
    dtype: Dtype = "auto"
    """What activations and unquantized weights are; auto: float32 on a CPU, float16 on a GPU."""
    output: str | None = None
    """Also write the figures to this JSON file."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens}: give at least 2")
        if self.window < 2:
            raise UserError(f"--window {self.window}: give at least 2 tokens")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise UserError(f"--stride {self.stride}: give 1..{self.window} (the window)")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give at least 1")


def main(config: PerplexityJob, console: Console | None = None) -> dict[int, Perplexity]:
    """Measures and prints. UserError: no such model or texts, precisions that the model does not hold."""
    import torch
    from rich.console import Console

    from pmpd import PMPDForCausalLM, gpu
    from pmpd.cli.steps import Steps
    from pmpd.evaluation.perplexity import by_precision, count_windows, token_stream
    from pmpd.labeling.prompts import PromptConfig, records
    from pmpd.weights.base import shared_state

    console = console or Console()
    source = PromptConfig(config.dataset, config.dataset_config, config.split)
    source.kind  # noqa: B018 - raises for a dataset that is not there, before any work
    device = torch.device("cuda" if gpu.available() else "cpu")
    spec = ModelSpec(
        config.model_path,
        config.model_path.endswith(".json"),
        config.precisions or None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
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
    console.print(f"{scored:,} tokens scored, windows of {window}, stride {stride}, {dtype} on {device}")
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
    }
    assert config.output is not None
    Path(config.output).write_text(json.dumps(content, indent=1) + "\n")
