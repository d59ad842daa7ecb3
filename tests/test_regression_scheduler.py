"""The scheduler `regression`: what it knows of a prompt is what its labels knew, and its plan is the
study's."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load, save
from safetensors.torch import save as save_tensors

from pmpd import PMPDForCausalLM, Scheduler, demo, storage
from pmpd.cli.flags.generate import GenerateJob
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.flags.train import TrainJob
from pmpd.cli.generate import main as generate
from pmpd.cli.generate import scheduler_names
from pmpd.cli.label import main as label
from pmpd.cli.train import gain_line, generate_command, reached_line, wants_regression
from pmpd.cli.train import main as train
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.forced import GivenTokens, forward_given
from pmpd.decode.prompt_state import PROBE_TOKENS, look_back
from pmpd.decode.requests import Request
from pmpd.errors import UserError
from pmpd.evaluation.curve_set import CurveSet, state_of
from pmpd.evaluation.frontier import lower_hull
from pmpd.evaluation.policies import (
    MULTIPLIERS,
    choices_by_prediction,
    fitted_stops,
    regression_prediction,
    seen_by,
    stops,
)
from pmpd.evaluation.results import read_generations
from pmpd.farm.train import LabelSource
from pmpd.labeling.curves import curves_columns, forced_rows
from pmpd.schedulers import stop_model
from pmpd.schedulers.base import Decision, ObservedRows, PrefillState, PromptState
from pmpd.schedulers.budget import TOLERANCE
from pmpd.schedulers.chain import chain_bits, plan_points, sixths_plans
from pmpd.schedulers.kv_cache import KVCacheScheduler
from pmpd.schedulers.loss_model import (
    FEATURES,
    LossModel,
    cheapest,
    feature_names,
    prompt_features,
)
from pmpd.schedulers.regression import (
    Calibration,
    RegressionConfig,
    RegressionScheduler,
    artefact_files,
    calibrate,
    choose,
)
from pmpd.schedulers.static import StaticScheduler
from pmpd.training.config import TrainConfig
from pmpd.training.data import splits_of
from pmpd.training.regression import fit_regression, read_curves
from tests.test_engine import random_prompts
from tests.test_frontier import CHAIN, FORWARDS, made_up

MODEL = "0123456789abcdef"


@pytest.fixture(scope="module")
def texts():
    """Prompts shorter than the probe (one of a single token) and longer, and references."""
    prompts, references = random_prompts(7, 60, seed=4), random_prompts(7, 12, seed=5)
    keys = [f"{index:016x}" for index in range(7)]
    assert max(map(len, prompts)) > PROBE_TOKENS
    return dict(zip(keys, prompts, strict=True)), {
        key: [3, *ids, 4] for key, ids in zip(keys, references, strict=True)
    }


def known_prompts(prompts: int = 300, seed: int = 0) -> CurveSet:
    """Made-up curves whose loss a prompt's entropy tells, with features under their real names."""
    curves = made_up(prompts, seed, kind_effect=0.5)
    rng = np.random.default_rng(seed)
    states = [
        PromptState(
            {name: float(rng.normal()) for name in ("loss", "margin", "last_entropy", "last_margin")}
            | {"entropy": float(kind + 0.3 * rng.normal())},
            {bits: float(rng.gamma(2.0)) for bits in CHAIN[1:]},
        )
        for kind in curves.kinds
    ]
    lengths = rng.integers(5, 200, prompts)
    features = prompt_features(states, lengths.tolist(), CHAIN)
    return replace(curves, features=features, feature_names=feature_names(CHAIN))


def states_of(curves: CurveSet) -> list[PromptState]:
    """The states that these features are of."""
    table = {name: curves.features[:, i].tolist() for i, name in enumerate(curves.feature_names)}
    return [
        PromptState(
            {name: values[row] for name, values in table.items() if not name.startswith(("probe", "log"))},
            {bits: float(np.exp(table[f"probe_{bits}"][row]) - 1e-4) for bits in CHAIN[1:]},
        )
        for row in range(len(curves))
    ]


def written(folder: Path, model: LossModel, calibrations: tuple[Calibration, ...], features: str) -> Path:
    config = RegressionConfig(CHAIN, features, calibrations[0].target_bits, calibrations, 9, MODEL, "labels")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in artefact_files(config, model).items():
        (folder / name).write_bytes(content)
    return folder


def decided(scheduler: RegressionScheduler, curves: CurveSet) -> np.ndarray:
    """Switch steps of every prompt for answers as long as the longest reference."""
    states = states_of(curves)
    lengths = np.exp(curves.features[:, -1]).round().astype(int).tolist()
    tokens = [curves.loss.shape[2] + 1] * len(curves)
    state = PrefillState(
        curves.keys, tokens, lengths, lambda: pytest.fail("no cache"), prompts=lambda _: states
    )
    return scheduler.begin(state).switch_steps


# ---- What is known of a prompt


class Spy(StaticScheduler):
    """A static plan that looks at the prompts first."""

    def __init__(self, precisions, high_bit_steps, looks: bool = True, says_so: bool = False) -> None:
        super().__init__(precisions, high_bit_steps)
        self.prompt_bits = self.precisions if says_so else ()
        self.seen: dict[str, PromptState] = {}
        self.looks = looks

    def begin(self, state: PrefillState) -> Decision:
        if self.looks:
            self.seen |= zip(state.keys, state.prompts(self.precisions), strict=True)
        return super().begin(state)


