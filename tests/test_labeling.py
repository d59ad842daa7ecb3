"""Labels against the rule, written out once more over plain decoding and the published ROUGE-L."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import pmpd
from pmpd import PMPDForCausalLM, Scheduler
from pmpd.cli import generate, label
from pmpd.decode import oracle
from pmpd.decode.pulse import Pulse
from pmpd.decode.requests import Completion, Request
from pmpd.errors import UserError
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import Labeler, in_order, label_prompts, reference_prompts, submitted
from pmpd.labeling.row_threads import RowThreads
from pmpd.labeling.rule import LabelRule, Trajectory, label_of
from pmpd.labeling.scoring import PairBranches, RowScorer, Score
from pmpd.labeling.scoring_process import ScoringProcess, ScoringProcesses
from pmpd.metrics.rouge import rouge_l
from tests.helpers import write_anyprec, write_dense
from tests.test_engine import random_prompts

NEW_TOKENS = 31
STEPS = (0, 10, 20, 30)
"""m = 30 decode forwards: 0, m // 3, 2 (m // 3), m."""
CHAIN = (4, 3, 2)
ENDS = frozenset(range(0, 258, 37))
"""So many tokens end a sequence that some trajectories end before, and some after, the steps of their
class."""


def words_of(tokens: list[int]) -> str:
    """A text whose words come from few, so that ROUGE-L takes many values and ties: the bytes of tokens say
    little."""
    return " ".join("abcdefg"[token % 7] for token in tokens)


class Words:
    """In place of a tokenizer."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return words_of(tokens)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(quantized, unquantized) with tokens that end sequences and texts made of words."""
    dense = write_dense(tmp_path_factory.mktemp("dense"), seed=8)
    quantized = PMPDForCausalLM(
        write_anyprec(tmp_path_factory.mktemp("anyprec"), dense), CHAIN, kernel="reference"
    ).eval()
    reference = PMPDForCausalLM(dense).eval()
    for model in (quantized, reference):
        model.eos_token_ids = ENDS
        model.tokenizer = Words()
    return quantized, reference


def prompt_rows(count: int) -> list[dict]:
    prompts = random_prompts(count, 40, seed=31)
    return [
        {"prompt_id": f"{index:016x}", "prompt_text": words_of(ids), "input_ids": ids}
        for index, ids in enumerate(prompts)
    ]


