"""The bit budget: one multiplier for all rows, calibrated, kept to, told whether it was reached."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pmpd import Scheduler
from pmpd.cli.flags.train import TrainJob
from pmpd.cli.train import budget_line, budget_schedulers
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from pmpd.schedulers.artefact import ArtefactConfig, save_artefact
from pmpd.schedulers.budget import calibrate, choose_classes, described, plan_bits, risks
from pmpd.schedulers.chain import chain_bits, class_steps
from pmpd.schedulers.classifier import KVCacheClassifier
from pmpd.training.config import TrainConfig
from pmpd.training.data import Labels
from pmpd.training.fit import TrainState
from pmpd.training.result import budget_of, check_target
from tests.test_engine import random_prompts

CHAIN = (4, 3, 2)


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).normal(size=(rows, 2, 4))


def test_the_risk_of_a_class_is_the_probability_of_a_higher_label():
    scores = np.log(np.asarray([0.1, 0.2, 0.3, 0.4]))
    np.testing.assert_allclose(risks(scores), [0.9, 0.7, 0.4, 0.0], atol=1e-12)


def test_average_bits_of_classes_are_those_of_the_forwards_they_stand_for():
    classes = np.asarray([(a, b) for a in range(4) for b in range(4)])
    steps = np.asarray([class_steps(301)] * len(classes))
    plans = np.take_along_axis(steps, classes, axis=1)
    forwards = np.stack([chain_bits(CHAIN, plans, np.full(len(classes), t)) for t in range(1, 301)])
    np.testing.assert_allclose(plan_bits(classes, CHAIN), forwards.mean(axis=0), atol=1e-9)


@pytest.mark.parametrize("target", [2.0, 2.4, 3.0, 3.6, 4.0])
def test_a_budget_within_the_chain_is_reached_on_prompts_of_the_same_kind(target):
    found = calibrate(logits(2000), CHAIN, target)
    assert found.reached, found
    assert found.bits <= target + 1e-9
    fresh = plan_bits(choose_classes(logits(2000, seed=1), CHAIN, found.multiplier), CHAIN).mean()
    assert abs(fresh - target) < 0.1
    assert "reached" in budget_line({**described(found), "test_bits": fresh})


def test_bits_go_where_the_risk_is():
    scores = np.zeros((2, 1, 4))
    scores[0, 0, 0] = scores[1, 0, 3] = 4.0  # the first row's label is 0, the second's 3, most likely
    for multiplier in (0.2, 0.5, 0.8):
        assert choose_classes(scores, (4, 3), multiplier).tolist() == [[0], [3]]
    assert choose_classes(scores, (4, 3), 0.0).tolist() == [[3], [3]], "no budget: never switch"
    assert choose_classes(scores, (4, 3), 99.0).tolist() == [[0], [0]]


def test_a_budget_that_rows_alike_can_not_keep_is_told_as_not_reached():
    found = calibrate(np.zeros((50, 2, 4)), CHAIN, 3.3)
    assert not found.reached
    assert "3.3 bits on average: not reached" in budget_line({**described(found), "test_bits": None})


def test_training_calibrates_on_its_validation_prompts_only():
    pairs, ids = ((4, 3), (3, 2)), tuple(f"{i:016x}" for i in range(900))
    labels = Labels(ids, pairs, np.zeros((900, 2), dtype=np.int64))
    config, scores = TrainConfig(), logits(900)
    splits = labels.splits(config)
    scores[splits != 1] = 0.0  # would give other bits
    named = {"kv_cache/4-3": scores[:, 0], "kv_cache/3-2": scores[:, 1]}
    state = TrainState(logits={name: torch.from_numpy(part) for name, part in named.items()})
    found = budget_of(labels, state, config, 3.0)
    alone = calibrate(scores[splits == 1].astype(np.float32), CHAIN, 3.0)
    assert (found["multiplier"], found["prompts"]) == (alone.multiplier, int((splits == 1).sum()))
    with pytest.raises(ValueError, match=r"target_bits 1.5: the chain \[4, 3, 2\] has 2 to 4"):
        check_target(pairs, 1.5)
    with pytest.raises(ValueError, match="are no chain"):
        check_target(((4, 3), (4, 2)), 3.0)


def test_the_scheduler_keeps_to_what_its_artefact_was_calibrated_for(anyprec_model, tmp_path):
    model = anyprec_model("llama")
    torch.manual_seed(2)
    states = {}
    for pair in ((4, 3), (3, 2)):
        classifier = KVCacheClassifier(16, 2)
        torch.nn.init.normal_(classifier.queries, std=4.0)
        torch.nn.init.normal_(classifier.head.weight, std=4.0)
        states[pair] = classifier.state_dict()
    config = ArtefactConfig(16, 2, tuple(states))
    save_artefact(tmp_path, config, states)
    with pytest.raises(ValueError, match=r"calibrated for no budget, not for .*--target-bits"):
        Scheduler.get_scheduler("budget", precisions=CHAIN, save_dir=tmp_path)
    free = Scheduler.get_scheduler("kv_cache", precisions=CHAIN, save_dir=tmp_path)
    prompts = random_prompts(8, 40, seed=3)
    requests = [Request(str(i), prompt, 13) for i, prompt in enumerate(prompts)]
    engine, ends = Engine(model.model, 3, 60), model.eos_token_ids
    scores = np.stack([c.scores for c in engine.run(requests, free, 4, ends)])
    budget = described(calibrate(scores, CHAIN, 3.0))
    save_artefact(tmp_path, dataclasses.replace(config, budget=budget), states)
    scheduler = Scheduler.get_scheduler("budget", precisions=CHAIN, save_dir=tmp_path)
    found = list(engine.run(requests, scheduler, 4, ends))
    for completion in found:
        key = completion.key
        truth = oracle.decode(model.model, prompts[int(key)], 13, 4, ends, scheduler, key=key)
        assert completion.tokens == truth.tokens
    chosen = np.stack([completion.classes for completion in found])
    assert plan_bits(chosen, CHAIN).mean() == pytest.approx(budget["bits"])
    assert len({tuple(row) for row in chosen.tolist()}) > 1, "all rows decided alike: this shows nothing"
    never = Scheduler.get_scheduler("budget", precisions=CHAIN, save_dir=tmp_path, multiplier=0)
    high = [completion.precision_trace for completion in engine.run(requests, never, 4, ends)]
    assert {bits for trace in high for bits, _ in trace} == {4}


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({}, ""),
        ({"target_bits": 3.0}, " --schedulers fp,uniform,static,kv_cache,budget"),
        (
            {"target_bits": 3.0, "training": TrainConfig(objective="loss")},
            " --schedulers fp,uniform,static,budget",
        ),
    ],
)
def test_the_next_command_has_the_schedulers_that_the_training_serves(options, flag):
    assert budget_schedulers(TrainJob(**options)) == flag
