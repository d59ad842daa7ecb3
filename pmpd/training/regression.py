"""Fit the scheduler `regression` to labels by divergence, calibrate it for bits on average, and say on
held-out prompts what it gains over static plans at equal bits. Linear algebra of milliseconds; no Ray, no
model.

Legend: N prompts, P plans.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pmpd.errors import UserError
from pmpd.evaluation.curve_set import LABEL_COLUMNS, CurveSet, chain_of, curve_set, plans_within
from pmpd.evaluation.frontier import Resampling, StaticFrontier, gain_of, table
from pmpd.evaluation.policies import features_of, fitted, fitted_stops, static, stops
from pmpd.schedulers.loss_model import LossModel, cheapest
from pmpd.schedulers.regression import (
    Calibration,
    PlansAt,
    RegressionConfig,
    artefact_files,
    calibrate,
    choose,
    fixed_plan,
)
from pmpd.schedulers.stop_model import WATCHED, StopModel, pair_for
from pmpd.training.config import SPLITS, TrainConfig
from pmpd.training.data import splits_of, usable

COLUMNS = (*LABEL_COLUMNS, "pairs")
"""Of LABELS, what is read."""

STEP = 1 / 8
"""Bits between two targets that an artefact is calibrated for."""

SHOWN = 1 / 4
"""Bits between two targets that are judged on the test prompts."""

RESAMPLES = 2000
FRONTIER_POINTS = 41


def read_curves(labels: pa.Table, chain: Sequence[int] | None = None) -> CurveSet:
    """The labelled prompts, each a group of its own; `chain`: of these precisions only.

    UserError where the labels hold no curves and plans, those of several chains, or none of the chain; its
    highest precision must be theirs, which the prompts were prefilled at.
    """
    found = usable(labels)
    if not len(found) or found["curves"].null_count:
        raise UserError(
            "these labels do not say what each plan loses, which a regression is fitted to; label with `pmpd "
            "label --rule kl`, or train classifiers with --scheduler kv_cache"
        )
    rows = found.select(
        [name for name in LABEL_COLUMNS if name != "curves" and name in found.column_names]
    ).to_pylist()
    for row, curves in zip(rows, _divergences(found["curves"]), strict=True):
        row["curves"] = curves
    held = chain_of(rows)
    wanted = held if chain is None else tuple(chain)
    if wanted[0] != held[0] or not set(wanted) <= set(held):
        raise UserError(
            f"--precisions {','.join(map(str, wanted))}: the labels are of {','.join(map(str, held))}; a "
            f"regression takes their highest precision and any of the others; label with `pmpd label "
            f"--precisions` of that chain for another"
        )
    if wanted != held and all(row.get("plans") for row in rows):
        plans_within(rows, wanted)
    ids = {row["prompt_id"]: row["prompt_id"] for row in rows}
    return curve_set(rows, ids, dict.fromkeys(ids, 0))


def _divergences(curves: pa.ChunkedArray) -> list[list[dict[str, Any]]]:
    """Of each row's curves what is needed here, which is not all of their many numbers."""
    found = []
    for chunk in curves.chunks:
        struct = chunk.flatten()
        names = ("bits", "divergence", *WATCHED, "probe_divergence")
        slim = pa.StructArray.from_arrays([struct.field(name) for name in names], names)
        lengths = chunk.value_lengths().to_numpy(zero_copy_only=False)
        rows, at = slim.to_pylist(), 0
        for length in lengths.tolist():
            found.append(rows[at : at + length])
            at += length
    return found


def ladder(chain: Sequence[int], target_bits: float) -> list[float]:
    """The targets that an artefact is calibrated for: every `STEP` of the chain, and the given one."""
    steps = np.arange(chain[-1], chain[0] + STEP / 2, STEP).tolist()
    return sorted({*steps, target_bits})


