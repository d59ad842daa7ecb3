"""The scheduler that knows what a prompt will lose: a regression on numbers of the prompt says how much each
precision loses over the decode, and each row takes the progressive plan of least loss within a number of
bits.

Legend: B rows, N prompts, J pairs of the chain, P plans, M decode forwards.

A plan is chosen by predicted loss + multiplier x bits. One multiplier serves the whole workload, and is
calibrated on the validation prompts of the training for a ladder of targets, so that one artefact serves any
of them. Where no multiplier meets a target (many prompts change their plans at the same one), two
neighbouring multipliers share the prompts, by a draw from their keys.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pmpd.errors import UserError
from pmpd.schedulers.artefact import check_fingerprint, locate, reader
from pmpd.schedulers.base import Decision, PrefillState, Scheduler, SchedulerEntry
from pmpd.schedulers.budget import TOLERANCE, bracket
from pmpd.schedulers.chain import check_chain, plan_steps, static_plans
from pmpd.schedulers.loss_model import (
    FEATURES,
    LossModel,
    cheapest,
    feature_names,
    plan_losses,
    probed,
    prompt_features,
)

ARCHITECTURE = "regression"
VERSION = 1
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


def choose(losses: np.ndarray, bits: np.ndarray, keys: Sequence[str], calibration: Calibration) -> np.ndarray:
    """The plan of each row: int [B]. `losses` [B, P]: predicted, and `bits` [P], both sums over a whole
    decode."""
    first = cheapest(losses, bits, calibration.multiplier)
    if not calibration.share:
        return first
    second = cheapest(losses, bits, calibration.second)
    return np.where([draw(key) < calibration.share for key in keys], second, first)


def calibrate(
    losses: np.ndarray,
    bits: np.ndarray,
    taken: np.ndarray,
    forwards: np.ndarray,
    keys: Sequence[str],
    target_bits: float,
) -> Calibration:
    """The smallest multiplier under which these prompts take at most `target_bits` on average, or two.
    `losses`, `bits`: as in `choose`; `taken` [N, P]: bits times forwards that each plan takes of the prompt's
    reference, `forwards` [N]."""
    rows = np.arange(len(losses))

    def mean(plans: np.ndarray) -> float:
        return float(taken[rows, plans].sum() / forwards.sum())

    def at(multiplier: float) -> float:
        return mean(cheapest(losses, bits, multiplier))

    low, high = bracket(at, target_bits)
    found = Calibration(target_bits, high, high, 0.0, at(high), False)
    if target_bits - found.bits > TOLERANCE and low < high:
        high, low = high * (1 + APART), low * (1 - APART)
        few, many = at(high), at(low)
        share = float(np.clip((target_bits - few) / max(many - few, 1e-9), 0, 1))
        found = Calibration(target_bits, high, low, share, few, False)
        mixed = mean(choose(losses, bits, keys, found))
        found = Calibration(target_bits, high, low, share, mixed, False)
    reached = abs(found.bits - target_bits) <= TOLERANCE
    return Calibration(**{**asdict(found), "reached": reached})


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
    training: dict[str, Any] = field(default_factory=dict)
    """The split and its seed, for the record."""
    architecture: str = ARCHITECTURE
    version: int = VERSION

    def calibration(self, target_bits: float, source: str) -> Calibration:
        for found in self.calibrations:
            if abs(found.target_bits - target_bits) < 1e-9:
                return found
        known = ", ".join(f"{each.target_bits:g}" for each in self.calibrations)
        raise UserError(
            f"target_bits {target_bits:g}: {source} is calibrated for {known}; take one of them, or train "
            f"it with --target-bits {target_bits:g}"
        )


def artefact_files(config: RegressionConfig, model: LossModel) -> dict[str, bytes]:
    """File name -> content of an artefact folder, `config.json` last: a folder without it is not finished."""
    tensors = {part.name: np.ascontiguousarray(getattr(model, part.name)) for part in fields(model)}
    return {WEIGHTS: save(tensors), "config.json": (json.dumps(asdict(config), indent=1) + "\n").encode()}


@dataclass(frozen=True)
class Artefact:
    config: RegressionConfig
    model: LossModel


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
        model = LossModel(**{name: np.asarray(part, float) for name, part in load(weights).items()})
        model.check(len(config.chain), len(feature_names(config.chain, config.features)))
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}/{WEIGHTS}: damaged ({error}); copy the folder again, or train again"
        ) from error
    return Artefact(config, model)


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
                f"it describes {described}, this version reads {ARCHITECTURE!r} version {VERSION}"
            )
        raw["chain"] = check_chain(raw["chain"])
        raw["calibrations"] = tuple(Calibration(**each) for each in raw["calibrations"])
        for each in raw["calibrations"]:
            _check_numbers(asdict(each), "target_bits", "multiplier", "second", "share", "bits")
        _check_numbers(raw, "target_bits")
        if raw["features"] not in FEATURES:
            raise UserError(f"features {raw['features']!r}: known are {', '.join(FEATURES)}")
        return RegressionConfig(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}: not the description of a regression ({error}); copy the folder again, or train again"
        ) from error


def _check_numbers(given: Mapping[str, Any], *names: str) -> None:
    """ValueError unless all of these are finite numbers, none of them negative."""
    for name in names:
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
            raise ValueError(f"{name} {value!r}: not a number, 0 or more")


# ---- Scheduler


@functools.lru_cache(maxsize=256)
def plans_of(chain: tuple[int, ...], forwards: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The progressive plans of so many decode forwards: int [P, M], their switch steps int32 [P, J], and
    their bits, float64 [P] sums over the forwards. Plan 0 never switches."""
    plans = static_plans(chain, max(1, forwards))
    bits = np.asarray(chain, float)[plans].sum(1)
    return plans, plan_steps(plans, len(chain) - 1), bits


