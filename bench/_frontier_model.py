"""The parts of the scheduler study that need a model: `online` run exactly, and the decode times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._frontier_online import Thresholds, follow, settings_of
from bench._frontier_pack import read_curves
from bench.frontier_labels import main_folders
from pmpd import PMPDForCausalLM, storage
from pmpd.decode.forced import GivenTokens, forward_given
from pmpd.decode.precision import token_statistics
from pmpd.decode.prompt_state import look_back
from pmpd.evaluation.answer import measure_forwards
from pmpd.evaluation.curve_set import CurveSet, Outcome, folds
from pmpd.evaluation.frontier import (
    Resampling,
    StaticFrontier,
    gain_of,
    holm,
    lower_hull,
    mix_for,
    prompts_needed,
    table,
)
from pmpd.evaluation.policies import static
from pmpd.labeling.curves import PROBE_TOKENS, batches
from pmpd.schedulers.base import STATISTICS
from pmpd.schedulers.loss_model import FEATURES, probed
from pmpd.training.fit import make_head
from pmpd.weights.model_spec import Dtype, ModelSpec


@torch.inference_mode()
def exact_losses(
    model: PMPDForCausalLM,
    unquantized: PMPDForCausalLM,
    rows: Sequence[Given],
    plans: Sequence[np.ndarray],
    high: int,
) -> np.ndarray:
    """Sums over the decode forwards of what plans lose, run as a decode would have it: float64 [P, N].

    `rows`: prompt and reference of each. A plan: bits of forwards 1.., int [M] for all rows or [N, M]."""
    found = np.zeros((len(plans), len(rows)))
    longest = max(len(prompt) + len(reference) for prompt, reference in rows)
    names = {str(row): row for row in range(len(rows))}
    prompts = {name: rows[row][0] for name, row in names.items()}
    references = {name: rows[row][1] for name, row in names.items()}
    vocabulary = int(model.model.config.vocab_size)
    for keys in batches(prompts, references, vocabulary, model.device.type):
        engine, target = (each.engine(len(keys), longest) for each in (model, unquantized))
        whole = [
            GivenTokens(slot, 0, [*prompts[key], *references[key][:-1]], len(references[key]) - 1)
            for slot, key in enumerate(keys)
        ]
        wanted = torch.cat(forward_given(target, whole, unquantized.precisions[0])).float().log_softmax(-1)
        chances = wanted.exp()
        forward_given(engine, [GivenTokens(slot, 0, list(prompts[k])) for slot, k in enumerate(keys)], high)
        given = [
            GivenTokens(slot, len(prompts[key]), list(references[key][:-1]), len(references[key]) - 1)
            for slot, key in enumerate(keys)
        ]
        of_row = torch.tensor(
            [slot for slot, part in enumerate(given) for _ in part.ids], device=engine.device
        )
        at = [names[key] for key in keys]
        for p, plan in enumerate(plans):
            bits = [
                int(width)
                for row, part in zip(at, given, strict=True)
                for width in (plan if plan.ndim == 1 else plan[row])[: len(part.ids)]
            ]
            logits = torch.cat(forward_given(engine, given, bits)).float().log_softmax(-1)
            divergence = ((wanted - logits).mul_(chances)).sum(-1).clamp_min_(0).double()
            sums = torch.zeros(len(keys), dtype=torch.float64, device=engine.device)
            found[p, at] = sums.index_add_(0, of_row, divergence).cpu().numpy()
    return found


def given_tokens(folders: Sequence[str]) -> dict[str, Given]:
    """Prompts and references of label folders, by prompt_id."""
    columns = ["prompt_id", "input_ids", "reference_ids"]
    return {
        row["prompt_id"]: (row["input_ids"], row["reference_ids"])
        for folder in folders
        for row in storage.read_table(storage.join(folder, "labels"), columns).to_pylist()
    }


@dataclass(frozen=True)
class OnlineExact:
    """The scheduler `online` on prompts that it was not fitted to, run exactly, against the static frontier.
    Its setting (or mix of two) is the best of `candidates` on some of the other prompts, run exactly too."""

    pack: Path
    study: Path
    """Where `bench.frontier_labels` put the set `main`."""
    model_path: str
    reference_model_path: str
    output: Path
    targets: tuple[float, ...] = (2.5, 2.75, 3.0, 3.25, 3.5)
    prompts: int = 640
    """Of the first fold, at most."""
    fitted_to: int = 1500
    """Of the other folds, at most."""
    fitted_exactly: int = 256
    """Of these, about: candidates are run exactly on them."""
    candidates: int = 72
    folds: int = 5
    resamples: int = 10000
    seed: int = 0
    device: str = "cpu"
    kernel: str | None = None
    reference_dtype: Dtype = "float32"

    def run(self) -> None:
        curves = read_curves(self.pack)
        fold = folds(curves, self.folds, self.seed)
        rng = np.random.default_rng(self.seed)
        train, test = (
            curves.take(np.sort(rng.permutation(np.nonzero(mask)[0])[:most]))
            for mask, most in ((fold != 0, self.fitted_to), (fold == 0, self.prompts))
        )
        found = self.judge(train, test, given_tokens(main_folders(self.study)))
        self.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))

    def judge(self, train: CurveSet, test: CurveSet, given: Mapping[str, Given]) -> dict[str, Any]:
        """`given`: prompt_id -> prompt and reference."""
        device, started = torch.device(self.device), time.perf_counter()
        specs = (
            ModelSpec(self.model_path, kernel=self.kernel),
            ModelSpec(self.reference_model_path, dtype=self.reference_dtype),
        )
        models = [PMPDForCausalLM.from_spec(spec, device).eval() for spec in specs]

        def run(curves: CurveSet, levels: Sequence[np.ndarray]) -> list[Outcome]:
            rows, widths = [given[key] for key in curves.keys], curves.widths.astype(int)
            sums = exact_losses(
                models[0], models[1], rows, [widths[each] for each in levels], curves.chain[0]
            )
            shape = (len(curves), curves.loss.shape[2])
            simulated = [curves.summed(np.broadcast_to(each, shape)) for each in levels]
            return [Outcome(loss, o.bits, o.forwards) for loss, o in zip(sums, simulated, strict=True)]

        settings = candidates(train, self.candidates)
        few = train.take(np.arange(0, len(train), max(1, len(train) // self.fitted_exactly)))
        mixes = Mixes.of(run(few, [follow(few, setting) for setting in settings]))
        used = sorted({k for target in self.targets for k in mixes.of_target(target)[:2]})
        ran = dict(zip(used, run(test, [follow(test, settings[k]) for k in used]), strict=True))
        resampling = Resampling.of(test.groups, self.resamples, self.seed)
        budgets = np.linspace(test.chain[-1], test.chain[0], 41).tolist()
        frontier = StaticFrontier(static(train, test, budgets, self.seed), resampling)
        gains = [gain_of("online", mixes.mixed(ran, target), frontier, target) for target in self.targets]
        rows = table(gains, holm([gain.p for gain in gains]), {})
        for row, gain in zip(rows, gains, strict=True):
            row["prompts_for_1_percent"] = prompts_needed(gain, len(test))
        return {
            "prompts": len(test),
            "groups": len(np.unique(test.groups)),
            "fitted_to": len(train),
            "fitted_exactly": len(few),
            "candidates": len(settings),
            "settings": {
                f"{target:g}": [str(settings[k]) for k in mixes.of_target(target)[:2]]
                for target in self.targets
            },
            "seconds": time.perf_counter() - started,
            "rows": rows,
        }


Given = tuple[Sequence[int], Sequence[int]]
"""Tokens of a prompt and of its reference."""


class Mixes:
    """Settings by their mean bits and loss on the prompts that they are chosen on; what meets a target is the
    mix of two neighbours on their lower hull."""

    def __init__(self, bits: np.ndarray, loss: np.ndarray) -> None:
        self.hull = lower_hull(bits, loss)
        self.bits = bits[self.hull].tolist()

    @staticmethod
    def of(outcomes: Sequence[Outcome]) -> Mixes:
        return Mixes(
            *(np.asarray([getattr(o, name) for o in outcomes]) for name in ("mean_bits", "mean_loss"))
        )

    def of_target(self, target: float) -> tuple[int, int, float]:
        a, b, share = mix_for(self.bits, target)
        return int(self.hull[a]), int(self.hull[b]), share

    def mixed(self, outcomes: Mapping[int, Outcome], target: float) -> Outcome:
        a, b, share = self.of_target(target)
        return Outcome.mix(outcomes[a], outcomes[b], share)


def candidates(train: CurveSet, most: int) -> list[Thresholds]:
    """Settings of `online` that are worth exact forwards: of those of `settings_of`, and more that switch
    seldom, for each twelfth of the bits some of least loss by the sums of curves, and as many that switch
    least."""
    settings = [setting for setting in settings_of(train) if setting.signal == "entropy"]
    for setting in list(settings):
        if setting.patience == 1 and setting.hold == 1:
            settings += [replace(setting, patience=p, hold=h) for p, h in ((4, 1), (4, 16), (8, 16))]
    rows = train.take(np.arange(0, len(train), max(1, len(train) // 300)))
    bits, loss, switches = [], [], []
    for setting in settings:
        places = follow(rows, setting)
        outcome = rows.summed(places)
        bits.append(outcome.mean_bits)
        loss.append(outcome.mean_loss)
        switches.append(float(((np.diff(places, axis=1) != 0) & rows.valid[:, 1:]).sum()))
    whole = rows.loss.sum((0, 2)) / rows.forwards.sum()
    order = np.argsort(rows.widths)
    above = np.asarray(loss) / np.exp(np.interp(bits, rows.widths[order], np.log(whole[order])))
    edges = np.linspace(rows.widths.min(), rows.widths.max(), 13)
    chosen: list[int] = []
    each = max(1, most // 24)
    for low, high in pairwise(edges):
        inside = np.nonzero((np.asarray(bits) >= low) & (np.asarray(bits) <= high))[0]
        for key in (above, np.asarray(switches)):
            chosen += inside[np.argsort(key[inside], kind="stable")[:each]].tolist()
    ends = [int(np.argmin(bits)), int(np.argmax(bits))]
    return [settings[k] for k in dict.fromkeys([*ends, *chosen])]


PROMPT_TOKENS = 128
"""Of the prompt on which the classifiers' time is measured."""