def as_numbers(state: PromptState) -> list[float]:
    return [*(state.values[name] for name in sorted(state.values)), *(state.probes[bits] for bits in (3, 2))]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_the_numbers_of_a_prompt_are_the_same_in_labels_and_decode(
    anyprec_model, dense_folder, texts, architecture, slots
):
    prompts, references = texts
    model = anyprec_model(architecture)
    unquantized = PMPDForCausalLM(dense_folder(architecture), kernel="reference").eval()
    labelled = {
        row.key: state_of(curves_columns(row))
        for row in forced_rows(model, unquantized, prompts, references, CHAIN, 14)
    }
    spy, other = Spy(CHAIN, 2), Spy(CHAIN, 2, says_so=True)
    engine = Engine(model.model, slots=slots, max_length=80)
    requests = [Request(key, ids, 6) for key, ids in prompts.items()]
    for each in (spy, other):
        assert all(c.error is None for c in engine.run(requests, each, 4, ()))
    for key, ids in prompts.items():
        np.testing.assert_allclose(
            as_numbers(other.seen[key]), as_numbers(spy.seen[key]), rtol=2e-4, atol=2e-6
        )
        np.testing.assert_allclose(as_numbers(spy.seen[key]), as_numbers(labelled[key]), rtol=2e-4, atol=2e-6)
        plain = Spy(CHAIN, 2)
        oracle.decode(model.model, ids, 2, 4, (), plain, key=key)
        np.testing.assert_allclose(
            as_numbers(plain.seen[key]), as_numbers(labelled[key]), rtol=2e-4, atol=2e-6
        )
    values = np.asarray([as_numbers(state) for state in labelled.values()])
    assert (values.std(0) > 0).all(), "prompts differ in every number"


def test_looking_back_changes_nothing(anyprec_model, texts):
    """Probes overwrite the end of a prompt in its slot: what was there comes back, bit by bit. The prefill is
    at another precision than what is looked at last, which would leave its own there."""
    prompts, _ = texts
    model = anyprec_model()
    found = {}
    for looks in (False, True):
        engine = Engine(model.model, slots=3, max_length=80)
        requests = [Request(key, ids, 12, want_prefix=True) for key, ids in prompts.items()]
        found[looks] = {c.key: c for c in engine.run(requests, Spy(CHAIN, 4, looks), 3, ())}
    for key, completion in found[True].items():
        other = found[False][key]
        assert completion.tokens == other.tokens
        for layers in zip(completion.prefix.layers, other.prefix.layers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(*layers, strict=True))


def test_what_the_prefill_tells_takes_no_forward(anyprec_model, texts, monkeypatch):
    prompts, _ = texts
    engine = Engine(anyprec_model().model, slots=7, max_length=80)
    requests = [Request(key, ids, 2) for key, ids in prompts.items()]
    forward, counts = engine.forward, []
    monkeypatch.setattr(engine, "forward", lambda *given: (counts.append(len(given[0])), forward(*given))[1])

    def forwards(spy: Spy, prefill_bits: int = 4) -> int:
        counts.clear()
        assert len(list(engine.run(requests, spy, prefill_bits, ()))) == len(prompts)
        return len(counts)

    alone = forwards(Spy(CHAIN, 1, looks=False))
    assert forwards(Spy(CHAIN, 1, says_so=True)) == alone + 2, "one for each lower precision"
    assert forwards(Spy(CHAIN, 1)) == alone + 3
    assert forwards(Spy(CHAIN, 1, says_so=True), prefill_bits=3) == alone + 3, "4 bits were not the prefill's"


def test_prompts_are_looked_at_in_parts_that_fit_the_memory(anyprec_model, texts, monkeypatch):
    prompts, _ = texts
    model = anyprec_model()
    engine = Engine(model.model, slots=7, max_length=80)
    rows = list(enumerate(prompts.values()))
    forward_given(engine, [GivenTokens(slot, 0, ids) for slot, ids in rows], 4)
    whole = [as_numbers(state) for state in look_back(engine, rows, CHAIN)]
    monkeypatch.setattr("pmpd.decode.prompt_state.LOGIT_BYTES", {"cpu": 1})
    np.testing.assert_allclose(
        [as_numbers(s) for s in look_back(engine, rows, CHAIN)], whole, rtol=2e-4, atol=2e-6
    )


def test_a_decision_is_counted_in_the_decode_time(anyprec_model, texts):
    prompts, _ = texts
    engine = Engine(anyprec_model().model, slots=3, max_length=80)
    requests = [Request(key, ids, 6) for key, ids in prompts.items()]
    for completion in engine.run(requests, Spy(CHAIN, 2), 4, ()):
        assert 0 < completion.decision_seconds < completion.decode_seconds
    (planned,) = engine.run([replace(requests[0], switch_steps=(0, 0))], Spy(CHAIN, 2), 4, ())
    assert planned.decision_seconds == 0, "a row with a plan has no decision"


# ---- The plan