class RegressionScheduler(Scheduler):
    """Each row takes the progressive plan that a regression on numbers of its prompt predicts to lose least,
    within a number of bits on average. One decision per row, before decode forward 1.

    precisions: the chain, that of the artefact. save_dir: folder or URI of an artefact (`pmpd train` on
    labels by divergence); None = the one of the embedded demo model. target_bits: bits on average, one of
    those that the artefact is calibrated for; None = the one that it was trained for.
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
        self.prompt_bits = (self.precisions[0], *probed(self.precisions, config.features))

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:
        """ValueError, with the reason, where the artefact was made for another model."""
        check_fingerprint(self.artefact.config.model_fingerprint, self.save_dir, fingerprint)

    def begin(self, state: PrefillState) -> Decision:
        config, model = self.artefact.config, self.artefact.model
        prompts = state.prompts(self.prompt_bits)
        features = prompt_features(prompts, state.prompt_lengths, self.precisions, config.features)
        known = np.isfinite(features).all(1)  # a row without finite logits is the engine's to report
        curves = model.predict(np.where(known[:, None], features, model.mean))
        found = np.zeros((len(curves), len(self.pairs)), np.int32)
        lengths = np.asarray(state.max_new_tokens) - 1
        for forwards in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == forwards)
            plans, steps, bits = plans_of(self.precisions, forwards)
            keys = [state.keys[row] for row in rows.tolist()]
            chosen = choose(plan_losses(curves[rows], plans), bits, keys, self.calibration)
            found[rows] = steps[np.where(known[rows], chosen, 0)]
        return Decision(found)

    def describe(self) -> dict[str, Any]:
        config = self.artefact.config
        return {
            **super().describe(),
            "target_bits": self.calibration.target_bits,
            "multiplier": self.calibration.multiplier,
            "features": config.features,
            "regression_fingerprint": self.artefact.model.fingerprint,
            "labels_fingerprint": config.labels_fingerprint,
            "model_fingerprint": config.model_fingerprint,
        }


def _run_name(scheduler: Scheduler, options: Mapping[str, Any]) -> str:
    assert isinstance(scheduler, RegressionScheduler)
    return f"regression-{scheduler.calibration.target_bits:g}"


ENTRY = SchedulerEntry(RegressionScheduler, run_name=_run_name)
