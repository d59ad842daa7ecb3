"""Policies that choose per prompt against static plans that switch, run exactly.

    python -m bench.frontier_static --fit-labels A/continuations A/instructions --labels B/continuations \
        B/instructions --model-path anyprec --reference-model-path unquantized

A sum of uniform curves takes a forward at the low precision to read what forwards at it wrote. After a switch
it reads what the high one wrote, and loses less: on SmolLM2 a switch from 3 to 2 bits half-way loses 14 %
less than its sum. So the best static plan must be looked for by exact forwards: here among the precisions
throughout and switches between neighbours at quarters of the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import tyro

from bench import _record
from bench._frontier_model import exact_losses, given_tokens
from bench.frontier import load, same_length, told
from pmpd.evaluation.curve_set import CurveSet, Outcome
from pmpd.evaluation.frontier import Resampling, StaticFrontier, gain_of, holm, lower_hull, mix_for
from pmpd.evaluation.policies import POLICIES
from pmpd.model import PMPDForCausalLM
from pmpd.weights.model_spec import ModelSpec

POINTS = 41


@dataclass(frozen=True)
class StaticExact:
    """Judge policies against static plans that switch, all run exactly."""

    fit_labels: tuple[str, ...]
    """Output folders of pmpd label --rule kl: policies are fitted to these."""
    labels: tuple[str, ...]
    """Their prompts are judged. Policies must choose one precision throughout: their sums are exact then."""
    model_path: str
    reference_model_path: str
    policies: tuple[str, ...] = (
        "static per kind",
        "regression",
        "regression, one probe",
        "regression, no probe",
    )
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Of the answer, at which plans switch."""
    targets: tuple[float, ...] = (2.5, 2.75)
    resamples: int = 10000
    seed: int = 0
    name: str = "frontier_static"
    """Write bench/results/NAME.json."""

    def run(self) -> None:
        started = time.perf_counter()
        (train, _), (test, about) = load(self.fit_labels), load(self.labels)
        train, test = same_length(train, test)
        plans = switching_plans(test, self.shares)
        outcomes = self.exact(test, list(plans.values()))
        resampling = Resampling.of(test.groups, self.resamples, self.seed)
        frontiers = {
            "uniform plans": frontier([o for o in outcomes if uniform(o, test)], test, resampling),
            "plans that switch": frontier(outcomes, test, resampling),
        }
        rows, gains = [], []
        for against, static in frontiers.items():
            for policy in self.policies:
                found = POLICIES[policy](train, test, self.targets, self.seed)
                for outcome, target in zip(found, self.targets, strict=True):
                    gain = gain_of(policy, outcome, static, target)
                    gains.append(gain)
                    rows.append({"against": against, "policy": policy, "target_bits": target})
        for row, gain, p in zip(rows, gains, holm([gain.p for gain in gains]), strict=True):
            row |= {
                "bits": gain.bits, "gain_percent": 100 * gain.gain / gain.static_loss,
                "low_percent": 100 * gain.low / gain.static_loss,
                "high_percent": 100 * gain.high / gain.static_loss, "p_holm": float(p),
            }  # fmt: skip
            print(row)
        told_plans = {
            name: {
                "bits": exact.mean_bits,
                "exact": exact.mean_loss,
                "by_curves": test.outcome(np.broadcast_to(plan, (len(test), len(plan)))).mean_loss,
            }
            for (name, plan), exact in zip(plans.items(), outcomes, strict=True)
        }
        results = {
            "settings": told(self), "prompts": len(test), "groups": len(np.unique(test.groups)),
            "kinds": about, "plans": told_plans, "policies": rows, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        print(_record.write(self.name, results))

    def exact(self, test: CurveSet, plans: list[np.ndarray]) -> list[Outcome]:
        device, given = torch.device("cpu"), given_tokens(self.labels)
        specs = ModelSpec(self.model_path), ModelSpec(self.reference_model_path, dtype="float32")
        model, unquantized = (PMPDForCausalLM.from_spec(spec, device).eval() for spec in specs)
        widths, shape = test.widths.astype(int), (len(test), test.loss.shape[2])
        levels = [np.broadcast_to(plan, shape) for plan in plans]
        rows = [given[key] for key in test.keys]
        sums = exact_losses(model, unquantized, rows, [widths[each] for each in levels], test.chain[0])
        simulated = [test.outcome(each) for each in levels]
        return [Outcome(loss, o.bits, o.forwards) for loss, o in zip(sums, simulated, strict=True)]


def switching_plans(curves: CurveSet, shares: Sequence[float]) -> dict[str, np.ndarray]:
    """Place in the chain of each decode forward, by name."""
    most, chain = curves.loss.shape[2], curves.chain
    found = {f"{bits} throughout": np.full(most, place) for place, bits in enumerate(chain)}
    for place, (high, low) in enumerate(pairwise(chain)):
        for share in shares:
            plan = np.full(most, place + 1)
            plan[: round(share * most)] = place
            found[f"{high} for {share:g}, then {low}"] = plan
    return found


def uniform(outcome: Outcome, curves: CurveSet) -> bool:
    return any(np.allclose(outcome.bits, width * curves.forwards) for width in curves.widths)


def frontier(outcomes: list[Outcome], curves: CurveSet, resampling: Resampling) -> StaticFrontier:
    """Of static plans, their mixes of least loss in hindsight, which favours them."""
    bits, loss = (np.array([getattr(o, name) for o in outcomes]) for name in ("mean_bits", "mean_loss"))
    hull = lower_hull(bits, loss)
    mixes = []
    for budget in np.linspace(curves.chain[-1], curves.chain[0], POINTS).tolist():
        first, second, share = mix_for(bits[hull].tolist(), budget)
        mixes.append(Outcome.mix(outcomes[hull[first]], outcomes[hull[second]], share))
    return StaticFrontier(mixes, resampling)


if __name__ == "__main__":
    tyro.cli(StaticExact, description=__doc__).run()