@dataclass(frozen=True)
class Steps:
    """Seconds of a decode forward of a row alone at each precision, and what decisions cost."""

    model_path: str
    output: Path
    device: str = "cpu"
    repeats: int = 20
    threads: int = 1

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        model = PMPDForCausalLM.from_spec(ModelSpec(self.model_path), torch.device(self.device)).eval()
        measured = measure_forwards(model, model.precisions)
        logits = torch.randn(1, model.model.config.vocab_size, device=self.device)
        engine = model.engine(1, 256)
        ids = list(range(10, 10 + PROBE_TOKENS))

        def seconds(work) -> float:
            work()
            times = []
            for _ in range(self.repeats):
                started = time.perf_counter()
                work()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            return float(np.median(times))

        low = model.precisions[1:]
        heads = [make_head("kv_cache", model.head_dim, model.kv_heads, 0.0, 0, 0) for _ in low]
        prompt = torch.randn(1, PROMPT_TOKENS, model.head_dim, device=self.device)
        length = torch.tensor([PROMPT_TOKENS], device=self.device)
        for head in heads:
            head.eval().to(self.device)

        def classify() -> None:
            with torch.inference_mode():
                for head in heads:
                    head(prompt, prompt, length).argmax(-1).cpu()

        chain = model.precisions
        looked_at = {features: (chain[0], *probed(chain, features)) for features in FEATURES}
        known = forward_given(engine, [GivenTokens(0, 0, ids, PROBE_TOKENS)], chain[0])  # the prefill's
        found = {
            "threads": self.threads,
            "seconds": {str(row["bits"]): row["seconds"] for row in measured},
            "statistics_seconds": seconds(lambda: token_statistics(STATISTICS, logits).cpu()),
            "classifier_seconds": seconds(classify),
            "probe_seconds": len(low)
            * seconds(lambda: forward_given(engine, [GivenTokens(0, 0, ids, PROBE_TOKENS)], low[0])[0].cpu()),
            "regression_seconds": {
                features: seconds(lambda bits=bits: look_back(engine, [(0, ids)], bits, known))
                for features, bits in looked_at.items()
            },
        }
        self.output.write_text(json.dumps({"results": found}, indent=1) + "\n")
        print(json.dumps(found, indent=1))
