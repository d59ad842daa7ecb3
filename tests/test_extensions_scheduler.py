"""A scheduler from outside: one class and one entry of the registry, and it arrives everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ray import cloudpickle

from pmpd import Scheduler
from pmpd.benchmarks import BENCHMARKS, Question
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Fork, Request
from pmpd.evaluation.answer import Generator, conversation_rows
from pmpd.evaluation.compare import compare
from pmpd.evaluation.score import ScoreConfig, score
from pmpd.evaluation.sweep import SweepConfig, sweep_runs
from pmpd.report.build import write_report
from pmpd.report.source import Report, Source
from pmpd.schedulers import SCHEDULERS, SchedulerEntry
from pmpd.schedulers.base import Decision, ObservedRows, PrefillState
from pmpd.schedulers.chain import NEVER
from tests.test_engine import expanded, random_prompts
from tests.test_report import MANIFEST


class Countdown(Scheduler):
    """Low, and for `rest` forwards high again after each unsure token: an online policy in ten lines."""

    name = "countdown"
    statistics = ("margin", "entropy")

    def __init__(self, precisions, rest=2):
        super().__init__(precisions)
        self.rest = rest

    def begin(self, state: PrefillState) -> Decision:
        rows = len(state.keys)
        return Decision(np.zeros((rows, len(self.pairs)), np.int32), states=[(key, 0) for key in state.keys])

    def observe(self, rows: ObservedRows) -> np.ndarray:
        assert [state[0] for state in rows.states] == list(rows.keys), "the rows have others' states"
        unsure = (rows.statistics["margin"] < 0.02) & (rows.statistics["entropy"] > 1)
        left = [self.rest if u else max(0, n - 1) for u, (_, n) in zip(unsure, rows.states, strict=True)]
        rows.states[:] = zip(rows.keys, left, strict=True)
        return np.where(np.asarray(left) > 0, self.precisions[0], self.precisions[-1])

    def describe(self):
        return {**super().describe(), "rest": self.rest}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "countdown", SchedulerEntry(Countdown, aliases=("count",)))


@pytest.mark.parametrize("slots", [1, 4])
def test_it_decodes_and_may_go_back_up_as_the_oracle_does(anyprec_model, slots):
    model = anyprec_model("llama")
    scheduler = Scheduler.get_scheduler("count", precisions=[4, 3, 2], rest=3)
    prompts = random_prompts(7, 40, seed=6)
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(prompts)]
    rises = 0
    for completion in Engine(model.model, slots, 80).run(requests, scheduler, 4, model.eos_token_ids):
        truth = oracle.decode(
            model.model,
            prompts[int(completion.key)],
            24,
            4,
            model.eos_token_ids,
            scheduler,
            key=completion.key,
        )
        assert completion.tokens == truth.tokens, completion.key
        assert expanded(completion) == truth.bits
        rises += sum(low < high for low, high in zip(truth.bits[1:], truth.bits[2:], strict=False))
    assert rises > 3, "no precision ever rose: the test shows nothing"


def test_rows_with_a_given_plan_and_forks_are_not_its_business(anyprec_model):
    model, prompt = anyprec_model("llama"), random_prompts(2, 20)[1]
    scheduler = Scheduler.get_scheduler("countdown", precisions=[4, 2])
    asked = [
        Request("plan", prompt, 12, switch_steps=(11,), forks=(Fork("fork", 3, (3,)),)),
        Request("own", prompt, 12),
        Request("one", prompt, 1),
    ]
    found = {c.key: c for c in Engine(model.model, 3, 60).run(asked, scheduler, 4, ())}
    assert found["plan"].precision_trace == [(4, 12)]
    assert found["fork"].precision_trace == [(4, 4), (2, 8)]
    assert found["one"].switch_steps == (), "it ended before anything was observed: no steps were followed"
    assert found["own"].tokens == oracle.decode(model.model, prompt, 12, 4, (), scheduler, key="own").tokens


def test_a_precision_that_the_chain_has_not_is_refused_with_the_schedulers_name(anyprec_model):
    class Strange(Countdown):
        def observe(self, rows):
            return np.full(len(rows.keys), 5)

    engine = Engine(anyprec_model("llama").model, 2, 40)
    with pytest.raises(ValueError, match=r"Strange answered the precisions \[5\]; its chain is \[4, 2\]"):
        list(engine.run([Request("a", [1, 2], 8)], Strange((4, 2)), 4, ()))


def test_a_sweep_takes_it_with_its_options_and_names_its_runs():
    config = SweepConfig(("uniform", "count", "countdown"), options={"count": {"rest": 4}})
    *_, run = sweep_runs(config)
    assert (run.name, run.kind, run.options) == ("countdown-rest=4", "countdown", {"rest": 4})
    assert json.loads(run.describe())["rest"] == 4
    uniform = ["uniform-4", "uniform-3", "uniform-2", "uniform-3-prefill-4", "uniform-2-prefill-4"]
    assert [other.name for other in sweep_runs(config)] == [*uniform, run.name], "an alias is the same run"
    with pytest.raises(ValueError, match=r"known are fp, uniform, static, naive, .*countdown, count"):
        SweepConfig(("countup",))
    with pytest.raises(ValueError, match="scheduler 'countdown', option pause: it takes precisions, rest"):
        sweep_runs(SweepConfig(("countdown",), options={"countdown": {"pause": 4}}))


def test_a_run_carries_its_scheduler_to_a_worker_that_never_registered_it(monkeypatch):
    *_, run = sweep_runs(SweepConfig(("countdown",)))
    sent = cloudpickle.dumps(run)
    monkeypatch.delitem(SCHEDULERS, "countdown")
    assert isinstance(cloudpickle.loads(sent).scheduler(), Countdown)


def test_two_runs_of_one_name_are_an_error_and_none_replaces_the_other(monkeypatch):
    entry = SchedulerEntry(Countdown, run_name=lambda scheduler, options: "kv_cache")
    monkeypatch.setitem(SCHEDULERS, "countdown", entry)
    with pytest.raises(ValueError, match=r"two runs are called 'kv_cache', of kv_cache .* and of countdown"):
        sweep_runs(SweepConfig(("kv_cache", "countdown")))


def test_it_is_in_scores_figures_and_report(anyprec_model, tmp_path, monkeypatch):
    runs = sweep_runs(SweepConfig(("uniform", "static", "countdown"), (4, 2), max_new_tokens=30))
    questions = [Question(f"{i:016x}", f"q{i}", "", (f"Say {i}.",), (f"the answer {i}",)) for i in range(4)]
    conversations = conversation_rows(BENCHMARKS["demo"], "test", questions, runs, "tiny", "plain")
    model = anyprec_model("llama")
    # of these weights no answer ends by itself; with many end tokens they end at several lengths
    monkeypatch.setattr(model, "eos_token_ids", frozenset(range(0, model.model.config.vocab_size, 8)))
    rows = list(Generator(model, runs, slots=8).answer(conversations))
    assert len({row["output_tokens"] for row in rows}) > 2, "one length: no figure of lengths is drawn"
    mine = [row for row in rows if row["run"] == "countdown"]
    assert [row["error"] for row in mine] == [None] * 4
    assert not any(row["switch_steps"] for row in mine), "steps that nothing followed"
    (comparison,) = compare(rows)
    scores = score(comparison, ScoreConfig(resamples=100))
    assert "countdown" in {row["run"] for row in scores}
    keys = {(row["benchmark"], row["split"], row["run"]): [1] for row in rows}
    report = Report([comparison], scores, [Source(1, "here", MANIFEST)], keys, ScoreConfig(resamples=100))
    written = write_report(report, tmp_path)
    assert b">countdown<" in written["demo-quality.svg"].read_bytes(), "no entry in the figure's legend"
    page = written["report.html"].read_text()
    assert "</span>countdown</th>" in page, "no line in the table"
    assert '">countdown<b>' in page, "no card of its own"
    assert b">countdown<" in written["demo-lengths.svg"].read_bytes(), "no box among the lengths"
    assert "demo-switches.svg" not in written, "an online scheduler has no switch steps to draw"


def test_by_default_one_run_under_its_own_name_and_never_is_what_an_open_pair_says():
    assert [run.name for run in sweep_runs(SweepConfig(("countdown",)))] == ["countdown"]
    state = PrefillState(["a"], [10], [3], lambda: pytest.fail("nobody asked"))
    steps = Scheduler.get_scheduler("confidence", precisions=[4, 2]).begin(state).switch_steps
    assert steps.tolist() == [[NEVER]]