@pytest.mark.parametrize("features", FEATURES)
def test_the_plan_is_that_of_the_study(tmp_path, features):
    """Fitted to the same prompts, scheduler and policy choose the same plan for every held-out prompt."""
    curves = known_prompts()
    fitted, held_out = curves.take(np.arange(200)), curves.take(np.arange(200, 300))
    ((first, second, _),) = choices_by_prediction(
        fitted, held_out, [2.6], regression_prediction(fitted, features)
    )
    names = feature_names(CHAIN, features)
    own = fitted.features[:, [fitted.feature_names.index(name) for name in names]]
    model = LossModel.fit(own, fitted.plan_loss, fitted.plan_bits, fitted.forwards)
    steps = np.asarray(plan_points(FORWARDS + 1))[sixths_plans(2)]
    found = []
    for index, multiplier in enumerate(MULTIPLIERS):
        folder = written(
            tmp_path / str(index), model, (Calibration(2.6, multiplier, 0, 0, 2.6, True),), features
        )
        found.append(decided(RegressionScheduler(CHAIN, folder), held_out))
    for plans in (first, second):
        assert any(np.array_equal(steps[plans], each) for each in found), (
            "no multiplier gives the policy's plans"
        )
    assert (len(np.unique(steps[first], axis=0)) > 1) == (features != "none"), (
        "prompts have plans of their own"
    )


def test_without_features_the_best_static_plans_come_out(tmp_path):
    """The mix of two plans that the frontier of the same prompts has, and no prompt is looked at."""
    curves = known_prompts(400)
    fitted = fit_regression(curves, TrainConfig(), features="none", watch=False, target_bits=2.6)
    for name, content in fitted.files().items():
        (tmp_path / name).write_bytes(content)
    scheduler = RegressionScheduler(CHAIN, tmp_path)
    assert scheduler.prompt_bits == ()
    keys = [f"{i:016x}" for i in range(4000)]
    state = PrefillState(
        keys, [FORWARDS + 1] * 4000, [5] * 4000, lambda: None, prompts=lambda _: pytest.fail("a look")
    )
    steps = scheduler.begin(state).switch_steps
    used = np.unique(steps, axis=0)
    assert 1 <= len(used) <= 2, "two plans share the prompts"
    train = curves.take(np.flatnonzero(splits_of(curves.keys, TrainConfig()) == 0))
    hull = lower_hull(*train.plan_means)
    best = np.asarray(plan_points(FORWARDS + 1))[sixths_plans(2)[hull]].tolist()
    assert all(plan in best for plan in used.tolist())
    validation = curves.take(np.flatnonzero(splits_of(curves.keys, TrainConfig()) == 1))
    assert fitted.calibration.reached or len(used) == 2
    assert fitted.calibration.bits == pytest.approx(2.6, abs=0.15), len(validation)


class Along:
    """A decode along the references of made-up curves: what a scheduler that watches is shown."""

    def __init__(self, curves: CurveSet) -> None:
        self.curves, self.states = curves, states_of(curves)
        self.tokens = [curves.loss.shape[2] + 1] * len(curves)

    def steps(self, scheduler: RegressionScheduler) -> np.ndarray:
        curves = self.curves
        lengths = np.exp(curves.features[:, -1]).round().astype(int).tolist()
        state = PrefillState(curves.keys, self.tokens, lengths, lambda: None, prompts=lambda _: self.states)
        decision = scheduler.begin(state)
        steps, states = decision.switch_steps.copy(), list(decision.states)
        for t in range(1, curves.loss.shape[2] + 1):
            on = np.flatnonzero(curves.valid[:, t - 1])
            bits = chain_bits(CHAIN, steps[on], np.full(len(on), t))
            place = [CHAIN.index(each) for each in bits.tolist()]
            seen = {name: curves.statistics[name][on, place, t - 1] for name in scheduler.statistics}
            keys, own = [curves.keys[n] for n in on], [states[n] for n in on]
            rows = ObservedRows(keys, np.full(len(on), t), bits, steps[on], own, seen)
            assert scheduler.observe(rows) is None
            steps[on] = rows.switch_steps
            for n, found in zip(on.tolist(), rows.states, strict=True):
                states[n] = found
        return steps


def watching(prompts: int = 400) -> CurveSet:
    """Made-up curves of which the decode tells more than the prompt."""
    curves = known_prompts(prompts)
    shown = np.exp(0.8 * (2 * curves.kinds - 1))[:, None, None] * np.ones_like(curves.loss)
    return replace(curves, statistics={"entropy": shown, "margin": np.exp(-shown)})


@pytest.mark.parametrize("watch", [True, False])
def test_a_target_at_a_precision_is_kept_exactly(tmp_path, watch):
    """By every prompt, not on average over some: it is the static plan, which looks at nothing. One that does
    not watch may mix other plans at a precision between the ends."""
    curves = watching()
    for target in CHAIN:
        fitted = fit_regression(curves, TrainConfig(), watch=watch, target_bits=target)
        free = not watch and target == 3
        assert (fitted.fixed_plan is None) == free
        assert ("kept exactly" in reached_line(fitted)) == (gain_line(fitted) is None) == (not free)
        folder = tmp_path / str(target)
        folder.mkdir()
        for name, content in fitted.files().items():
            (folder / name).write_bytes(content)
        scheduler = RegressionScheduler(CHAIN, folder)
        assert bool(scheduler.prompt_bits) == free
        if free:
            continue
        assert (fitted.calibration.bits, fitted.calibration.reached) == (target, True)
        row = next(row for row in fitted.judged if row["target_bits"] == target)
        assert (row["bits"], row["gain_percent"]) == (target, 0)
        assert not scheduler.observes
        assert not scheduler.statistics
        tokens = [1, 2, 9, 300]
        state = PrefillState(["a", "b", "c", "d"], tokens, [5] * 4, lambda: pytest.fail("no cache"))
        steps = scheduler.begin(state).switch_steps
        for forwards, row_steps in zip([m - 1 for m in tokens], steps, strict=True):
            at = np.arange(1, forwards + 1)
            assert (chain_bits(CHAIN, np.tile(row_steps, (forwards, 1)), at) == target).all()