def default_target(chain: Sequence[int]) -> float:
    """Midway between the two highest precisions: near the quality of the highest."""
    return (chain[0] + chain[1]) / 2


@dataclass(frozen=True)
class Fitted:
    config: RegressionConfig
    model: LossModel | StopModel
    judged: list[dict[str, Any]]
    """Rows of `evaluation.frontier.table` on the test prompts; [] where there are too few."""
    counts: dict[str, int]
    """Prompts by split."""

    @property
    def calibration(self) -> Calibration:
        return self.config.calibration(self.config.target_bits, "")

    @property
    def fixed_plan(self) -> int | None:
        """`schedulers.regression.fixed_plan` of its target."""
        return self.config.fixed_plan(self.config.target_bits)

    def files(self) -> dict[str, bytes]:
        """File name -> content of the `scheduler/` folder, `config.json` last."""
        files = artefact_files(self.config, self.model)
        finishing = files.pop("config.json")
        metrics = {"prompts": self.counts, "test": self.judged}
        return {
            **files,
            "metrics.json": (json.dumps(metrics, indent=1) + "\n").encode(),
            "config.json": finishing,
        }


def fit_regression(
    curves: CurveSet,
    config: TrainConfig,
    *,
    features: str = "no_probe",
    watch: bool = True,
    target_bits: float | None = None,
    model_fingerprint: str | None = None,
    labels_fingerprint: str | None = None,
) -> Fitted:
    """Fit on the training prompts, calibrate on the validation prompts, judge on the test prompts (the split
    is that of the classifiers). UserError for a target outside of the chain, or where a split is empty."""
    chain = curves.chain
    target = default_target(chain) if target_bits is None else float(target_bits)
    if not chain[-1] <= target <= chain[0]:
        raise UserError(f"--target-bits {target:g}: the chain {list(chain)} has {chain[-1]} to {chain[0]}")
    places = splits_of(curves.keys, config)
    train, validation, test = (curves.take(np.nonzero(places == split)[0]) for split in range(len(SPLITS)))
    for name, part in (("train", train), ("validation", validation)):
        if not len(part):
            raise UserError(
                f"{len(curves)} labelled prompts leave the {name} split empty; label more prompts (some "
                f"hundreds at least)"
            )
    model = fitted_stops(train, features) if watch else fitted(train, features)

    def plans_at(part: CurveSet, target: float) -> PlansAt:
        if (plan := fixed_plan(chain, target, watch)) is not None:
            return lambda _: np.full(len(part), plan)
        if isinstance(model, StopModel):
            return stops(model, part, pair_for(chain, target), features)
        losses, bits = model.predict(features_of(part, features)), model.bits
        return lambda multiplier: cheapest(losses, bits, multiplier)

    calibrations = tuple(
        calibrate(
            plans_at(validation, each), validation.plan_bits, validation.forwards, validation.keys, each
        )
        for each in ladder(chain, target)
    )
    split = {"seed": config.seed, "split_shares": config.split_shares}
    about = RegressionConfig(
        chain,
        features,
        target,
        calibrations,
        len(validation),
        model_fingerprint,
        labels_fingerprint,
        watch,
        split,
    )
    judged = []
    if len(test) > 1:
        resampling = Resampling.of(test.groups, RESAMPLES, config.seed)
        budgets = np.linspace(chain[-1], chain[0], FRONTIER_POINTS).tolist()
        frontier = StaticFrontier(static(train, test, budgets, config.seed), resampling)
        gains = []
        for each in calibrations:
            if each.target_bits == target or (each.target_bits - chain[-1]) % SHOWN == 0:
                chosen = choose(plans_at(test, each.target_bits), test.keys, each)
                gains.append(gain_of("regression", test.under(chosen), frontier, each.target_bits))
        judged = table(gains, [gain.p for gain in gains], {})
    counts = dict(zip(SPLITS, (len(train), len(validation), len(test)), strict=True))
    return Fitted(about, model, judged, counts)
