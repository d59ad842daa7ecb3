"""Answers as {model_id}-{run}.jsonl for FastChat's gen_judgment.py."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class ExportJob:
    """Answers as {model_id}-{run}.jsonl for FastChat's gen_judgment.py."""

    path: tyro.conf.Positional[str]
    """Output folder of `pmpd generate` for one benchmark, e.g. results/generate/mt_bench."""
    folder: tyro.conf.Positional[str]
    """Where FastChat looks for answers, e.g. data/mt_bench/model_answer."""
    runs: str | None = None
    """Only these runs, comma-separated."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md)."""
