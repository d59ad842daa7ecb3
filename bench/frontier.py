"""Does any policy beat the best static plan at equal bits? The study of docs/guides/scheduler-study.md.

    python -m bench.frontier prompts --texts texts.json.gz --questions question.jsonl --output study/texts
    pmpd label --rule kl --dataset study/texts/continuations.jsonl --output-dir study/continuations …
    pmpd label --rule kl --dataset study/texts/instructions.jsonl --prompt-form chat --output-dir …
    python -m bench.frontier study --labels study/continuations study/instructions
    python -m bench.frontier exact --labels … --model-path Q --reference-model-path U   # checks the curves
    python -m bench.frontier steps --model-path Q                                       # decode times

`study` needs no model: the labels hold every precision's divergence by position, and the loss of any plan is
a sum of them. `bench/frontier.sh` runs all of it, on a CPU or a GPU.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from bench import _frontier_prompts, _record
from bench._frontier_kv import kv_features, kv_policy
from bench._frontier_model import Exact, Steps
from pmpd import storage
from pmpd.evaluation.curve_set import LABEL_COLUMNS, CurveSet, Outcome, cross_fitted, curve_set, folds
from pmpd.evaluation.frontier import (
    Gain,
    Resampling,
    StaticFrontier,
    check_targets,
    gain_of,
    holm,
    prompts_needed,
    table,
)
from pmpd.evaluation.online_policies import ONLINE_POLICIES
from pmpd.evaluation.policies import ORACLES, POLICIES, Policy, static

FRONTIER_POINTS = 41


@dataclass(frozen=True)
class Prompts:
    """Write the two kinds of prompt."""

    texts: str
    """File or folder of texts, as `pmpd label --dataset` takes it; its second half is used."""
    output: Path
    questions: str | None = None
    """Questions in FastChat's schema: their first turns are instructions."""
    continuations: int = 320
    tasks: int = 240

    def run(self) -> None:
        lines = _frontier_prompts.write(
            self.texts, self.questions, self.output, self.continuations, self.tasks
        )
        print(json.dumps(lines))


