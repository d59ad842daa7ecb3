"""GSM8K, passkey and HumanEval: what is asked, what counts as right, and that generated code is held back."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from pmpd.benchmarks import get_benchmark, load_questions
from pmpd.benchmarks.base import Question
from pmpd.evaluation.compare import compare
from pmpd.evaluation.score import ScoreConfig, score
from pmpd.metrics.code import pass_tests, passes, program_of
from pmpd.metrics.tasks import final_number_right, key_found
from tests.generation_rows import generation_rows

TASK = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef helper(x):\n    return x + 1\n\ndef area(r):\n    """Of a circle."""\n',
    "test": "def check(candidate):\n    assert candidate(1) == math.pi\n    assert helper(1) == 2",
    "entry_point": "area",
}
GOOD = "Here it is:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nDone."


def question(name: str, path: Path, record: dict) -> Question:
    path.write_text(json.dumps(record) + "\n")
    (found,) = load_questions(get_benchmark(name), question_file=path)
    return found


def test_gsm8k_counts_the_final_number_only(tmp_path: Path) -> None:
    record = {"question": "How many?", "answer": "Half of 2,144 is 1072.\n#### 1,072"}
    asked = question("gsm8k", tmp_path / "q.jsonl", record)
    assert "How many?" in asked.turns[0]
    reference = str(asked.references[0])
    for answer, right in (
        ("2144 / 2 = 1072", 1), ("The answer is 1,072.0.", 1), ("It is $1,072.", 1), ("1072, or rather 5", 0),
        ("none", 0), ("-1072", 0), ("", 0),
    ):  # fmt: skip
        assert final_number_right(answer, reference) == right, answer
    with pytest.raises(ValueError, match="no usable question"):
        question("gsm8k", tmp_path / "bad.jsonl", {"question": "How many?", "answer": "five"})


def test_the_pass_key_is_in_its_text_where_it_should_be_and_lengths_are_in_tokens() -> None:
    questions = load_questions(get_benchmark("passkey"), count_tokens=lambda text: len(text.split()))
    assert len({found.key for found in questions}) == len(questions) == 80
    for found in questions:
        length, depth = (float(part) for part in found.key.split("-")[:2])
        (text,), (key,) = found.turns, found.references
        assert text.count(str(key)) == 2
        assert abs(len(text.split()) - length) < 20
        assert abs(text.index(str(key)) / len(text) - depth) < 0.35
    lengths = [len(found.turns[0]) for found in questions]
    assert lengths[:20] < lengths[20:40] < lengths[60:], "short ones first"
    assert [key_found(said, "12345") for said in ("It is 12345.", "54321 no, 12345", "?")] == [1, 0, 0]


def test_humaneval_answers_are_programs_in_every_form_that_models_write(tmp_path: Path) -> None:
    reference = str(question("humaneval", tmp_path / "q.jsonl", TASK).references[0])
    answers = {
        GOOD: 1.0,
        "def area(r):\n    return math.pi * r * r": 1.0,
        "    return math.pi * r * r\n": 1.0,
        "```\ndef area(r):\n    return math.pi * r * r": 1.0,
        "```python\ndef area(r):\n    return 3 * r\n```": 0.0,
        "I can't.": 0.0,
        "": 0.0,
        "```python\ndef area(r):\n    raise SystemExit(0)\n```": 0.0,
        "```python\nimport os\ndef area(r):\n    os._exit(0)\n```": 0.0,
    }
    found = pass_tests([(answer, reference) for answer in answers])
    assert dict(zip(answers, found, strict=True)) == answers
    assert program_of(GOOD, reference).startswith("import math")


def test_generated_code_has_no_network_little_memory_and_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    try:
        assert passes("x = 1")
        assert not passes(f"import socket; socket.create_connection({address!r}, 2)")
        assert not passes("x = bytearray(4 << 30)")
        assert passes("import os; assert 'SECRET_KEY' not in os.environ")
        assert passes("open('a', 'w').write('x'); import os; assert os.listdir() == ['a']"), (
            "a folder of its own"
        )
        assert not passes("open('a', 'wb').write(b'x' * (2 << 20))")
    finally:
        server.close()
    begin = time.monotonic()
    mark = tmp_path / "late"
    left = (
        f"import os, time\nif os.fork() == 0:\n    time.sleep(3); open({str(mark)!r}, 'w')\nwhile True: pass"
    )
    assert not passes(left, seconds=1.0)
    assert time.monotonic() - begin < 8
    time.sleep(max(0, 5 - (time.monotonic() - begin)))
    assert not mark.exists(), "what it started ends with it"


def test_code_is_run_only_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            **row,
            "output_text": GOOD if row["kind"] == "fp" else "no",
            "reference_text": "def area(r):\n    '''x'''\n\n# ---- tests ----\narea",
        }
        for row in generation_rows(questions=2, two_turns=0, benchmark="humaneval")
        if row["run"] in ("fp", "uniform-4")
    ]
    (comparison,) = compare(rows)
    with monkeypatch.context() as patch:
        patch.setattr("pmpd.metrics.code.subprocess.Popen", None)
        assert "tests_passed" not in {row["metric"] for row in score(comparison, ScoreConfig(resamples=100))}
    found = score(comparison, ScoreConfig(resamples=100, run_code=True))
    by_run = {row["run"]: row["value"] for row in found if row["metric"] == "tests_passed"}
    assert by_run == {"fp": 1.0, "uniform-4": 0.0}
