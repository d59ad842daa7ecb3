"""Quantize a causal language model into an Any-Precision checkpoint: one folder that holds several
precisions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pmpd.quantize.config import QuantizeConfig

if TYPE_CHECKING:
    from rich.console import Console

    from pmpd.quantize.convert import Summary
from pmpd import demo
from pmpd.cli.flags.quantize import QuantizeJob


def main(config: QuantizeJob, console: Console | None = None) -> Summary:
    """Quantizes and prints what was written. UserError: see `quantize_checkpoint`."""
    from rich.console import Console

    from pmpd import farm, plugins, storage
    from pmpd.cli.steps import Steps
    from pmpd.farm.quantize_task import STAGES, STALL_SECONDS, QuantizeTask, quantize_on_farm
    from pmpd.labeling.prompts import PromptConfig

    console = console or Console()
    plugins.load(config.plugins)
    path = config.model_path
    name = storage.base_name(path if storage.is_uri(path) else Path(path).resolve())
    told = "demo" if Path(path) == demo.DENSE else name
    output = config.output_dir or f"anyprec-{told}-{config.parent_precision}-{config.seed_precision}"
    texts = PromptConfig(
        config.dataset, config.dataset_config, config.split or ("train" if config.dataset == "demo" else None)
    )
    texts.kind  # noqa: B018 - raises for a dataset that is not there, before any work
    settings = QuantizeConfig(
        **{key: value for key, value in asdict(config).items() if key in QuantizeConfig.__dataclass_fields__}
    )
    on_farm = config.gpus_per_worker is not None
    task = QuantizeTask(
        storage.absolute(path) if on_farm and storage.exists(path) else path,
        farm.output_folder(output) if on_farm else output,
        settings,
        texts,
        config.dtype,
        config.trust_remote_code,
    )
    if on_farm:
        options = farm.FarmOptions(
            1,
            config.gpus_per_worker,
            1,
            retry_errors=True,
            stall_seconds=config.stall_seconds or STALL_SECONDS,
        )
        farm.connect(options)
        summary = quantize_on_farm(task, options)
    else:
        worked = False

        def on_progress(stage: str, done: int, total: int) -> None:
            nonlocal worked
            worked = True
            steps(STAGES[stage], done, total)

        with Steps(console) as steps:
            summary = task.quantize(None, on_progress)
        if not worked:
            console.print(f"{task.output} is finished already; what its run said:", soft_wrap=True)
    report(summary, path, task.output, console)
    return summary


def report(summary: Summary, source: str, output: str, console: Console) -> None:
    """Prints what the precisions are worth, what was written and what comes next."""
    from rich.table import Table

    table = Table(title="What the precisions are worth")
    table.add_column("precision", justify="right")
    table.add_column(
        "relative error of outputs" if summary.settings["weighted"] else "relative error of weights",
        justify="right",
    )
    table.add_column("perplexity, kept-out texts", justify="right")
    for bits in sorted({*summary.relative_error, *summary.perplexity}, key=int, reverse=True):
        error, perplexity = summary.relative_error.get(bits), summary.perplexity.get(bits)
        table.add_row(
            bits,
            "" if error is None else f"{error:.6f}",
            "not measured" if perplexity is None else f"{perplexity:,.2f}",
        )
    console.print(table)
    for module, reason in summary.skipped.items():
        console.print(f"left unquantized: {module} ({reason})")
    samples, tokens = summary.calibration_tokens
    calibration = f"{samples} calibration samples of {tokens} tokens" if samples else "not weighted"
    again = f", {summary.reused_layers} layers reused" if summary.reused_layers else ""
    console.print(
        f"wrote {output}: {summary.model_bytes / 1e6:.2f} MB (unquantized: {summary.source_bytes / 1e6:.2f} "
        f"MB), "
        f"{summary.quantized_weights:,} weights quantized, {calibration}, "
        f"{summary.seconds:.1f} s ({summary.processor_seconds:.1f} of a processor), "
        f"{summary.peak_bytes / 1e9:.1f} GB of memory at most{again}",
        soft_wrap=True,
    )
    if summary.stage_seconds:  # a folder that was finished before there were any has none
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary.stage_seconds.items())
        console.print(f"seconds by stage: {stages}", soft_wrap=True)
    reference = "" if Path(source) == demo.DENSE else f" --reference-model-path {source} --dataset TEXTS"
    console.print(
        f"next: pmpd perplexity --model-path {output}, or pmpd label --model-path {output}{reference}",
        soft_wrap=True,
    )
