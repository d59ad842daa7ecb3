"""The scheduler that knows what a prompt will lose: a regression on numbers of the prompt says how much it
loses under each progressive plan, and each row takes the plan of least loss within a number of bits. One that
watches decides at every sixth of the decode whether to switch now, from what the decode has shown
(`schedulers.stop_model`).

Legend: B rows, N prompts, J pairs of the chain, P plans of `chain.sixths_plans`.

A plan is chosen by predicted loss + multiplier x bits. One multiplier serves the whole workload, and is
calibrated on the validation prompts of the training for a ladder of targets, so that one artefact serves any
of them. Where no multiplier meets a target (many prompts change their plans at the same one), two
neighbouring multipliers share the prompts, by a draw from their keys. A target that one plan alone meets
takes that plan (`fixed_plan`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pmpd.errors import UserError
from pmpd.schedulers.artefact import check_fingerprint, locate, reader
from pmpd.schedulers.base import Decision, ObservedRows, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.budget import TOLERANCE, bracket
from pmpd.schedulers.chain import NUM_CLASSES, check_chain, place_of, plan_points, sixths_plans
from pmpd.schedulers.loss_model import (
    FEATURES,
    LossModel,
    cheapest,
    feature_names,
    probed,
    prompt_features,
)
from pmpd.schedulers.stop_model import WATCHED, StopModel, pair_for, path, watched

ARCHITECTURE = "regression"
VERSION = 2
WEIGHTS = "regression.safetensors"

DEMO_ARTEFACT = Path(__file__).parents[1] / "demo" / "regression"

APART = 1e-3
"""Of two neighbouring multipliers: so far, as a share, on either side of where many prompts change their
plans."""


# ---- Calibration


@dataclass(frozen=True)
class Calibration:
    """The multipliers for a target, and what they gave on the prompts that they were calibrated on."""

    target_bits: float
    multiplier: float
    """Nats a bit."""
    second: float
    """What the prompts take whose draw is below `share`; more bits."""
    share: float
    bits: float
    """Average bits of the calibration prompts, weighted by forwards."""
    reached: bool
    """Whether `bits` is within `budget.TOLERANCE` of the target."""


def draw(key: str) -> float:
    """A number in 0..1 that depends on the row's key alone."""
    digest = hashlib.sha256(f"regression/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


PlansAt = Callable[[float], np.ndarray]
"""Multiplier -> the plan of each row, int [B]."""


def choose(plans_at: PlansAt, keys: Sequence[str], calibration: Calibration) -> np.ndarray:
    """The plan of each row: int [B]."""
    first = plans_at(calibration.multiplier)
    if not calibration.share:
        return first
    return np.where([draw(key) < calibration.share for key in keys], plans_at(calibration.second), first)


def calibrate(
    plans_at: PlansAt, taken: np.ndarray, forwards: np.ndarray, keys: Sequence[str], target_bits: float
) -> Calibration:
    """The smallest multiplier under which these prompts take at most `target_bits` on average, or two.
    `taken` [N, P]: bits times forwards that each plan takes of the prompt's reference, `forwards` [N]."""
    rows = np.arange(len(taken))

    def mean(plans: np.ndarray) -> float:
        return float(taken[rows, plans].sum() / forwards.sum())

    def at(multiplier: float) -> float:
        return mean(plans_at(multiplier))

    low, high = bracket(at, target_bits)
    found = Calibration(target_bits, high, high, 0.0, at(high), False)
    if target_bits - found.bits > TOLERANCE and low < high:
        high, low = high * (1 + APART), low * (1 - APART)
        few, many = at(high), at(low)
        share = float(np.clip((target_bits - few) / max(many - few, 1e-9), 0, 1))
        found = Calibration(target_bits, high, low, share, few, False)
        mixed = mean(choose(plans_at, keys, found))
        found = Calibration(target_bits, high, low, share, mixed, False)
    reached = abs(found.bits - target_bits) <= TOLERANCE
    return Calibration(**{**asdict(found), "reached": reached})


def fixed_plan(chain: Sequence[int], target_bits: float, watches: bool) -> int | None:
    """The place in `chain.sixths_plans` of the only plan that a target leaves, one precision throughout, for
    any prompt: at the ends of the chain, and at every precision for a scheduler that watches, which switches
    between neighbours alone. None where prompts may have plans of their own."""
    if target_bits not in (chain if watches else (chain[0], chain[-1])):
        return None
    return _throughout(len(chain) - 1, list(chain).index(int(target_bits)))


def _throughout(pairs: int, place: int) -> int:
    """The place in `chain.sixths_plans` of the plan that runs at the chain's `place`-th precision alone."""
    return int(place_of(np.where(np.arange(pairs) < place, 0, NUM_CLASSES - 1)))


# ---- Artefact


@dataclass(frozen=True)
class RegressionConfig:
    """What a folder's regression is and what it fits (`config.json`)."""

    chain: tuple[int, ...]
    features: str
    """One of `loss_model.FEATURES`."""
    target_bits: float
    """The calibration that is taken where none is asked for."""
    calibrations: tuple[Calibration, ...]
    prompts: int
    """That the multipliers were calibrated on."""
    model_fingerprint: str | None = None
    """Of the quantized model whose prompts were labelled."""
    labels_fingerprint: str | None = None
    watches: bool = False
    """Whether it decides at every sixth of the decode, rather than before it."""
    training: dict[str, Any] = field(default_factory=dict)
    """The split and its seed, for the record."""
    architecture: str = ARCHITECTURE
    version: int = VERSION

    def fixed_plan(self, target_bits: float) -> int | None:
        """See the function of that name."""
        return fixed_plan(self.chain, target_bits, self.watches)

    def calibration(self, target_bits: float, source: str) -> Calibration:
        for found in self.calibrations:
            if abs(found.target_bits - target_bits) < 1e-9:
                return found
        known = ", ".join(f"{each.target_bits:g}" for each in self.calibrations)
        raise UserError(
            f"target_bits {target_bits:g}: {source} is calibrated for {known}; take one of them, or train "
            f"it with --target-bits {target_bits:g}"
        )


def artefact_files(config: RegressionConfig, model: LossModel | StopModel) -> dict[str, bytes]:
    """File name -> content of an artefact folder, `config.json` last: a folder without it is not finished."""
    tensors = {name: np.ascontiguousarray(part) for name, part in model.tensors()}
    return {WEIGHTS: save(tensors), "config.json": (json.dumps(asdict(config), indent=1) + "\n").encode()}


@dataclass(frozen=True)
class Artefact:
    config: RegressionConfig
    model: LossModel | StopModel


def load_artefact(folder: str | Path, read: Callable[[str], bytes | None] | None = None) -> Artefact:
    """From a folder that `pmpd train` wrote, or one with a `scheduler/` in it; a URI too. UserError, with the
    reason, where it holds no regression, or a damaged one."""
    read = reader(str(folder)) if read is None else read
    folder, content = locate(folder, read)
    if content is None:
        raise UserError(f"{folder}: no config.json; give the folder that `pmpd train --output-dir` wrote")
    config = _config(content, f"{folder}/config.json")
    weights = read(f"{folder}/{WEIGHTS}")
    if weights is None:
        raise UserError(f"{folder}/{WEIGHTS}: missing; copy the whole folder, or train again")
    try:
        tensors = {name: np.asarray(part, float) for name, part in load(weights).items()}
        known, pairs = len(feature_names(config.chain, config.features)), len(config.chain) - 1
        model: LossModel | StopModel
        if config.watches:
            model = StopModel.of(tensors, pairs)
            model.check(known)
        else:
            model = LossModel(**tensors)
            model.check(len(sixths_plans(pairs)), known)
        _check_chain_of(model, set(tensors), config.chain)
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{folder}/{WEIGHTS}: damaged, or not of the chain {list(config.chain)}, features "
            f"{config.features!r} and watches {config.watches} of its config.json ({reason}); copy the whole "
            f"folder again, or train again"
        ) from error
    return Artefact(config, model)