def labels_by_the_rule(quantized: PMPDForCausalLM, reference: PMPDForCausalLM, ids: list[int]) -> list[dict]:
    """For each pair: the trajectory at its high precision throughout; one per class; the smallest class that
    is as good."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    truth = words_of(oracle.decode(reference.model, ids, NEW_TOKENS, 16, ENDS).tokens)
    pairs = []
    for pair in ((4, 3), (3, 2)):
        # prefill and decision are the chain's: a pair below the first one begins after no forward at the
        # precisions above it
        whole_chain = Scheduler.get_scheduler("static", precisions=CHAIN, high_bit_steps=[0, 0])
        branches = []
        for steps in STEPS:
            plan = (steps, NEW_TOKENS) if pair == (4, 3) else (0, steps)
            branches.append(
                oracle.decode(quantized.model, ids, NEW_TOKENS, 4, ENDS, whole_chain, switch_steps=plan)
            )
        never = branches[3]
        assert set(never.bits[1:]) <= {pair[0]}, "class 3 never switches"
        scores = [scorer.score(truth, words_of(branch.tokens))["rougeL"].fmeasure for branch in branches]
        label = 0
        while round(scores[label], 3) < round(scores[3], 3):
            label += 1
        pairs.append(
            {
                "label": label,
                "scores": scores,
                "ids": never.tokens,
                "lengths": [len(branch.tokens) for branch in branches],
            }
        )
    return pairs


def test_labels_are_those_of_the_rule_over_plain_decoding(models):
    quantized, reference = models
    rows = prompt_rows(20)
    config = LabelConfig(CHAIN, NEW_TOKENS, slots=16)
    references = {row["prompt_id"]: row for row in reference_prompts(reference, rows, config)}
    labeled = {row["prompt_id"]: row for row in label_prompts(quantized, rows, references, config)}
    assert len(labeled) == len(rows)
    seen: Counter[int] = Counter()
    ties = ended_early = 0
    for row in rows:
        found = labeled[row["prompt_id"]]
        assert found["error"] is None
        for pair, expected in zip(
            found["pairs"], labels_by_the_rule(quantized, reference, row["input_ids"]), strict=True
        ):
            told = f"pair {pair['high']},{pair['low']} of a prompt of {len(row['input_ids'])} tokens"
            assert pair["label"] == expected["label"], told
            assert pair["rouge_l"] == expected["scores"], told
            assert pair["high_rouge_l"] == expected["scores"][3]
            assert pair["high_ids"] == expected["ids"]
            assert pair["branch_tokens"] == expected["lengths"]
            seen[expected["label"]] += 1
            ties += expected["scores"].count(expected["scores"][expected["label"]]) > 1
            ended_early += min(expected["lengths"]) < STEPS[2]
    assert sorted(seen) == [0, 1, 2, 3], f"not every class occurs: {dict(seen)}"
    assert ties, "no tie between branches: the test shows less than it says"
    assert ended_early > 5, "no trajectory ends before its branches fork"


@pytest.mark.parametrize(
    ("branches", "high", "label"),
    [
        ([0.5, 0.6, 0.7, 0.7], 0.7, 2),
        ([0.7, 0.7, 0.7, 0.7], 0.7, 0),
        ([0.1, 0.9, 0.2, 0.3], 0.3, 1),
        ([0.2, 0.2, 0.2, 0.3], 0.3, 3),
        ([0.69951, 0.5, 0.5, 0.7], 0.7, 0),  # 0.7 to three digits
        ([0.69949, 0.5, 0.5, 0.7], 0.7, 3),
        ([0.7, 0.5, 0.5, 0.70049], 0.70049, 0),
        ([0.0, 0.0, 0.0, 0.0], 0.0, 0),
    ],
)
def test_the_label_is_the_smallest_class_as_good_as_never_switching_to_three_digits(branches, high, label):
    assert label_of(branches, high) == label


def test_rouge_l_is_the_published_one_and_not_its_precision_or_recall():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for prediction, reference in (
        ("a b c", "a c d e f"),
        ("a c d e f", "a b c"),
        ("x", "y"),
        ("", "y"),
        ("Dogs ran", "the dog runs"),
    ):
        score = scorer.score(reference, prediction)["rougeL"]
        assert rouge_l(prediction, reference) == score.fmeasure
        assert score.precision != score.recall or score.fmeasure in (0, 1)


def test_logits_that_are_not_finite_make_an_error_row_without_a_label(models, tmp_path):
    """The rows beside it are labeled as if it had not been there."""
    quantized, reference = models
    folder = write_anyprec(tmp_path / "anyprec", write_dense(tmp_path / "dense", seed=8))
    model = PMPDForCausalLM(folder, CHAIN, kernel="reference").eval()
    model.eos_token_ids, model.tokenizer = ENDS, quantized.tokenizer
    rows = [row for row in prompt_rows(9) if 9 not in row["input_ids"]]
    bad = {"prompt_id": "bad", "prompt_text": "", "input_ids": [1, 9, 2]}
    with torch.no_grad():
        model.model.model.embed_tokens.weight[9] = float("nan")
    config = LabelConfig(CHAIN, NEW_TOKENS, slots=3)
    references = {row["prompt_id"]: row for row in reference_prompts(reference, [bad, *rows], config)}
    expected = {row["prompt_id"]: row["pairs"] for row in label_prompts(quantized, rows, references, config)}
    found = {row["prompt_id"]: row for row in label_prompts(model, [bad, *rows], references, config)}
    error = found.pop("bad")
    assert "not finite" in error["error"]
    assert error["pairs"] is None
    assert error["keys"] is None
    fine = {key: row["pairs"] for key, row in found.items() if not row["error"]}
    assert len(fine) > 4, "too many rows met the token themselves"
    assert fine == {key: expected[key] for key in fine}


def test_a_prompt_without_a_reference_is_an_error_row(models):
    quantized, _ = models
    rows = prompt_rows(2)
    references = {rows[0]["prompt_id"]: {"error": "it failed"}}
    found = {
        row["prompt_id"]: row
        for row in label_prompts(quantized, rows, references, LabelConfig(CHAIN, NEW_TOKENS))
    }
    assert "no reference output (it failed)" in found[rows[0]["prompt_id"]]["error"]
    assert "not in the references" in found[rows[1]["prompt_id"]]["error"]


@pytest.mark.parametrize("job", [label.LabelJob, generate.GenerateJob])
def test_references_come_from_an_unquantized_model(anyprec_folder, dense_folder, tmp_path, job):
    main = {label.LabelJob: label.main, generate.GenerateJob: generate.main}[job]
    settings = {"model_path": str(anyprec_folder()), "output_dir": str(tmp_path / "out")}
    with pytest.raises(
        ValueError,
        match=r"--reference-model-path .* is quantized already .*'anyprec'.*: give the unquantized model",
    ):
        main(job(reference_model_path=str(anyprec_folder()), **settings))
    with pytest.raises(ValueError, match=r"--reference-model-path /no/such: no such folder"):
        main(job(reference_model_path="/no/such", **settings))
    assert not (tmp_path / "out").exists()


def labelled(labeler: Labeler, unit: list[dict], references: dict) -> list[dict]:
    return list(in_order(row for _, row in labeler(unit, references)))


def test_rows_are_scored_beside_the_decoding():
    """The next call is made while the last one is still at work; results keep their order, an exception is
    that of its own row."""
    begun, go_on = threading.Event(), threading.Event()

    def first() -> dict:
        begun.set()
        assert go_on.wait(30), "nothing was decoded while this row was scored"
        return {"row": 0}

    def fails() -> dict:
        raise ZeroDivisionError

    def calls():
        yield "0", first
        assert begun.wait(30)
        go_on.set()
        yield "1", lambda: {"row": 1}
        yield "2", fails

    before = sys.getswitchinterval()
    with ThreadPoolExecutor(1) as thread:
        keys, futures = zip(*submitted(thread, calls()), strict=True)
        assert sys.getswitchinterval() == before
        assert keys == ("0", "1", "2")
        rows = in_order(futures)
        assert list(itertools.islice(rows, 2)) == [{"row": 0}, {"row": 1}]
        with pytest.raises(ZeroDivisionError):
            next(rows)


def test_a_unit_has_ended_while_its_last_rows_are_still_scored(models):
    """The next one decodes meanwhile."""
    quantized, reference = models
    rows, config = prompt_rows(4), LabelConfig(CHAIN, NEW_TOKENS, slots=16)
    references = {row["prompt_id"]: row for row in reference_prompts(reference, rows, config)}
    labeler, go_on = Labeler(quantized, config), threading.Event()
    score = labeler._score

    def waits(*arguments: Any) -> dict:
        assert go_on.wait(30), "the decoding waited for the scores"
        return score(*arguments)

    labeler._score = waits
    late = [row for unit in (rows[:2], rows[2:]) for _, row in labeler(unit, references)]
    assert not any(row.done() for row in late)
    go_on.set()
    assert same_labels(list(in_order(late)), list(label_prompts(quantized, rows, references, config)))


def test_rows_scored_in_a_process_of_their_own_are_the_same(models):
    quantized, reference = models
    rows = prompt_rows(4)
    config = LabelConfig(CHAIN, NEW_TOKENS, slots=16)
    references = {row["prompt_id"]: row for row in reference_prompts(reference, rows, config)}
    here = labelled(Labeler(quantized, config), rows, references)
    labeler = Labeler(quantized, config, own_process=True)
    there = labelled(labeler, rows, references)
    assert same_labels(there, here)
    for row, other in zip(sorted(here, key=of_prompt), sorted(there, key=of_prompt), strict=True):
        assert row.keys() == other.keys()
        assert np.array_equal(row["keys"], other["keys"])
        assert np.array_equal(row["values"], other["values"])


def of_prompt(row: dict) -> str:
    return row["prompt_id"]


def a_rule_that_prints(trajectory: Trajectory, reference: Trajectory) -> float:
    print("not an answer")
    return 0.5


def a_rule_that_fails(trajectory: Trajectory, reference: Trajectory) -> float:
    raise ZeroDivisionError("of this rule")


def a_rule_that_kills(trajectory: Trajectory, reference: Trajectory) -> float:
    os._exit(3)


class ServiceError(Exception):
    """Can be pickled, not unpickled."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")