@pytest.mark.parametrize("target", [2.4, 2.75, 3.3])
def test_one_that_watches_switches_where_the_study_does(tmp_path, target):
    """Row by row along the decode, from what it is shown then."""
    curves = watching()
    fitted = fit_regression(curves, TrainConfig(), target_bits=target)
    for name, content in fitted.files().items():
        (tmp_path / name).write_bytes(content)
    scheduler = RegressionScheduler(CHAIN, tmp_path)
    assert scheduler.observes
    assert scheduler.statistics == ("entropy", "margin")
    steps = Along(curves).steps(scheduler)
    plans_at = stops(fitted.model, curves, scheduler.pair, "no_probe")
    plans = choose(plans_at, curves.keys, fitted.calibration)
    wanted = np.asarray(plan_points(FORWARDS + 1))[sixths_plans(2)[plans]]
    # a switch behind the end of a reference is one that the decode never came to
    ends = curves.valid.sum(1)[:, None]
    assert np.array_equal(np.minimum(steps, ends), np.minimum(wanted, ends))
    assert len(np.unique(steps, axis=0)) > 3, "prompts switch at steps of their own"
    assert (np.diff(steps, axis=1) >= 0).all()


def test_what_the_decode_shows_is_worth_something():
    curves = watching(600)
    rows = {}
    for watch in (False, True):
        fitted = fit_regression(curves, TrainConfig(), features="none", watch=watch, target_bits=2.5)
        rows[watch] = next(row for row in fitted.judged if row["target_bits"] == 2.5)
    assert abs(rows[False]["gain_percent"]) < 3, "the prompt alone is not even looked at"
    assert rows[True]["low_percent"] > 5
    model = fitted_stops(curves, "none")
    assert seen_by(curves, 1, 0, "none").shape == (600, 0)
    assert model.parts[1][3].weights.shape == (4, 4), "what was shown, the sixths that are left and never"


def test_a_plan_never_rises_and_any_number_of_tokens_has_one(tmp_path):
    curves = known_prompts()
    fitted = fit_regression(curves, TrainConfig(), target_bits=2.75)
    folder = tmp_path / "it"
    folder.mkdir()
    for name, content in fitted.files().items():
        (folder / name).write_bytes(content)
    scheduler = RegressionScheduler(CHAIN, folder)
    states = states_of(curves)[:6]
    tokens = [1, 2, 3, 7, 64, 300]
    state = PrefillState(curves.keys[:6], tokens, [9] * 6, lambda: None, prompts=lambda _: states)
    steps = scheduler.begin(state).switch_steps
    assert (np.diff(steps, axis=1) >= 0).all()
    assert (steps <= np.maximum(1, np.asarray(tokens) - 1)[:, None]).all()


def test_a_prompt_without_finite_numbers_never_switches(tmp_path):
    curves = known_prompts()
    folder = written(
        tmp_path,
        fit_regression(curves, TrainConfig(), features="one_probe", watch=False).model,
        (Calibration(2.5, 1e6, 1e6, 0, 2, False),),
        "one_probe",
    )
    states = states_of(curves)[:2]
    states[1] = replace(states[1], probes={3: float("nan"), 2: float("nan")})
    state = PrefillState(curves.keys[:2], [9, 9], [5, 5], lambda: None, prompts=lambda _: states)
    steps = RegressionScheduler(CHAIN, folder).begin(state).switch_steps
    assert steps[0].tolist() == [0, 0]
    assert steps[1].tolist() == [8, 8]


# ---- Bits on average


def test_the_target_is_reached_on_the_validation_prompts():
    curves = known_prompts(600)
    for target in (2.3, 2.75, 3.2, 3.9):
        fitted = fit_regression(curves, TrainConfig(), watch=False, target_bits=target)
        assert fitted.calibration.reached
        assert abs(fitted.calibration.bits - target) <= TOLERANCE
        rows = np.nonzero(splits_of(curves.keys, TrainConfig()) == 1)[0]
        assert fitted.config.prompts == len(rows)
        assert sum(fitted.counts.values()) == len(curves)
    assert {each.target_bits for each in fitted.config.calibrations} >= {2.0, 2.125, 3.0, 3.9, 4.0}
    with pytest.raises(ValueError, match="has 2 to 4"):
        fit_regression(curves, TrainConfig(), target_bits=4.5)
    with pytest.raises(ValueError, match="split empty"):
        fit_regression(curves.take(np.arange(1)), TrainConfig())


def test_what_comes_next_is_a_target_near_the_one_asked_for():
    fitted = fit_regression(known_prompts(200), TrainConfig(), watch=False, target_bits=2.75)
    line = reached_line(fitted)
    assert line.startswith("2.75 bits on average: ")
    assert '\'{"regression": {"target_bits": 2.625}}\'` takes another of its 17 targets' in line


