"""Where the numbers of a report come from."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from pmpd import storage
from pmpd.evaluation.compare import Comparison
from pmpd.evaluation.score import ScoreConfig
from pmpd.metrics.text import bleu_signature
from pmpd.report.source import Report, Source


def shown(source: Source) -> dict[str, Any]:
    """A source as the page shows it: number, folder, `facts` [(name, value)], the whole manifest as text."""
    manifest = source.manifest
    facts = {
        "written": manifest.get("written"),
        "commit": manifest.get("git_commit"),
        "device": manifest.get("device"),
        "rows": (manifest.get("counts") or {}).get("rows"),
        "seconds": manifest.get("seconds"),
        "computed in": dtypes(manifest) or None,
        "models": models(manifest),
        **_costs(source.summary or {}),
        "complete": manifest.get("complete"),
    }
    return {
        "number": source.number,
        "folder": source.folder,
        "facts": [(name, str(value)) for name, value in facts.items() if value is not None],
        "manifest": json.dumps(manifest, indent=1, ensure_ascii=False, default=str),
    }


COSTS = {
    "rows_per_worker_hour": "rows per worker-hour",
    "tokens": "tokens",
    "wall_seconds": "seconds on the clock",
    "worker_seconds": "seconds of workers",
    "cost": "cost",
    "cost_per_1000_rows": "cost of 1,000 rows",
}
"""Key of a summary's total -> its name for a reader."""


def _costs(summary: Mapping[str, Any]) -> dict[str, Any]:
    """All runs that made the data set, together."""
    total = summary.get("total")
    if not isinstance(total, Mapping):
        return {}
    known = {key: name for key, name in COSTS.items() if isinstance(total.get(key), int | float)}
    return {name: f"{total[key]:,.6g}" for key, name in known.items()}


def dtypes(manifest: Mapping[str, Any]) -> str:
    """The number formats that models computed in, as far as the manifest says."""
    entries = [manifest.get("run"), manifest.get("config"), *(manifest.get("models") or {}).values()]
    found = [entry["dtype"] for entry in entries if isinstance(entry, Mapping) and entry.get("dtype")]
    return ", ".join(dict.fromkeys(map(str, found)))


DEFAULT_FORMAT = "its device's default number format (float32 on a CPU, float16 on a GPU)"
"""What manifests without a `dtype` mean."""


def settings(report: Report, comparison: Comparison) -> str:
    """Templates, number formats and commits behind a comparison, in one sentence."""
    rows = [row for run in comparison.runs.values() for row in run.rows.values()]
    templates = sorted({str(row["template"]) for row in rows})
    numbers = {
        number
        for (benchmark, split, _), found in report.run_sources.items()
        for number in found
        if (benchmark, split) == (comparison.benchmark, comparison.split)
    }
    manifests = [source.manifest for source in report.sources if source.number in numbers]
    formats = sorted({dtypes(manifest) for manifest in manifests} - {""})
    commits = sorted({str(manifest.get("git_commit") or "unknown") for manifest in manifests})
    return (
        f"Prompts in the template {' and '.join(templates)}; computed in "
        f"{', '.join(formats) or DEFAULT_FORMAT}; answered by commit "
        f"{', '.join(commit[:12] for commit in commits)}."
    )


def models(manifest: Mapping[str, Any]) -> str:
    return "; ".join(f"{role}: {_compact(model)}" for role, model in (manifest.get("models") or {}).items())


def _compact(model: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in model.items())
        if isinstance(model, Mapping)
        else str(model)
    )


def method(config: ScoreConfig) -> str:
    """How the numbers were made, in words."""
    version = importlib.metadata.version
    bert = f"BERTScore: {config.bert_score}. " if config.bert_score else ""
    return (
        f"ROUGE-L: tokens and F1 of rouge_score {version('rouge_score')}. BLEU: sacrebleu "
        f"{version('sacrebleu')}, signature {bleu_signature()}. {bert}Intervals: 95 % percentiles of "
        f"{config.resamples} bootstrap resamples of the questions, seed {config.seed}, the same resamples "
        f"for all runs. Rows are joined by prompt id, choice and turn. Numbers in the tables come from the "
        f"sources named in their last column."
    )


def made_by() -> str:
    versions = ", ".join(
        f"{name} {version}"
        for name, version in storage.package_versions().items()
        if name in ("pmpd", "numpy", "pyarrow")
    )
    return f"{versions}, commit {storage.git_commit() or 'unknown'}"