def load(folders: tuple[str, ...]) -> tuple[CurveSet, dict[str, Any]]:
    """The labelled prompts of all folders, and what their manifests say of them. A folder is a kind of
    prompt; those that differ in a number behind the name are of one kind (`texts-0`, `texts-1`)."""
    rows, groups, kinds, about = [], {}, {}, {}
    names = [storage.base_name(folder).rstrip("0123456789").rstrip("-") for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        labels, prompts = (storage.join(folder, name) for name in ("labels", "prompts"))
        for row in storage.read_table(prompts, ["prompt_id", "source"]).to_pylist():
            groups[row["prompt_id"]] = f"{folder}/{_frontier_prompts.group_of(row['source'])}"
            kinds[row["prompt_id"]] = sorted(set(names)).index(name)
        found = storage.read_table(labels, [*LABEL_COLUMNS, "seconds", "rule"]).to_pylist()
        manifest = storage.read_manifest(labels) or {}
        about[storage.base_name(folder)] = {
            "prompts": sum(not row["error"] for row in found),
            "errors": sum(bool(row["error"]) for row in found),
            "rule": next((row["rule"] for row in found), None),
            "label_seconds": sum(row["seconds"] for row in found),
            "models": manifest.get("models"),
            "config": manifest.get("config"),
        }
        rows += found
    return curve_set(rows, groups, kinds), about


@dataclass(frozen=True)
class Study:
    """Every policy against the static frontier, on prompts that it was not fitted to."""

    labels: tuple[str, ...]
    """Output folders of pmpd label --rule kl, one a kind of prompt."""
    targets: tuple[float, ...] = (2.5, 2.75, 3.25, 3.5)
    """Bits on average."""
    folds: int = 5
    resamples: int = 10000
    seed: int = 0
    steps: Path | None = None
    """What `steps` wrote: decode times."""
    noise: Path | None = None
    """What bench.label_noise wrote."""
    exact: Path | None = None
    """What `exact` wrote."""
    kv_classifiers: bool = False
    """Fit the KV-cache classifiers too, to the labels and to the losses: minutes."""
    name: str = "frontier_cpu"
    """Write bench/results/NAME.json and NAME.md."""
    device: str = "cpu"
    """What the labels were made on."""

    def run(self) -> None:
        started = time.process_time()
        curves, about = load(self.labels)
        check_targets(curves.chain, self.targets)
        fold = folds(curves, self.folds, self.seed)
        budgets = np.linspace(curves.chain[-1], curves.chain[0], FRONTIER_POINTS).tolist()
        resampling = Resampling.of(curves.groups, self.resamples, self.seed)
        frontier = StaticFrontier(cross_fitted(curves, fold, static, budgets, self.seed), resampling)
        gains, oracle_gains, outcomes = [], [], {}

        def gains_of(name: str, found: list[Outcome]) -> list[Gain]:
            return [gain_of(name, o, frontier, t) for o, t in zip(found, self.targets, strict=True)]

        for name, policy in {**POLICIES, **self._kv_policies(about), **ONLINE_POLICIES}.items():
            outcomes[name] = cross_fitted(curves, fold, policy, self.targets, self.seed)
            gains += gains_of(name, outcomes[name])
        for name, policy in ORACLES.items():
            oracle_gains += gains_of(name, policy(curves, curves, self.targets, self.seed))
        best = {gain.target_bits: gain.gain for gain in oracle_gains if gain.policy == "oracle, plan"}
        rows = table(gains, holm([gain.p for gain in gains]), best)
        for row, gain in zip(rows, gains, strict=True):
            row["prompts_for_1_percent"] = prompts_needed(gain, len(curves))
        oracle_rows = table(oracle_gains, [gain.p for gain in oracle_gains], best)
        results = {
            "settings": {**asdict(self), **{k: str(getattr(self, k)) for k in ("steps", "noise", "exact")}},
            "prompts": len(curves),
            "groups": len(np.unique(curves.groups)),
            "forwards": float(curves.forwards.sum()),
            "kinds": about,
            "chain": curves.chain,
            "uniform": uniform(curves),
            "by_segment": by_segment(curves),
            "static_frontier": [
                {"bits": bits, "loss": loss}
                for bits, loss in zip(frontier.bits.tolist(), frontier.loss.tolist(), strict=True)
            ],
            "policies": rows,
            "oracles": oracle_rows,
            **{key: json.loads(path.read_text()) for key, path in self._parts()},
            "cpu_seconds": time.process_time() - started,
        }
        if self.steps is not None:
            results["decode_time"] = decode_times(outcomes, self.targets, results["steps"]["results"])
        _record.write(self.name, results, self.device)
        text = markdown(results)
        (_record.RESULTS / f"{self.name}.md").write_text(text)
        print(text)

    def _kv_policies(self, about: dict[str, Any]) -> dict[str, Policy]:
        if not self.kv_classifiers:
            return {}
        first = next(iter(about.values()))
        heads, tokens = first["models"]["num_key_value_heads"], first["config"]["max_new_tokens"]
        features = kv_features(self.labels)
        return {
            f"KV classifier, {objective}": kv_policy(features, heads, objective, tokens)
            for objective in ("class", "loss")
        }

    def _parts(self) -> list[tuple[str, Path]]:
        return [
            (key, path) for key in ("steps", "noise", "exact") if (path := getattr(self, key)) is not None
        ]


def uniform(curves: CurveSet) -> list[dict[str, float]]:
    """Mean divergence and agreement of each precision, by kind."""
    rows = []
    for c, bits in enumerate(curves.chain):
        row: dict[str, float] = {"bits": bits}
        for kind in np.unique(curves.kinds):
            at = curves.kinds == kind
            row[f"loss_kind_{kind}"] = float(curves.loss[at, c].sum() / curves.forwards[at].sum())
        row["loss"] = float(curves.loss[:, c].sum() / curves.forwards.sum())
        row["entropy"] = float((curves.statistics["entropy"][:, c] * curves.valid).sum() / curves.valid.sum())
        rows.append(row)
    return rows


def by_segment(curves: CurveSet, segments: int = 4) -> list[dict[str, float]]:
    """Mean divergence by quarter of the decode: whether later tokens are cheaper to lower."""
    at = np.minimum(np.arange(curves.valid.shape[1]) * segments // curves.valid.shape[1], segments - 1)
    rows = []
    for s in range(segments):
        count = curves.valid[:, at == s].sum()
        loss = curves.loss[:, :, at == s].sum((0, 2)) / count
        losses = {str(bits): float(x) for bits, x in zip(curves.chain, loss, strict=True)}
        rows.append({"segment": s, **losses})
    return rows


def decode_times(
    outcomes: dict[str, list[Outcome]], targets: tuple[float, ...], steps: dict[str, Any]
) -> list[dict[str, Any]]:
    """Decode seconds of a row alone per forward, as a share of the highest precision's: the steps of the
    policy's mean bits (between two measured precisions the line) and what its decisions cost."""
    bits = sorted(int(b) for b in steps["seconds"])
    seconds = [steps["seconds"][str(b)] for b in bits]
    rows = []
    for name, found in outcomes.items():
        for target, outcome in zip(targets, found, strict=True):
            forwards = float(outcome.forwards.mean())
            watching = steps["statistics_seconds"] if name in ONLINE_POLICIES else 0.0
            probing = steps["probe_seconds"] if name in ("regression", "static per cluster") else 0.0
            step = float(np.interp(outcome.mean_bits, bits, seconds))
            total = step + watching + probing / forwards
            rows.append(
                {
                    "policy": name,
                    "target_bits": target,
                    "of_highest": total / seconds[-1],
                    "decision_share": (watching + probing / forwards) / total,
                }
            )
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The result as a page."""
    chain = ", ".join(map(str, results["chain"]))
    lines = [
        f"# Policies against the static frontier: {results['prompts']} held-out prompts, chain {chain}",
        "",
        f"{results['forwards']:.0f} decode forwards, {results['groups']} groups of documents, "
        f"{results['settings']['folds']} folds, "
        f"{results['settings']['resamples']} paired resamples, {results['cpu_seconds']:.0f} CPU seconds for "
        f"this table. Loss: KL(unquantized, plan) along the unquantized model's own output, nats a forward.",
        "",
        "| precision | loss | by kind | entropy |",
        "|---|---|---|---|",
    ]
    for row in results["uniform"]:
        kinds = " / ".join(f"{value:.4f}" for key, value in row.items() if key.startswith("loss_kind"))
        lines.append(f"| {row['bits']} | {row['loss']:.4f} | {kinds} | {row['entropy']:.2f} |")
    quarters = "; ".join(_segment(row) for row in results["by_segment"])
    lines += ["", f"By quarter of the decode: {quarters}", ""]
    lines += [
        "| policy | target bits | bits | loss | static at these bits | gain, % | 95 % | p | p (Holm) | "
        "share of the oracle | prompts to see 1 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["policies"] + results["oracles"]:
        share = "" if row["oracle_share"] is None else f"{row['oracle_share']:.2f}"
        needed, mark = row.get("prompts_for_1_percent", ""), ""
        if row["p_holm"] < 0.05 and "prompts_for_1_percent" in row:
            mark = " **" if row["gain_percent"] > 0 else " (worse)"
        lines.append(
            f"| {row['policy']}{mark} | {row['target_bits']:g} | {row['bits']:.3f} | {row['loss']:.4f} | "
            f"{row['static_loss']:.4f} | {row['gain_percent']:+.2f} | [{row['low_percent']:+.2f}, "
            f"{row['high_percent']:+.2f}] | {row['p']:.2g} | {row['p_holm']:.2g} | {share} | {needed} |"
        )
    if "exact" in results:
        lines += ["", "| plan | curves against exact forwards, error in % | correlation over prompts |"]
        lines += ["|---|---|---|"]
        lines += [
            f"| {name} | {row['error_percent']:+.2f} | {row['correlation']:.3f} |"
            for name, row in results["exact"].items()
        ]
    if "noise" in results:
        lines += ["", "| rule | pair | labelled again | agreement | no accuracy exceeds | majority |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {row['rule']} | {row['pair']} | {row['against']} ({row['prompts']}) | {row['agreement']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}] | {row['ceiling']:.2f} | {row['majority']:.2f} |"
            for row in results["noise"]["results"]
        ]
    if "decode_time" in results:
        lines += ["", "| policy | target bits | decode time of the highest precision | decisions |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {row['policy']} | {row['target_bits']:g} | {row['of_highest']:.3f} "
            f"| {row['decision_share']:.1%} |"
            for row in results["decode_time"]
        ]
    return "\n".join(lines) + "\n"


def _segment(row: dict[str, float]) -> str:
    return ", ".join(f"{bits}: {row[bits]:.4f}" for bits in row if bits != "segment")


if __name__ == "__main__":
    tyro.cli(
        Annotated[Prompts, tyro.conf.subcommand("prompts")]
        | Annotated[Study, tyro.conf.subcommand("study")]
        | Annotated[Exact, tyro.conf.subcommand("exact")]
        | Annotated[Steps, tyro.conf.subcommand("steps")],  # type: ignore[arg-type]
        description=__doc__,
    ).run()
