"""Settings of a sweep: sampling, presets, and uniform runs with the schedules' prefill."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tyro

from pmpd import demo
from pmpd.benchmarks import get_benchmark, load_questions
from pmpd.benchmarks.iwslt import BY_TARGET
from pmpd.cli.flags.generate import GenerateJob
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.generate import folder_name, sampling_plan, scheduler_names, scheduler_options
from pmpd.cli.generate import main as generate
from pmpd.cli.label import what_is_labelled
from pmpd.errors import UserError
from pmpd.evaluation.answer import Generator, conversation_rows
from pmpd.evaluation.compare import compare
from pmpd.evaluation.presets import get_preset
from pmpd.evaluation.sampling_plan import CATEGORY_TEMPERATURES, SamplingPlan
from pmpd.evaluation.score import ScoreConfig, score
from pmpd.evaluation.sweep import SweepConfig, sweep_runs
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.base import Scheduler
from pmpd.schedulers.chain import NEVER
from pmpd.weights.model_spec import ModelSpec
from tests.generation_rows import generation_rows


@pytest.fixture(scope="module")
def model() -> PMPDForCausalLM:
    return PMPDForCausalLM(demo.ANYPREC, [4, 2], use_anyprec=True).eval()


def answers(
    model: PMPDForCausalLM, slots: int, plan: SamplingPlan, choices: int = 1, schedulers: tuple = ("uniform",)
) -> list[dict]:
    """First answers of two questions under uniform runs and further schedulers, sorted."""
    config = SweepConfig(schedulers, (4, 2), 8, sampling=plan, high_bit_steps=((3,),))
    runs = sweep_runs(config)
    benchmark = get_benchmark("demo")
    questions = [
        replace(found, turns=found.turns[:1], references=found.references[:1])
        for found in load_questions(benchmark, end=2)
    ]
    rows = list(conversation_rows(benchmark, "test", questions, runs, "demo", "plain", choices))
    found = Generator(model, runs, slots).answer(rows)
    return sorted(found, key=lambda row: (row["run"], row["prompt_id"], row["choice"]))


def test_sampled_answers_do_not_depend_on_batch_mates_and_differ_by_choice(
    model: PMPDForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmpd.evaluation.answer.measure_forwards", lambda *_: [])
    plan = SamplingPlan(temperature=1.0, top_p=0.95, seed=3)
    alone, together = (answers(model, slots, plan, choices=2) for slots in (1, 8))
    assert [row["output_ids"] for row in alone] == [row["output_ids"] for row in together]
    by_choice = [[row["output_ids"] for row in alone if row["choice"] == choice] for choice in (0, 1)]
    assert by_choice[0] != by_choice[1], "each choice draws for itself"
    greedy = answers(model, 8, SamplingPlan())
    assert [row["output_ids"] for row in greedy] != by_choice[0]
    assert json.loads(alone[0]["scheduler"])["sampling"] == {"temperature": 1.0, "top_p": 0.95, "seed": 3}
    assert "sampling" not in json.loads(greedy[0]["scheduler"])


def test_an_answer_ends_at_a_stop_string_which_is_no_part_of_it(
    model: PMPDForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmpd.evaluation.answer.measure_forwards", lambda *_: [])
    whole = answers(model, 8, SamplingPlan())
    text = whole[0]["output_text"]
    word = text.split()[2]
    cut = answers(model, 8, SamplingPlan(stop=(word,)))
    assert cut[0]["output_text"] == text[: text.index(word)].strip()
    assert cut[0]["finish_reason"] == "stop"
    assert cut[0]["output_tokens"] < whole[0]["output_tokens"]


def test_a_uniform_run_with_the_high_prefill_decodes_in_its_own_precision(
    model: PMPDForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmpd.evaluation.answer.measure_forwards", lambda *_: [])
    rows = {row["run"]: row for row in answers(model, 8, SamplingPlan(), schedulers=("uniform", "static"))}
    assert set(rows) == {"uniform-4", "uniform-2", "uniform-2-prefill-4", "static-3"}
    trace = rows["uniform-2-prefill-4"]["precision_trace"]
    assert trace[0] == {"bits": 4, "count": 1}, "the prefill gives the first token"
    assert [part["bits"] for part in trace] == [4, 2]
    assert rows["uniform-2"]["precision_trace"][0]["bits"] == 2
    assert rows["uniform-2-prefill-4"]["kind"] == "uniform_prefill"


def test_what_mixes_is_compared_with_uniform_runs_of_the_same_prefill() -> None:
    rows = generation_rows()
    twins = []
    for row in rows:
        if row["run"] in ("uniform-3", "uniform-2"):
            settings = {**json.loads(row["scheduler"]), "prefill_bit": 4}
            name = f"{row['run']}-prefill-4"
            twins.append({**row, "run": name, "kind": "uniform_prefill", "scheduler": json.dumps(settings)})
    (comparison,) = compare([*rows, *twins])
    found = {row["run"]: row["nearest_uniform"] for row in score(comparison, ScoreConfig(resamples=100))}
    mixing = ("static", "random", "kv_cache", "confidence")
    alike = {"uniform-4", "uniform-3-prefill-4", "uniform-2-prefill-4"}
    assert {found[run] for run in found if run.startswith(mixing)} <= alike
    assert found["uniform-3-prefill-4"] is None
    (without,) = compare(rows)
    assert "uniform-2" in {row["nearest_uniform"] for row in score(without, ScoreConfig(resamples=100))}


def test_temperatures_follow_the_category_where_that_is_asked_for() -> None:
    plan = SamplingPlan(temperature="category")
    for category, temperature in CATEGORY_TEMPERATURES.items():
        assert plan.of(category).temperature == temperature
    assert SamplingPlan().describe() == SamplingPlan(seed=5).describe() == {}, "greedy draws nothing"
    for options, said in (
        ({"temperature": "hot"}, "a number, or category"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"stop": ("",)}, "not empty"),
    ):
        with pytest.raises(ValueError, match=said):
            SamplingPlan(**options)


# ------------------------------------------------------------------------------------------------------------


def test_the_published_preset_is_what_its_page_says() -> None:
    preset = get_preset("published")
    assert preset.benchmark("IWSLT") is BY_TARGET
    assert preset.benchmark("dsum").name == "dialogsum"
    assert (preset.max_new_tokens["iwslt"], preset.max_new_tokens["dialogsum"]) == (60, 33)
    assert preset.templates["cnn_dm"] == "claude-2"
    job = GenerateJob(preset="published", scheduler_options='{"confidence": {"calibration": 4}}')
    options = scheduler_options(job, preset)
    assert options["static"] == {"published_steps": True}
    assert options["confidence"]["calibration"] == 4, "what the user gives goes first"
    names = {
        run.name for run in sweep_runs(SweepConfig(("static", "confidence"), (4, 3), 32, options=options))
    }
    assert "static-0-published" in names
    assert any(name.startswith("confidence-first4") for name in names)
    assert folder_name(job, "iwslt") == "iwslt-published"
    assert folder_name(GenerateJob(temperature=0.7), "mt_bench") == "mt_bench-sampled"
    assert sampling_plan(GenerateJob(temperature="category")).of("writing").temperature == 0.7
    with pytest.raises(ValueError, match="--preset else: known are published"):
        get_preset("else")


def test_iwslt_by_target_keeps_other_sentences_under_another_version() -> None:
    long, short = "mot " * 70, "word " * 70
    count = lambda text: len(text.split())  # noqa: E731
    source_long = {"translation": {"fr": long, "en": "few words"}}
    target_long = {"translation": {"fr": "peu de mots", "en": short}}
    ours = get_benchmark("iwslt")
    kept = [
        (benchmark.version, record is source_long)
        for benchmark in (ours, BY_TARGET)
        for record in (source_long, target_long)
        if benchmark.make(record, count) is not None
    ]
    assert kept == [(ours.version, True), (BY_TARGET.version, False)]
    assert ours.version != BY_TARGET.version, "answers to one set are never paired with those to the other"


def test_the_published_threshold_is_mean_and_deviation_of_a_rows_first_scores() -> None:
    scheduler = Scheduler.get_scheduler("confidence", precisions=[4, 3], calibration=4, patience=1)
    decision = scheduler.begin(SimpleNamespace(keys=["a", "b"]))
    scores = [(0.2, 0.9), (0.4, 0.9), (0.6, 0.9), (0.8, 0.9), (0.72, 0.89), (0.73, 0.9)]
    steps = np.asarray(decision.switch_steps)
    for number, both in enumerate(scores, start=1):
        scheduler.observe(
            SimpleNamespace(
                switch_steps=steps, states=decision.states, step=np.asarray([number, number]),
                statistics={"top_probability": np.asarray(both)},
            )
        )  # fmt: skip
        if number == 5:
            assert (steps == NEVER).all(), (
                "0.5 + 0.2236 is more than 0.72; nothing is sure while it is measured"
            )
    assert steps.tolist() == [[6], [6]], "row b: deviation 0, so its mean is enough"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("demo", None, None, "rouge_l")),
        ({"preset": "published"}, ("allenai/c4", "en", "validation", "published")),
        ({"preset": "published", "split": "train"}, ("allenai/c4", "en", "train", "published")),
        ({"preset": "published", "rule": "agreement"}, ("allenai/c4", "en", "validation", "agreement")),
        ({"preset": "published", "dataset": "demo"}, ("demo", None, None, "published")),
        ({"dataset": "allenai/c4"}, ("allenai/c4", None, None, "rouge_l")),
    ],
)
def test_published_labels_are_of_c4_validation_by_the_published_rule(flags, expected) -> None:
    source, rule = what_is_labelled(LabelJob(**flags))
    assert (source.dataset, source.config, source.split, rule.name) == expected


def test_flags_of_the_published_command_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user types it, up to the checkpoint: both models have the revision and the dtype."""
    words = """--model-path a/b --reference-model-path a/c --bench-name IWSLT --search --revision v1
               --dtype bfloat16 --precisions 4,3 --classifier_path x --max_new_tokens 60"""
    job = tyro.cli(GenerateJob, args=words.split())
    assert (job.static_search, job.classifier_path, job.max_new_tokens) == (True, "x", 60)
    assert get_benchmark(job.bench_name) is get_benchmark("iwslt")
    assert get_benchmark("dsum") is get_benchmark("dialogsum")
    assert scheduler_names(GenerateJob(scheduler="naive"), "dataset") == ["naive"]
    opened = []

    def opening(spec: ModelSpec) -> None:
        opened.append(spec)
        raise UserError("stop here")

    monkeypatch.setattr(ModelSpec, "open", opening)
    for scheduler in ("naive", "fp"):
        with pytest.raises(UserError, match="stop here"):
            generate(replace(job, scheduler=scheduler, static_search=False))
    found = [(spec.path, spec.revision, spec.dtype) for spec in opened]
    assert found == [("a/b", "v1", "bfloat16"), ("a/c", "v1", "bfloat16")]
    with pytest.raises(UserError, match=r"--dtype float8: choose one of auto"):
        ModelSpec("a/b", dtype="float8")