def test_prompts_that_are_all_alike_share_two_plans_by_their_keys():
    """Everybody changes the plan at the same multiplier: no single one meets a target between."""
    shares = np.diff(np.pad(sixths_plans(2) / 6, [(0, 0), (1, 1)], constant_values=((0, 0), (0, 1))))
    bits, losses = shares @ np.asarray(CHAIN, float), np.tile(shares @ [0.1, 0.2, 2.0], (400, 1))
    taken, forwards = np.tile(bits * FORWARDS, (400, 1)), np.full(400, float(FORWARDS))
    keys = [f"{i:016x}" for i in range(400)]

    def plans_at(multiplier: float) -> np.ndarray:
        return cheapest(losses, bits, multiplier)

    found = calibrate(plans_at, taken, forwards, keys, 2.4)
    assert 0 < found.share < 1
    assert found.reached
    chosen = choose(plans_at, keys, found)
    assert sorted(set(bits[chosen].round(9).tolist())) == [2.0, 3.0]
    again = choose(lambda each: plans_at(each)[:7], keys[:7], found)
    assert np.array_equal(chosen[:7], again), "a row's plan depends on its key alone"


# ---- The artefact


@pytest.fixture(scope="module")
def labels(dense_folder, anyprec_folder, tmp_path_factory):
    """Output folder of `pmpd label --rule kl`, and the models."""
    folder = tmp_path_factory.mktemp("labels")
    texts = folder / "texts.jsonl"
    lines = [
        f"Lobster number {i} is blue{'!' * (i % 7)}. It lives in {i * i} metres of water." for i in range(60)
    ]
    texts.write_text("".join(json.dumps({"text": line * 3}) + "\n" for line in lines))
    models = str(anyprec_folder()), str(dense_folder())
    job = LabelJob(
        model_path=models[0],
        reference_model_path=models[1],
        dataset=str(texts),
        size=60,
        max_new_tokens=14,
        max_prompt_tokens=60,
        rule="kl",
        output_dir=str(folder / "label"),
        kernel="reference",
        num_workers=0,
    )
    label(job, Console(quiet=True))
    return folder / "label", models


CONFIG = TrainConfig(split_shares=(0.6, 0.2, 0.2))


@pytest.fixture(
    scope="module",
    params=[{}, {"features": "one_probe", "watch": False}],
    ids=["watching", "one_probe"],
)
def artefact(labels, tmp_path_factory, request):
    """What `pmpd train` makes of these labels, by itself, and with a probe and one decision a row."""
    folder = tmp_path_factory.mktemp("train")
    metrics = train(TrainJob(str(labels[0]), str(folder), target_bits=2.75, training=CONFIG, **request.param))
    assert sum(metrics["prompts"].values()) > 40
    assert [row["target_bits"] for row in metrics["test"]] == [2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4]
    return folder / "scheduler"


def test_labels_by_divergence_train_the_regression_unless_told_otherwise(labels):
    assert wants_regression(TrainJob(), losses=True)
    assert not wants_regression(TrainJob(), losses=False)
    assert not wants_regression(TrainJob(scheduler="kv_cache"), losses=True)
    assert not wants_regression(TrainJob(training=TrainConfig(objective="loss")), losses=True)
    assert not wants_regression(TrainJob(tune=3), losses=True)
    assert not wants_regression(TrainJob(again_path="other"), losses=True)


ANY = {"data_path", "output_dir", "scheduler", "precisions", "target_bits", "num_heads", "model_path"} | {
    "plugins", "split_shares", "seed"}  # fmt: skip
FLAGS = {each.name for each in (*fields(TrainJob), *fields(TrainConfig))} - {"training"}
WORDS = {"features": "none", "watch": False, "again_path": "x", "objective": "loss", "rebalance": "none"}


@pytest.mark.parametrize("flag", sorted(FLAGS - ANY))
def test_a_flag_without_effect_on_what_is_trained_is_refused(flag):
    """Every flag that is not of both is of the regression or of the classifiers."""
    job = TrainJob()
    default = getattr(job if hasattr(job, flag) else job.training, flag)
    value = WORDS[flag] if flag in WORDS else default + 1 if isinstance(default, int) else default / 2
    of_job = {flag: value} if hasattr(job, flag) else {"training": replace(job.training, **{flag: value})}
    job = replace(job, **of_job)
    names = ["regression", "kv_cache"]
    of, other = names if flag in ("features", "watch") else names[::-1]
    assert wants_regression(replace(job, scheduler=of), losses=True) == (of == "regression")
    reason = (
        f"--(no-)?{flag.replace('_', '-')}: no effect with --scheduler {other}; leave it out, or give .*{of}"
    )
    with pytest.raises(UserError, match=reason):
        wants_regression(replace(job, scheduler=other), losses=True)


def test_what_auto_stands_for_is_told_with_the_flag():
    with pytest.raises(
        UserError, match="--patience: no effect with --scheduler regression, which auto stands"
    ):
        wants_regression(TrainJob(training=TrainConfig(patience=3)), losses=True)
    with pytest.raises(UserError, match=r"--features and --no-watch: .* leave them out, or label with"):
        wants_regression(TrainJob(features="none", watch=False), losses=False)


