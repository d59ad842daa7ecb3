"""Scores: equal to the published metrics, joined by id, failures in the open, intervals paired."""

import importlib.util
import json
import random
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pmpd import storage
from pmpd.evaluation.compare import compare
from pmpd.evaluation.results import read_generations
from pmpd.evaluation.score import ScoreConfig, pick_static, score
from pmpd.metrics.base import METRICS
from pmpd.metrics.bootstrap import bootstrap_weights
from pmpd.metrics.precision import average_bits, decode_forwards
from pmpd.metrics.rouge import rouge_l
from pmpd.metrics.text import bert_scores, bleu_of_statistics, bleu_statistics, first_divergence
from tests.generation_rows import SECONDS, WORDS, generation_rows, write_generations

QUICK = ScoreConfig(resamples=200)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return generation_rows()


@pytest.fixture(scope="module")
def scored(rows: list[dict]) -> list[dict]:
    (comparison,) = compare(rows)
    return score(comparison, QUICK)


def value(
    scored: list[dict], run: str, metric: str, against: str = "reference_output", turn: int | None = None
) -> dict:
    (row,) = [
        r for r in scored if (r["run"], r["metric"], r["against"], r["turn"]) == (run, metric, against, turn)
    ]
    return row


def texts(count: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    words = [*WORDS, "running", "runs", "Ran!", "42", "naïve", "can't", "(x)", "\n"]
    pairs = [
        (
            " ".join(draw.choices(words, k=draw.randint(0, 60))),
            " ".join(draw.choices(words, k=draw.randint(1, 60))),
        )
        for _ in range(count)
    ]
    return [*pairs, ("", ""), ("", "a"), ("a", ""), ("same text", "same text"), ("!!!", "???")]


def test_rouge_l_equals_the_published_package_with_and_without_stemming() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    for stemmed in (False, True):
        scorer = RougeScorer(["rougeL"], use_stemmer=stemmed)
        for prediction, reference in texts(60):
            assert (
                rouge_l(prediction, reference, stemmed)
                == scorer.score(reference, prediction)["rougeL"].fmeasure
            )
    assert rouge_l("running", "runs", stemmed=True) == 1.0 > rouge_l("running", "runs")


def test_bleu_from_summed_statistics_equals_sacrebleus_corpus_bleu() -> None:
    import sacrebleu

    pairs = [(prediction, reference) for prediction, reference in texts(40) if reference]
    total = sum(bleu_statistics(prediction, reference) for prediction, reference in pairs)
    expected = sacrebleu.corpus_bleu([p for p, _ in pairs], [[r for _, r in pairs]]).score
    assert bleu_of_statistics(total) == pytest.approx(expected, abs=1e-9)


def test_average_bits_counts_decode_forwards_only_and_weights_by_them() -> None:
    trace = [{"bits": 4, "count": 3}, {"bits": 2, "count": 6}]
    assert decode_forwards(trace) == Counter({4: 2, 2: 6})
    assert average_bits(decode_forwards(trace)) == (2 * 4 + 6 * 2) / 8
    assert decode_forwards([{"bits": 4, "count": 1}]) == Counter(), (
        "one token is the prefill's: no decode forward"
    )
    assert average_bits(Counter()) is None


def test_average_bits_of_a_run_are_not_a_mean_of_means() -> None:
    rows = [row for row in generation_rows(questions=2, two_turns=0) if row["kind"] in ("uniform",)]
    long, short = [row for row in rows if row["run"] == "uniform-4"]
    long["precision_trace"] = [{"bits": 4, "count": 1}, {"bits": 3, "count": 99}]
    short["precision_trace"] = [{"bits": 4, "count": 2}]
    (comparison,) = compare(rows)
    bits = value(score(comparison, QUICK), "uniform-4", "rouge_l", "dataset")["average_bits"]
    assert bits == pytest.approx((99 * 3 + 4) / 100)


def test_agreement_counts_leading_tokens_and_exact_matches(scored: list[dict]) -> None:
    assert first_divergence([1, 2, 3], [1, 2, 4]) == 2
    assert first_divergence([1, 2], [1, 2, 4]) == 2
    assert first_divergence([], [1]) == 0
    assert value(scored, "fp", "exact_match")["value"] == 1.0
    assert value(scored, "uniform-2", "exact_match")["value"] == 0.0


def test_rows_are_joined_by_id_whatever_their_order(rows: list[dict], scored: list[dict]) -> None:
    shuffled = list(rows)
    random.Random(1).shuffle(shuffled)
    (comparison,) = compare(shuffled)
    assert score(comparison, QUICK) == scored


def test_quality_falls_with_the_bits_and_the_intervals_contain_the_value(scored: list[dict]) -> None:
    by_bits = [
        value(scored, run, "rouge_l")["value"] for run in ("fp", "uniform-4", "uniform-3", "uniform-2")
    ]
    assert by_bits == sorted(by_bits, reverse=True)
    for row in scored:
        assert row["low"] <= row["value"] + 1e-9, row
        assert row["value"] <= row["high"] + 1e-9, row
    assert value(scored, "uniform-4", "rouge_l")["difference"] == 0.0
    assert value(scored, "uniform-2", "rouge_l")["difference_high"] < 0, "worse beyond doubt"


def test_dataset_references_score_only_the_turns_that_have_one(scored: list[dict]) -> None:
    assert value(scored, "fp", "rouge_l", "dataset")["rows"] == 8
    assert value(scored, "fp", "rouge_l")["rows"] == 16
    assert value(scored, "fp", "rouge_l", turn=2)["rows"] == 4


def test_an_error_row_is_excluded_from_every_run_and_counted(rows: list[dict]) -> None:
    broken = [dict(row) for row in rows]
    victim = next(row for row in broken if row["run"] == "random-0" and row["turn"] == 1)
    victim |= {
        "error": "RuntimeError: boom",
        "output_text": None,
        "output_ids": None,
        "precision_trace": None,
    }
    (comparison,) = compare(broken)
    scored = score(comparison, QUICK)
    assert {
        row["rows"]
        for row in scored
        if row["metric"] == "rouge_l" and row["against"] == "reference_output" and row["turn"] is None
    } == {15}
    assert value(scored, "random-0", "rouge_l")["error_rows"] == 1
    assert value(scored, "fp", "rouge_l")["error_rows"] == 0
    assert value(scored, "fp", "rouge_l")["unpaired_rows"] == 1


def test_a_conversation_that_failed_as_a_whole_fails_in_all_its_turns(
    tmp_path: Path, rows: list[dict]
) -> None:
    two_turns = next(row["prompt_id"] for row in rows if row["turn"] == 2)
    lost = [
        row for row in rows if row["prompt_id"] == two_turns and row["turn"] == 1
    ]  # in every run: no other row knows of turn 2
    failed = [
        {**row, "turn": None, "error": "WorkerDied: gone", "model_fingerprint": None, "output_text": None}
        for row in lost
    ]
    kept = [row for row in rows if row["prompt_id"] != two_turns]
    asked = [{"conversation_id": row["conversation_id"], "turns": ["a", "b"]} for row in failed]
    write_generations(tmp_path / "answers", [*kept, *failed])
    with pytest.raises(ValueError, match="conversations: no Parquet"):
        list(read_generations(str(tmp_path)))
    storage.write_shard(
        storage.to_table(asked, storage.CONVERSATIONS), tmp_path / "conversations" / "data" / "part-0.parquet"
    )
    ((_, _, found),) = read_generations(str(tmp_path))
    (comparison,) = compare(found)
    assert {len(run.errors) for run in comparison.runs.values()} == {2}
    assert len(comparison.shared) == 14
    assert {row["error_rows"] for row in score(comparison, QUICK) if row["turn"] is None} == {2}


def test_the_grid_of_a_static_search_is_read_only_when_it_is_asked_for(
    tmp_path: Path, rows: list[dict]
) -> None:
    write_generations(tmp_path / "a" / "answers", rows[:3])
    with pytest.raises(ValueError, match="no generations in it"):
        list(read_generations(str(tmp_path), static_search=True))
    write_generations(tmp_path / "search" / "answers", rows[:5], static_search=True)
    assert [len(found) for _, _, found in read_generations(str(tmp_path))] == [3]
    assert [len(found) for _, _, found in read_generations(str(tmp_path), static_search=True)] == [5]


def test_missing_references_are_counted_with_three_examples(rows: list[dict]) -> None:
    gone = {row["prompt_id"] for row in rows[:1]} | {rows[-1]["prompt_id"]}
    partial = [row for row in rows if not (row["kind"] == "fp" and row["prompt_id"] in gone)]
    with pytest.raises(
        ValueError,
        match=r"no answer to 3 turns that others answered, e\.g\. (\w{16} \(choice 0, turn \d\)(, )?){3}; "
        r"run pmpd generate",
    ):
        compare(partial)


@pytest.mark.parametrize(
    ("column", "other", "said"),
    [
        ("model_id", "another", "different model_id"),
        ("benchmark_version", "2", "different benchmark_version"),
        ("model_fingerprint", "x", "rows of 2 quantized models"),
    ],
)
def test_rows_of_different_models_or_versions_are_never_mixed(
    rows: list[dict], column: str, other: str, said: str
) -> None:
    mixed = [{**row, column: other} if row["run"] == "uniform-2" else row for row in rows]
    with pytest.raises(ValueError, match=said):
        compare(mixed)


@pytest.mark.parametrize(("column", "other"), [("model_id", "another"), ("model_fingerprint", "x")])
def test_models_are_not_mixed_across_benchmarks_either(column: str, other: str) -> None:
    both = [
        row
        for name in ("demo", "cnn_dm")
        for row in generation_rows(questions=3, two_turns=0, benchmark=name)
    ]
    assert len(compare(both)) == 2
    with pytest.raises(ValueError, match=rf"{other} in cnn_dm"):
        compare([{**row, column: other} if row["benchmark"] == "cnn_dm" else row for row in both])


@pytest.mark.parametrize(
    ("column", "turn", "said"),
    [("prompt_text", 1, "prompt_text 'other' and 'Question"), ("template", 2, "template 'other' and 'plain'"),
     ("reference_text", 1, "reference_text 'other' and ")],
)  # fmt: skip
def test_one_id_for_different_questions_is_refused(
    rows: list[dict], column: str, turn: int, said: str
) -> None:
    victim = next(row for row in rows if row["run"] == "fp" and row["turn"] == turn)
    with pytest.raises(
        ValueError, match=rf"answered different questions under the id q0 \(turn {turn}: {said}"
    ):
        compare([{**row, column: "other"} if row is victim else row for row in rows])
    second = next(row for row in rows if row["run"] == "kv_cache" and row["turn"] == 2)
    compare([{**row, "prompt_text": "with another first answer"} if row is second else row for row in rows])


def test_a_run_without_any_answer_does_not_take_the_others_with_it(
    rows: list[dict], scored: list[dict]
) -> None:
    lost = {"error": "RuntimeError: boom", "output_text": None, "output_ids": None, "precision_trace": None}
    (comparison,) = compare([{**row, **lost} if row["run"] == "kv_cache" else row for row in rows])
    assert list(comparison.unanswered) == ["kv_cache"]
    assert len(comparison.unanswered["kv_cache"].errors) == 16
    assert score(comparison, QUICK) == [row for row in scored if row["run"] != "kv_cache"]
    with pytest.raises(ValueError, match="no run has an answer; the first error of fp: RuntimeError: boom"):
        compare([{**row, **lost} for row in rows])


def test_bits_and_seconds_are_of_the_turns_that_are_scored(rows: list[dict], scored: list[dict]) -> None:
    cited = {row["prompt_id"] for row in rows if row["reference_text"] is not None}
    (comparison,) = compare([row for row in rows if row["prompt_id"] in cited])
    alone = value(score(comparison, QUICK), "confidence-0.9x4", "rouge_l", "dataset")
    among_others = value(scored, "confidence-0.9x4", "rouge_l", "dataset")
    assert among_others == alone, "questions without a reference change neither the costs nor the interval"
    assert among_others["average_bits"] != value(scored, "confidence-0.9x4", "rouge_l")["average_bits"]


def test_a_mixing_run_is_compared_with_the_uniform_run_of_nearest_bits_pair_by_pair(
    rows: list[dict], scored: list[dict]
) -> None:
    everywhere = [
        row
        for row in scored
        if (row["metric"], row["against"], row["turn"]) == ("rouge_l", "reference_output", None)
    ]
    uniform = {row["run"]: row for row in everywhere if row["kind"] == "uniform"}
    for row in everywhere:
        if row["kind"] in ("fp", "uniform"):
            assert row["nearest_uniform"] is None
            continue
        distances = {
            name: abs(other["average_bits"] - row["average_bits"]) for name, other in uniform.items()
        }
        assert distances[row["nearest_uniform"]] == min(distances.values())
        assert row["nearest_difference"] == row["value"] - uniform[row["nearest_uniform"]]["value"]
        assert row["nearest_difference_low"] <= row["nearest_difference"] <= row["nearest_difference_high"]
    twin = [{**row, "run": "static-twin", "kind": "static"} for row in rows if row["run"] == "uniform-3"]
    (comparison,) = compare([*rows, *twin])
    row = value(score(comparison, QUICK), "static-twin", "rouge_l")
    assert (row["nearest_uniform"], row["nearest_difference_low"], row["nearest_difference_high"]) == (
        "uniform-3",
        0,
        0,
    )


def test_a_turn_given_twice_is_refused(rows: list[dict]) -> None:
    with pytest.raises(ValueError, match="is there twice"):
        compare([*rows, rows[0]])


def test_speed_model_weights_measured_forwards(rows: list[dict], scored: list[dict]) -> None:
    (comparison,) = compare(rows)
    assert comparison.speed.seconds == pytest.approx(SECONDS)
    assert comparison.speed.workers == {16: 2, 4: 2, 3: 2, 2: 2}
    assert comparison.speed.ratio({4: 10, 2: 30}, 4) == pytest.approx((10 + 30 * 0.5) / 40)
    assert comparison.speed.ratio({8: 1}, 4) is None, "a precision nobody measured"
    assert value(scored, "uniform-4", "rouge_l")["decode_time_ratio"] == pytest.approx(1.0)
    assert value(scored, "uniform-2", "rouge_l")["decode_time_ratio"] == pytest.approx(0.5)
    assert value(scored, "uniform-2", "rouge_l")["decode_time_ratio_16"] == pytest.approx(0.25)


def test_the_oracle_is_as_good_as_never_switching_and_costs_no_more(
    rows: list[dict], scored: list[dict]
) -> None:
    (comparison,) = compare(rows)
    oracle, high = comparison.runs["oracle"], comparison.runs["uniform-4"]
    assert set(oracle.rows) == set(high.rows)
    for key in comparison.shared:
        reference = comparison.runs["fp"].rows[key]["output_text"]
        ours, theirs = (round(rouge_l(run.rows[key]["output_text"], reference), 3) for run in (oracle, high))
        assert ours >= theirs
    assert value(scored, "oracle", "rouge_l")["average_bits"] < 4
    conversations = {row["conversation_id"] for row in oracle.rows.values()}
    assert len(conversations) == 12, "both turns of a conversation come from one plan"
    assert "oracle" not in compare([row for row in rows if row["kind"] != "fp"])[0].runs, (
        "without reference outputs nobody knows it"
    )


def test_the_bootstrap_is_paired_seeded_and_over_questions(rows: list[dict], scored: list[dict]) -> None:
    weights = bootstrap_weights(7, 300, seed=3)
    assert weights.shape == (300, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == bootstrap_weights(7, 300, seed=3)).all()
    # The same answers under another name: the difference is 0 in every resample only if runs share them.
    twin = [{**row, "run": "uniform-4b", "kind": "static"} for row in rows if row["run"] == "uniform-4"]
    (comparison,) = compare([*rows, *twin])
    row = value(score(comparison, QUICK), "uniform-4b", "rouge_l")
    assert (row["difference"], row["difference_low"], row["difference_high"]) == (0, 0, 0)
    assert row["high"] - row["low"] > 0.005


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    weights = bootstrap_weights(40, 400, seed=0)
    hits = 0
    for _ in range(200):
        sample = draw.normal(1.0, 2.0, 40)
        low, high = np.percentile(weights @ sample / 40, [2.5, 97.5])
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_static_search_takes_the_cheapest_setting_within_the_budget(scored: list[dict]) -> None:
    static = {row["run"]: row for row in scored if row["kind"] == "static" and row["metric"] == "rouge_l"
              and row["turn"] is None
              and row["against"] == "reference_output"}  # fmt: skip
    cheapest = min(static.values(), key=lambda row: row["average_bits"])
    assert pick_static(scored, "rouge_l", "reference_output", budget=1.0)["run"] == cheapest["run"]
    best = max(static.values(), key=lambda row: row["value"])
    high = best["value"] - best["difference"]
    budget = 1 - best["value"] / high + 1e-9
    assert pick_static(scored, "rouge_l", "reference_output", budget)["run"] == best["run"]
    with pytest.raises(ValueError, match="raise --quality-budget"):
        pick_static(scored, "rouge_l", "reference_output", budget=-1.0)
    with pytest.raises(ValueError, match="no static and uniform runs"):
        pick_static([], "rouge_l", "reference_output", budget=0.1)


def test_bert_score_without_its_package_or_model_says_so(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict]
) -> None:
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ValueError, match=r"pip install 'pmpd\[bertscore\]'"):
        bert_scores([("a", "b")], "roberta-large")
    (comparison,) = compare(rows)
    with pytest.raises(ValueError, match="bert-score"):
        score(comparison, ScoreConfig(resamples=200, bert_score="roberta-large"))


