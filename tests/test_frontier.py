"""The comparison with the static frontier on made-up curves whose answer is known: a policy with a true gain
is found, one without is not, and the oracle bounds them all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench import _frontier_online
from pmpd.evaluation import curve_set, frontier, policies
from pmpd.evaluation.curve_set import CurveSet, Outcome, bits_of, cross_fitted, folds, plans_within
from pmpd.evaluation.frontier import Resampling, StaticFrontier, gain_of, holm, lower_hull, prompts_needed
from pmpd.schedulers.base import ObservedRows
from pmpd.schedulers.chain import SIXTHS, chain_bits, plan_points, sixths_plans
from pmpd.schedulers.online import OnlineScheduler

CHAIN, FORWARDS = (4, 3, 2), 24
WIDTH_LOSS = np.asarray([0.05, 0.2, 0.8])
TARGETS = (2.5, 3.0)


PLANS = sixths_plans(len(CHAIN) - 1)
STEPS = np.asarray(plan_points(FORWARDS + 1))[PLANS]
LEVELS = np.stack([(t > STEPS).sum(1) for t in range(1, FORWARDS + 1)], axis=1)
"""Places in the chain of each plan's forwards, int [P, M]."""


def made_up(
    prompts: int,
    seed: int,
    kind_effect: float = 0.0,
    step_effect: float = 0.0,
    switch_effects: tuple[float, float] = (1.0, 1.0),
) -> CurveSet:
    """Loss = a width's mean x what the prompt's kind and the step's hidden state make of it x noise. The
    entropy behind a forward shows the state of the next one, whatever the precision. Plans that switch lose
    the sum of their curves, times the effect of the prompt's kind."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, prompts)
    hidden = rng.normal(size=(prompts, FORWARDS + 1))
    for t in range(1, FORWARDS + 1):
        hidden[:, t] = 0.8 * hidden[:, t - 1] + 0.6 * hidden[:, t]
    lengths = rng.integers(FORWARDS // 2, FORWARDS + 1, prompts)
    valid = np.arange(FORWARDS) < lengths[:, None]
    factor = np.exp(kind_effect * (2 * kinds - 1)[:, None] + step_effect * hidden[:, :-1])
    noise = rng.gamma(4, 0.25, size=(prompts, len(CHAIN), FORWARDS))
    loss = WIDTH_LOSS[None, :, None] * factor[:, None, :] * noise * valid[:, None, :]
    entropy = np.repeat(np.exp(hidden[:, None, 1:]), len(CHAIN), axis=1)
    loss_NP = np.stack(
        [np.take_along_axis(loss, np.tile(plan, (prompts, 1))[:, None], 1)[:, 0].sum(1) for plan in LEVELS], 1
    )
    switches = (LEVELS[:, 0] != LEVELS[:, -1]).astype(float)
    loss_NP *= np.asarray(switch_effects)[kinds][:, None] ** switches
    features = np.column_stack([kinds + 0.3 * rng.normal(size=prompts), rng.normal(size=(prompts, 3))])
    return CurveSet(
        keys=tuple(f"{i:016x}" for i in range(prompts)),
        groups=np.arange(prompts) // 2,
        kinds=kinds,
        chain=CHAIN,
        loss=loss,
        valid=valid,
        statistics={"entropy": entropy, "margin": np.exp(-entropy), "top_probability": np.exp(-entropy)},
        start={"entropy": np.exp(hidden[:, 0]), "margin": np.exp(-np.exp(hidden[:, 0]))},
        features=features,
        feature_names=("a", "b", "c", "d"),
        plan_loss=loss_NP,
        plan_bits=bits_of(np.tile(STEPS, (prompts, 1, 1)), CHAIN, valid.sum(1)),
    )


def static_frontier(curves: CurveSet, fold, resamples: int = 400) -> StaticFrontier:
    budgets = np.linspace(CHAIN[-1], CHAIN[0], 21).tolist()
    resampling = Resampling.of(curves.groups, resamples, seed=3)
    return StaticFrontier(cross_fitted(curves, fold, policies.static, budgets), resampling)


def gains(curves: CurveSet, policy, targets=TARGETS) -> list[frontier.Gain]:
    fold = folds(curves, 4, seed=1)
    below = static_frontier(curves, fold)
    outcomes = cross_fitted(curves, fold, policy, targets)
    return [gain_of("it", outcome, below, t) for outcome, t in zip(outcomes, targets, strict=True)]


def test_a_policy_with_a_true_gain_is_found_and_the_oracle_gains_more():
    curves = made_up(300, seed=0, kind_effect=1.0)
    told = replace(curves, features=curves.features[:, :1])  # without what tells nothing
    for policy in (policies.per_kind, policies.per_cluster, policies.regression):
        for gain in gains(told if policy is policies.per_cluster else curves, policy):
            assert gain.low > 0, (policy.__name__, gain)
            assert abs(gain.bits - gain.target_bits) < 0.1, "the budget was not kept"
    best = gains(curves, policies.oracle_plan)
    for kind, plan in zip(gains(curves, policies.per_kind), best, strict=True):
        assert kind.gain < plan.gain


def test_a_gain_that_only_plans_that_switch_have_is_found_and_counts_for_static_too():
    """Switches pay for prompts of one kind alone. Chosen among plans that switch, the gain is there; a
    frontier of one precision throughout would call it larger."""
    curves = made_up(300, seed=11, switch_effects=(0.5, 1.5))
    for policy in (policies.per_kind, policies.regression):
        (gain,) = gains(curves, policy, (2.5,))
        assert gain.low > 0, policy.__name__
        assert gain.percent > 10
        assert abs(gain.bits - 2.5) < 0.1
    everybody = made_up(300, seed=11, switch_effects=(0.5, 0.5))
    (gain,) = gains(everybody, policies.per_kind, (2.5,))
    assert abs(gain.percent) < 3, "what a switch gains for all prompts is the static frontier's"
    line = (WIDTH_LOSS[1] + WIDTH_LOSS[2]) / 2
    assert gain.static_loss < 0.65 * line, "the best static plan switches"


def test_the_gain_found_is_the_true_one():
    """Two kinds, the second without any loss at fewer bits: the best policy gives it the lowest precision, so
    the first kind has twice what the mean leaves above the lowest."""
    curves = made_up(4000, seed=5)
    loss = np.stack([curves.valid @ WIDTH_LOSS[plan] for plan in LEVELS], axis=1)
    flat = replace(curves, plan_loss=np.where(curves.kinds[:, None] == 1, 0.0, loss))
    (gain,) = gains(flat, policies.per_kind, (2.5,))
    # static at 2.5 bits: half of the prompts lose (0.8 + 0.2) / 2; by kind: those at 3 bits lose 0.2
    assert gain.static_loss == pytest.approx(0.25, abs=0.01)
    assert gain.loss == pytest.approx(0.1, abs=0.01)
    assert gain.low < 0.15 < gain.high or gain.gain == pytest.approx(0.15, abs=0.01)


def test_a_policy_that_sees_the_prompt_gains_nothing_by_the_steps():
    for gain in gains(made_up(160, seed=2, step_effect=1.0), policies.regression):
        assert gain.p > 0.01


def test_no_policy_is_found_where_there_is_nothing_to_know():
    """The share of false finds over many made-up studies, every policy in each."""
    found, tried, kept = 0, 0, []
    for seed in range(20):
        curves = made_up(80, seed=100 + seed, switch_effects=(0.8, 0.8))
        fold = folds(curves, 4, seed)
        below = static_frontier(curves, fold, resamples=200)
        study = []
        for policy in (policies.random_plan, policies.per_kind, policies.per_cluster, policies.regression):
            for outcome in cross_fitted(curves, fold, policy, TARGETS):
                gain = gain_of("it", outcome, below)
                found, tried = found + (gain.p < 0.05 and gain.gain > 0), tried + 1
                study.append(gain.p if gain.gain > 0 else 1.0)
        kept.append(min(holm(study)) < 0.05)
    assert found / tried <= 0.06, f"{found} of {tried} tries of nothing were called a gain"
    assert sum(kept) <= 3, "Holm's correction must keep whole studies free of false finds"


def test_the_frontier_is_convex_and_a_static_plan_gains_nothing():
    curves = made_up(60, seed=4)
    fold = folds(curves, 3, seed=0)
    below = static_frontier(curves, fold)
    assert (np.diff(below.loss) <= 1e-9).all()
    for target in (2.3, 3.1, 3.8):
        (outcome,) = cross_fitted(curves, fold, policies.static, [target])
        gain = gain_of("static", outcome, below, target)
        assert abs(gain.percent) < 1.0
        assert gain.low <= 1e-6
    hull = lower_hull(np.asarray([2.0, 3.0, 4.0, 3.0, 2.5]), np.asarray([1.0, 0.5, 0.1, 0.9, 0.74]))
    assert hull.tolist() == [0, 4, 1, 2] or hull.tolist() == [0, 1, 2]


def test_folds_and_resamples_keep_groups_together():
    curves = made_up(40, seed=6)
    fold = folds(curves, 5, seed=9)
    assert all(len(set(fold[curves.groups == group])) == 1 for group in set(curves.groups.tolist()))
    counts = Resampling.of(curves.groups, 50, seed=0).counts
    assert (counts[:, 0::2] == counts[:, 1::2]).all()
    assert (counts.sum(1) == 40).all()


def test_an_outcome_is_weighted_by_forwards():
    curves = made_up(10, seed=7)
    levels = np.ones(curves.valid.shape, dtype=int)
    levels[::2] = 2
    outcome = curves.summed(levels)
    bits = [3.0 if n % 2 else 2.0 for n in range(10) for _ in range(int(curves.valid[n].sum()))]
    assert outcome.mean_bits == pytest.approx(np.mean(bits))
    half = Outcome.mix(outcome, curves.summed(np.zeros_like(levels)), 0.25)
    assert half.mean_bits == pytest.approx(0.75 * np.mean(bits) + 0.25 * 4)
    lowest = curves.under(0)
    assert PLANS[0].tolist() == [0, 0]
    np.testing.assert_allclose(lowest.loss, curves.loss[:, 2].sum(1))
    np.testing.assert_allclose(lowest.bits, 2 * curves.valid.sum(1))
    each = curves.under(np.arange(10))
    assert each.loss[3] == curves.plan_loss[3, 3]


def test_a_plans_bits_are_those_of_its_forwards():
    """As a decode takes them, for answers that end before a switch, too."""
    curves = made_up(9, seed=3)
    for n, length in enumerate(curves.valid.sum(1)):
        for p, steps in enumerate(STEPS):
            forwards = np.arange(1, length + 1)
            taken = chain_bits(CHAIN, np.tile(steps, (length, 1)), forwards)
            assert curves.plan_bits[n, p] == taken.sum()


def test_some_precisions_of_a_label_have_the_plans_that_use_no_other():
    curves = [{"bits": bits} for bits in CHAIN]
    plans = [{"steps": steps, "divergence": float(p)} for p, steps in enumerate(STEPS.tolist())]
    for chain in ((4, 3), (4, 2)):
        row = {"curves": curves, "plans": plans}
        plans_within([row], chain)
        assert [curve["bits"] for curve in row["curves"]] == list(chain)
        assert [plan["steps"] for plan in row["plans"]] == [[at] for at in plan_points(FORWARDS + 1)]
        for plan in row["plans"]:
            used = np.asarray(CHAIN)[LEVELS[int(plan["divergence"])]]
            assert set(used.tolist()) <= set(chain)
            assert (used == chain[0]).sum() == plan["steps"][0]
    assert len(PLANS) == 28
    assert PLANS[-1].tolist() == [SIXTHS, SIXTHS]


def test_holm_and_the_number_of_prompts_are_the_textbooks():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    gain = frontier.Gain("a", 3.0, 3.0, 0.9, 1.0, 0.1, 0.0, 0.2, error=0.05, p=0.04)
    assert prompts_needed(gain, 100, percent=14.01) == 100
    assert prompts_needed(gain, 100, percent=1.4007) == pytest.approx(10000, abs=2)


def test_the_simulated_online_scheduler_is_the_scheduler():
    curves = made_up(12, seed=8, step_effect=1.0)
    setting = _frontier_online.Thresholds("entropy", 0.8, 1.6, patience=2, hold=3)
    levels = _frontier_online.follow(curves, setting)
    scheduler = OnlineScheduler(CHAIN, "entropy", 0.8, 1.6, 2, 3)
    states = [type(scheduler).begin(scheduler, _prefill(12)).states[0]] * 12
    place = np.zeros(12, dtype=int)
    for t in range(FORWARDS):
        assert (levels[:, t] == place).all(), t
        seen = {"entropy": curves.statistics["entropy"][np.arange(12), place, t]}
        rows = ObservedRows(["a"] * 12, np.full(12, t + 1), np.asarray(CHAIN)[place], None, states, seen)
        place = np.asarray([CHAIN.index(bits) for bits in scheduler.observe(rows).tolist()])
    assert len(set(levels.ravel().tolist())) == 3, "not all precisions were used"


def _prefill(rows: int):
    from pmpd.schedulers.base import PrefillState

    return PrefillState(["a"] * rows, [FORWARDS] * rows, [5] * rows, lambda: None)


def test_labels_without_curves_are_refused():
    row = {"prompt_id": "a", "error": None, "curves": None, "plans": None}
    with pytest.raises(ValueError, match="the labels have no curves; label with `pmpd label --rule kl`"):
        curve_set.curve_set([row], {"a": 0}, {"a": 0})
    with pytest.raises(ValueError, match="no losses of plans, as those of rule kl before version 2"):
        curve_set.curve_set([{**row, "curves": [{"bits": 4}]}], {"a": 0}, {"a": 0})
    with pytest.raises(ValueError, match="2 to 4 bits"):
        frontier.check_targets(CHAIN, [5.0])