def test_a_loaded_artefact_decides_as_before(artefact, labels):
    table = storage.read_table(
        str(labels[0] / "labels"), ["prompt_id", "prompt_tokens", "prompt_state", "curves"]
    )
    rows = table.slice(0, 20).to_pylist()
    states = [state_of(row) for row in rows]
    keys, lengths = [row["prompt_id"] for row in rows], [row["prompt_tokens"] for row in rows]
    state = PrefillState(keys, [15] * 20, lengths, lambda: None, prompts=lambda _: states)
    scheduler = RegressionScheduler(CHAIN, artefact.parent)  # finds the scheduler/ in it
    config, model = scheduler.artefact.config, scheduler.artefact.model
    assert scheduler.prompt_bits == {"no_probe": (4,), "one_probe": (4, 2)}[config.features]
    features = prompt_features(states, lengths, CHAIN, config.features)
    steps = np.asarray(plan_points(15))[sixths_plans(2)]
    if config.watches:
        first = model.thresholds(scheduler.pair, 0, features) <= scheduler.calibration.multiplier
        plans = np.where(first, *stop_model.path(2, scheduler.pair)[[0, -1]])
    else:
        losses = model.predict(features)
        plans = choose(lambda each: cheapest(losses, model.bits, each), keys, scheduler.calibration)
    wanted = steps[plans]
    assert np.array_equal(scheduler.begin(state).switch_steps, wanted)
    other = Scheduler.get_scheduler(
        "regression", precisions=[4, 3, 2], save_dir=str(artefact), target_bits=2.5
    )
    assert other.describe()["target_bits"] == 2.5
    assert other.describe()["regression_fingerprint"] == scheduler.describe()["regression_fingerprint"]


def test_rows_of_a_batch_decide_as_they_do_alone(artefact, labels, texts):
    model = PMPDForCausalLM(labels[1][0], kernel="reference").eval()
    scheduler = RegressionScheduler(CHAIN, artefact)
    prompts, _ = texts
    requests = [Request(key, ids, 20) for key, ids in prompts.items()]

    def plans(slots: int) -> dict[str, tuple[int, ...]]:
        engine = Engine(model.model, slots=slots, max_length=90)
        return {c.key: c.switch_steps for c in engine.run(requests, scheduler, 4, ())}

    alone = plans(1)
    assert plans(7) == alone
    assert len(set(alone.values())) > 1
    for key, ids in prompts.items():
        assert (
            tuple(oracle.decode(model.model, ids, 20, 4, (), scheduler, key=key).switch_steps) == alone[key]
        )


@pytest.mark.parametrize("kernel", [None, "dense"])
def test_every_kernel_decides_alike(artefact, labels, texts, kernel):
    """The written-out forward of CPUs among them."""
    scheduler = RegressionScheduler(CHAIN, artefact)
    prompts, _ = texts
    requests = [Request(key, ids, 20) for key, ids in prompts.items()]
    found = []
    for name in ("reference", kernel):
        model = PMPDForCausalLM(labels[1][0], kernel=name, dtype=torch.float32).eval()
        engine = Engine(model.model, slots=4, max_length=90)
        found.append({c.key: c.switch_steps for c in engine.run(requests, scheduler, 4, ())})
    assert found[0] == found[1]


def test_what_does_not_fit_is_refused(artefact, tmp_path):
    scheduler = RegressionScheduler(CHAIN, artefact)
    own = scheduler.artefact.config.model_fingerprint
    scheduler.check_model(own, 1, 1)
    with pytest.raises(ValueError, match="trained on labels of the model"):
        scheduler.check_model(MODEL, 1, 1)
    with pytest.raises(ValueError, match=r"chain \[4, 3, 2\], not for \[4, 3\]"):
        RegressionScheduler([4, 3], artefact)
    with pytest.raises(ValueError, match=r"calibrated for 2, 2\.125"):
        RegressionScheduler(CHAIN, artefact, target_bits=2.6)
    with pytest.raises(ValueError, match="use --schedulers regression"):
        KVCacheScheduler(CHAIN, save_dir=artefact)
    with pytest.raises(ValueError, match="use --schedulers kv_cache"):
        RegressionScheduler(CHAIN, Path(KVCacheScheduler(CHAIN).save_dir))
    with pytest.raises(ValueError, match=r"no config\.json"):
        RegressionScheduler(CHAIN, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy)
    (copy / "regression.safetensors").write_bytes((copy / "regression.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        RegressionScheduler(CHAIN, copy)
    (copy / "regression.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        RegressionScheduler(CHAIN, copy)


@pytest.mark.parametrize(
    "damage",
    [
        {"target_bits": "3"},
        {"target_bits": None},
        {"calibrations": [{"target_bits": None}]},
        {"calibrations": [{"multiplier": "1"}]},
        {"calibrations": [{"multiplier": float("nan")}]},
        {"calibrations": [{"multiplier": -1}]},
        {"calibrations": [{"share": [1]}]},
        {"calibrations": [{"share": 1.5}]},
        {"calibrations": [{"target_bits": 4.5}]},
        {"calibrations": [{"target_bits": 2.75}]},
        {"calibrations": [{"bits": 1}]},
        {"calibrations": [{"multiplier": float("inf")}]},
        {"calibrations": [{"reached": "yes"}]},
        {"calibrations": []},
        {"target_bits": 2.6},
        {"watches": 1},
        {"features": "all"},
    ],
    ids=str,
)
def test_a_description_with_values_that_no_training_writes_is_refused(artefact, tmp_path, damage):
    """By the file and the field."""
    shutil.copytree(artefact, tmp_path / "copy")
    config = json.loads((artefact / "config.json").read_text())
    (field,) = damage
    if changes := damage.get("calibrations"):
        ((field, _),) = changes[0].items()
        damage = {"calibrations": [{**each, **changes[0]} for each in config["calibrations"]]}
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, **damage}))
    with pytest.raises(
        UserError, match=rf"config\.json: not the description of a regression \(.*\b{field}\b"
    ):
        RegressionScheduler(CHAIN, tmp_path / "copy")


