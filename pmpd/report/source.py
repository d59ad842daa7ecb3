"""What a report is made of, and what its parts are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmpd.benchmarks import BENCHMARKS
from pmpd.errors import UserError
from pmpd.evaluation.compare import Comparison
from pmpd.evaluation.judge_scores import JudgeTable
from pmpd.evaluation.score import ScoreConfig
from pmpd.metrics.base import DATASET, REFERENCE_OUTPUT


@dataclass(frozen=True)
class Source:
    """A data set that rows were read from."""

    number: int
    folder: str
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any] | None = None
    """What making it cost (`summary.json`), where that is known."""


@dataclass(frozen=True)
class Report:
    """All that goes on the page."""

    comparisons: Sequence[Comparison]
    scores: Sequence[Mapping[str, Any]]
    """Rows of SCORES."""
    sources: Sequence[Source]
    run_sources: Mapping[tuple[str, str, str], Sequence[int]]
    """(benchmark, split, run) -> numbers of the sources its rows came from."""
    config: ScoreConfig
    judged: Sequence[tuple[str, int, JudgeTable]] = ()
    """(benchmark, number of the source, what a judge said)."""
    metric: str | None = None
    """The metric of cards, figure and table; None: each benchmark's own."""

    def scores_of(self, comparison: Comparison) -> list[Mapping[str, Any]]:
        return [
            row
            for row in self.scores
            if row["benchmark"] == comparison.benchmark and row["split"] == comparison.split
        ]


def main_metric(report: Report, comparison: Comparison) -> tuple[str, str]:
    """(metric, against) of cards, figure and table: the one asked for, else the benchmark's own if it was
    scored, else the first that was."""
    known = {(row["metric"], row["against"]) for row in report.scores_of(comparison)}
    if not known:
        raise UserError(
            f"{comparison.benchmark}: nothing to compare the answers with: it has no references of its own "
            f"and no answers of the "
            "unquantized model are among the inputs; run pmpd generate --schedulers fp, or give its "
            "folder too"
        )
    benchmark = BENCHMARKS.get(comparison.benchmark)
    against = benchmark.reference if benchmark else REFERENCE_OUTPUT
    if report.metric is not None:
        found = [pair for pair in ((report.metric, against), *sorted(known)) if pair[0] == report.metric]
        if not any(pair in known for pair in found):
            names = ", ".join(sorted({metric for metric, _ in known}))
            raise UserError(f"--metric {report.metric}: scored for {comparison.benchmark} are {names}")
        return next(pair for pair in found if pair in known)
    wanted = [(benchmark.metric, benchmark.reference)] if benchmark else []
    for choice in (*wanted, ("rouge_l", REFERENCE_OUTPUT), ("rouge_l", DATASET)):
        if choice in known:
            return choice
    return sorted(known)[0]


def slugs_of(comparisons: Sequence[Comparison]) -> Iterator[tuple[str, Comparison]]:
    """A name for files and anchors of each comparison, all different: letters, digits, hyphens and
    underscores of benchmark and split, and a hash where anything else was in them."""
    seen: set[str] = set()
    for comparison in comparisons:
        name = comparison.benchmark + ("" if comparison.split == "test" else f"-{comparison.split}")
        slug = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        if slug != name or slug.lower() in seen:
            identity = f"{comparison.benchmark}/{comparison.split}"
            slug += "-" + hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()[:8]
        seen.add(slug.lower())
        yield slug, comparison
