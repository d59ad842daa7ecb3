"""The static frontier by exact forwards: plans that switch are in it where forwards say that they lose less
than their sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench import _record, frontier_static
from bench.frontier_static import StaticExact, switching_plans, uniform
from pmpd.evaluation.curve_set import Outcome
from tests.test_frontier import CHAIN, FORWARDS, made_up


def test_plans_are_the_precisions_throughout_and_switches_between_neighbours():
    curves = made_up(4, seed=0)
    plans = switching_plans(curves, (0.5,))
    assert list(plans) == [
        "4 throughout", "3 throughout", "2 throughout", "4 for 0.5, then 3", "3 for 0.5, then 2",
    ]  # fmt: skip
    assert plans["3 for 0.5, then 2"].tolist() == [1] * (FORWARDS // 2) + [2] * (FORWARDS // 2)
    shape = (len(curves), FORWARDS)
    told = {name: curves.outcome(np.broadcast_to(plan, shape)) for name, plan in plans.items()}
    assert [name for name, outcome in told.items() if uniform(outcome, curves)] == list(plans)[: len(CHAIN)]


def test_a_policy_of_uniform_plans_gains_less_where_switches_lose_less_than_their_sums(monkeypatch):
    train, test = made_up(300, seed=1, kind_effect=1.0), made_up(120, seed=2, kind_effect=1.0)
    test = replace(test, keys=tuple(f"test{i}" for i in range(len(test))))
    monkeypatch.setattr(frontier_static, "load", lambda folders: (train if folders == ("a",) else test, {}))

    def exact(self: StaticExact, curves, plans) -> list[Outcome]:
        found = [curves.outcome(np.broadcast_to(plan, (len(curves), FORWARDS))) for plan in plans]
        return [o if uniform(o, curves) else Outcome(0.5 * o.loss, o.bits, o.forwards) for o in found]

    monkeypatch.setattr(StaticExact, "exact", exact)
    written: list[dict] = []
    monkeypatch.setattr(_record, "write", lambda name, results: written.append(results))
    StaticExact(("a",), ("b",), "m", "u", policies=("static per kind",), targets=(2.5,), resamples=200).run()
    (found,) = written
    of = {row["against"]: row for row in found["policies"]}
    assert of["uniform plans"]["low_percent"] > 0
    assert of["plans that switch"]["gain_percent"] < of["uniform plans"]["gain_percent"] - 10
    plan = found["plans"]["3 for 0.5, then 2"]
    assert plan["exact"] == 0.5 * plan["by_curves"]