@pytest.mark.parametrize("chain", [[4, 3, 1], [8, 3, 2], [5, 4, 3], [4, 3], [5, 4, 3, 2]], ids=str)
def test_a_description_of_another_chain_than_the_weights_is_refused(artefact, tmp_path, chain):
    """Most have weights of the same shapes."""
    shutil.copytree(artefact, tmp_path / "copy")
    config = json.loads((artefact / "config.json").read_text())
    fitting = [each for each in config["calibrations"] if chain[-1] <= min(each["target_bits"], each["bits"])]
    given = {**config, "chain": chain, "calibrations": fitting, "target_bits": 3.25}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(given))
    with pytest.raises(
        UserError, match=r"regression\.safetensors: damaged, or not of the chain .* config\.json"
    ):
        RegressionScheduler(chain, tmp_path / "copy")


@pytest.mark.parametrize("name", ["mean", "deviation", "weights", "intercept", "scale", "bits"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda part: part[:-1],
        lambda part: part.reshape(-1)[:1],
        lambda part: part * np.nan,
        lambda part: part * 0 - 1,
    ],
    ids=["shorter", "one number", "not finite", "negative"],
)
def test_weights_of_another_shape_or_that_are_not_finite_are_refused(artefact, tmp_path, name, damage):
    """Numpy would stretch some of them, and choose other plans without a word."""
    shutil.copytree(artefact, tmp_path / "copy")
    path = tmp_path / "copy" / "regression.safetensors"
    tensors = load(path.read_bytes())
    if name not in tensors:  # of one that watches
        name = f"1.2.{name}"
    path.write_bytes(save({**tensors, name: np.ascontiguousarray(damage(tensors[name]))}))
    if damage(np.ones(2))[0] == -1 and name.split(".")[-1] not in ("deviation", "scale", "bits"):
        RegressionScheduler(CHAIN, tmp_path / "copy")
        return
    with pytest.raises(UserError, match="damaged"):
        RegressionScheduler(CHAIN, tmp_path / "copy")


def test_weights_of_a_type_that_numpy_lacks_are_refused(artefact, tmp_path):
    shutil.copytree(artefact, tmp_path / "copy")
    path = tmp_path / "copy" / "regression.safetensors"
    tensors = {key: torch.from_numpy(part).bfloat16() for key, part in load(path.read_bytes()).items()}
    path.write_bytes(save_tensors(tensors))
    with pytest.raises(UserError, match="damaged"):
        RegressionScheduler(CHAIN, tmp_path / "copy")


def test_training_again_leaves_nothing_of_the_training_before(labels, tmp_path):
    job = TrainJob(str(labels[0]), str(tmp_path), training=CONFIG)
    (tmp_path / "scheduler").mkdir()
    for name in ("classifier_4_3.safetensors", "tune.json", "learning_curves.png", "mine.txt"):
        (tmp_path / "scheduler" / name).write_text("old")
    train(job)
    names = {path.name for path in (tmp_path / "scheduler").iterdir()}
    assert names == {"config.json", "metrics.json", "regression.safetensors", "mine.txt"}
    first = (tmp_path / "scheduler" / "config.json").read_bytes()
    train(job)
    assert (tmp_path / "scheduler" / "config.json").read_bytes() == first
    with pytest.raises(ValueError, match="takes their highest precision"):
        train(replace(job, precisions="3,2"))


@pytest.mark.parametrize(
    ("gain", "low", "high", "told"),
    [
        (
            11.8,
            8.1,
            15.1,
            "11.8 % less than the best static plans of as many (gain +11.8, 95 % +8.1 to +15.1): better",
        ),
        (
            -1.2,
            -5.3,
            3.6,
            "1.2 % more than the best static plans of as many (gain -1.2, 95 % -5.3 to +3.6): neither",
        ),
        (-4.0, -5.0, -3.0, "worse"),
    ],
)
def test_the_training_says_whether_the_regression_pays(gain, low, high, told):
    row = {"target_bits": 2.75, "gain_percent": gain, "low_percent": low, "high_percent": high}
    fitted = SimpleNamespace(
        calibration=SimpleNamespace(target_bits=2.75), judged=[{**row, "bits": 2.8}], fixed_plan=None
    )
    assert "a target of 2.75 bits it takes 2.80 on" in gain_line(fitted)
    assert told in gain_line(fitted)
    fitted.judged = []
    assert gain_line(fitted) is None


def test_what_comes_next_names_the_models_of_the_labels(labels):
    folder, (quantized, unquantized) = labels
    source = LabelSource.open(str(folder))
    next_command = f"pmpd generate --model-path {quantized} --reference-model-path {unquantized}"
    assert generate_command(source, CHAIN, 4) == next_command
    demos = {"model_path": str(demo.ANYPREC), "reference_model_path": str(demo.DENSE)}
    assert generate_command(replace(source, run=demos), CHAIN, 4) == "pmpd generate", (
        "flags at their defaults"
    )
    gptq = {**demos, "model_path": "a set.json", "use_multi_model": True}
    assert generate_command(replace(source, run=gptq), CHAIN, 4).endswith(
        " --model-path 'a set.json' --use-multi-model"
    )
    unknown = replace(source, run={})
    assert generate_command(unknown, CHAIN, 4) == "pmpd generate --model-path MODEL-OF-THE-LABELS"
    low = generate_command(replace(source, run=demos), (3, 2), 4)
    assert low == "pmpd generate --precisions 3,2 --prefill-bit 4", "the labels' prompts were prefilled at 4"


