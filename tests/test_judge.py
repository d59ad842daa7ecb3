"""Judging: the right prompts, verdicts read as FastChat reads them, every judgment a row, whatever the server
does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmpd import storage
from pmpd.cli.flags.judge import JudgeJob
from pmpd.cli.flags.report import ReportJob
from pmpd.cli.judge import main, pairs_of_runs, read_references
from pmpd.cli.report import main as report
from pmpd.evaluation.judge import (
    answered,
    judgment,
    load_judge_prompts,
    pair_matches,
    rating,
    single_matches,
    winner,
)
from pmpd.evaluation.judge_endpoint import Endpoint, JudgeError
from pmpd.evaluation.judge_scores import judge_table
from pmpd.farm.judge_task import EndpointJudgeTask
from pmpd.farm.task import Place
from tests.generation_rows import generation_rows, write_generations
from tests.judge_stub import rating_of, stub_judge

RUNS = ("fp", "uniform-4", "static-13/26")
REFERENCES = {"82": ["the first truth", "the second truth"]}


def answer_rows() -> list[dict]:
    rows = generation_rows(questions=4, two_turns=4, benchmark="mt_bench")
    categories = {"q0": "writing", "q1": "math", "q2": "math", "q3": "stem"}
    return [
        {
            **row,
            "category": categories[row["question_id"]],
            "question_id": str(81 + int(row["question_id"][1:])),
        }
        for row in rows
        if row["run"] in RUNS
    ]


def turns_of(rows: list[dict]) -> dict[str, list[str]]:
    return {row["prompt_id"]: [f"First {row['question_id']}?", "{And} then?"] for row in rows}


def matches_of(mode: str, rows: list[dict] | None = None) -> list[dict]:
    rows = answer_rows() if rows is None else rows
    answers, failed = answered(rows, turns_of(rows))
    assert failed == 0
    prompts = load_judge_prompts(None, mode)
    if mode == "single":
        return list(single_matches(answers, REFERENCES, prompts))
    pairs = [(run, "uniform-4") for run in RUNS if run != "uniform-4"]
    return list(pair_matches(answers, pairs, REFERENCES, prompts))


def write_results(folder: Path, rows: list[dict]) -> Path:
    """Answers with their conversations beside them, as pmpd generate leaves them."""
    write_generations(folder / "answers", rows)
    turns = turns_of(rows)
    asked = [
        {"conversation_id": f"{row['run']}-{row['prompt_id']}", "prompt_id": row["prompt_id"],
         "turns": turns[row["prompt_id"]]}
        for row in rows if row["turn"] == 1
    ]  # fmt: skip
    path = folder / "conversations" / "data" / "part-0.parquet"
    storage.write_shard(storage.to_table(asked, storage.CONVERSATIONS), path)
    return folder


def test_every_turn_is_asked_about_once_with_its_question_answer_and_reference() -> None:
    rows = answer_rows()
    matches = matches_of("single", rows)
    assert len({match["judgment_id"] for match in matches}) == len(matches) == len(rows)
    answers = {(row["run"], row["prompt_id"], row["turn"]): row["output_text"] for row in rows}
    for match in matches:
        text = match["prompt_text"]
        for turn in range(1, match["turn"] + 1):
            assert answers[match["run"], match["prompt_id"], turn] in text
        assert f"First {match['question_id']}?" in text
        assert ("{And} then?" in text) == (match["turn"] == 2), "braces in a text are only text"
        known = match["question_id"] == "82"
        assert ("the first truth" in text) == known, "math with a reference, and no other"
        assert match["prompt_name"] == (
            ("single-math-v1" if known else "single-v1") + "-multi-turn" * (match["turn"] == 2)
        )


def test_pairs_are_asked_in_both_positions_and_read_the_right_way_round() -> None:
    matches = matches_of("pair")
    assert len(matches) == 2 * 2 * 4 * 2, "pairs x positions x questions x turns"
    first, second = (
        next(m for m in matches if (m["run"], m["position"], m["turn"]) == ("fp", position, 1))
        for position in ("first", "second")
    )
    texts = {row["run"]: row["output_text"] for row in reversed(answer_rows()) if row["turn"] == 1}
    assert first["prompt_text"].index(texts["fp"]) < first["prompt_text"].index(texts["uniform-4"])
    assert second["prompt_text"].index(texts["fp"]) > second["prompt_text"].index(texts["uniform-4"])
    said = {"[[A]]": ("run", "other"), "[[B]]": ("other", "run"), "[[C]]": ("tie", "tie")}
    for text, expected in said.items():
        assert (judgment(first, text)["winner"], judgment(second, text)["winner"]) == expected
    assert "no verdict" in judgment(first, "I like both")["error"]


def test_verdicts_are_read_as_fastchat_reads_them() -> None:
    said = {
        "Rating: [[7]]": 7,
        "[[8.5]] or [[2]]": 8.5,
        "so [6]": 6,
        "[[11]]": None,
        "ten": None,
        "[[0]]": None,
    }
    assert {text: rating(text) for text in said} == said
    assert [winner(text) for text in ("[[B]]", "[[C]] rather than [[A]]", "A", "")] == ["B", "A", None, None]


def test_a_failed_turn_is_not_judged_and_counted() -> None:
    rows = answer_rows()
    victim = next(row for row in rows if row["run"] == "fp" and row["turn"] == 2)
    victim |= {"error": "RuntimeError: boom", "output_text": None}
    answers, failed = answered(rows, turns_of(rows))
    assert failed == 1
    assert sum(one.run == "fp" for one in answers) == 3


def test_prompts_in_fastchats_form_are_taken_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text(json.dumps({"name": "single-v1", "type": "single", "output_format": "[[A]]"}) + "\n")
    with pytest.raises(ValueError, match=r"no prompt single-v1 of type single with output_format"):
        load_judge_prompts(path, "single")
    with pytest.raises(ValueError, match="can't be read"):
        load_judge_prompts(tmp_path / "absent", "single")
    lines = [
        {"name": name, "type": "single", "system_prompt": "s", "prompt_template": "{answer} {unknown}",
         "output_format": "[[rating]]"}
        for name in ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = answer_rows()
    with pytest.raises(ValueError, match="prompt single-v1 has the field 'unknown'"):
        list(single_matches(answered(rows, turns_of(rows))[0], {}, load_judge_prompts(path, "single")))


def test_references_are_read_from_both_of_fastchats_files(tmp_path: Path) -> None:
    path = tmp_path / "references.jsonl"
    path.write_text(
        '{"question_id": 82, "choices": [{"turns": ["a", "b"]}]}\n{"question_id": 83, "reference": ["c"]}\n'
    )
    assert read_references(str(path)) == {"82": ["a", "b"], "83": ["c"]}
    path.write_text('{"reference": ["c"]}\n')
    with pytest.raises(ValueError, match=r"references\.jsonl:1: KeyError\('question_id'\)"):
        read_references(str(path))


def test_the_baseline_is_the_highest_uniform_run_unless_another_is_named() -> None:
    job = JudgeJob(judge_url="http://127.0.0.1/v1", judge_model="j", mode="pair")
    assert pairs_of_runs(job, ["fp", "uniform-2", "uniform-4"]) == [
        ("fp", "uniform-4"),
        ("uniform-2", "uniform-4"),
    ]
    with pytest.raises(ValueError, match="--baseline None: answers are there of fp"):
        pairs_of_runs(job, ["fp"])


# ------------------------------------------------------------------------------------------------------------


def patient(url: str, **options) -> Endpoint:
    return Endpoint(url, "stub", first_wait_seconds=0.01, **options)


def test_a_judge_that_is_busy_stalls_or_writes_nonsense_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    moods = [(429, b"slow down"), "stall", (200, b"{not json"), (200, b'{"choices": []}'), (503, b"")]

    def answer(messages, attempt):
        return moods[attempt - 1] if attempt <= len(moods) else rating_of(messages)

    with stub_judge(answer, stall=3) as server:
        said = patient(server.url, timeout_seconds=0.3).ask("be just", "hello")
        assert rating(said) is not None
        assert len(server.asked) == 6
        assert server.keys == {"Bearer sk-secret"}
        assert server.asked[0]["temperature"] == 0
        assert [m["role"] for m in server.asked[0]["messages"]] == ["system", "user"]
        with pytest.raises(JudgeError, match=r"after 1 requests; the last: HTTP 429 .*slow down"):
            patient(server.url, timeout_seconds=0.3, attempts=1).ask("be just", "another")


def test_a_refusal_is_not_repeated_and_the_key_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with stub_judge(lambda *_: (401, b"bad key sk-secret")) as server:
        with pytest.raises(JudgeError, match="after 1 requests; the last: HTTP 401") as caught:
            patient(server.url, attempts=6).ask("be just", "hello")
        assert len(server.asked) == 1
    assert "sk-secret" not in str(caught.value)
    for url in ("http://user:sk-secret@host/v1", "http://host/v1?key=sk-secret", "ftp://host"):
        with pytest.raises(ValueError, match="--judge-url") as caught:
            Endpoint(url, "stub")
        assert "sk-secret" not in str(caught.value)


def test_every_match_gives_one_row_and_a_row_without_verdict_says_why() -> None:
    matches = matches_of("single")

    def answer(messages, attempt):
        text = messages[-1]["content"]
        if "First 83?" in text:
            return "I would rather not say."
        return (500, b"broken") if "First 84?" in text else rating_of(messages)

    with stub_judge(answer) as server:
        task = EndpointJudgeTask(patient(server.url, attempts=2), parallel=4)
        rows = list(task.build(Place("w", 1)).run([{"matches": match} for match in matches]))
    assert [row["judgment_id"] for row in rows] == [match["judgment_id"] for match in matches]
    for row in rows:
        if row["question_id"] == "83":
            assert "no rating" in row["error"]
            assert row["judgment_text"] == "I would rather not say."
        elif row["question_id"] == "84":
            assert "no answer after 2 requests" in row["error"]
            assert row["score"] is None
        else:
            assert row["error"] is None
            assert 1 <= row["score"] <= 10
    storage.to_table(rows, storage.JUDGMENTS)


def test_a_local_checkpoint_judges_every_match_once() -> None:
    from pmpd import demo
    from pmpd.farm.judge_task import ModelJudgeTask
    from pmpd.weights.model_spec import ModelSpec

    matches = [match for match in matches_of("single") if match["run"] == "fp"]
    long = {**matches[0], "judgment_id": "long", "prompt_text": "word " * 3000}
    task = ModelJudgeTask(ModelSpec(str(demo.DENSE)), "demo", "plain", 4, 4)
    rows = list(task.build(Place("w", 1)).run([{"matches": match} for match in [*matches, long]]))
    found = {row["judgment_id"]: row for row in rows}
    assert set(found) == {match["judgment_id"] for match in matches} | {"long"}
    assert len(rows) == len(found)
    assert "too long for the judge" in found.pop("long")["error"]
    assert all("no rating" in row["error"] for row in found.values()), (
        "that model is no judge, and says nothing"
    )
    storage.to_table(rows, storage.JUDGMENTS)


def judged(mode: str, say) -> list[dict]:
    return [{**judgment(match, say(match)), "judge": "stub"} for match in matches_of(mode)]


def test_ratings_are_means_by_category_on_the_turns_that_all_runs_have() -> None:
    worth = {"fp": 9, "uniform-4": 8, "static-13/26": 6}
    rows = judged("single", lambda match: f"[[{worth[match['run']] - (match['turn'] == 2)}]]")
    lost = next(
        row for row in rows if row["run"] == "fp" and row["category"] == "writing" and row["turn"] == 2
    )
    lost |= {"error": "no rating", "score": None}
    nearest = {"static-13/26": "fp"}
    table = judge_table(rows, resamples=200, seed=0, base="uniform-4", nearest=nearest)
    found = {(score.run, score.category): score for score in table.scores}
    assert found["fp", "math"].value == 8.5
    assert found["uniform-4", "writing"].value == 8, "without the turn that has no rating in another run"
    assert found["uniform-4", "all"].judged == 7
    assert (found["static-13/26", "all"].difference, found["static-13/26", "all"].difference_high) == (-2, -2)
    assert found["uniform-4", "all"].difference is None
    assert found["static-13/26", "all"].nearest_difference == -3
    assert found["fp", "all"].nearest_difference is None
    assert table.errors == {"fp": 1}


def test_a_comparison_is_won_only_in_both_positions() -> None:
    def say(match: dict) -> str:
        if match["run"] == "fp":  # wins wherever it stands
            return "[[A]]" if match["position"] == "first" else "[[B]]"
        return "[[A]]"  # the judge that likes what stands first: a tie

    table = judge_table(judged("pair", say), resamples=200, seed=0)
    found = {(score.run, score.category): score for score in table.scores}
    assert found["fp", "all"].value == 1.0
    assert found["static-13/26", "all"].value == 0.5
    assert found["fp", "math"].judged == 4
    assert {score.other_run for score in table.scores} == {"uniform-4"}


def test_the_report_shows_what_judges_said(tmp_path: Path) -> None:
    rows = answer_rows()
    write_results(tmp_path / "in", rows)

    def verdict(match: dict) -> str:
        if match["mode"] == "pair":
            return "[[C]]"
        return "[[5]]" if match["run"] == "static-13/26" else "[[7]]"

    for mode in ("single", "pair"):
        verdicts = judged(mode, verdict)
        folder = tmp_path / "judge" / mode / "judgments"
        storage.write_shard(storage.to_table(verdicts, storage.JUDGMENTS), folder / "data" / "part-0.parquet")
        storage.write_manifest(
            folder, storage.JUDGMENTS, {"benchmark": "mt_bench"}, table="judgments", complete=True,
            counts={"rows": len(verdicts)},
        )  # fmt: skip
    job = ReportJob((str(tmp_path / "in"), str(tmp_path / "judge")), str(tmp_path / "out"), resamples=200)
    page = report(job).read_text()
    assert "Judged by stub: ratings" in page
    assert "Judged by stub: comparisons in pairs" in page
    assert "static-13/26 against uniform-4" in page
    assert '<td>7.00<br><span class="ci">7.00 to 7.00</span>' in page
    assert '<td>7.00<br><span class="ci">one question, +0.000</span>' in page, "no interval of one question"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "### Judged by stub: ratings" in text
    by_rating = (
        "its mean rating by stub of 5.000 is worse than that of uniform 4 bit (−2.000, 95 % −2.000 to −2.000)"
    )
    in_pairs = (
        "won 0.500 of its comparisons with uniform-4 by stub, a tie as half a win: not surely different from "
        "half (95 % 0.500 to 0.500)."
    )
    for told in (by_rating, in_pairs):
        assert told in page, "no conclusion from the judge"
        assert told in text
        assert page.index(told) < page.index("All runs"), "it belongs on top"
    with pytest.raises(ValueError, match="no generations in it"):
        report(ReportJob((str(tmp_path / "judge"),), str(tmp_path / "out2")))


@pytest.mark.parametrize("unquantized", [True, False])
def test_a_judged_sweep_without_unquantized_answers_is_told_what_the_report_lacks(
    tmp_path: Path, capsys, unquantized: bool
) -> None:
    rows = [{**row, "reference_text": None} for row in answer_rows() if unquantized or row["kind"] != "fp"]
    write_results(tmp_path / "in", rows)
    with stub_judge(lambda messages, _: rating_of(messages)) as server:
        main(
            JudgeJob(
                input=str(tmp_path / "in"), judge_url=server.url, judge_model="stub",
                output_dir=str(tmp_path / "judge"),
            )
        )  # fmt: skip
    assert ("pmpd generate --use-fp" in capsys.readouterr().out) == (not unquantized)


def test_flags_that_do_not_go_together_are_refused() -> None:
    for options, said in (
        ({}, "--judge-url or --judge-model-path"),
        ({"judge_url": "http://h/v1"}, "also give --judge-model"),
        ({"judge_model_path": "m", "parallel": 0}, "--parallel 0: at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            JudgeJob(**options)


@pytest.mark.slow
def test_the_command_judges_once_goes_on_and_retries_errors(tmp_path: Path) -> None:
    rows = answer_rows()
    write_results(tmp_path / "in", rows)
    broken = [True]

    def answer(messages, attempt):
        return (400, b"no") if broken and "First 83?" in messages[-1]["content"] else rating_of(messages)

    with stub_judge(answer) as server:
        options = {
            "input": str(tmp_path / "in"), "judge_url": server.url, "judge_model": "stub",
            "output_dir": str(tmp_path / "judge"), "attempts": 1,
        }  # fmt: skip
        folder = main(JudgeJob(**options))
        assert len(server.asked) == len(rows)
        found = storage.read_table(folder).to_pylist()
        assert len({row["judgment_id"] for row in found}) == len(found) == len(rows)
        assert sum(row["error"] is not None for row in found) == 6
        main(JudgeJob(**options))
        assert len(server.asked) == len(rows), "nothing is asked twice"
        broken.clear()
        main(JudgeJob(**options, retry_errors=True))
        assert len(server.asked) == len(rows) + 6
        assert all(row["error"] is None for row in storage.read_table(folder).to_pylist())
