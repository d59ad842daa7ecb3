"""Score what pmpd generate answered and write the report: one HTML page, its figures, Markdown, and the
scores as Parquet."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pmpd import plugins, storage
from pmpd.cli.flags.report import ReportJob
from pmpd.errors import UserError
from pmpd.evaluation.compare import Comparison, compare
from pmpd.evaluation.judge_scores import JudgeTable, judge_table
from pmpd.evaluation.results import datasets_at, read_generations, read_judgments
from pmpd.evaluation.score import ScoreConfig, score
from pmpd.metrics.base import get_metric
from pmpd.report.build import conclusions, notes, unfinished, write_report
from pmpd.report.source import Report, Source


def main(job: ReportJob, console: Console | None = None) -> Path:
    """Writes the report; the path of its page (of a local copy, where the report is written to a URI).
    UserError for anything the user can cure."""
    console = console or Console()
    plugins.load(job.plugins)
    if not storage.is_uri(job.output_dir):
        return _write(job, job.output_dir, console)
    local = storage.cache_folder(job.output_dir)
    shutil.rmtree(local, ignore_errors=True)
    page = _write(replace(job, output_dir=str(local)), job.output_dir, console)
    storage.upload_folder(local, job.output_dir)
    return page


def _write(job: ReportJob, told: str, console: Console) -> Path:
    """Writes into a local folder, and calls it by `told`."""
    begin = time.monotonic()
    config = ScoreConfig(job.resamples, job.seed, job.bert_score, job.run_code)
    if job.metric is not None:
        get_metric(job.metric)
    rows: list[dict[str, Any]] = []
    sources: list[Source] = []
    run_sources: dict[tuple[str, str, str], list[int]] = {}
    verdicts: list[tuple[int, list[dict[str, Any]]]] = []
    for path in job.inputs:
        before = len(verdicts)
        for folder, manifest, found in read_judgments(path):
            sources.append(source(len(sources) + 1, folder, manifest))
            verdicts.append((sources[-1].number, found))
        if len(verdicts) > before and not any(datasets_at(path, "generations")):
            continue
        for folder, manifest, found in read_generations(path):
            sources.append(source(len(sources) + 1, folder, manifest))
            rows += found
            for key in {(row["benchmark"], row["split"], row["run"]) for row in found}:
                run_sources.setdefault(key, []).append(sources[-1].number)
    if not rows:
        given = " ".join(job.inputs)
        raise UserError(f"--inputs {given}: no generations in it; give the folder of the answers, too")
    comparisons = compare(rows)
    scores = [row for comparison in comparisons for row in score(comparison, config)]
    judged = [judged_table(number, found, sources, comparisons, scores, config) for number, found in verdicts]
    report = Report(comparisons, scores, sources, run_sources, config, judged, job.metric)
    output = Path(job.output_dir)
    written = write_report(report, output)
    dataset = str(output / "scores")
    storage.write_shard(
        storage.to_table(scores, storage.SCORES), storage.join(storage.data_folder(dataset), "part-0.parquet")
    )
    settings = {
        "inputs": [source.folder for source in sources],
        "resamples": config.resamples,
        "seed": config.seed,
        "bert_score": config.bert_score,
    }
    counts = {
        "rows": len(scores),
        "errors": sum(bool(row["error"]) for row in rows),
        "generation_rows": len(rows),
    }
    seconds = time.monotonic() - begin
    storage.write_manifest(
        dataset, storage.SCORES, settings, table="scores", complete=True, counts=counts, seconds=seconds
    )
    for folder in unfinished(sources):
        console.print(
            f"note: {folder} is not complete; run its pmpd generate again to finish it", soft_wrap=True
        )
    for note in notes(report):
        console.print(f"note: {note}")
    for comparison in comparisons:
        for name, run in comparison.unanswered.items():
            console.print(
                f"note: {comparison.benchmark}: all {len(run.errors)} turns of {name} failed; it is in no "
                f"number of the report"
            )
    if counts["errors"]:
        console.print(
            f"note: {counts['errors']} of {len(rows)} turns failed and are left out of the scores; the page "
            f"counts them by run"
        )
    for conclusion in conclusions(report):
        console.print(conclusion, soft_wrap=True, highlight=False)
    console.print(
        f"report:  {storage.join(told, 'report.html')}\nscores:  {storage.join(told, 'scores', 'data')}",
        soft_wrap=True,
    )
    return written["report.html"]


def source(number: int, folder: str, manifest: Mapping[str, Any]) -> Source:
    """The data set, with what making it cost where a summary says so."""
    content = storage.read_bytes(storage.join(folder, "summary.json"))
    try:
        summary = json.loads(content) if content else None
    except ValueError:
        summary = None
    return Source(number, folder, manifest, summary if isinstance(summary, dict) else None)


def judged_table(
    number: int,
    rows: list[dict[str, Any]],
    sources: Sequence[Source],
    comparisons: Sequence[Comparison],
    scores: Sequence[Mapping[str, Any]],
    config: ScoreConfig,
) -> tuple[str, int, JudgeTable]:
    """(benchmark, source, scores) of a data set of judgments; differences are to the uniform highest
    precision, and to the uniform run of nearest average bits."""
    benchmark = sources[number - 1].manifest["config"]["benchmark"]
    base = next((c.uniform_high for c in comparisons if c.benchmark == benchmark), None)
    nearest = {
        row["run"]: row["nearest_uniform"]
        for row in scores
        if row["benchmark"] == benchmark and row["turn"] is None and row["nearest_uniform"]
    }
    name = base.name if base else None
    return benchmark, number, judge_table(rows, config.resamples, config.seed, name, nearest)