def test_labels_of_several_kinds_train_one_regression(labels, tmp_path):
    halves = []
    for half in range(2):
        folder = tmp_path / f"half-{half}"
        shutil.copytree(labels[0], folder)
        first, *others = storage.list_shards(str(folder / "labels"))
        table = storage.read_table(str(folder / "labels")).sort_by("prompt_id")
        for path in others:
            storage.remove(path)
        storage.write_shard(table.slice(half * (len(table) // 2), len(table) // 2), first)
        halves.append(str(folder))
    job = TrainJob(",".join(halves), str(tmp_path / "out"), target_bits=2.75, training=CONFIG)
    found, whole = train(job), train(replace(job, data_path=str(labels[0])))
    assert abs(sum(found["prompts"].values()) - sum(whole["prompts"].values())) <= 1
    with pytest.raises(ValueError, match="occurs twice"):
        train(replace(job, data_path=f"{labels[0]},{labels[0]}"))
    with pytest.raises(ValueError, match="one labels dataset"):
        train(replace(job, scheduler="kv_cache"))


def test_labels_of_a_chain_train_one_of_some_of_its_precisions(labels, tmp_path, capsys):
    """As `read_curves` leaves them: the plans that use no other precision."""
    job = TrainJob(str(labels[0]), str(tmp_path / "out"), precisions="4,2", target_bits=2.5, training=CONFIG)
    metrics = train(job)
    assert [row["target_bits"] for row in metrics["test"]][::8] == [2, 4]
    assert "--precisions 4,2 --classifier-path" in " ".join(capsys.readouterr().out.split())
    scheduler = RegressionScheduler([4, 2], tmp_path / "out")
    assert scheduler.pairs == [(4, 2)]
    with pytest.raises(UserError, match="no label of the pair 4-2, these are of 4-3, 3-2"):
        train(replace(job, scheduler="kv_cache"))


def test_references_that_all_end_early_are_not_taken_for_whole_answers(labels):
    """Plans switch at sixths of the answer that labels allow, 13 forwards, not of the longest reference."""
    table = storage.read_table(str(labels[0] / "labels"))
    rows = table.to_pylist()
    for curve in (curve for row in rows for curve in row["curves"] or []):
        curve |= {name: part[:5] for name, part in curve.items() if isinstance(part, list)}
    curves = read_curves(storage.to_table(rows, table.schema))
    assert curves.valid.sum(1).max() == 5
    assert curves.loss.shape[2] == 13
    assert (curves.plan_bits[:, [0, -1]] == curves.forwards[:, None] * [2, 4]).all()
    with pytest.raises(
        UserError, match=r"labels of 14 new tokens, .* has more than 6, .* --max-new-tokens 6 or"
    ):
        fit_regression(curves, CONFIG)
    assert fit_regression(curves, CONFIG, watch=False).calibration.bits <= 4


def test_labels_of_two_chains_are_refused_by_their_names(labels, tmp_path):
    table, source = storage.read_table(str(labels[0] / "labels")), LabelSource.open(str(labels[0]))
    rows = table.to_pylist()
    for row in rows:
        row["pairs"] = row["pairs"] and row["pairs"][:1]
    other = tmp_path / "other"
    shutil.copytree(source.path, other)
    first, *more = storage.list_shards(str(other))
    for path in more:
        storage.remove(path)
    storage.write_shard(storage.to_table(rows, table.schema), first)
    with pytest.raises(UserError, match=r"several precision chains: .*/labels of 4,3,2; .*/other of 4,3;"):
        train(TrainJob(f"{labels[0]},{other}", str(tmp_path / "out"), training=CONFIG))
    for row in rows[::2]:
        for plan in row["plans"] or []:
            plan["steps"] = [2 * step for step in plan["steps"]]
    with pytest.raises(UserError, match="labels of 14 and 27 new tokens, whose plans switch at other steps"):
        read_curves(storage.to_table(rows, table.schema))
    for row in rows[::2]:
        row["curves"] = row["curves"] and row["curves"][:2]
    with pytest.raises(UserError, match="several precision chains: 4,3,2 and 4,3; take"):
        read_curves(storage.to_table(rows, table.schema), (4, 2))


def test_the_demo_answers_under_its_regression(tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": "1", "category": "c", "turns": ["The old lighthouse stood", "And then?"]}\n')
    job = GenerateJob(
        question_file=str(questions),
        schedulers="uniform,regression",
        scheduler_options='{"regression": {"target_bits": 2.75}}',
        max_new_tokens=8,
        output_dir=str(tmp_path / "out"),
        num_workers=0,
    )
    folder = generate(job, Console(quiet=True))
    rows = [row for _, _, found in read_generations(folder) for row in found if row["kind"] == "regression"]
    assert [row["error"] for row in rows] == [None, None]
    assert {row["run"] for row in rows} == {"regression-2.75"}
    assert json.loads(rows[0]["scheduler"])["features"] == "no_probe"
    assert all(0 < row["decision_seconds"] < row["decode_seconds"] for row in rows)


def test_the_default_sweep_takes_what_the_folder_holds(artefact):
    names = scheduler_names(GenerateJob(classifier_path=str(artefact)), "reference_output")
    assert "regression" in names
    assert "kv_cache" not in names
    assert "kv_cache" in scheduler_names(GenerateJob(), "reference_output")
    asked = GenerateJob(classifier_path=str(artefact), schedulers="fp,kv_cache")
    assert scheduler_names(asked, "reference_output") == ["fp", "kv_cache"], (
        "what was asked for is not replaced"
    )
