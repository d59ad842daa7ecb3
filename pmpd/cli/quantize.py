"""Quantize a causal language model into an Any-Precision checkpoint: one folder that holds several
precisions.

    pmpd quantize --model-path meta-llama/Llama-2-7b-chat-hf --dataset allenai/c4 --output-dir anyprec-7b

An interrupted run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import pmpd
from pmpd import storage
from pmpd.labeling.prompts import PromptConfig, records
from pmpd.quantize.convert import QuantizeConfig, Summary, quantize_checkpoint
from pmpd.weights.hub import local_folder

DEMO = Path(pmpd.__file__).parent / "demo" / "model"
_STAGES = {"gradients": "gradients of calibration samples", "layers": "layers quantized"}


@dataclass(frozen=True)
class QuantizeJob(QuantizeConfig):
    """Quantize a model to several precisions at once (Any-Precision format)."""

    model_path: str = str(DEMO)
    """Unquantized checkpoint: a folder, or a Hugging Face id."""
    output_dir: str | None = None
    """Folder to write, or a URI (s3://bucket/folder); default: anyprec-NAME-PARENT-SEED in the current
    folder."""
    dataset: str = "demo"
    """Calibration texts: demo, a local .json[.gz]/.jsonl/.parquet/.txt file, a folder of such, or a Hugging
    Face id (allenai/c4)."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str | None = None
    """Split of the dataset; default: train."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""


def main(config: QuantizeJob, console: Console | None = None) -> Summary:
    """Quantizes and prints what was written. ValueError: see `quantize_checkpoint`."""
    console = console or Console()
    folder = local_folder(config.model_path)
    name = (
        Path(config.model_path).resolve().name
        if folder == Path(config.model_path)
        else config.model_path.split("/")[-1]
    )
    output = (
        config.output_dir
        or f"anyprec-{'demo' if folder == DEMO else name}-{config.parent_precision}-{config.seed_precision}"
    )
    source = PromptConfig(
        config.dataset, config.dataset_config, config.split or ("train" if config.dataset == "demo" else None)
    )
    source.kind  # noqa: B018 - raises for a dataset that is not there, before any work
    texts = (text for _, text, problem in records(source) if problem is None)
    settings = QuantizeConfig(
        **{key: value for key, value in asdict(config).items() if key in QuantizeConfig.__dataclass_fields__}
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks = {stage: bar.add_task(text, total=None, visible=False) for stage, text in _STAGES.items()}
        summary = quantize_checkpoint(
            folder,
            storage.cache_folder(output) if storage.is_uri(output) else output,
            settings,
            texts,
            trust_remote_code=config.trust_remote_code,
            on_progress=lambda stage, done, total: bar.update(
                tasks[stage], completed=done, total=total, visible=True
            ),
        )
    if storage.is_uri(output):
        storage.upload_folder(storage.cache_folder(output), output)
    report(summary, output, console)
    return summary


def report(summary: Summary, output: str, console: Console) -> None:
    table = Table(
        title="Weighted error of the quantized weights"
        if summary.settings["weighted"]
        else "Error of the quantized weights"
    )
    table.add_column("precision", justify="right")
    table.add_column("relative error", justify="right")
    for bits, error in summary.relative_error.items():
        table.add_row(bits, f"{error:.6f}")
    console.print(table)
    for module, reason in summary.skipped.items():
        console.print(f"left unquantized: {module} ({reason})")
    samples, tokens = summary.calibration_tokens
    calibration = f"{samples} calibration samples of {tokens} tokens" if samples else "not weighted"
    again = f", {summary.reused_layers} layers reused" if summary.reused_layers else ""
    console.print(
        f"wrote {output}: {summary.model_bytes / 1e6:.2f} MB (unquantized: {summary.source_bytes / 1e6:.2f} "
        f"MB), "
        f"{summary.quantized_weights:,} weights quantized, {calibration}, {summary.seconds:.1f} s{again}"
    )
    console.print(f"next: pmpd label --model-path {output}", soft_wrap=True)