class FakeScorer:
    """What `bert_scores` takes of bert_score.BERTScorer. Like the real one it chokes on an empty text."""

    def __init__(self, model_type: str, num_layers: int | None) -> None:
        if model_type == "absent":
            raise OSError("absent is not a local folder\nand more")
        self._tokenizer = types.SimpleNamespace(model_max_length=int(1e30))
        self._model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=514))

    def score(self, predictions: list[str], references: list[str]):
        if self._tokenizer.model_max_length > 514:
            raise OverflowError("int too big to convert")
        if not all(text.strip() for text in (*predictions, *references)):
            raise AttributeError("no attribute build_inputs_with_special_tokens")
        return None, None, np.asarray([len(a) / len(b) for a, b in zip(predictions, references, strict=True)])


@pytest.fixture
def bert_score_fake(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("bert_score")
    module.BERTScorer, module.utils = (
        FakeScorer,
        types.SimpleNamespace(model2layers={"known": 9, "absent": 9}),
    )
    monkeypatch.setitem(sys.modules, "bert_score", module)
    return module


def test_bert_score_scores_an_empty_text_as_0_and_the_others_in_their_places(
    bert_score_fake, rows: list[dict]
) -> None:
    assert bert_scores([("", "a"), ("a", "ab"), (" ", "b"), ("abc", "ab"), ("x", "\n")], "known") == [
        0.0,
        0.5,
        0.0,
        1.5,
        0.0,
    ]
    assert bert_scores([("", "")], "known") == [0.0]
    changed = [{**row, "output_text": ""} if row["run"] == "uniform-2" else row for row in rows]
    (comparison,) = compare(changed)
    found = score(comparison, ScoreConfig(resamples=200, bert_score="known"))
    assert value(found, "fp", "bert_score")["value"] == 1.0
    assert value(found, "uniform-2", "bert_score")["value"] == 0.0
    assert value(found, "fp", "bert_score", "dataset")["rows"] == 8


def test_bert_score_says_which_model_is_absent_or_fails(
    bert_score_fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"--bert-score absent: its model could not be loaded \(OSError: absent is not a local folder\)",
    ):
        bert_scores([("a", "b")], "absent")
    with pytest.raises(ValueError, match="no such model"):
        bert_scores([("a", "b")], str(tmp_path))
    monkeypatch.setattr(FakeScorer, "score", lambda *_: [][0])
    with pytest.raises(
        ValueError, match=r"--bert-score known: its model can't score these texts \(IndexError"
    ):
        bert_scores([("a", "b")], "known")


@pytest.mark.skipif(importlib.util.find_spec("bert_score") is None, reason="bert-score is an extra")
@pytest.mark.parametrize("longest", [None, 64])
def test_the_real_bert_score_takes_long_and_empty_texts(tmp_path: Path, longest: int | None) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(
        str(tmp_path / "vocab.txt"), **({"model_max_length": longest} if longest else {})
    ).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path)
    long = " ".join(WORDS * 20)
    same, different, empty = bert_scores(
        [(long, long), ("the value", "error object"), ("", "the")], str(tmp_path)
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0 < different < 1
    assert empty == 0.0


def test_scores_fit_their_table(scored: list[dict]) -> None:
    from pmpd.storage.dataset import to_table
    from pmpd.storage.schemas import SCORES

    table = to_table(scored, SCORES)
    assert len(table) == len(scored)
    assert {row["metric"] for row in scored} == {
        name for name, metric in METRICS.items() if not metric.option and metric.scores("demo")
    }
    assert json.loads(scored[0]["scheduler"])