def a_rule_that_fails_once(trajectory: Trajectory, reference: Trajectory) -> float:
    if reference.tokens[0] == 9:
        raise ServiceError(429, "slow down")
    return 0.5


def a_rule_that_hangs(trajectory: Trajectory, reference: Trajectory) -> float:
    print("hangs in", os.getpid(), flush=True)
    while True:
        time.sleep(0.01)


def a_rule_that_exits(trajectory: Trajectory, reference: Trajectory) -> float:
    sys.exit(2)


def a_rule_that_says_where_it_runs(trajectory: Trajectory, reference: Trajectory) -> float:
    time.sleep(0.3)
    return float(os.getpid())


def scorer_by(score: Callable[..., float]) -> RowScorer:
    return RowScorer(Words(), frozenset({0}), LabelConfig((4, 3), 8, 4, LabelRule("odd", 1, score)))


def scoring_process(score: Callable[..., float]) -> ScoringProcess:
    return ScoringProcess(scorer_by(score))


def scored_row(score: Score, first: int = 5) -> dict:
    branch = Completion("a", [5, 6, 7], [(4, 3)], (7,), "length")
    row = {"prompt_id": "a", "input_ids": [5, 6], "prompt_text": "x"}
    reference = {"reference_ids": [first, 6, 8], "reference_text": "a word"}
    return score(row, reference, [PairBranches(branch, (branch,) * 3)])


