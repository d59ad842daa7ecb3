"""Synthetic generation rows for the tests of scores and reports: texts that get worse with fewer bits, in a
known way."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from pmpd import storage

TEXT = (
    "the statement of a value is an object that returns its name when called with no argument and raises "
    "error if not found"
)
WORDS = TEXT.split()
HIGH = 4
SECONDS = {16: 0.004, 4: 0.002, 3: 0.0015, 2: 0.001}


def hex16(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def run_settings(max_new_tokens: int = 40) -> list[tuple[str, str, dict[str, Any]]]:
    """(run, kind, scheduler description) of a small sweep over the chain 4,3,2."""
    m = max_new_tokens - 1
    uniform = [
        (f"uniform-{bits}", "uniform", {"name": "uniform", "precisions": [bits]}) for bits in (4, 3, 2)
    ]
    static = [
        (f"static-{a}/{b}", "static", {"name": "static", "precisions": [4, 3, 2], "high_bit_steps": [a, b]})
        for a, b in ((0, 0), (0, m // 3), (m // 3, 2 * (m // 3)), (2 * (m // 3), m))
    ]
    others = [
        ("random-0", "random", {"name": "random", "precisions": [4, 3, 2], "seed": 0}),
        (
            "confidence-0.9x4",
            "confidence",
            {"name": "confidence", "precisions": [4, 3, 2], "threshold": 0.9, "patience": 4},
        ),
        ("kv_cache", "kv_cache", {"name": "kv_cache", "precisions": [4, 3, 2]}),
    ]
    return [("fp", "fp", {"name": "uniform", "precisions": [16]}), *uniform, *static, *others]


def generation_rows(
    questions: int = 12, two_turns: int = 4, max_new_tokens: int = 40, benchmark: str = "demo", seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of a whole sweep: the first `two_turns` questions have two turns and no reference, the others one
    turn with a reference."""
    rows = []
    for number in range(questions):
        prompt_id = hex16(benchmark, number)
        for turn in (1, 2) if number < two_turns else (1,):
            draw = random.Random(f"{seed}/{number}/{turn}")
            ideal = draw.choices(WORDS, k=draw.randint(max_new_tokens // 2, max_new_tokens))
            for run, kind, settings in run_settings(max_new_tokens):
                rows.append(
                    _row(
                        benchmark,
                        prompt_id,
                        number,
                        turn,
                        run,
                        kind,
                        settings,
                        ideal,
                        max_new_tokens,
                        number >= two_turns,
                    )
                )
    return rows


def _row(
    benchmark: str,
    prompt_id: str,
    number: int,
    turn: int,
    run: str,
    kind: str,
    settings: dict[str, Any],
    ideal: list[str],
    length: int,
    cited: bool,
) -> dict[str, Any]:
    draw = random.Random(f"{number}/{turn}/{run}")
    bits = _plan(settings, length, draw)[: len(ideal)]
    noise = {16: 0.0, 4: 0.05, 3: 0.2, 2: 0.5}
    words = [
        word if draw.random() >= noise[width] else draw.choice(WORDS)
        for word, width in zip(ideal, bits, strict=True)
    ]
    steps = settings.get("high_bit_steps") or [
        sum(width > low for width in bits) for low in settings["precisions"][1:]
    ]
    return {
        "row_id": hex16(prompt_id, run, turn), "conversation_id": hex16(prompt_id, run),
        "prompt_id": prompt_id, "benchmark": benchmark,
        "benchmark_version": "1", "split": "test", "question_id": f"q{number}",
        "category": "continuation" if cited else "statements",
        "model_id": "demo", "model_fingerprint": "dense0" if kind == "fp" else "quant0", "run": run,
        "kind": kind,
        "scheduler": json.dumps({**settings, "prefill_bit": settings["precisions"][0],
        "max_new_tokens": length}),
        "choice": 0, "turn": turn, "template": "plain", "prompt_text": f"Question {number} <b>turn</b> "
                                                                       f"{turn}?", "prompt_tokens": 7,
        "dropped_tokens": 0, "reused_tokens": 0, "input_ids": list(range(7)),
        "reference_text": " ".join(ideal) if cited else None,
        "output_text": " ".join(words), "output_tokens": len(words),
        "output_ids": [WORDS.index(word) for word in words],
        "output_pieces": [f"{word} " for word in words],
        "finish_reason": "eos" if len(words) < length else "length",
        "precision_trace": _runs(bits), "switch_steps": list(steps), "classes": None, "decision_scores": None,
        "prefill_seconds": 0.01,
        "decode_seconds": sum(SECONDS[width] for width in bits[1:]), "decision_seconds": 0.0,
        "forward_seconds": [_measured(width) for width in ([16] if kind == "fp" else [4, 3, 2])],
        "device": "test machine", "worker": f"w{number % 2}", "error": None,
    }  # fmt: skip


def _measured(width: int) -> dict[str, Any]:
    seconds = SECONDS[width]
    return {"bits": width, "seconds": seconds, "repeats": [0.9 * seconds, seconds, seconds], "idle": True}


def _plan(settings: dict[str, Any], length: int, draw: random.Random) -> list[int]:
    """Precision of each new token; the prefill's first."""
    chain = settings["precisions"]
    if len(chain) == 1:
        return chain * length
    first, second = settings.get("high_bit_steps") or sorted(draw.randint(0, length) for _ in range(2))
    return [4] + [4 if t <= first else 3 if t <= second else 2 for t in range(1, length)]


def _runs(bits: list[int]) -> list[dict[str, int]]:
    trace: list[dict[str, int]] = []
    for width in bits:
        if trace and trace[-1]["bits"] == width:
            trace[-1]["count"] += 1
        else:
            trace.append({"bits": width, "count": 1})
    return trace


def write_generations(folder: Path, rows: list[dict[str, Any]], **config: Any) -> None:
    """A data set of generations, complete."""
    storage.write_shard(storage.to_table(rows, storage.GENERATIONS), folder / "data" / "part-0.parquet")
    storage.write_manifest(
        folder, storage.GENERATIONS, config, table="generations", complete=True, counts={"rows": len(rows)}
    )
