"""The online policy: down while sure, up when not, with hysteresis; engine equal to oracle."""

from __future__ import annotations

import numpy as np
import pytest

from pmpd import Scheduler
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from pmpd.schedulers.base import ObservedRows, PrefillState
from tests.test_engine import expanded, random_prompts


def follow(doubts: list[float], **options) -> list[int]:
    """Precisions after each forward of one row that meets these entropies."""
    scheduler = Scheduler.get_scheduler("online", precisions=[4, 3, 2], **options)
    decision = scheduler.begin(PrefillState(["a"], [99], [3], lambda: pytest.fail("nobody asked")))
    states, bits = list(decision.states), []
    for t, doubt in enumerate(doubts, start=1):
        seen = {"entropy": np.asarray([doubt])}
        rows = ObservedRows(["a"], np.asarray([t]), np.asarray([4]), decision.switch_steps, states, seen)
        bits += scheduler.observe(rows).tolist()
    return bits


def test_it_goes_down_one_by_one_and_up_at_once():
    sure, between, unsure = 0.1, 1.0, 3.0
    options = {"lower_below": 0.5, "raise_above": 2.0, "patience": 2, "hold": 3}
    assert follow([sure] * 6, **options) == [4, 3, 3, 2, 2, 2]
    assert follow([sure, between, sure, sure], **options) == [4, 4, 4, 3], "not two in a row"
    assert follow([sure] * 4 + [between] * 3, **options)[-3:] == [2, 2, 2], (
        "between the thresholds nothing moves"
    )
    up = follow([sure] * 4 + [unsure] + [sure] * 5, **options)
    assert up == [4, 3, 3, 2, 4, 4, 4, 3, 3, 2], "the highest for three forwards, then down again"


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"lower_below": 5.12, "raise_above": 5.15, "hold": 2},
        {"signal": "margin", "lower_below": 0.994, "raise_above": 0.9965, "patience": 1},
    ],
    ids=["entropy", "margin"],
)
def test_engine_equals_oracle_when_precisions_rise_and_fall(anyprec_model, slots, options):
    model = anyprec_model("llama")
    scheduler = Scheduler.get_scheduler("online", precisions=[4, 3, 2], **options)
    prompts = random_prompts(6, 40, seed=16)
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(prompts)]
    falls = rises = 0
    for completion in Engine(model.model, slots, 80).run(requests, scheduler, 4, model.eos_token_ids):
        ends, key = model.eos_token_ids, completion.key
        truth = oracle.decode(model.model, prompts[int(key)], 24, 4, ends, scheduler, key=key)
        assert completion.tokens == truth.tokens, key
        assert expanded(completion) == truth.bits, key
        steps = np.diff(truth.bits)
        falls, rises = falls + int((steps < 0).sum()), rises + int((steps > 0).sum())
    assert falls > 3
    assert rises > 1, "no precision ever rose: the test shows nothing"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"signal": "mood"}, "signal 'mood': known are top_probability, margin, entropy"),
        ({"lower_below": 2, "raise_above": 1}, "0 <= lower_below <= raise_above"),
        ({"hold": 0}, "hold 0: at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        Scheduler.get_scheduler("online", precisions=[4, 2], **options)
