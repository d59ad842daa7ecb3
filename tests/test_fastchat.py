"""MT-Bench answers reach FastChat's judge: its questions' ids, its own loaders, its own programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pmpd.benchmarks import get_benchmark, load_questions
from pmpd.benchmarks.mt_bench import FASTCHAT_IDS, turns_hash
from pmpd.evaluation.fastchat_export import answer_files, export
from pmpd.evaluation.judge import (
    PROMPT_FILE,
    answered,
    judgment,
    load_judge_prompts,
    pair_matches,
    single_matches,
)
from tests.generation_rows import generation_rows, write_generations
from tests.judge_stub import rating_of, stub_judge

QUESTIONS = [
    {"question_id": 81 + i, "category": category, "turns": [f"Question {i}?", "And then?"]}
    for i, category in enumerate(("writing", "math"))
]

# FastChat's programs, with the parts replaced that would load models or need OpenAI's client.
RUNNER = """
import json, runpy, sys, types, urllib.request
url = sys.argv[1]
openai, anthropic = types.ModuleType("openai"), types.ModuleType("anthropic")
class ChatCompletion:
    def create(model, messages, **options):
        body = json.dumps({"model": model, "messages": messages, **options}).encode()
        request = urllib.request.Request(url + "/chat/completions", body)
        return json.load(urllib.request.urlopen(request))
openai.ChatCompletion = ChatCompletion
openai.error = types.SimpleNamespace(OpenAIError=ConnectionError)
from fastchat.conversation import get_conv_template
adapter = types.ModuleType("fastchat.model.model_adapter")
adapter.get_conversation_template = lambda model: get_conv_template("chatgpt")
adapter.OPENAI_MODEL_LIST, adapter.ANTHROPIC_MODEL_LIST = ("gpt-4",), ()
package = types.ModuleType("fastchat.model")
package.model_adapter = adapter
sys.modules |= {"openai": openai, "anthropic": anthropic, "fastchat.model": package,
                "fastchat.model.model_adapter": adapter}
module, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_module(module, run_name="__main__")
"""


def fastchat(url: str, folder: Path, program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, url, f"fastchat.llm_judge.{program}", *arguments],
        cwd=folder,
        input="\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def judged_rows(choices: int) -> list[dict]:
    """Two questions of two turns under every run, each answered `choices` times."""
    rows = generation_rows(questions=2, two_turns=2, benchmark="mt_bench")
    return [
        {
            **row,
            "question_id": str(81 + int(row["question_id"][1:])),
            "choice": choice,
            "conversation_id": f"{row['conversation_id']}-{choice}",
            "output_text": f"{row['output_text']} ({choice})",
        }
        for row in rows
        if row["run"] in ("fp", "uniform-4", "static-13/26")
        for choice in range(choices)
    ]


@pytest.mark.parametrize("choices", [1, 2])
def test_fastchats_programs_judge_the_export_and_show_its_results(tmp_path: Path, choices: int) -> None:
    data = tmp_path / "data" / "mt_bench"
    rows = judged_rows(choices)
    write_generations(tmp_path / "in", rows)
    (data / "reference_answer").mkdir(parents=True)
    (data / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    reference = {"question_id": 82, "choices": [{"index": 0, "turns": ["one", "two"]}]}
    (data / "reference_answer" / "gpt-4.jsonl").write_text(json.dumps(reference) + "\n")
    shutil.copy(PROMPT_FILE, tmp_path / "data")
    written = export(str(tmp_path / "in"), str(data / "model_answer"))
    models = {"demo-fp", "demo-uniform-4", "demo-static-13_26"}
    assert {path.stem for path in written} == models
    with stub_judge(lambda messages, _: rating_of(messages)) as judge:
        fastchat(judge.url, tmp_path, "gen_judgment", "--mode", "single", "--judge-model", "gpt-4")
        asked = [body["messages"][-1]["content"] for body in judge.asked]
        shown = fastchat(judge.url, tmp_path, "show_result", "--mode", "single", "--judge-model", "gpt-4")
    judgments = [
        json.loads(line) for line in (data / "model_judgment" / "gpt-4_single.jsonl").read_text().splitlines()
    ]
    found = {(entry["model"], entry["question_id"], entry["turn"]) for entry in judgments}
    assert found == {(model, question, turn) for model in models for question in (81, 82) for turn in (1, 2)}
    assert all(entry["score"] > 0 for entry in judgments)
    first = next(row for row in rows if (row["run"], row["question_id"], row["turn"]) == ("fp", "81", 1))
    assert any(first["output_text"] in text for text in asked), "the judge sees the first choice's answer"
    assert all(model in shown for model in models)


def test_fastchat_fills_our_prompts_and_reads_verdicts_as_we_do(tmp_path: Path) -> None:
    """FastChat's own programs ask exactly what `pmpd judge` asks, and give the same scores and winners."""
    data = tmp_path / "data" / "mt_bench"
    rows = [row for row in judged_rows(1) if row["run"] != "fp"]
    write_generations(tmp_path / "in", rows)
    (data / "reference_answer").mkdir(parents=True)
    (data / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    reference = {"question_id": 82, "choices": [{"index": 0, "turns": ["one", "two"]}]}
    (data / "reference_answer" / "gpt-4.jsonl").write_text(json.dumps(reference) + "\n")
    shutil.copy(PROMPT_FILE, tmp_path / "data")
    export(str(tmp_path / "in"), str(data / "model_answer"))
    asked_of = {"82": ["one", "two"]}
    categories = {str(question["question_id"]): question for question in QUESTIONS}
    rows = [{**row, "category": categories[row["question_id"]]["category"]} for row in rows]
    turns = {row["prompt_id"]: categories[row["question_id"]]["turns"] for row in rows}
    answers, _ = answered(rows, turns)

    def said(messages: list[dict], _: object) -> str:
        text = messages[-1]["content"]
        if "assistant_a" in text:
            return f"Weighed. [[{'ABC'[len(text) % 3]}]]"
        return ("Rating: [[7.5]]", "so [6]", "[[10]] not [[3]]")[len(text) % 3]

    with stub_judge(said) as judge:
        fastchat(judge.url, tmp_path, "gen_judgment", "--mode", "single", "--judge-model", "gpt-4")
        fastchat(
            judge.url, tmp_path, "gen_judgment", "--mode", "pairwise-baseline", "--baseline-model",
            "demo-uniform-4", "--judge-model", "gpt-4",
        )  # fmt: skip

    def judgments(mode: str) -> list[dict]:
        path = data / "model_judgment" / f"gpt-4_{mode}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    ours = {match["prompt_text"]: match for match in single_matches(
        answers, asked_of, load_judge_prompts(None, "single"))}  # fmt: skip
    theirs = judgments("single")
    assert {entry["user_prompt"] for entry in theirs} == set(ours)
    for entry in theirs:
        assert judgment(ours[entry["user_prompt"]], entry["judgment"])["score"] == entry["score"]

    pairs = [("static-13/26", "uniform-4")]
    ours = {match["prompt_text"]: match for match in pair_matches(
        answers, pairs, asked_of, load_judge_prompts(None, "pair"))}  # fmt: skip
    theirs = judgments("pair")
    games = [(entry, game) for entry in theirs for game in ("g1", "g2")]
    assert {entry[f"{game}_user_prompt"] for entry, game in games} == set(ours)
    assert len(games) == len(ours) == 8
    models = {"demo-static-13_26": "run", "demo-uniform-4": "other"}
    for entry, game in games:
        row = judgment(ours[entry[f"{game}_user_prompt"]], entry[f"{game}_judgment"])
        won = entry[f"{game}_winner"]
        assert row["winner"] == ("tie" if won == "tie" else models[entry[won]])


