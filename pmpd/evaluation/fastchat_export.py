"""Answers in the file format of FastChat's `llm_judge`, so that its own `gen_judgment.py` and
`show_result.py` take them from there.

    pmpd export-fastchat results/generate/mt_bench data/mt_bench/model_answer

One file `{model_id}-{run}.jsonl` per run: in FastChat a model is a file, and a run is what is to be judged.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmpd.errors import UserError


def answer_files(rows: Iterable[Mapping[str, Any]], timestamp: float) -> dict[str, list[dict[str, Any]]]:
    """FastChat model id -> its answers (rows of GENERATIONS, in any order), sorted by question.

    ValueError: a turn that is there twice, or that failed (a failure is no answer, and FastChat would judge
    it as one); two runs whose file names are the same.
    """
    turns: dict[tuple[str, str, int], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    runs: dict[str, tuple[str, str]] = {}
    failed = []
    for row in rows:
        model, run = file_name(row["model_id"], row["run"]), (row["model_id"], row["run"])
        if runs.setdefault(model, run) != run:
            raise UserError(
                f"{' and '.join(map(' '.join, (runs[model], run)))} would both be written as {model}.jsonl; "
                f"export them to folders of their own with --runs"
            )
        if row["error"] is not None:
            failed.append(f"{row['run']} question {row['question_id']}")
            continue
        key = (model, row["question_id"], row["choice"])
        if row["turn"] in turns[key]:
            raise UserError(
                f"{model}: question {row['question_id']}, turn {row['turn']} is there twice; give the folder "
                f"of one run"
            )
        turns[key][row["turn"]] = row
    if failed:
        raise UserError(
            f"{len(failed)} turns failed, e.g. {', '.join(failed[:3])}; FastChat knows no failed answer: do "
            f"them again with "
            "pmpd generate --retry-errors, or leave those runs out with --runs"
        )
    answers: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (model, question, choice), found in sorted(turns.items(), key=lambda item: item[0]):
        in_order = [found[turn] for turn in sorted(found)]
        entry = answers[model].setdefault(
            question,
            {
                "question_id": int(question) if question.isdigit() else question,
                "answer_id": in_order[0]["conversation_id"],
                "model_id": model,
                "choices": [],
                "tstamp": timestamp,
            },
        )
        entry["choices"].append(_choice(choice, in_order))
    return {model: sorted(found.values(), key=_question_order) for model, found in answers.items()}


def _choice(index: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A choice of FastChat's, with what scorers of published speeds read beside it: of each turn the decode
    forwards (`idxs`), new tokens, seconds, and the precision of every token's forward, prefill first."""
    choice = {
        "index": index,
        "turns": [row["output_text"] for row in rows],
        "idxs": [max(row["output_tokens"] - 1, 0) for row in rows],
        "new_tokens": [row["output_tokens"] for row in rows],
        "wall_time": [row["prefill_seconds"] + row["decode_seconds"] for row in rows],
        "precision_log": [
            [part["bits"] for part in row["precision_trace"] for _ in range(part["count"])] for row in rows
        ],
    }
    references = [row["reference_text"] for row in rows]
    if any(text is not None for text in references):
        choice["reference"] = references[0] if len(references) == 1 else references
    return choice


def _question_order(answer: Mapping[str, Any]) -> tuple[bool, Any]:
    return isinstance(answer["question_id"], str), answer["question_id"]


def file_name(model_id: str, run: str) -> str:
    """`vicuna-7b-v1.5-static-42_84`: the last part of the model id and the run, without what a file name
    can't hold."""
    return re.sub(r"[^\w.-]", "_", f"{model_id.rstrip('/').rsplit('/', 1)[-1]}-{run}")


def export(path: str, folder: str, runs: str | None = None) -> list[Path]:
    """Writes the answers of every GENERATIONS data set at or below `path` to `folder`; `runs`:
    comma-separated names, default all."""
    import time

    from pmpd.evaluation.results import read_generations

    rows = [row for _, _, found in read_generations(path) for row in found]
    for column in ("benchmark", "split"):
        values = sorted({row[column] for row in rows})
        if len(values) > 1:
            raise UserError(
                f"{path}: answers of more than one {column} ({', '.join(values)}); give the folder of one"
            )
    if runs is not None:
        wanted = [name.strip() for name in runs.split(",")]
        known = sorted({row["run"] for row in rows})
        absent = sorted(set(wanted) - set(known))
        if absent:
            raise UserError(f"--runs {', '.join(absent)}: {path} holds {', '.join(known)}")
        rows = [row for row in rows if row["run"] in wanted]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for model, answers in answer_files(rows, time.time()).items():
        written.append(target / f"{model}.jsonl")
        written[-1].write_text(
            "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8"
        )
    return written
