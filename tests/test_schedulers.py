"""The published door of the schedulers: what it takes, what it refuses, and that every option does what it
says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pmpd.errors import UserError
from pmpd.schedulers.base import ObservedRows, PrefillState, Scheduler
from pmpd.schedulers.chain import NEVER, chain_bits, class_steps


def state_of(keys: list[str], max_new_tokens: int = 256) -> PrefillState:
    return PrefillState(
        keys,
        [max_new_tokens] * len(keys),
        [10] * len(keys),
        features=lambda: pytest.fail("nobody asked for features"),
    )


def random_steps(keys: list[str], **options) -> np.ndarray:
    """Switch steps [B, 2] of the chain 4, 3, 2."""
    return (
        Scheduler.get_scheduler("random", precisions=[4, 3, 2], **options).begin(state_of(keys)).switch_steps
    )


KEYS = [f"row {index}" for index in range(400)]


def test_random_follows_its_prior():
    steps = class_steps(256)
    assert set(random_steps(KEYS, prior=[0, 0, 1, 0]).ravel()) == {steps[2]}
    per_pair = random_steps(KEYS, prior=[[1, 0, 0, 0], [0, 0, 0, 1]])
    assert set(per_pair[:, 0]) == {steps[0]}
    assert set(per_pair[:, 1]) == {steps[3]}
    counts = Counter(random_steps(KEYS, prior=[3, 1, 0, 0]).ravel().tolist())
    assert set(counts) == {steps[0], steps[1]}
    assert 0.7 < counts[steps[0]] / 800 < 0.8, "weights 3 : 1 of 800 draws"


def test_random_is_uniform_without_a_prior_and_each_pair_draws_for_itself():
    steps = random_steps(KEYS)
    counts = Counter(steps.ravel().tolist())
    assert set(counts) == set(class_steps(256))
    assert min(counts.values()) > 150, "of 800 draws, 200 are expected for each class"
    assert (steps[:, 0] != steps[:, 1]).mean() > 0.6


def test_random_draws_depend_on_seed_and_key_only():
    steps = random_steps(KEYS, seed=1)
    assert (random_steps(KEYS, seed=2) != steps).any(axis=1).mean() > 0.8, "another seed, other draws"
    assert np.array_equal(random_steps(KEYS[::-1], seed=1)[::-1], steps), (
        "the order of the batch changes a row's draw"
    )
    assert np.array_equal(random_steps(KEYS[7:8], seed=1)[0], steps[7]), "the batch changes a row's draw"


@pytest.mark.parametrize("number", [int, np.int64, np.int32])
def test_static_takes_integers_of_every_kind(number):
    one = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=number(5))
    two = Scheduler.get_scheduler("naive", precisions=[4, 3, 2], high_bit_steps=[number(5), number(10)])
    for scheduler in (one, two):
        assert scheduler.describe() == {"name": "static", "precisions": [4, 3, 2], "high_bit_steps": [5, 10]}
        steps = scheduler.begin(state_of(["a"] * 3)).switch_steps
        assert steps.tolist() == [[5, 10]] * 3
        bits = [int(chain_bits((4, 3, 2), steps[:1], np.asarray([t]))[0]) for t in range(1, 13)]
        assert bits == [4] * 5 + [3] * 5 + [2] * 2


def test_confidence_lowers_after_patience_sure_forwards_in_a_row():
    scheduler = Scheduler.get_scheduler("confidence", precisions=[4, 3, 2], threshold=0.9, patience=2)
    decision = scheduler.begin(state_of(["a"]))
    steps, states = decision.switch_steps, list(decision.states)
    seen = []
    for t, probability in enumerate([0.95, 0.5, 0.9, 0.99, 0.99, 0.2, 0.9, 0.9], start=1):
        statistics = {"top_probability": np.asarray([probability])}
        scheduler.observe(ObservedRows(["a"], np.asarray([t]), np.asarray([4]), steps, states, statistics))
        seen.append(steps[0][steps[0] < NEVER].tolist())
    assert seen == [[], [], [], [4], [4], [4], [4], [4, 8]], (
        "a forward that is not sure starts the count again, and each pair counts for itself"
    )


def test_one_dictionary_serves_all_schedulers():
    everything = {
        "precisions": [4, 3],
        "high_bit_steps": 3,
        "seed": 1,
        "prior": None,
        "threshold": 0.5,
        "patience": 1,
    }
    names = [
        type(Scheduler.get_scheduler(name, **everything)).name
        for name in ("naive", "static", "random", "confidence")
    ]
    assert names == ["static", "static", "random", "confidence"]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("lucky", {}, r"scheduler 'lucky': known are budget, confidence, kv_cache, naive, .*static"),
        ("static", {"precisions": [4, 3], "high_bit_steps": 3, "steps": 1}, r"scheduler option steps: known "
                                                                            r"are .*high_bit_steps"),
        ("static", {"precisions": [4, 3]}, r"scheduler 'static' needs the option high_bit_steps; it takes "
                                           r"precisions, high_bit_steps"),
        ("naive", {}, r"scheduler 'naive' needs the option precisions, high_bit_steps"),
        ("random", {"seed": 3}, r"scheduler 'random' needs the option precisions; it takes precisions, "
                                r"seed, prior"),
        ("kv_cache", {"precisions": None}, r"scheduler 'kv_cache' needs the option precisions"),
        ("random", {"precisions": "4,3"}, r"precisions '4,3': a precision chain is a list of bit widths"),
        ("random", {"precisions": "43"}, r"precisions '43': a precision chain is a list of bit widths"),
        ("random", {"precisions": [4.5, 3]}, r"precisions \[4\.5, 3\]: a precision chain is a list of bit "
                                             r"widths"),
        ("random", {"precisions": 4}, r"precisions 4: a precision chain is a list of bit widths"),
        ("random", {"precisions": [3, 3]}, r"distinct and descending"),
        ("static", {"precisions": [4, 3], "high_bit_steps": 2.5}, r"high_bit_steps 2\.5: .* has 1 "
                                                                  r"pair\(s\); give one whole number"),
        ("static", {"precisions": [4, 3], "high_bit_steps": "3"}, r"high_bit_steps 3: .*give one whole "
                                                                  r"number"),
        ("static", {"precisions": [4, 3, 2], "high_bit_steps": [3]}, r"has 2 pair\(s\); .*or one per pair"),
        ("static", {"precisions": [4, 3], "high_bit_steps": -1}, r"decode forwards >= 0"),
        ("random", {"precisions": [4, 3], "prior": [1, 2]}, r"prior \[1, 2\]: give four weights >= 0 .*each "
                                                            r"of the 1 pair\(s\)"),
        ("random", {"precisions": [4, 3], "prior": [[1, 2, 3, 4], [1]]}, r"prior .*: give four weights"),
        ("random", {"precisions": [4, 3], "prior": [0, 0, 0, 0]}, r"with a positive sum"),
        ("random", {"precisions": [4, 3], "prior": [1, 1, -1, 1]}, r"weights >= 0"),
        ("random", {"precisions": [4, 3], "prior": [1, 1, float("nan"), 1]}, r"weights >= 0"),
        (
            "confidence", {"precisions": [4, 3], "threshold": 0},
            r"threshold 0, patience 4, calibration 0: 0 < threshold <= 1",
        ),
        *(
            (name, {"precisions": [4, 3, 2], option: value}, f"'{name}', option {option} .*: give a {kind}")
            for name, option, kind in (
                ("confidence", "threshold", "float"),
                ("online", "patience", "int"),
                ("budget", "multiplier", "float | None"),
                ("regression", "target_bits", "float | None"),
                ("kv_cache", "published_steps", "bool"),
            )
            for value in ("x", [1], {}, float("nan"))
        ),
    ],
)  # fmt: skip
def test_the_door_refuses_what_it_can_not_use_and_says_what_it_takes(name, options, told):
    with pytest.raises(UserError, match=told.replace(" | ", r" \| ")):
        Scheduler.get_scheduler(name, **options)
