"""The static search: the cheapest `high_bit_steps` within a quality budget, found on the validation split and
kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pmpd import storage
from pmpd.errors import UserError
from pmpd.evaluation.compare import Comparison
from pmpd.evaluation.score import ScoreConfig, pick_static, score


def best_path(output_dir: str, benchmark: str, chain: Sequence[int]) -> str:
    """Where the search writes its choice and `--high-bit-steps best` reads it."""
    return storage.join(output_dir, f"best-static-{benchmark}-{'-'.join(map(str, chain))}.json")


def choose(
    comparison: Comparison, metric: str, against: str, budget: float, max_new_tokens: int, config: ScoreConfig
) -> dict[str, Any]:
    """The content of the file: the chosen setting and every candidate's score and bits."""
    scores = score(comparison, config)
    best = pick_static(scores, metric, against, budget)
    candidates = [
        row
        for row in scores
        if row["kind"] == "static" and (row["metric"], row["against"], row["turn"]) == (metric, against, None)
    ]
    kept = (
        "run",
        "value",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
        "average_bits",
        "decode_time_ratio",
        "rows",
        "error_rows",
    )
    chosen = comparison.runs[best["run"]]
    return {
        "benchmark": comparison.benchmark,
        "benchmark_version": comparison.benchmark_version,
        "split": comparison.split,
        "precisions": chosen.settings["precisions"],
        "high_bit_steps": chosen.settings["high_bit_steps"],
        "max_new_tokens": max_new_tokens,
        "model_fingerprint": next(iter(chosen.rows.values()))["model_fingerprint"],
        "metric": metric,
        "against": against,
        "quality_budget": budget,
        "best": {name: best[name] for name in kept},
        "candidates": [
            {name: row[name] for name in kept}
            for row in sorted(candidates, key=lambda row: row["average_bits"])
        ],
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_best(path: str, best: Mapping[str, Any]) -> None:
    storage.write_bytes(path, json.dumps(best, indent=1).encode() + b"\n")


def read_best(
    path: str, chain: Sequence[int], model_fingerprint: str, max_new_tokens: int
) -> tuple[int, ...]:
    """The chosen steps, as shares of the decode forwards carried over to `max_new_tokens`.

    ValueError: no search was run, or it was of another model or chain, or the file is no search's.
    """
    content = storage.read_bytes(path)
    if content is None:
        raise UserError(
            f"--high-bit-steps: no search result at {path}; run the same command with --static-search first, "
            f"or give the path of its "
            "best-static-….json"
        )
    try:
        best = json.loads(content)
        before, now, steps = best["max_new_tokens"] - 1, max_new_tokens - 1, best["high_bit_steps"]
        carried = tuple(round(step * now / before) for step in steps)
    except (ValueError, TypeError, LookupError, ArithmeticError):
        raise UserError(
            f"--high-bit-steps: {path} is not what a static search writes; search again"
        ) from None
    for name, wanted in (("precisions", list(chain)), ("model_fingerprint", model_fingerprint)):
        if best.get(name) != wanted:
            raise UserError(
                f"--high-bit-steps: {path} was searched with {name} {best.get(name)}, this run has {wanted}; "
                f"search again"
            )
    return carried
