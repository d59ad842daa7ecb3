"""The browser of answers: what two runs said to one turn, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.evaluation.compare import Comparison
from pmpd.metrics.precision import decode_forwards
from pmpd.metrics.rouge import rouge_l
from pmpd.metrics.text import first_divergence
from pmpd.report.page import embedded_json

BROWSER_QUESTIONS = 60
"""Turns of a benchmark that the browser of answers holds; more would make the page too heavy for a phone."""


def browser(comparison: Comparison) -> dict[str, Any]:
    """`data` (JSON for the page's script), the `widths` that its key explains, and a `note`."""
    keys = comparison.shared[:BROWSER_QUESTIONS]
    runs = [run for run in comparison.runs.values() if run.kind != "oracle"]
    keys = sorted(
        keys, key=lambda key: (runs[0].rows[key]["category"], runs[0].rows[key]["question_id"], key)
    )
    reference = comparison.unquantized
    questions, answers = [], []
    for key in keys:
        row = runs[0].rows[key]
        title = f"{row['category']} · {row['question_id']} · turn {row['turn']}" + (
            f" · choice {row['choice']}" if row["choice"] else ""
        )
        # The prompt of the first run; from the second turn on, each run's prompt holds its own first answer.
        questions.append({"title": title, "prompt": row["prompt_text"], "reference": row["reference_text"]})
        answers.append([_answer(run.rows[key], reference.rows[key] if reference else None) for run in runs])
    names = [run.name for run in runs]
    left = names.index("kv_cache") if "kv_cache" in names else len(names) - 1
    widths = {part["bits"] for run in runs for key in keys for part in run.rows[key]["precision_trace"]}
    note = (
        f"The first {len(keys)} of {len(comparison.shared)} turns, to keep the page light; all are in the "
        f"Parquet. "
        if len(keys) < len(comparison.shared)
        else ""
    )
    note += (
        "From the second turn on, a run's prompt holds its own first answer; the prompt shown is that of "
        "the first run in the list."
    )
    data = {"questions": questions, "answers": answers, "runs": names, "left": left, "right": 0}
    return {"data": embedded_json(data), "widths": sorted(widths, reverse=True), "note": note}


def _answer(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    forwards = decode_forwards(row["precision_trace"])
    total = sum(forwards.values())
    note = (
        f"{row['output_tokens']} tokens, ended by "
        f"{'the limit' if row['finish_reason'] == 'length' else 'itself'}"
    )
    note += f", {sum(bits * count for bits, count in forwards.items()) / total:.2f} bits" if total else ""
    if reference is not None and reference is not row:
        same = first_divergence(row["output_ids"], reference["output_ids"])
        note += (
            f", ROUGE-L {rouge_l(row['output_text'], reference['output_text']):.3f} to the unquantized "
            f"answer, first {same} tokens equal"
        )
    return {
        "pieces": row["output_pieces"],
        "trace": [[part["bits"], part["count"]] for part in row["precision_trace"]],
        "note": note,
    }
