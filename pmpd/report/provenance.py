"""Where the numbers of a report come from."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from pmpd import storage
from pmpd.evaluation.score import ScoreConfig
from pmpd.metrics.text import bleu_signature
from pmpd.report.source import Source


def shown(source: Source) -> dict[str, Any]:
    """A source as the page shows it: number, folder, `facts` [(name, value)], the whole manifest as text."""
    manifest = source.manifest
    facts = {
        "written": manifest.get("written"),
        "commit": manifest.get("git_commit"),
        "device": manifest.get("device"),
        "rows": (manifest.get("counts") or {}).get("rows"),
        "seconds": manifest.get("seconds"),
        "models": models(manifest),
        "complete": manifest.get("complete"),
    }
    return {
        "number": source.number,
        "folder": source.folder,
        "facts": [(name, str(value)) for name, value in facts.items()],
        "manifest": json.dumps(manifest, indent=1, ensure_ascii=False, default=str),
    }


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