def _check_chain_of(model: LossModel | StopModel, names: set[str], chain: tuple[int, ...]) -> None:
    """ValueError unless these are all tensors, and their plans of one precision throughout take the bits of
    this chain: another chain of as many precisions has tensors of the same shapes."""
    more = sorted(names - {name for name, _ in model.tensors()})
    if more:
        raise ValueError(f"{', '.join(more)}: tensors of more pairs, or unknown")
    if isinstance(model, StopModel):
        firsts = [parts[0].bits for parts in model.parts]
        found = [firsts[0][-1], *(bits[0] for bits in firsts)]
    else:
        found = [model.bits[_throughout(len(chain) - 1, place)] for place in range(len(chain))]
    if not np.allclose(found, chain, rtol=0, atol=1e-6):
        raise ValueError(f"its plans are of the chain {', '.join(f'{bits:g}' for bits in found)}")


def _config(content: bytes, source: str) -> RegressionConfig:
    try:
        raw = json.loads(content)
        described = {key: raw.get(key) for key in ("architecture", "version")}
        if described["architecture"] == "kv_cache":
            raise UserError(
                "it describes classifiers of the KV cache; use --schedulers kv_cache (or budget), or train a "
                "regression, on labels of `pmpd label --rule kl`"
            )
        if described != {"architecture": ARCHITECTURE, "version": VERSION}:
            raise UserError(
                f"it describes {described}, this version reads {ARCHITECTURE!r} version {VERSION}; label and "
                f"train again"
            )
        raw["chain"] = check_chain(raw["chain"])
        raw["calibrations"] = tuple(Calibration(**each) for each in raw["calibrations"])
        if not raw["calibrations"]:
            raise ValueError("calibrations: empty, there is no target to decode for")
        for place, each in enumerate(raw["calibrations"]):
            _check_calibration(each, raw["chain"], f"calibrations[{place}].")
        targets = [each.target_bits for each in raw["calibrations"]]
        if len(set(targets)) < len(targets):
            raise ValueError("calibrations: two have the same target_bits")
        if raw["target_bits"] not in targets:
            raise ValueError(f"target_bits {raw['target_bits']!r}: not a target_bits of calibrations")
        if not isinstance(raw["watches"], bool):
            raise ValueError(f"watches {raw['watches']!r}: true or false")
        if raw["features"] not in FEATURES:
            raise ValueError(f"features {raw['features']!r}: known are {', '.join(FEATURES)}")
        return RegressionConfig(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}: not the description of a regression ({error}); copy the folder again, or train again"
        ) from error


