"""Does any policy beat the best static plan at equal bits? The study of docs/guides/scheduler-study.md.

    python -m bench.frontier prompts --texts texts.json.gz --questions question.jsonl --output study/texts
    pmpd label --rule kl --dataset study/texts/continuations.jsonl --output-dir study/continuations …
    pmpd label --rule kl --dataset study/texts/instructions.jsonl --prompt-form chat --output-dir …
    python -m bench.frontier study --labels study/continuations study/instructions
    python -m bench.frontier steps --model-path Q                                       # decode times

`study` needs no model: the labels hold what every progressive plan loses, run exactly. `bench/frontier.sh`
runs all of it, on a CPU or a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from bench import (
    _frontier_answers,
    _frontier_pack,
    _frontier_page,
    _frontier_prompts,
    _frontier_texts,
    _record,
)
from bench._frontier_kv import KvFits, fit_folds, kv_features, kv_policy
from bench._frontier_model import OnlineExact, Steps, given_tokens
from bench.frontier_labels import main_folders
from pmpd import PMPDForCausalLM, storage
from pmpd.decode.requests import Request
from pmpd.errors import UserError
from pmpd.evaluation.curve_set import (
    LABEL_COLUMNS,
    CurveSet,
    Outcome,
    bits_of,
    cross_fitted,
    curve_set,
    folds,
)
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
from pmpd.evaluation.policies import ORACLE, POLICIES, Policy, oracle_plan, static
from pmpd.schedulers.chain import SIXTHS, plan_points, sixths_plans
from pmpd.schedulers.regression import RegressionScheduler
from pmpd.training.config import TrainConfig
from pmpd.training.data import labels_from_table
from pmpd.weights.gguf import GGUFCheckpoint
from pmpd.weights.model_spec import ModelSpec

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
    whole: bool = False
    """Use all of it (what `texts` wrote holds no half that a quantizer has seen)."""

    def run(self) -> None:
        lines = _frontier_prompts.write(
            self.texts, self.questions, self.output, self.continuations, self.tasks, self.whole
        )
        print(json.dumps(lines))


def load(folders: tuple[str, ...]) -> tuple[CurveSet, dict[str, Any]]:
    """The labelled prompts of all folders, and what their manifests say of them. A folder is a kind of
    prompt; those that differ in a number behind the name are of one kind (`texts-0`, `texts-1`).

    UserError: a folder that is not the output of `pmpd label`.
    """
    rows, groups, kinds, about = [], {}, {}, {}
    names = [storage.base_name(folder).rstrip("0123456789").rstrip("-") for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        if not storage.exists(storage.join(folder, "labels")):
            raise UserError(
                f"{folder}: no labels/ in it; give the whole --output-dir of `pmpd label --rule kl`"
            )
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
            "labels_fingerprint": labels_from_table(
                storage.read_table(labels, ["prompt_id", "pairs", "error"])
            ).fingerprint("loss"),
        }
        rows += found
    return curve_set(rows, groups, kinds), about


@dataclass(frozen=True)
class Texts:
    """Write real texts of Debian's packages and of files of records (`bench/_frontier_texts.py`)."""

    output: Path
    documents: tuple[Path, ...] = ()
    """Folders of unpacked packages."""
    records: tuple[str, ...] = ()
    """Files of records; the second half of each."""
    most: int = 700
    """Records of each folder or file."""

    def run(self) -> None:
        print(_frontier_texts.write(self.documents, self.records, self.output, self.most), "records")


@dataclass(frozen=True)
class Unpack:
    """Write a GGUF file as a folder of safetensors (float32, what it dequantizes to): each process that reads
    the file itself takes 20 s for it."""

    gguf: Path
    output: Path

    def run(self) -> None:
        checkpoint = GGUFCheckpoint(self.gguf)
        config = checkpoint.config()
        config.save_pretrained(self.output)
        checkpoint.write_side_files(self.output)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        tensors = {name: checkpoint.tensor(name).clone() for name in sorted(checkpoint.names() - tied)}
        save_file(tensors, self.output / "model.safetensors", {"format": "pt"})


