"""Answers as {model_id}-{run}.jsonl for FastChat's gen_judgment.py."""

from __future__ import annotations

from pmpd import plugins
from pmpd.cli.flags.export_fastchat import ExportJob
from pmpd.evaluation.fastchat_export import export


def main(job: ExportJob) -> None:
    """Writes the files and prints their paths."""
    plugins.load(job.plugins)
    print("\n".join(map(str, export(job.path, job.folder, job.runs))))
