"""Score what pmpd generate answered and write the report: one HTML page, its figures, Markdown, and the
scores as Parquet.

    pmpd report                                    # everything under results/generate
    pmpd report --inputs results/a results/b       # several folders, e.g. the unquantized answers apart"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportJob:
    """Score what pmpd generate answered and write the report."""

    inputs: tuple[str, ...] = ("results/generate",)
    """Output folders of pmpd generate and pmpd judge (everything below them is read)."""
    output_dir: str = "results/report"
    """Folder or URI (s3://bucket/folder) for report.html, report.md, figures/ and scores/."""
    bert_score: str | None = None
    """Also BERTScore, with the model in this folder or of this name (needs pip install 'pmpd[bertscore]')."""
    metric: str | None = None
    """The metric of headlines, figure and table; default each benchmark's own."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: the metrics and benchmarks that they
    register are known then."""
    run_code: bool = False
    """Run generated code against its tests (humaneval), each program in a limited process of its own. It
    still runs as you: use a container."""
    resamples: int = 2000
    """Bootstrap resamples behind the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""
