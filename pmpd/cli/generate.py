"""Answer a benchmark under several precision schedulers: what the report compares."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from pmpd import farm, plugins, storage
from pmpd.benchmarks import load_questions
from pmpd.benchmarks.base import Split
from pmpd.benchmarks.conversation import choose_template, template_note
from pmpd.cli.flags.generate import GenerateJob
from pmpd.errors import UserError
from pmpd.evaluation.compare import compare
from pmpd.evaluation.presets import NO_PRESET, Preset, get_preset
from pmpd.evaluation.results import read_generations, reportable
from pmpd.evaluation.sampling_plan import SamplingPlan
from pmpd.evaluation.score import ScoreConfig
from pmpd.evaluation.static_search import best_path, choose, read_best, write_best
from pmpd.evaluation.sweep import SweepConfig, check_fit, grid_plans, sweep_runs
from pmpd.farm.connection import output_folder
from pmpd.farm.generate_task import Sweep, check_folder, generate
from pmpd.metrics.precision import average_bits, decision_share, decode_forwards
from pmpd.schedulers.artefact import architecture
from pmpd.schedulers.base import find
from pmpd.schedulers.chain import parse_chain
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.model_spec import ModelSpec, check_held, shared_tokenizer


def main(job: GenerateJob, console: Console | None = None) -> str:
    """Generates, prints the table, returns the folder of the results. ValueError for anything the user can
    cure."""
    console = console or Console()
    plugins.load(job.plugins)
    preset = get_preset(job.preset) if job.preset else NO_PRESET
    benchmark = preset.benchmark(job.bench_name)
    split: Split = "validation" if job.validation or job.static_search else "test"
    length = job.max_new_tokens or preset.max_new_tokens.get(benchmark.name) or benchmark.max_new_tokens
    chain = parse_chain(job.precisions)
    output = output_folder(job.output_dir)
    names = scheduler_names(job, benchmark.reference)
    models = {
        "fp": ModelSpec(
            job.reference_model_path,
            dtype=job.dtype,
            trust_remote_code=job.trust_remote_code,
            revision=job.revision,
            flag="--reference-model-path",
        ),
        "quantized": ModelSpec(
            job.model_path,
            job.use_multi_model,
            None,
            job.kernel,
            job.dtype,
            job.trust_remote_code,
            job.revision,
            job.head_bits,
        ),
    }
    wanted = {group: [name for name in names if (name == "fp") == (group == "fp")] for group in models}
    checkpoints = {
        group: model.open_unquantized() if group == "fp" else model.open()
        for group, model in models.items()
        if wanted[group]
    }
    if "quantized" in checkpoints:
        prefill = () if job.prefill_bit is None else (job.prefill_bit,)
        check_held(
            checkpoints["quantized"], job.model_path, {"--precisions": chain, "--prefill-bit": prefill}
        )
    tokenizer = shared_tokenizer(list(checkpoints.values()))
    left_out: list[str] = []
    questions = load_questions(
        benchmark, split=split, question_file=job.question_file, begin=job.question_begin,
        end=job.question_end,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        left_out=left_out,
    )  # fmt: skip
    if left_out:
        many = f"{len(left_out)} record{'s' * (len(left_out) > 1)}"
        console.print(f"{many} left out; the first one is {left_out[0]}", soft_wrap=True)
    asked = job.template or preset.templates.get(benchmark.name)
    template = choose_template(job.model_id, tokenizer, asked)
    console.print(f"template: {template_note(template, job.model_id, asked)}", soft_wrap=True)
    best_file = (
        job.high_bit_steps
        if job.high_bit_steps and job.high_bit_steps.endswith(".json")
        else best_path(output, benchmark.name, chain)
    )
    folder = storage.join(output, folder_name(job, benchmark.name))

    steps = static_steps(job, chain, length, best_file, checkpoints)
    sweeps = {}
    for group, checkpoint in checkpoints.items():
        config = SweepConfig(
            tuple(wanted[group]),
            chain,
            length,
            job.prefill_bit,
            scheduler_options(job, preset),
            steps,
            sampling_plan(job),
            job.searched,
        )
        runs = tuple(sweep_runs(config))
        fingerprint = checkpoint.fingerprint()
        check_fit(runs, checkpoint.config(), fingerprint)
        sweeps[group] = Sweep(
            benchmark,
            split,
            questions,
            runs,
            job.model_id,
            fingerprint,
            template,
            job.num_choices,
            job.static_search,
            job.dtype,
            models[group].head_bits,
        )
    for group, sweep in sweeps.items():
        check_folder(sweep, storage.join(folder, group))
    slots, unit_rows = farm.batch_of(job.batch_size)
    farm.connect(farm.FarmOptions(job.num_workers, job.gpus_per_worker))
    for group, sweep in sweeps.items():
        widths = sorted(
            {bits for run in sweep.runs for bits in (*run.precisions, run.prefill_bit)}, reverse=True
        )
        model = models[group] if group == "fp" else replace(models[group], precisions=tuple(widths))
        options = farm.FarmOptions(
            job.num_workers,
            job.gpus_per_worker,
            sweep.unit_rows(unit_rows),
            job.retry_errors,
            job.stall_seconds,
            job.price_per_worker_hour,
        )
        generate(sweep, model, storage.join(folder, group), slots, job.reuse_cache, options)
    rows = [row for _, _, found in read_generations(folder, job.static_search) for row in found]
    console.print(result_table(rows))
    if job.static_search:
        best = choose(
            compare(rows)[0], benchmark.metric, benchmark.reference, job.quality_budget, length, ScoreConfig()
        )
        write_best(best_file, best)
        chosen = best["best"]
        console.print(
            f"best: high_bit_steps {best['high_bit_steps']}: {chosen['average_bits']:.3f} average bits, "
            f"{best['metric']} {chosen['value']:.4f} "
            f"({chosen['difference']:+.4f} to uniform {chain[0]} bit), in {best_file}",
            soft_wrap=True,
        )
    console.print(f"Parquet:     {folder}/*/answers/data", soft_wrap=True)
    if all(row["error"] for row in rows):
        raise UserError(f"every turn has an error; the first one: {rows[0]['error']}")
    if job.static_search:
        console.print(f"use it next: {best_command(job)}", soft_wrap=True)
        return folder
    # what a search chose is worth a look beside the other runs only
    inputs = output if job.searched else folder
    report = f"pmpd report --inputs {shlex.quote(inputs)}"
    if reportable(inputs):
        console.print(f"report next: {report}", soft_wrap=True)
    else:
        console.print(
            f"next:        {reference_command(job)}\n"
            f"             answers the same questions without quantization, which a report compares with; "
            f"then\nreport:      {report}",
            soft_wrap=True,
        )
    return folder


def sampling_plan(job: GenerateJob) -> SamplingPlan:
    return SamplingPlan(
        job.temperature, job.top_p, job.top_k, job.seed, job.repetition_penalty, tuple(job.stop)
    )


def scheduler_options(job: GenerateJob, preset: Preset = NO_PRESET) -> dict[str, dict[str, Any]]:
    """Options by scheduler: those of the flags, of the preset, then --scheduler-options."""
    options: dict[str, dict[str, Any]] = {
        "random": {"seed": job.seed},
        "confidence": {"threshold": job.confidence_threshold, "patience": job.confidence_patience},
        "kv_cache": {},
        "budget": {},
        "regression": {},
    }
    if job.random_prior:
        options["random"]["prior"] = list(job.random_prior)
    if job.classifier_path is not None:
        for name in LEARNED:
            options[name]["save_dir"] = storage.absolute(job.classifier_path)
    for name, given in preset.scheduler_options.items():
        options[name] = {**options.get(name, {}), **given}
    try:
        more = {name: dict(given) for name, given in json.loads(job.scheduler_options).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"--scheduler-options {job.scheduler_options}: give JSON of options by scheduler, e.g. "
            f'\'{{"confidence": {{"threshold": 0.8}}}}\' ({error})'
        ) from error
    for name, given in more.items():
        registered = find(name)[0]
        options[registered] = {**options.get(registered, {}), **given}
    return options


LEARNED = ("kv_cache", "budget", "regression")
"""Schedulers that --classifier-path is for."""


def scheduler_names(job: GenerateJob, reference: str) -> list[str]:
    if job.static_search:
        return ["fp"] * (reference == "reference_output") + ["uniform", "static"]
    names = (
        [job.scheduler]
        if job.scheduler
        else []
        if job.use_fp
        else [name.strip() for name in job.schedulers.split(",")]
    )
    untouched = job.scheduler is None and job.schedulers == GenerateJob.schedulers
    if untouched and job.classifier_path is not None and architecture(job.classifier_path) == "regression":
        names = ["regression" if name == "kv_cache" else name for name in names]
    return (["fp"] if job.use_fp and "fp" not in names else []) + names


def folder_name(job: GenerateJob, benchmark: str) -> str:
    chain = "-".join(map(str, parse_chain(job.precisions)))
    if job.static_search:
        return f"{benchmark}-search-{chain}"
    variant = f"-{job.preset}" if job.preset else ""
    variant += "-sampled" * (job.temperature != 0)
    return benchmark + variant + "-validation" * job.validation + f"-best-{chain}" * job.searched


def best_command(job: GenerateJob) -> str:
    """The command that answers the test split under what the search of `job` chose: all flags but those of
    search and questions."""
    left_out = ("static_search", "search_points", "quality_budget", "validation",
                "question_file", "question_begin", "question_end")  # fmt: skip
    words = command_like(job, ["--scheduler", "static", "--high-bit-steps", "best"], left_out)
    return words + " --question-file TEST_QUESTIONS" * (job.question_file is not None)


def reference_command(job: GenerateJob) -> str:
    """The command by which the unquantized model answers the questions of `job`."""
    return command_like(job, ["--use-fp"])


def command_like(job: GenerateJob, words: Sequence[str], left_out: Sequence[str] = ()) -> str:
    """pmpd generate with `words` in the place of the flags that choose runs, and the other flags of `job` but
    those left out."""
    left_out = (*left_out, "scheduler", "schedulers", "use_fp", "high_bit_steps")
    words = ["pmpd", "generate", *words]
    for field in fields(job):
        value = getattr(job, field.name)
        if field.name in left_out or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def static_steps(
    job: GenerateJob, chain: tuple[int, ...], length: int, best: str, checkpoints: dict[str, Checkpoint]
) -> tuple[tuple[int, ...], ...]:
    """The settings of `static`; () for the default."""
    if job.static_search:
        return tuple(grid_plans(len(chain) - 1, length, job.search_points))
    if job.searched:
        return (
            read_best(
                best,
                chain,
                checkpoints["quantized"].fingerprint() if "quantized" in checkpoints else "",
                length,
            ),
        )
    if job.high_bit_steps is None:
        return ()
    try:
        return (tuple(int(step) for step in job.high_bit_steps.split(",")),)
    except ValueError:
        raise UserError(
            f"--high-bit-steps {job.high_bit_steps}: one number, one per pair (42,84), best, or the .json of "
            f"a search"
        ) from None


def result_table(rows: list[dict]) -> Table:
    """Per run: turns, failures, tokens, average bits, and what decisions took of the decode time."""
    plans = "static-A/B: decode forwards 1 to A at the highest precision, on to B at the next. "
    decisions = "decisions: what schedulers took of the decode time."
    has_plans = any("/" in row["run"] for row in rows)
    table = Table(title="generated", caption=plans * has_plans + decisions, caption_justify="left")
    for column in ("run", "turns", "failed", "new tokens", "average bits", "decisions"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in dict.fromkeys(
        row["run"] for row in sorted(rows, key=lambda row: (row["kind"] != "fp", row["conversation_id"]))
    ):
        mine = [row for row in rows if row["run"] == run]
        good = [row for row in mine if not row["error"]]
        bits = average_bits(sum((decode_forwards(row["precision_trace"]) for row in good), Counter()))
        tokens = sum(row["output_tokens"] for row in good)
        table.add_row(
            run,
            str(len(mine)),
            str(len(mine) - len(good)),
            str(tokens),
            "-" if bits is None else f"{bits:.3f}",
            f"{decision_share(good) or 0:.1%}",
        )
    return table
