"""Which runs of a benchmark can be compared, on which turns."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmpd.errors import UserError
from pmpd.metrics.base import Row
from pmpd.metrics.precision import SpeedModel, decode_forwards, mean_bits, speed_model
from pmpd.metrics.quality import as_good
from pmpd.metrics.rouge import rouge_l

TurnKey = tuple[str, int, int]
"""(prompt_id, choice, turn)."""


# ------------------------------------------------------------------------------------------------------------


@dataclass
class AnsweredRun:
    """The rows of one scheduler setting."""

    name: str
    kind: str
    scheduler: str
    rows: dict[TurnKey, Row] = field(default_factory=dict)
    errors: dict[TurnKey, str] = field(default_factory=dict)
    """Turns that failed, with why."""

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.scheduler)


@dataclass
class Comparison:
    """All runs of one benchmark, split and model, joined."""

    benchmark: str
    benchmark_version: str
    split: str
    model_id: str
    runs: dict[str, AnsweredRun]
    shared: list[TurnKey]
    """Turns that every run answered, sorted."""
    speed: SpeedModel
    high_bits: int | None
    """The highest quantized precision."""
    unanswered: dict[str, AnsweredRun]
    """Runs without a single answer: they are in no number."""

    def find(self, kind: str) -> AnsweredRun | None:
        return next((run for run in self.runs.values() if run.kind == kind), None)

    @property
    def unquantized(self) -> AnsweredRun | None:
        return self.find("fp")

    @property
    def uniform_high(self) -> AnsweredRun | None:
        return self.runs.get(f"uniform-{self.high_bits}")

    @property
    def has_reference(self) -> bool:
        """Whether there is something to compare the answers with: the unquantized model's or references."""
        answers = next(iter(self.runs.values())).rows
        return self.unquantized is not None or any(
            answers[key]["reference_text"] is not None for key in self.shared
        )

    def turns(self) -> list[int]:
        return sorted({turn for _, _, turn in self.shared})


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Joins generation rows to comparisons, one per benchmark and split, and adds the oracle's rows where
    they can be known.

    ValueError: rows of several models or benchmark versions, different questions under one id, one turn
    twice, turns that the unquantized run lacks, no turn that all runs answered.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row["benchmark"], row["split"])].append(row)
    _check_models([row for group in groups.values() for row in group])
    return [_compare(group) for _, group in sorted(groups.items())]


def _check_models(rows: Sequence[Row]) -> None:
    """ValueError where rows, of whatever benchmark, are of several models."""
    model_ids = _examples(rows, "model_id")
    if len(model_ids) > 1:
        raise UserError(f"rows of different model_id ({_told(model_ids)}) in one report; report them apart")
    for of_fp, name in ((True, "unquantized"), (False, "quantized")):
        # A row of a conversation that failed as a whole doesn't know its model.
        known = [
            row for row in rows if (row["kind"] == "fp") == of_fp and row["model_fingerprint"] is not None
        ]
        fingerprints = _examples(known, "model_fingerprint")
        if len(fingerprints) > 1:
            raise UserError(
                f"rows of {len(fingerprints)} {name} models (fingerprints {_told(fingerprints)}) under one "
                f"--model-id "
                f"{next(iter(model_ids))}; give each model its own id and its own report"
            )


def _examples(rows: Iterable[Row], column: str) -> dict[str, str]:
    """Value of the column -> a benchmark that has it."""
    return {row[column]: row["benchmark"] for row in rows}


def _told(examples: Mapping[str, str]) -> str:
    return ", ".join(f"{value} in {benchmark}" for value, benchmark in sorted(examples.items()))


def _compare(rows: list[Row]) -> Comparison:
    benchmark, versions = rows[0]["benchmark"], _examples(rows, "benchmark_version")
    if len(versions) > 1:
        raise UserError(
            f"{benchmark}: rows of different benchmark_version ({', '.join(sorted(versions))}) in one "
            f"report; report them apart"
        )
    runs: dict[str, AnsweredRun] = {}
    for row in rows:
        run = runs.setdefault(row["run"], AnsweredRun(row["run"], row["kind"], row["scheduler"]))
        if run.scheduler != row["scheduler"]:
            raise UserError(
                f"run {row['run']} of {benchmark} has two settings: {run.scheduler} and {row['scheduler']}; "
                f"report them apart"
            )
        key = (row["prompt_id"], row["choice"], row["turn"])
        if key in run.rows or key in run.errors:
            raise UserError(
                f"run {row['run']} of {benchmark}: turn {key} is there twice; was one folder given twice?"
            )
        if row["error"] is not None:
            run.errors[key] = row["error"]
        else:
            run.rows[key] = row
    unquantized = next((run for run in runs.values() if run.kind == "fp"), None)
    if unquantized is not None:
        _check_references(unquantized, runs.values(), benchmark)
    _check_questions(runs.values(), benchmark)
    unanswered = {name: run for name, run in runs.items() if not run.rows}
    runs = {name: run for name, run in runs.items() if run.rows}
    if not runs:
        name, run = next(iter(unanswered.items()))
        raise UserError(
            f"{benchmark}: no run has an answer; the first error of {name}: "
            f"{next(iter(run.errors.values()))}; cure it and run "
            "pmpd generate --retry-errors"
        )
    _add_oracle(runs)
    shared = sorted(set.intersection(*(set(run.rows) for run in runs.values())))
    if not shared:
        counts = ", ".join(f"{run.name} {len(run.rows)} (+{len(run.errors)} failed)" for run in runs.values())
        raise UserError(f"{benchmark}: no turn was answered by all runs; answered turns: {counts}")
    widths = [
        bits
        for run in runs.values()
        if run.kind != "fp"
        for row in run.rows.values()
        for bits in decode_forwards(row["precision_trace"])
    ]
    return Comparison(
        benchmark, rows[0]["benchmark_version"], rows[0]["split"], rows[0]["model_id"],
        dict(sorted(runs.items(), key=_run_order)), shared,
        speed_model(rows), max(widths, default=None), unanswered,
    )  # fmt: skip


