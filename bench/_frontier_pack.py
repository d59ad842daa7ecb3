"""What a study needs of its label sets, small enough to take along: the curves in 16 bits and what every rule
said of every pair. No features of the KV cache, no texts.

    python -m bench.frontier pack --study study --output study/pack

Legend: N prompts, J pairs, 4 switch classes.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.frontier_labels import KINDS
from pmpd import storage
from pmpd.evaluation.curve_set import CurveSet
from pmpd.labeling.noise import LabelSet, agreement
from pmpd.labeling.rule import RULES

LABELS = "labels.json.gz"

ROWS_PER_FILE = 1500
"""Prompts of a file of curves: 7 MB with 256 new tokens."""

_HALVES = ("loss", "statistics.")
"""What is kept in 16 bits: three digits of a divergence are enough."""

_LEFT_OUT = ("statistics.top_probability",)
"""No policy looks at it."""

_OF_ALL = ("chain", "feature_names")


def write_curves(curves: CurveSet, folder: Path) -> None:
    """curves-0.npz, … of `ROWS_PER_FILE` prompts each."""
    for number, at in enumerate(range(0, len(curves), ROWS_PER_FILE)):
        part = curves.take(np.arange(at, min(at + ROWS_PER_FILE, len(curves))))
        _write_part(part, folder / f"curves-{number}.npz")


def _write_part(curves: CurveSet, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for field in fields(CurveSet):
        value = getattr(curves, field.name)
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in parts:
            key = f"{field.name}.{name}" if name else field.name
            array = np.asarray(part)
            if key in _LEFT_OUT:
                continue
            arrays[key] = array.astype(np.float16) if key.startswith(_HALVES) else array
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # the stubs know no **


def read_curves(folder: Path) -> CurveSet:
    parts = []
    for path in sorted(folder.glob("curves-*.npz"), key=lambda path: int(path.stem.split("-")[1])):
        with np.load(path) as held:
            parts.append({key: held[key] for key in held.files})
    arrays = {
        key: parts[0][key] if key in _OF_ALL else np.concatenate([part[key] for part in parts])
        for key in parts[0]
    }
    wide = {
        key: array.astype(np.float64) if array.dtype.kind == "f" else array for key, array in arrays.items()
    }

    def table(name: str) -> dict[str, np.ndarray]:
        return {key.partition(".")[2]: value for key, value in wide.items() if key.startswith(f"{name}.")}

    return CurveSet(
        keys=tuple(wide["keys"].tolist()),
        groups=wide["groups"],
        kinds=wide["kinds"],
        chain=tuple(wide["chain"].tolist()),
        loss=wide["loss"],
        valid=wide["valid"],
        statistics=table("statistics"),
        start=table("start"),
        features=wide["features"],
        feature_names=tuple(wide["feature_names"].tolist()),
        plan_loss=wide["plan_loss"],
        plan_bits=wide["plan_bits"],
    )


@dataclass(frozen=True)
class Judged:
    """What one label set says, by rule; a rule's arrays have one row for each of `lines`."""

    lines: tuple[str, ...]
    """Kind and line of the record: what repetitions are joined by."""
    keys: tuple[str, ...]
    """prompt_id"""
    labels: np.ndarray
    """int64 [N, J]"""
    scores: np.ndarray
    """float64 [N, J, 4]: of every class, higher is better."""
    tokens: np.ndarray | None = None
    """int64 [N, J, 4]: new tokens of every class; None where nothing was decoded."""

    def label_set(self) -> LabelSet:
        """As `pmpd.labeling.noise` has them; the pairs are numbered."""
        return {
            (j, 0): dict(zip(self.lines, self.labels[:, j].tolist(), strict=True))
            for j in range(self.labels.shape[1])
        }

    def joined(self, other: Judged) -> tuple[np.ndarray, np.ndarray]:
        """Rows of this set and of the other that are of one record."""
        at = {line: row for row, line in enumerate(other.lines)}
        mine = [row for row, line in enumerate(self.lines) if line in at]
        return np.asarray(mine, int), np.asarray([at[self.lines[row]] for row in mine], int)


