"""Label rules: ROUGE-L in every script, agreement of tokens, the published rule on hand-made trajectories."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pmpd.labeling import published
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import label_prompts, reference_prompts
from pmpd.labeling.rule import RULES, Trajectory, get_rule, label_of
from pmpd.metrics.rouge import rouge_l, words
from tests.test_labeling import CHAIN, ENDS, NEW_TOKENS, STEPS, models, prompt_rows, words_of  # noqa: F401

SCRIPTS = {
    "Latin": "a cat sits",
    "Cyrillic": "кот сидит там",
    "Greek": "η γάτα κάθεται",
    "Han": "今天天气很好",
    "Japanese": "猫はソファーに座る",
    "Thai": "แมวนั่งบนโซฟา",
    "Khmer": "ឆ្មាអង្គុយ",
    "Lao": "ແມວນັ່ງ",
    "Burmese": "ကြောင်ထိုင်",
    "Arabic": "القط هنا الآن",
    "Persian": "گربه می\u200cنشیند",
    "Devanagari": "नमस्ते दुनिया",
    "Hangul": "고양이가 앉는다",
    "Hebrew": "החתול יושב",
}
LATIN = "".join(map(chr, [*range(32, 127), 9, 10, *range(0xA0, 0x250), *range(0x1E00, 0x1F00)])) + (
    "\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u20ac\u2122\u211d\u0301\u2022\u00bd\u2192\U0001f600\U0001d7d8"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_of_every_script_are_scored(script):
    text = SCRIPTS[script]
    assert rouge_l(text, text) == 1.0
    tokens = words(text)
    assert len(tokens) > 1
    half = text[: len(text) // 2]
    assert 0 < rouge_l(half, text) < 1, "part of a text is like it, but not equal"
    others = [other for name, other in SCRIPTS.items() if name not in (script, "Han", "Japanese")]
    assert not any(rouge_l(text, other) for other in others)


def test_words_and_characters_with_their_marks():
    assert words("नमस्ते, दुनिया!") == ("नमस्ते", "दुनिया")
    assert words("今天 GPT-4 很好") == ("今", "天", "gpt", "4", "很", "好")
    assert words("แมวนั่ง") == ("แ", "ม", "ว", "นั่", "ง")
    assert words("ＧＰＴ－４　は１２") == ("gpt", "4", "は", "12"), (
        "Latin letters in full width are those letters"
    )
    assert words("Кот, кот") == ("кот", "кот")
    assert words("\u1112\u1161\u11ab") == ("한",), "one spelling of a syllable"
    assert words("!?… 😀 ½ ™") == ()
    assert words("\u0301 \u200d") == (), "marks of nothing"


@settings(deadline=None, max_examples=60)
@given(prediction=st.text(LATIN, max_size=60), reference=st.text(LATIN, max_size=60), stemmed=st.booleans())
@example("“Naïve” café — it’s π-less…", "The naïve cafe: it's less…", False)
@example("# Title\n\n1. **Bold**: running\n```python\nx = 1\n```", "Title 1. bold runs x == 1", True)
@example("A\u030a e\u0301 ﬁne ²³ ªº 10µm", "å é fine", False)
def test_latin_text_has_the_scores_of_rouge_score(prediction, reference, stemmed):
    scorer = RougeScorer(["rougeL"], use_stemmer=stemmed)
    prediction, reference = (text.replace("π", "") for text in (prediction, reference))
    assert rouge_l(prediction, reference, stemmed) == pytest.approx(
        scorer.score(reference, prediction)["rougeL"].fmeasure, abs=1e-12
    )


def test_a_reference_with_nothing_to_score_is_an_error_row_that_says_so(models):  # noqa: F811
    quantized, _ = models
    rows = prompt_rows(2)
    references = {
        row["prompt_id"]: {"error": None, "reference_text": text, "reference_ids": [1, 2]}
        for row, text in zip(rows, ("… !", "a b"), strict=True)
    }
    config = LabelConfig(CHAIN, NEW_TOKENS)
    found = {row["prompt_id"]: row for row in label_prompts(quantized, rows, references, config)}
    assert "nothing to score: the reference has no word" in found[rows[0]["prompt_id"]]["error"]
    assert found[rows[1]["prompt_id"]]["error"] is None
    by_tokens = LabelConfig(CHAIN, NEW_TOKENS, rule=RULES["agreement"])
    assert not any(row["error"] for row in label_prompts(quantized, rows, references, by_tokens))


def test_agreement_is_the_first_position_that_leaves_the_reference():
    rule = RULES["agreement"]
    reference = Trajectory((5, 6, 7, 8), "")
    scores = [rule.score(Trajectory(t, ""), reference) for t in ((5, 6, 9), (5, 6, 7), (9,), (5, 6, 7, 8))]
    assert scores == [2, 3, 0, 4]
    assert label_of(scores, scores[-1]) == 3
    assert label_of([3.0, 1.0, 2.0, 3.0], 3.0) == 0


def test_rules_have_identities_and_an_unknown_one_is_refused():
    assert RULES["rouge_l"].identity == "rouge_l/3/v1"
    assert len({rule.identity for rule in RULES.values()}) == len(RULES)
    with pytest.raises(ValueError, match="--rule rouge: known are rouge_l, agreement, kl, published"):
        get_rule("rouge")


# m = 9 decode forwards of 10 new tokens: classes fork after 0, 3, 6 forwards.
BRANCHES = [[1, 2, 0, 3, 3, 3, 3, 3, 3, 3], [1, 9, 9, 9, 5, 5, 0, 5, 5, 5], [1, 9, 9, 9, 4, 4, 4, 6, 6, 6]]


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        ([1, 9, 9, 9, 4, 4, 4, 4, 4, 4], BRANCHES),  # never ended: branches go on past their own ends (0)
        (
            [1, 9, 9, 9, 4, 0],
            [BRANCHES[0][:6], BRANCHES[1][:6], None],
        ),  # 5 forwards: the fork at 6 never came
        ([1, 9, 9, 0], [BRANCHES[0][:4], BRANCHES[1][:4], None]),  # ended at the fork, not before it
        ([1, 9, 0], [BRANCHES[0][:3], None, None]),
        ([0], [BRANCHES[0][:1], None, None]),
    ],
)
def test_published_branches_end_where_the_high_trajectory_ended(high, expected):
    assert published.candidates(high, BRANCHES, 10) == expected


def test_published_class_0_has_one_high_forward_and_no_candidate_is_no_label():
    request = published.request("k", [1, 2], 10, want_features=True)
    assert [(fork.step, fork.switch_steps) for fork in request.forks] == [(0, (1,)), (3, (4,)), (6, (7,))]
    assert request.switch_steps == (9,)
    assert published.cut_at_end([4, 0, 5, 0], {0}) == [4, 0]
    assert published.cut_at_end([4, 5], {0}) == [4, 5]
    assert label_of([0.2, None, None, 0.5], 0.5) == 3
    assert label_of([0.2, None, 0.5, 0.5], 0.5) == 2


def test_published_labels_are_those_of_plain_decoding_pair_by_pair(models):  # noqa: F811
    from pmpd import Scheduler
    from pmpd.decode import oracle

    quantized, reference = models
    rows = prompt_rows(4)
    config = LabelConfig(CHAIN, NEW_TOKENS, slots=16, rule=RULES["published"])
    references = {row["prompt_id"]: row for row in reference_prompts(reference, rows, config)}
    labeled = {row["prompt_id"]: row for row in label_prompts(quantized, rows, references, config)}
    absent = 0
    for row in rows:
        truth = references[row["prompt_id"]]["reference_text"]
        found = labeled[row["prompt_id"]]
        assert found["rule"] == "published/3/v1"
        for entry, chain in zip(found["pairs"], ((4, 3), (3, 2)), strict=True):
            plan = Scheduler.get_scheduler("static", precisions=chain, high_bit_steps=[0])

            def tokens(steps, ids=row["input_ids"], chain=chain, plan=plan, ends=frozenset()):
                return oracle.decode(
                    quantized.model, ids, NEW_TOKENS, chain[0], ends, plan, switch_steps=(steps,)
                ).tokens

            high = tokens(NEW_TOKENS, ends=ENDS)
            scores = [
                rouge_l(words_of(tokens(step + 1)[: len(high)]), truth) if len(high) - 1 >= step else None
                for step in STEPS[:3]
            ]
            absent += scores.count(None)
            assert entry["high_ids"] == high
            assert entry["scores"][:3] == scores
            best = round(rouge_l(words_of(high), truth), 3)
            good = [k for k, score in enumerate(scores) if score is not None and round(score, 3) >= best]
            assert entry["label"] == (good[0] if good else 3)
    assert absent, "no high trajectory ended before a fork: the test shows less than it says"