def _check_questions(runs: Iterable[AnsweredRun], benchmark: str) -> None:
    """ValueError where one id stands for different questions: ids do not know the text (of a second turn's
    prompt, the answer is part)."""
    seen: dict[tuple[TurnKey, str], tuple[str, str | None]] = {}
    for run in runs:
        for key, row in run.rows.items():
            for column in ("template", "reference_text", *(["prompt_text"] if key[2] == 1 else [])):
                name, value = seen.setdefault((key, column), (run.name, row[column]))
                if value != row[column]:
                    raise UserError(
                        f"{benchmark}: {name} and {run.name} answered different questions under the id "
                        f"{row['question_id']} "
                        f"(turn {key[2]}: {column} {_short(value)} and {_short(row[column])}); give both one "
                        f"question file and template"
                    )


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 60 else text[:60] + "…")


def _check_references(unquantized: AnsweredRun, runs: Iterable[AnsweredRun], benchmark: str) -> None:
    have = set(unquantized.rows) | set(unquantized.errors)
    missing = sorted({key for run in runs for key in (*run.rows, *run.errors)} - have)
    if missing:
        examples = ", ".join(
            f"{prompt} (choice {choice}, turn {turn})" for prompt, choice, turn in missing[:3]
        )
        raise UserError(
            f"{benchmark}: the unquantized model has no answer to {len(missing)} turns that others answered, "
            f"e.g. {examples}; "
            "run pmpd generate --schedulers fp with the same questions"
        )


UNIFORM_KINDS = ("uniform", "uniform_prefill")
"""Kinds of run that decode in one precision; the second prefills in another."""
BASE_KINDS = ("fp", *UNIFORM_KINDS)
"""Kinds of run that mix no precisions in decoding."""

KINDS = (*BASE_KINDS, "static", "kv_cache", "regression", "confidence", "random", "oracle")
"""The order of tables and legends."""


def _run_order(item: tuple[str, AnsweredRun]) -> tuple[int, list[float], str]:
    run = item[1]
    steps = run.settings.get("high_bit_steps") or run.settings.get("precisions") or []
    order = KINDS.index(run.kind) if run.kind in KINDS else len(KINDS)
    return order, [-float(step) for step in steps], run.name


def _add_oracle(runs: dict[str, AnsweredRun]) -> None:
    """Adds the run `oracle`: per conversation the cheapest fixed plan that is as good as never switching,
    chosen with hindsight.

    As good: in every turn ROUGE-L F1 against the reference output is, by `metrics.quality.as_good`, that of
    the uniform highest precision (the rule by which labels are made, applied to whole conversations). It
    costs no further generation: the plans are the static runs at hand.
    """
    unquantized = next((run for run in runs.values() if run.kind == "fp"), None)
    uniform = [run for run in runs.values() if run.kind == "uniform"]
    static = [run for run in runs.values() if run.kind == "static"]
    if unquantized is None or not uniform or len(static) < 2:
        return
    high = max(uniform, key=lambda run: run.settings["precisions"][0])
    conversations: dict[tuple[str, int], list[TurnKey]] = defaultdict(list)
    for key in sorted(set.intersection(*(set(run.rows) for run in (unquantized, high, *static)))):
        conversations[key[:2]].append(key)
    oracle = AnsweredRun(
        "oracle",
        "oracle",
        json.dumps({"name": "oracle", "plans": [high.name, *sorted(run.name for run in static)]}),
    )
    for turns in conversations.values():
        wanted = [_agreement(high, unquantized, key) for key in turns]
        good = [
            run
            for run in static
            if all(
                as_good(_agreement(run, unquantized, key), least)
                for key, least in zip(turns, wanted, strict=True)
            )
        ]
        chosen = min((high, *good), key=lambda run: (mean_bits(run.rows[key] for key in turns), run.name))
        for key in turns:
            oracle.rows[key] = {**chosen.rows[key], "run": "oracle", "kind": "oracle", "chosen": chosen.name}
    for run in (high, *static):
        oracle.errors.update(run.errors)
    runs["oracle"] = oracle


def _agreement(run: AnsweredRun, unquantized: AnsweredRun, key: TurnKey) -> float:
    return rouge_l(run.rows[key]["output_text"], unquantized.rows[key]["output_text"])