def _check_calibration(given: Calibration, chain: tuple[int, ...], where: str) -> None:
    """ValueError unless all numbers are ones that `calibrate` can give for this chain."""
    largest = float(np.finfo(float).max)
    limits = {
        "target_bits": (chain[-1], chain[0]),
        "multiplier": (0, largest),
        "second": (0, largest),
        "share": (0, 1),
        "bits": (chain[-1], chain[0]),
    }
    for name, (low, high) in limits.items():
        value = getattr(given, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            limit = f"{low} or more" if high == largest else f"from {low} to {high}"
            raise ValueError(f"{where}{name} {value!r}: not a number {limit}")
    if not isinstance(given.reached, bool):
        raise ValueError(f"{where}reached {given.reached!r}: true or false")


# ---- Scheduler


@dataclass(frozen=True)
class _Watch:
    """What is remembered of a row that may switch yet."""

    known: np.ndarray
    """[F], of its prompt."""
    points: tuple[int, ...]
    """Steps of its sixths."""
    multiplier: float
    whole: np.ndarray
    """[W]: sums of `WATCHED` over its forwards."""
    last: np.ndarray
    """Over those since `since`, its last sixth."""
    since: int = 0


class RegressionScheduler(Scheduler):
    """Each row takes the progressive plan that a regression on numbers of its prompt predicts to lose least,
    within a number of bits on average. One decision per row, before decode forward 1; an artefact that
    watches begins at the precision above the target, and decides at every sixth of the decode whether to
    switch to the one below for good, from the entropy and margin of the tokens so far.

    precisions: the chain, that of the artefact. save_dir: folder or URI of an artefact (`pmpd train` on
    labels by divergence); None = the one of the embedded demo model. target_bits: bits on average, one of
    those that the artefact is calibrated for; None = the one that it was trained for. A target that one plan
    alone meets (`fixed_plan`) takes it for every row, and looks at nothing.
    """

    name = "regression"

    def __init__(
        self,
        precisions: Sequence[int],
        save_dir: str | Path | None = None,
        target_bits: float | None = None,
    ) -> None:
        super().__init__(precisions)
        self.save_dir = str(DEMO_ARTEFACT if save_dir is None else save_dir)
        self.artefact = load_artefact(self.save_dir)
        config = self.artefact.config
        if config.chain != self.precisions:
            raise UserError(
                f"{self.save_dir}: made for the precision chain {list(config.chain)}, not for "
                f"{list(self.precisions)}; label and train with this chain"
            )
        wanted = config.target_bits if target_bits is None else float(target_bits)
        self.calibration = config.calibration(wanted, self.save_dir)
        self.fixed_plan = config.fixed_plan(self.calibration.target_bits)
        if self.observes:
            self.statistics = WATCHED
        self.prompt_bits: tuple[int, ...] = ()
        if config.features != "none" and self.fixed_plan is None:
            self.prompt_bits = (self.precisions[0], *probed(self.precisions, config.features))

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:
        """ValueError, with the reason, where the artefact was made for another model."""
        check_fingerprint(self.artefact.config.model_fingerprint, self.save_dir, fingerprint)

    def begin(self, state: PrefillState) -> Decision:
        points = np.asarray([plan_points(tokens) for tokens in state.max_new_tokens], np.int32)
        if self.fixed_plan is not None:
            return Decision(points[:, sixths_plans(len(self.pairs))[self.fixed_plan]])
        config = self.artefact.config
        prompts = state.prompts(self.prompt_bits) if self.prompt_bits else ()
        features = prompt_features(prompts, state.prompt_lengths, self.precisions, config.features)
        known = np.isfinite(features).all(1)  # a row without finite logits is the engine's to report
        plans, states = self._plans(np.where(known[:, None], features, 0.0), state)
        plans[~known] = -1  # never switches
        steps = np.take_along_axis(points, sixths_plans(len(self.pairs))[plans], axis=1)
        return Decision(steps, states=[each if ok else None for each, ok in zip(states, known, strict=True)])

    def _plans(self, features: np.ndarray, state: PrefillState) -> tuple[np.ndarray, list[_Watch | None]]:
        """The plan of each row, int [B], and what is remembered of those that may yet take another."""
        model = self.artefact.model
        if isinstance(model, LossModel):
            losses = model.predict(features)
            plans = choose(lambda each: cheapest(losses, model.bits, each), state.keys, self.calibration)
            return plans, [None] * len(plans)
        never, now = path(len(self.pairs), self.pair)[[-1, 0]]
        multipliers = [self._multiplier(key) for key in state.keys]
        lowers = multipliers >= model.thresholds(self.pair, 0, features)
        nothing = np.zeros(len(WATCHED))
        states = [
            None if lower else _Watch(known, plan_points(tokens), multiplier, nothing, nothing)
            for known, tokens, multiplier, lower in zip(
                features, state.max_new_tokens, multipliers, lowers.tolist(), strict=True
            )
        ]
        return np.where(lowers, now, never), states

    def _multiplier(self, key: str) -> float:
        found = self.calibration
        return found.second if draw(key) < found.share else found.multiplier

    @property
    def pair(self) -> int:
        """The pair that it switches in where it watches."""
        return pair_for(self.precisions, self.calibration.target_bits)

    @property
    def observes(self) -> bool:
        return self.artefact.config.watches and self.fixed_plan is None

    def observe(self, rows: ObservedRows) -> None:
        for row, state in enumerate(rows.states):
            if state is not None:
                values = np.asarray([rows.statistics[name][row] for name in WATCHED], float)
                rows.states[row] = self._seen(rows, row, state, values)

    def _seen(self, rows: ObservedRows, row: int, state: _Watch, values: np.ndarray) -> _Watch | None:
        """The row after another forward; it may switch here. None: there is nothing left to decide."""
        step, model = int(rows.step[row]), self.artefact.model
        assert isinstance(model, StopModel)
        whole, last = state.whole + values, state.last + values
        if step not in state.points[1:-1]:
            return replace(state, whole=whole, last=last)
        at = max(place for place, point in enumerate(state.points[:-1]) if point == step)
        shown = watched(whole[None] / step, last[None] / (step - state.since))
        seen = np.concatenate([state.known[None], shown], axis=1)
        if state.multiplier >= model.thresholds(self.pair, at, seen)[0]:
            rows.switch_steps[row, self.pair] = step
            return None
        return replace(state, whole=whole, last=np.zeros_like(last), since=step)

    def describe(self) -> dict[str, Any]:
        config = self.artefact.config
        return {
            **super().describe(),
            "target_bits": self.calibration.target_bits,
            "multiplier": self.calibration.multiplier,
            "features": config.features,
            "watches": config.watches,
            "regression_fingerprint": self.artefact.model.fingerprint,
            "labels_fingerprint": config.labels_fingerprint,
            "model_fingerprint": config.model_fingerprint,
        }


def _run_name(scheduler: Scheduler, options: Mapping[str, Any]) -> str:
    assert isinstance(scheduler, RegressionScheduler)
    return f"regression-{scheduler.calibration.target_bits:g}"


ENTRY = SchedulerEntry(RegressionScheduler, run_name=_run_name)