def test_a_process_that_scores_is_replaced_and_ends_with_its_owner():
    score = scoring_process(a_rule_that_prints)
    assert scored_row(score)["pairs"][0]["scores"] == [0.5] * 4
    first = score._process
    first.kill()
    assert scored_row(score)["pairs"][0]["scores"] == [0.5] * 4, "the row is not to blame"
    assert first.poll() is not None
    second = score._process
    assert second is not first
    del score
    assert second.poll() == 0, "it ends with its standard input"


HANGING_DRIVER = """
from pmpd.labeling.row_threads import RowThreads
from tests import test_labeling as made
process = made.scoring_process(made.a_rule_that_hangs)
RowThreads(1).submit(made.scored_row, process).result()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rule_that_hangs_outlives_nobody_and_keeps_nobody(number):
    """However the process ends that its rows are scored for."""
    driver = subprocess.Popen(
        [sys.executable, "-c", HANGING_DRIVER],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert driver.stdout is not None
    scoring = int(next(line for line in driver.stdout if line.startswith("hangs in")).split()[2])
    driver.send_signal(number)
    try:
        driver.communicate(timeout=30)  # both write into this pipe, so it ends with the last of them
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(scoring, signal.SIGKILL)
        driver.kill()
    assert driver.returncode != 0


def test_a_rule_that_exits_ends_no_run():
    score = scorer_by(a_rule_that_exits)
    with pytest.raises(RuntimeError, match="SystemExit: 2"):
        RowThreads(1).submit(scored_row, score).result(60)


def test_several_threads_score_at_a_time_each_with_a_process_for_itself():
    score = ScoringProcesses(scorer_by(a_rule_that_says_where_it_runs), 2)
    with ThreadPoolExecutor(2) as threads:
        rows = list(threads.map(lambda _: scored_row(score), range(4)))
    assert len({row["pairs"][0]["scores"][0] for row in rows}) == 2


def test_nobody_waits_for_a_scoring_process_to_start(monkeypatch):
    """Its scorer is larger than what a pipe holds while nobody reads it."""
    started, made, popen = [], [], subprocess.Popen

    def asleep(command, **more):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", asleep)
    scorer = dataclasses.replace(scorer_by(a_rule_that_prints), eos_token_ids=frozenset(range(100_000)))
    thread = threading.Thread(target=lambda: made.append(ScoringProcess(scorer)), daemon=True)
    thread.start()
    while not started:
        time.sleep(0.01)
    thread.join(5)
    waits = not made
    started[0].kill()
    assert not waits


def test_what_a_rule_raises_elsewhere_is_raised_here():
    score = scoring_process(a_rule_that_fails)
    with pytest.raises(ZeroDivisionError, match="of this rule"):
        scored_row(score)
    score = scoring_process(a_rule_that_fails_once)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ServiceError: 429 slow down"):
            scored_row(score, 9)
        assert scored_row(score)["error"] is None, "the next row is scored again"
    with pytest.raises(RuntimeError, match="SystemExit: 2"):
        scored_row(scoring_process(a_rule_that_exits))
    with pytest.raises(UserError, match="make its score a function of a module"):
        scoring_process(lambda trajectory, reference: 0.5)
    elsewhere = types.FunctionType(a_rule_that_prints.__code__, {}, "unknown")
    elsewhere.__module__, elsewhere.__qualname__ = "pmpd", "unknown_rule"
    pmpd.unknown_rule = elsewhere  # here, and not where it is asked for
    try:
        score = scoring_process(elsewhere)
    finally:
        del pmpd.unknown_rule
    for _ in range(2):
        with pytest.raises(AttributeError, match="unknown_rule"):
            scored_row(score)
    score = scoring_process(a_rule_that_kills)
    with pytest.raises(RuntimeError, match="ended 2 times over one row"):
        scored_row(score)


def same_labels(found: list[dict], expected: list[dict]) -> bool:
    kept = ("prompt_id", "pairs", "feature_tokens", "error")
    return [
        {name: row[name] for name in kept} for row in sorted(found, key=lambda row: row["prompt_id"])
    ] == [{name: row[name] for name in kept} for row in sorted(expected, key=lambda row: row["prompt_id"])]


def test_the_next_unit_decodes_in_slots_that_the_last_rows_of_a_unit_leave_free(models):
    """Three units, each on offer once while the one before it is labeled: the same labels, in fewer steps."""
    quantized, reference = models
    rows = prompt_rows(12)
    units = [rows[:4], rows[4:8], rows[8:]]
    config = LabelConfig(CHAIN, NEW_TOKENS, slots=16)
    references = {row["prompt_id"]: row for row in reference_prompts(reference, rows, config)}
    quantized._engine = None  # of another test, with more slots
    alone, steps = [], []
    waiting: list[dict] = []

    def offer() -> dict[str, dict]:
        rows = {row["prompt_id"]: row for row in waiting}
        waiting.clear()
        return rows

    for offers in (False, True):
        quantized.pulse, labeler = CountedSteps(), Labeler(quantized, config, offer=offer)
        found = []
        for index, unit in enumerate(units):
            waiting[:] = units[index + 1] if offers and index + 1 < len(units) else []
            of_unit = labelled(labeler, unit, references)
            assert {row["prompt_id"] for row in of_unit} == {row["prompt_id"] for row in unit}
            found += of_unit
        steps.append(quantized.pulse.steps)
        assert quantized._engine is not None, "the cache is kept from others"
        if not offers:
            alone = found
    assert not any(row["error"] for row in alone)
    assert same_labels(found, alone)
    assert steps[1] < 0.9 * steps[0], "the next unit waited for the last rows"


class CountedSteps(Pulse):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self, bits, forwards=1):
        self.steps += forwards
        super().step(bits, forwards)


def test_an_offer_that_has_no_room_waits_for_its_unit_and_a_unit_that_fails_leaves_nothing_behind(models):
    quantized, reference = models
    long = [{**row, "input_ids": row["input_ids"] * 3} for row in prompt_rows(8)[4:]]
    short, config = prompt_rows(4), LabelConfig(CHAIN, NEW_TOKENS, slots=8)
    references = {row["prompt_id"]: row for row in reference_prompts(reference, [*short, *long], config)}
    expected = list(label_prompts(quantized, [*short, *long], references, config))
    waiting = [{row["prompt_id"]: row for row in long}]
    labeler = Labeler(quantized, config, offer=lambda: waiting.pop() if waiting else {})
    quantized._engine = None  # one of exactly the first unit's length
    assert same_labels(
        [*labelled(labeler, short, references), *labelled(labeler, long, references)], expected
    )
    assert not waiting

    waiting.append({row["prompt_id"]: row for row in long})
    labels = labeler(short, references)
    next(labels)
    labels.close()
    waiting.clear()
    assert quantized._engine is not None
    assert same_labels(
        [*labelled(labeler, short, references), *labelled(labeler, long, references)], expected
    )


def test_a_decode_that_goes_on_from_unit_to_unit_holds_no_rows_that_are_done(models):
    quantized, reference = models
    config = LabelConfig(CHAIN, 4, slots=4)
    rows = [{**row, "prompt_id": f"{n:016x}"} for n, row in enumerate(prompt_rows(10) * 12)]
    references = {row["prompt_id"]: row for row in reference_prompts(reference, rows, config)}
    units = [rows[start : start + 10] for start in range(0, len(rows), 10)]
    waiting: list[dict] = []

    def offer() -> dict[str, dict]:
        taken = {row["prompt_id"]: row for row in waiting}
        waiting.clear()
        return taken

    quantized._engine = None  # of another test, with more slots
    labeler, decodes = Labeler(quantized, config, offer=offer), set()
    for unit, after in itertools.zip_longest(units, units[1:]):
        waiting[:] = after or []
        assert len(list(labeler(unit, references))) == len(unit)
        decodes.add(id(labeler._branches._decode))
        held = sum(type(each) is Request for each in gc.get_objects())
        assert held <= 3 * len(units[0]), "more than this unit and the next one"
    assert len(decodes) < len(units) / 2, "each unit had a decode of its own: this shows nothing"
