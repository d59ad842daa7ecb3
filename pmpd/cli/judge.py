"""Have a judge model rate the answers of pmpd generate (MT-Bench), alone or in pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from pmpd import farm, plugins, storage
from pmpd.cli.flags.judge import JudgeJob
from pmpd.errors import UserError
from pmpd.evaluation.judge import (
    REFERENCE_CATEGORIES,
    Answered,
    answered,
    load_judge_prompts,
    pair_matches,
    single_matches,
)
from pmpd.evaluation.judge_endpoint import Endpoint
from pmpd.evaluation.results import read_generations, reportable
from pmpd.farm.connection import output_folder
from pmpd.farm.judge_task import EndpointJudgeTask, ModelJudgeTask, judge
from pmpd.storage.records import source_of
from pmpd.weights.model_spec import ModelSpec


def main(job: JudgeJob, console: Console | None = None) -> str:
    """Judges, prints what came of it, returns the folder of the judgments."""
    console = console or Console()
    plugins.load(job.plugins)
    prompts = load_judge_prompts(job.judge_prompts, job.prompt_mode)
    references = read_references(job.judge_references) if job.judge_references else {}
    answers, failed, benchmark = read_answers(job)
    without = {
        one.question_id
        for one in answers
        if one.category in REFERENCE_CATEGORIES and one.question_id not in references
    }
    if failed:
        console.print(f"note: {failed} conversations with a failed turn are not judged", soft_wrap=True)
    if without:
        console.print(
            f"note: {len(without)} questions of {', '.join(REFERENCE_CATEGORIES)} are judged without a "
            f"reference answer; --judge-references gives them",
            soft_wrap=True,
        )
    pairs = pairs_of_runs(job, sorted({one.run for one in answers}))
    matches = list(
        single_matches(answers, references, prompts)
        if job.mode == "single"
        else pair_matches(answers, pairs, references, prompts)
    )
    identity = {
        "benchmark": benchmark,
        "judge": job.name,
        "mode": job.mode,
        "pairs": pairs,
        "prompts": prompts.digest,
        "matches": hashlib.sha256("".join(sorted(m["judgment_id"] for m in matches)).encode()).hexdigest(),
        "max_new_tokens": job.max_new_tokens,
    }
    folder = storage.join(output_folder(job.output_dir), folder_name(benchmark, job.name, job.mode))
    task, options = recipe(job)
    farm.connect(options)
    result = judge(task, matches, folder, identity, options)
    errors = storage.read_table(result.dataset, ["error"])["error"].to_pylist() if result.errors else []
    first = next((error for error in errors if error), "").partition("\n")[0]
    console.print(
        f"{result.rows} judgments by {job.name}, {result.new_items} of them new; {result.errors} with an "
        f"error" + (f" (the first: {first}); --retry-errors does them again" if first else ""),
        soft_wrap=True,
    )
    console.print(f"Parquet:     {storage.data_folder(result.dataset)}", soft_wrap=True)
    if result.errors == result.rows:
        raise UserError(f"every judgment has an error; the first one: {errors[0]}")
    if not reportable(job.input):
        console.print(
            "next:        pmpd generate --use-fp, with the other flags of these answers: a report compares "
            "them with the unquantized model's, too",
            soft_wrap=True,
        )
    console.print(f"report next: pmpd report --inputs {job.input} {folder}", soft_wrap=True)
    return str(result.dataset)


def folder_name(benchmark: str, judge_name: str, mode: str) -> str:
    clean = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{benchmark}-{judge_name}-{mode}")
    return clean.lstrip(".")


def recipe(job: JudgeJob) -> tuple[EndpointJudgeTask | ModelJudgeTask, farm.FarmOptions]:
    """The task of the farm, and how it is spread."""
    if job.judge_url is not None:
        endpoint = Endpoint(
            job.judge_url, job.name, job.judge_key_variable, job.timeout_seconds, job.attempts,
            max_tokens=job.max_new_tokens,
        )  # fmt: skip
        options = farm.FarmOptions(0, 0, max(job.batch_size, job.parallel), job.retry_errors)
        return EndpointJudgeTask(endpoint, job.parallel), options
    from pmpd.benchmarks.conversation import choose_template

    model = ModelSpec(
        str(job.judge_model_path), trust_remote_code=job.trust_remote_code, flag="--judge-model-path"
    )
    template = choose_template(job.name, model.open().tokenizer(), job.template)
    options = farm.FarmOptions(job.num_workers, job.gpus_per_worker, job.batch_size, job.retry_errors)
    return ModelJudgeTask(model, job.name, template, job.max_new_tokens, job.batch_size), options


def read_answers(job: JudgeJob) -> tuple[list[Answered], int, str]:
    """(answers, conversations with a failed turn, the benchmark). ValueError for a run that is not there."""
    rows: list[dict[str, Any]] = []
    turns: dict[str, Sequence[str]] = {}
    for folder, _, found in read_generations(job.input):
        rows += found
        beside = storage.join(storage.absolute(folder).rpartition("/")[0], "conversations")
        asked = storage.read_table(beside, ["prompt_id", "turns"]).to_pylist()
        turns |= {row["prompt_id"]: row["turns"] for row in asked}
    benchmarks = sorted({f"{row['benchmark']}" for row in rows})
    if len(benchmarks) > 1:
        raise UserError(f"--input {job.input}: answers of {', '.join(benchmarks)}; give the folder of one")
    known = sorted({row["run"] for row in rows})
    if job.runs is not None:
        wanted = [name.strip() for name in job.runs.split(",")]
        absent = sorted(set(wanted) - set(known))
        if absent:
            raise UserError(f"--runs {', '.join(absent)}: {job.input} holds {', '.join(known)}")
        rows = [row for row in rows if row["run"] in wanted]
    answers, failed = answered(rows, turns)
    return answers, failed, benchmarks[0]


def pairs_of_runs(job: JudgeJob, runs: Sequence[str]) -> list[tuple[str, str]]:
    """(run, other run) of every comparison; [] for ratings."""
    if job.mode == "single":
        return []
    if job.mode == "pair-all":
        return [(run, other) for index, run in enumerate(runs) for other in runs[index + 1 :]]
    uniform = [run for run in runs if run.removeprefix("uniform-").isdigit()]
    baseline = job.baseline or max(uniform, key=lambda run: int(run.removeprefix("uniform-")), default=None)
    if baseline is None or baseline not in runs:
        raise UserError(f"--baseline {baseline}: answers are there of {', '.join(runs)}")
    return [(run, baseline) for run in runs if run != baseline]


def read_references(path: str) -> Mapping[str, Sequence[str]]:
    """question_id -> reference answers by turn."""
    references = {}
    for found in source_of(path, flag="--judge-references"):
        record = found.fields or {}
        try:
            texts = record["choices"][0]["turns"] if "choices" in record else record.get("reference") or []
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a reference that is no text")
            references[str(record["question_id"])] = list(texts)
        except (LookupError, TypeError) as error:
            raise UserError(
                f"--judge-references {path} {found.place}: {found.problem or repr(error)}; wanted are "
                f"lines of FastChat's reference_answer/MODEL.jsonl or question.jsonl"
            ) from None
    return references