def test_choices_carry_what_published_scorers_read() -> None:
    rows = [row for row in judged_rows(2) if row["run"] == "static-13/26"]
    ((entry, _),) = answer_files(rows, 0.0).values()
    assert [choice["index"] for choice in entry["choices"]] == [0, 1]
    for choice in entry["choices"]:
        turns = [
            row
            for row in rows
            if (row["question_id"], row["choice"]) == (str(entry["question_id"]), choice["index"])
        ]
        assert choice["new_tokens"] == [len(row["output_ids"]) for row in turns]
        assert choice["idxs"] == [len(row["output_ids"]) - 1 for row in turns], "decode forwards"
        assert choice["wall_time"] == [row["prefill_seconds"] + row["decode_seconds"] for row in turns]
        for row, log in zip(turns, choice["precision_log"], strict=True):
            assert len(log) == row["output_tokens"]
            assert log[0] == 4, "the prefill's precision comes first"
            assert {part["bits"] for part in row["precision_trace"]} == set(log)
        assert "reference" not in choice, "MT-Bench's references are no translations"
    cited = [
        row for row in generation_rows(questions=1, two_turns=0, benchmark="iwslt") if row["run"] == "fp"
    ]
    ((translated,),) = answer_files(cited, 0.0).values()
    assert translated["choices"][0]["reference"] == cited[0]["reference_text"]


def test_two_runs_that_would_share_a_file_are_refused() -> None:
    rows = judged_rows(1)
    twins = [{**row, "run": "static-13_26"} for row in rows if row["run"] == "static-13/26"]
    with pytest.raises(ValueError, match=r"static-13/26 and demo static-13_26 would both be written as"):
        answer_files([*rows, *twins], 0.0)


def test_a_question_of_the_hub_goes_by_fastchats_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(FASTCHAT_IDS.values()) == list(range(81, 161))
    turns = ["Write a poem.", "Now make\nit rhyme."]
    monkeypatch.setitem(FASTCHAT_IDS, turns_hash(["Write a  poem.", "Now make it rhyme."]), 99)
    path = tmp_path / "hub.jsonl"
    records = [
        {"prompt_id": "12345678", "category": "writing", "prompt": turns, "reference": []},
        {"prompt_id": "87654321", "category": "writing", "prompt": ["Another.", "One."], "reference": []},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    known, unknown = load_questions(get_benchmark("mt_bench"), question_file=path)
    assert known.key == "99"
    assert unknown.key == "87654321", "a question that FastChat does not have keeps its own"