@dataclass(frozen=True)
class Pack:
    """Bring the label sets of `bench.frontier_labels` into a few small files."""

    study: Path
    output: Path
    device: str = "cpu"
    """What the labels were made on."""

    def run(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        curves, about = load(tuple(main_folders(self.study)))
        _frontier_pack.write_curves(curves, self.output)
        counts = _frontier_pack.write_labels(self.study, self.output / _frontier_pack.LABELS)
        made_on = {"hardware": _record.hardware(self.device), "commit": _record.commit()}
        costs = _frontier_pack.cost_rows(self.study)
        told = {"kinds": about, "sets": counts, "costs": costs, "made_on": made_on}
        (self.output / ABOUT).write_text(json.dumps(told, indent=1, default=str) + "\n")
        print(json.dumps({"prompts": len(curves), **counts}))


@dataclass(frozen=True)
class Fit:
    """Fit the KV-cache classifier for every fold, by one rule, and keep what it says of every prompt."""

    study: Path
    pack: Path
    rule: Literal["kl", "loss", "rouge_l", "agreement"]
    """Whose labels; "loss": what each class loses, as a number."""
    folds: int = 5
    seed: int = 0
    batch_size: int = 128
    epochs: int = 30
    device: str = "cpu"

    def run(self) -> None:
        started = time.perf_counter()
        about = read_about(self.pack)
        curves = _frontier_pack.read_curves(self.pack)
        classes = None
        if self.rule in ("rouge_l", "agreement"):
            judged = _frontier_pack.read_labels(self.pack / _frontier_pack.LABELS)["main"][self.rule]
            classes = dict(zip(judged.keys, judged.labels.tolist(), strict=True))
        features = kv_features(main_folders(self.study))
        config = TrainConfig(batch_size=self.batch_size, num_train_epochs=self.epochs, seed=self.seed)
        fits = fit_folds(
            curves,
            features,
            heads_of(about),
            "loss" if self.rule == "loss" else "class",
            folds(curves, self.folds, self.seed),
            classes,
            config,
            self.device,
        )
        fits.write(self.pack / f"kv-{self.rule}.npz")
        told = {"rule": self.rule, "seconds": time.perf_counter() - started}
        print(json.dumps({**told, "accuracy": fits.accuracy(pair_names(curves.chain))}))


def judged_answers(
    answers: _frontier_answers.Answers,
    fold: np.ndarray,
    targets: tuple[float, ...],
    fits: dict[str, KvFits],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The whole answers' frontier, policies and oracle."""
    gains, oracle = _frontier_answers.gains(answers, fold, targets, fits, resamples, seed)
    best = {gain.target_bits: gain.gain for gain in oracle}
    rows = table(gains, holm([gain.p for gain in gains]), best)  # type: ignore[arg-type]
    for row, gain in zip(rows, gains, strict=True):
        row["prompts_for_1_percent"] = prompts_needed(gain, len(answers.loss))
    plans = [
        {
            "pair": pair_names(answers.curves.chain)[j],
            "class": k,
            "bits": float(answers.bits[:, p].sum() / answers.forwards[:, p].sum()),
            "rouge_l": float(1 - answers.loss[:, p].mean()),
        }
        for p, (j, k) in enumerate(answers.plans)
    ]
    return {
        "prompts": len(answers.loss),
        "plans": plans,
        "policies": rows,
        "oracles": table(oracle, [gain.p for gain in oracle], best),  # type: ignore[arg-type]
    }


@dataclass(frozen=True)
class AnswersStudy:
    """Whole answers alone, from the labels of a rule that decodes (rouge_l): no curves, no model."""

    labels: str
    """A labels dataset."""
    targets: tuple[float, ...] = (2.5, 2.75, 3.0, 3.25, 3.5)
    folds: int = 5
    resamples: int = 10000
    seed: int = 0
    epochs: int = 30
    batch_size: int = 64
    name: str = "frontier_answers"
    """Write bench/results/NAME.json and NAME.md."""

    def run(self) -> None:
        started = time.process_time()
        curves, judged, features = _frontier_answers.from_labels(self.labels)
        manifest = storage.read_manifest(self.labels) or {}
        heads, tokens = (
            manifest["models"]["num_key_value_heads"],
            manifest["config"]["max_new_tokens"],
        )
        fold = folds(curves, self.folds, self.seed)
        config = TrainConfig(batch_size=self.batch_size, num_train_epochs=self.epochs, seed=self.seed)
        classes = dict(zip(judged.keys, judged.labels.tolist(), strict=True))
        losses = (1 - judged.scores).astype(np.float32)
        fits = {
            "rouge_l": fit_folds(curves, features, heads, "class", fold, classes, config),
            "loss of ROUGE-L": fit_folds(
                curves, features, heads, "loss", fold, classes, config, losses=losses
            ),
        }
        answers = _frontier_answers.answers_of(curves, judged, tokens)
        found = judged_answers(answers, fold, self.targets, fits, self.resamples, self.seed)
        names = pair_names(curves.chain)
        results = {
            "settings": told(self),
            "labels": {
                key: manifest.get(key) for key in ("config", "models", "seconds", "device", "git_commit")
            },
            "classes": _frontier_pack.class_rows({"rouge_l": judged}, names),
            "classifiers": [
                {"rule": n, **row} for n, fitted in fits.items() for row in fitted.accuracy(names)
            ],
            "answers": found,
            "cpu_seconds": time.process_time() - started,
        }
        _record.write(self.name, results)
        text = _frontier_page.answers_page(results)
        (_record.RESULTS / f"{self.name}.md").write_text(text)
        print(text)


ABOUT = "about.json"


def read_about(pack: Path) -> dict[str, Any]:
    return json.loads((pack / ABOUT).read_text())["kinds"]


def heads_of(about: dict[str, Any]) -> int:
    return next(iter(about.values()))["models"]["num_key_value_heads"]


def told(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON, of paths their last part."""

    def short(value: Any) -> Any:
        if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
            return storage.base_name(str(value))
        return [short(part) for part in value] if isinstance(value, tuple | list) else value

    return {name: short(value) for name, value in asdict(settings).items()}


def tokens_of(about: dict[str, Any]) -> int:
    return next(iter(about.values()))["config"]["max_new_tokens"]


def pair_names(chain: tuple[int, ...]) -> list[str]:
    return [f"{high}-{low}" for high, low in pairwise(chain)]


def rules_of(pack: Path, chain: tuple[int, ...]) -> dict[str, Any]:
    """What the label sets say of the rules: noise, whole answers, classes, costs."""
    sets, pairs = _frontier_pack.read_labels(pack / _frontier_pack.LABELS), pair_names(chain)
    about = json.loads((pack / ABOUT).read_text())
    return {
        "rule_noise": _frontier_pack.noise_rows(sets, pairs),
        "whole_answers": _frontier_pack.whole_answer_rows(sets["main"], pairs),
        "classes": _frontier_pack.class_rows(sets["main"], pairs),
        "costs": about["costs"],
        "made_on": about.get("made_on"),
    }


def judged(
    outcomes: dict[str, list[Outcome]],
    oracle: list[Outcome],
    frontier: StaticFrontier,
    targets: tuple[float, ...],
) -> dict[str, Any]:
    """The rows of the policies, corrected for their number, and of the oracle."""

    def gains_of(name: str, found: list[Outcome]) -> list[Gain]:
        return [gain_of(name, o, frontier, t) for o, t in zip(found, targets, strict=True)]

    gains = [gain for name, found in outcomes.items() for gain in gains_of(name, found)]
    best = gains_of(ORACLE, oracle)
    shares: dict[float, float] = {t: gain.gain for t, gain in zip(targets, best, strict=True)}
    rows = table(gains, holm([gain.p for gain in gains]), shares)
    for row, gain in zip(rows, gains, strict=True):
        row["prompts_for_1_percent"] = prompts_needed(gain, len(oracle[0].loss))
    return {"policies": rows, "oracles": table(best, [gain.p for gain in best], shares)}


def plan_rows(curves: CurveSet) -> list[dict[str, Any]]:
    """Every plan: its switches in sixths of the answer, bits, loss, and what the sum of the uniform curves
    would have said."""
    most, forwards = curves.loss.shape[2], np.arange(1, curves.loss.shape[2] + 1)
    bits, loss = curves.plan_means
    rows = []
    for p, plan in enumerate(sixths_plans(len(curves.chain) - 1)):
        steps = np.asarray(plan_points(most + 1))[plan]
        levels = (steps[None] < forwards[:, None]).sum(1)
        summed = curves.summed(np.broadcast_to(levels, (len(curves), most))).mean_loss
        switches = [int(at) if at < SIXTHS else None for at in plan]
        rows.append({"sixths": switches, "bits": bits[p], "loss": loss[p], "by_curves": summed})
    return rows


@dataclass(frozen=True)
class Confirm:
    """Fit policies to label sets and judge them once on others."""

    fit_labels: tuple[str, ...]
    """Output folders of pmpd label --rule kl: the static frontier and the policies are chosen on these."""
    labels: tuple[str, ...]
    """Prompts that nobody has looked at."""
    policies: tuple[str, ...] = tuple(POLICIES)
    kv_classifiers: bool = False
    """And the KV-cache classifiers, by the labels and by the losses."""
    model_path: str = ""
    """With it and reference_model_path, `online` is run exactly too (see `online`), on the same prompts."""
    reference_model_path: str = ""
    fitted_exactly: int = 130
    candidates: int = 72
    """Of the exact run, as of `online`."""
    targets: tuple[float, ...] = (2.5, 2.75, 3.0, 3.25, 3.5)
    resamples: int = 10000
    seed: int = 0
    name: str = "frontier_confirm"
    """Write bench/results/NAME.json."""

    def run(self) -> None:
        started = time.process_time()
        (first, _), (second, about) = load(self.fit_labels), load(self.labels)
        assert not set(first.keys) & set(second.keys), "a prompt is in both sets"
        curves, _ = load((*self.fit_labels, *self.labels))
        held = np.isin(curves.keys, second.keys)
        train, test = curves.take(np.flatnonzero(~held)), curves.take(np.flatnonzero(held))
        chosen: dict[str, Policy] = {name: POLICIES[name] for name in self.policies}
        if self.kv_classifiers:
            features = kv_features((*self.fit_labels, *self.labels))
            for name, objective in (("kl", "class"), ("loss", "loss")):
                fits = fit_folds(curves, features, heads_of(about), objective, held.astype(int))
                chosen[f"KV classifier, {name}"] = kv_policy(fits)
        budgets = np.linspace(train.chain[-1], train.chain[0], FRONTIER_POINTS).tolist()
        resampling = Resampling.of(test.groups, self.resamples, self.seed)
        frontier = StaticFrontier(static(train, test, budgets, self.seed), resampling)
        outcomes = {name: policy(train, test, self.targets, self.seed) for name, policy in chosen.items()}
        oracle = oracle_plan(test, test, self.targets, self.seed)
        online = None
        if self.model_path:
            study = OnlineExact(
                Path(),
                Path(),
                self.model_path,
                self.reference_model_path,
                Path(),
                self.targets,
                fitted_exactly=self.fitted_exactly,
                candidates=self.candidates,
                resamples=self.resamples,
                seed=self.seed,
            )
            online = study.judge(train, test, given_tokens([*self.fit_labels, *self.labels]))
        results = {
            "settings": told(self),
            "fitted_to": len(train),
            "prompts": len(test),
            "groups": len(np.unique(test.groups)),
            "forwards": float(test.forwards.sum()),
            "kinds": about,
            "plans": plan_rows(test),
            **judged(outcomes, oracle, frontier, self.targets),
            **({} if online is None else {"online": online}),
            "cpu_seconds": time.process_time() - started,
        }
        _record.write(self.name, results)
        for row in [*results["policies"], *(online["rows"] if online else ())]:
            print(json.dumps(row))


@dataclass(frozen=True)
class Decoded:
    """Decode prompts freely under a regression that `pmpd train` made, and judge the plans that it chose by
    what they lose along the reference."""

    save_dir: str
    """The artefact."""
    model_path: str
    fit_labels: tuple[str, ...]
    """Output folders of pmpd label --rule kl: the static frontier is chosen on these."""
    labels: tuple[str, ...]
    """Likewise; their prompts are decoded."""
    targets: tuple[float, ...] = (2.5, 2.75)
    slots: int = 16
    resamples: int = 10000
    seed: int = 0
    device: str = "cpu"
    kernel: str | None = None
    name: str = "frontier_decoded"
    """Write bench/results/NAME.json."""

    def run(self) -> None:
        (train, _), (test, about) = load(self.fit_labels), load(self.labels)
        given, tokens = given_tokens(self.labels), tokens_of(about)
        spec = ModelSpec(self.model_path, kernel=self.kernel)
        model = PMPDForCausalLM.from_spec(spec, torch.device(self.device)).eval()
        budgets = np.linspace(train.chain[-1], train.chain[0], FRONTIER_POINTS).tolist()
        resampling = Resampling.of(test.groups, self.resamples, self.seed)
        frontier = StaticFrontier(static(train, test, budgets, self.seed), resampling)
        steps = np.asarray(plan_points(tokens))[sixths_plans(len(test.chain) - 1)].tolist()
        gains, decoded = [], []
        for target in self.targets:
            scheduler = RegressionScheduler(test.chain, self.save_dir, target)
            requests = [Request(key, given[key][0], tokens) for key in test.keys]
            model.decide(scheduler, test.chain[0])
            done = {each.key: each for each in model.complete(requests, scheduler, test.chain[0], self.slots)}
            plans = [steps.index(list(done[key].switch_steps)) for key in test.keys]
            gains.append(gain_of("regression", test.under(np.asarray(plans)), frontier, target))
            took = np.asarray([max(len(done[key].tokens) - 1, 1) for key in test.keys])
            switch = np.asarray([[done[key].switch_steps] for key in test.keys])
            seconds = [sum(getattr(each, f"{part}_seconds") for each in done.values())
                       for part in ("decision", "decode")]  # fmt: skip
            decoded.append(
                {
                    "decoded_bits": float(bits_of(switch, test.chain, took).sum() / took.sum()),
                    "decision_share": seconds[0] / seconds[1],
                }
            )
        rows = table(gains, holm([gain.p for gain in gains]), {})
        results = {
            "settings": told(self),
            "prompts": len(test),
            "groups": len(np.unique(test.groups)),
            "policies": [{**row, **more} for row, more in zip(rows, decoded, strict=True)],
        }
        _record.write(self.name, results, self.device)
        print(json.dumps(results))


@dataclass(frozen=True)
class Study:
    """Every policy against the static frontier, on prompts that it was not fitted to."""

    labels: tuple[str, ...] = ()
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
    online: Path | None = None
    """What `online` wrote."""
    kv_classifiers: bool = False
    """Fit the KV-cache classifiers too, to the labels and to the losses: minutes."""
    name: str = "frontier_cpu"
    """Write bench/results/NAME.json and NAME.md."""
    device: str = "cpu"
    """What this runs on; of a pack, it says itself what its labels were made on."""
    pack: Path | None = None
    """What `pack` wrote, in place of labels; the classifiers that `fit` wrote there are policies, too."""
    kind: int | None = None
    """Of a pack, the prompts of this kind alone, without the classifiers."""

    def run(self) -> None:
        started = time.process_time()
        curves, about = (
            load(self.labels)
            if self.pack is None
            else (_frontier_pack.read_curves(self.pack), read_about(self.pack))
        )
        if self.kind is not None:
            curves = curves.take(np.nonzero(curves.kinds == self.kind)[0])
        check_targets(curves.chain, self.targets)
        fold = folds(curves, self.folds, self.seed)
        fits = self._kv_fits(curves, about, fold)
        kv = {f"KV classifier, {name}": kv_policy(fitted) for name, fitted in fits.items()}
        budgets = np.linspace(curves.chain[-1], curves.chain[0], FRONTIER_POINTS).tolist()
        resampling = Resampling.of(curves.groups, self.resamples, self.seed)
        frontier = StaticFrontier(cross_fitted(curves, fold, static, budgets, self.seed), resampling)
        outcomes = {
            name: cross_fitted(curves, fold, policy, self.targets, self.seed)
            for name, policy in {**POLICIES, **kv}.items()
        }
        oracle = oracle_plan(curves, curves, self.targets, self.seed)
        results = {
            "settings": told(self),
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
            "plans": plan_rows(curves),
            **judged(outcomes, oracle, frontier, self.targets),
            **{key: json.loads(path.read_text()) for key, path in self._parts()},
            **({} if self.pack is None else rules_of(self.pack, curves.chain)),
            **self._answers(curves, fold, fits, tokens_of(about)),
            "classifiers": [
                {"rule": name, **row}
                for name, fitted in fits.items()
                for row in fitted.accuracy(pair_names(curves.chain))
            ],
            "cpu_seconds": time.process_time() - started,
        }
        if self.steps is not None:
            results["decode_time"] = decode_times(
                outcomes, self.targets, results["steps"]["results"], frontier
            )
        _record.write(self.name, results, self.device)
        text = _frontier_page.markdown(results)
        (_record.RESULTS / f"{self.name}.md").write_text(text)
        _frontier_page.figure(results, _record.RESULTS / f"{self.name}.png")
        print(text)
        print(f"this page, its figure and its figures as JSON: {_record.RESULTS / self.name}.md, .png, .json")

    def _answers(
        self, curves: CurveSet, fold: np.ndarray, fits: dict[str, KvFits], tokens: int
    ) -> dict[str, Any]:
        """The whole answers' frontier; {} where none were decoded."""
        if self.pack is None:
            return {}
        rouge = _frontier_pack.read_labels(self.pack / _frontier_pack.LABELS)["main"].get("rouge_l")
        if rouge is None:
            return {}
        answers = _frontier_answers.answers_of(curves, rouge, tokens)
        at = {key: row for row, key in enumerate(curves.keys)}
        fold = fold[[at[key] for key in answers.curves.keys]]
        return {"answers": judged_answers(answers, fold, self.targets, fits, self.resamples, self.seed)}

    def _kv_fits(self, curves: CurveSet, about: dict[str, Any], fold: np.ndarray) -> dict[str, KvFits]:
        if self.kind is not None:
            return {}
        if self.pack is not None:
            found = {p.stem.removeprefix("kv-"): KvFits.read(p) for p in sorted(self.pack.glob("kv-*.npz"))}
            for fitted in found.values():
                assert fitted.keys == curves.keys, "the classifiers were fitted to other prompts"
                assert np.array_equal(fitted.fold, fold), "the classifiers were fitted to other folds"
            return found
        if not self.kv_classifiers:
            return {}
        features, heads = kv_features(self.labels), heads_of(about)
        return {
            name: fit_folds(curves, features, heads, objective, fold)
            for name, objective in (("kl", "class"), ("loss", "loss"))
        }

    def _parts(self) -> list[tuple[str, Path]]:
        return [
            (key, path) for key in ("steps", "noise", "online") if (path := getattr(self, key)) is not None
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


REGRESSIONS = {
    "regression": "probes",
    "regression, one probe": "one_probe",
    "regression, no probe": "no_probe",
    "stopping": "probes",
    "stopping, one probe": "one_probe",
    "stopping, no probe": "no_probe",
}
"""Policy -> its features of the prompt."""


def decode_times(
    outcomes: dict[str, list[Outcome]],
    targets: tuple[float, ...],
    steps: dict[str, Any],
    frontier: StaticFrontier,
) -> list[dict[str, Any]]:
    """Decode seconds of a row alone per forward, as a share of the highest precision's: the steps of the
    policy's mean bits (between two measured precisions the line) and what its decisions cost. And how much
    less than the static plans of the same loss take: what a gain at equal bits is worth in time."""
    bits = sorted(int(b) for b in steps["seconds"])
    seconds = [steps["seconds"][str(b)] for b in bits]
    rows = []
    for name, found in outcomes.items():
        for target, outcome in zip(targets, found, strict=True):
            forwards = float(outcome.forwards.mean())
            watching = steps["statistics_seconds"] if name.startswith("stopping") else 0.0
            probing = steps["probe_seconds"] if name == "static per cluster" else 0.0
            probing += steps.get("regression_seconds", {}).get(REGRESSIONS.get(name, ""), 0.0)
            probing += steps.get("classifier_seconds", 0.0) if name.startswith("KV classifier") else 0.0
            step = float(np.interp(outcome.mean_bits, bits, seconds))
            total = step + watching + probing / forwards
            alike = float(np.interp(outcome.mean_loss, frontier.loss[::-1], frontier.bits[::-1]))
            static_step = float(np.interp(alike, bits, seconds))
            rows.append(
                {
                    "policy": name,
                    "target_bits": target,
                    "of_highest": total / seconds[-1],
                    "decision_share": (watching + probing / forwards) / total,
                    "bits_saved": alike - outcome.mean_bits,
                    "time_saved_percent": 100 * (1 - total / static_step),
                }
            )
    return rows


def main() -> None:
    """UserErrors are a line, as those of `pmpd`."""
    what = tyro.cli(
        Annotated[Texts, tyro.conf.subcommand("texts")]
        | Annotated[Prompts, tyro.conf.subcommand("prompts")]
        | Annotated[Unpack, tyro.conf.subcommand("unpack")]
        | Annotated[Pack, tyro.conf.subcommand("pack")]
        | Annotated[Fit, tyro.conf.subcommand("fit")]
        | Annotated[Study, tyro.conf.subcommand("study")]
        | Annotated[AnswersStudy, tyro.conf.subcommand("answers")]
        | Annotated[Confirm, tyro.conf.subcommand("confirm")]
        | Annotated[Decoded, tyro.conf.subcommand("decoded")]
        | Annotated[OnlineExact, tyro.conf.subcommand("online")]
        | Annotated[Steps, tyro.conf.subcommand("steps")],  # type: ignore[arg-type]
        description=__doc__,
    )
    try:
        what.run()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