def label_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all kinds of a set by one rule that have no error, without features and texts."""
    rows = []
    for kind in KINDS:
        if not storage.list_shards(str(folder / kind / "labels")):
            continue
        prompts = storage.read_table(str(folder / kind / "prompts"), ["prompt_id", "source"]).to_pylist()
        lines = {row["prompt_id"]: f"{kind}:{row['source'].rsplit(':', 1)[-1]}" for row in prompts}
        for row in storage.read_table(
            str(folder / kind / "labels"), ["prompt_id", "pairs", "error"]
        ).to_pylist():
            if row["error"]:
                continue
            pairs = [
                {name: pair[name] for name in ("label", "scores", "rouge_l", "high_rouge_l", "branch_tokens")}
                for pair in row["pairs"]
            ]
            rows.append({"line": lines[row["prompt_id"]], "key": row["prompt_id"], "pairs": pairs})
    return sorted(rows, key=lambda row: row["line"])


def write_labels(study: Path, path: Path) -> dict[str, dict[str, int]]:
    """Rows of each set and rule that there is."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for folder in sorted(p for p in study.glob("*/*") if p.name in ("kl", "agreement")):
        found.setdefault(folder.parent.name, {})[folder.name] = label_rows(folder)
    path.write_bytes(gzip.compress(json.dumps(found).encode(), 6))
    return {name: {rule: len(rows) for rule, rows in rules.items()} for name, rules in found.items()}


def read_labels(path: Path) -> dict[str, dict[str, Judged]]:
    """Set -> rule (agreement, rouge_l, kl) -> what it says."""
    found: dict[str, dict[str, Judged]] = {}
    for name, rules in json.loads(gzip.decompress(path.read_bytes())).items():
        for rule, rows in rules.items():
            if not rows:
                continue
            lines, keys = (tuple(row[what] for row in rows) for what in ("line", "key"))

            def table(what: str, rows: list[dict[str, Any]] = rows) -> np.ndarray:
                return np.asarray([[pair[what] for pair in row["pairs"]] for row in rows])

            decoded = rule == "agreement"
            tokens = table("branch_tokens") if decoded else None
            of_set = found.setdefault(name, {})
            of_set[rule] = Judged(lines, keys, table("label"), table("scores").astype(float), tokens)
            if decoded:
                rouge, high = table("rouge_l").astype(float), table("high_rouge_l").astype(float)
                scored = RULES["rouge_l"]
                labels = [
                    [scored.label(scores.tolist(), float(top)) for scores, top in zip(row, tops, strict=True)]
                    for row, tops in zip(rouge, high, strict=True)
                ]
                of_set["rouge_l"] = Judged(lines, keys, np.asarray(labels), rouge, tokens)
    return found


# ---- What the sets say of the rules


def noise_rows(sets: dict[str, dict[str, Judged]], pairs: list[str]) -> list[dict[str, Any]]:
    """Labels made twice, by set, rule and pair: agreement and ceiling of the classes, and the correlation
    over prompts of what class 0 loses against never switching, which bounds a regression as well."""
    rows = []
    for name, rules in sets.items():
        if name in ("main", "cost"):
            continue
        for rule, again in rules.items():
            first = sets["main"].get(rule)
            if first is None:
                continue
            mine, other = first.joined(again)
            for j, pair in enumerate(pairs):
                found = agreement(first.label_set()[j, 0], again.label_set()[j, 0])
                a = first.scores[mine, j, 3] - first.scores[mine, j, 0]
                b = again.scores[other, j, 3] - again.scores[other, j, 0]
                rows.append(
                    {
                        "against": name,
                        "rule": rule,
                        "pair": pair,
                        "prompts": found.prompts,
                        "agreement": found.agreement,
                        "low": found.low,
                        "high": found.high,
                        "kappa": found.kappa,
                        "ceiling": found.ceiling,
                        "majority": found.majority,
                        "loss_correlation": correlation(a, b),
                    }
                )
    return rows


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or a.std() < 1e-12 or b.std() < 1e-12:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def whole_answer_rows(
    rules: dict[str, Judged], pairs: list[str], sizes: tuple[int, ...] = (1, 10, 50), rounds: int = 100
) -> list[dict[str, Any]]:
    """How well each rule says what ROUGE-L of the whole answers loses, over random groups of prompts: the
    correlation, over groups, of the mean loss by the rule with the mean loss of ROUGE-L, both of class 0
    against never switching; mean and standard deviation over random groupings."""
    whole, rows = rules.get("rouge_l"), []
    if whole is None:
        return []
    for rule, judged in rules.items():
        if rule == "rouge_l":
            continue
        mine, other = judged.joined(whole)
        for j, pair in enumerate(pairs):
            a = judged.scores[mine, j, 3] - judged.scores[mine, j, 0]
            b = whole.scores[other, j, 3] - whole.scores[other, j, 0]
            for size in sizes:
                groups = len(a) // size
                if groups < 3:
                    continue
                rng, found = np.random.default_rng(0), []
                for _ in range(rounds if size > 1 else 1):
                    order = rng.permutation(len(a))[: groups * size].reshape(groups, size)
                    value = correlation(a[order].mean(1), b[order].mean(1))
                    if value is not None:
                        found.append(value)
                if found:
                    rows.append(
                        {
                            "rule": rule,
                            "pair": pair,
                            "prompts_in_a_group": size,
                            "groups": groups,
                            "correlation": float(np.mean(found)),
                            "deviation": float(np.std(found)),
                        }
                    )
    return rows


def class_rows(rules: dict[str, Judged], pairs: list[str]) -> list[dict[str, Any]]:
    """Shares of the labels, and the mean ROUGE-L of whole answers, by rule, pair and class. `beats`: share of
    prompts of which a lower class scores more than never switching."""
    rows = []
    for rule, judged in rules.items():
        for j, pair in enumerate(pairs):
            scores = judged.scores[:, j]
            rows.append(
                {
                    "rule": rule,
                    "pair": pair,
                    "shares": [float((judged.labels[:, j] == k).mean()) for k in range(4)],
                    "scores": scores.mean(0).tolist(),
                    "beats": float((scores[:, :3].max(1) > scores[:, 3] + 1e-9).mean()),
                }
            )
    return rows


def cost_rows(study: Path) -> list[dict[str, Any]]:
    """Every costs-*.json of a study."""
    return [
        {"name": path.stem.removeprefix("costs-").rsplit("-", 1)[0], **cost}
        for path in sorted(study.glob("costs-*.json"))
        for cost in json.loads(path.read_text())
    ]
