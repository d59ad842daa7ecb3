"""The terminal chat, fed from standard input as without a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pmpd import PMPDForCausalLM
from pmpd.cli import chat
from pmpd.cli.chat import Pieces, parse_scheduler
from pmpd.cli.flags.chat import ChatJob
from tests.helpers import byte_tokenizer


def talk(monkeypatch, job: ChatJob, *lines: str, colour: bool = False) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    output = io.StringIO()
    chat.main(
        job,
        Console(file=output, force_terminal=colour, width=200, color_system="standard" if colour else None),
    )
    return output.getvalue()


def test_a_conversation_streams_says_its_bits_and_switches_its_scheduler(monkeypatch):
    job = ChatJob(max_new_tokens=12, scheduler="static 3", kernel="reference")
    output = talk(
        monkeypatch, job, "What is a list?", "/scheduler uniform 2", "And a tuple?", "/scheduler static 1,2",
        "/reset", "Why?", "/quit", "never read",
    )  # fmt: skip
    footers = re.findall(r"\[(.*) tokens/s\]", output)
    assert len(footers) == 3
    assert footers[0].startswith("4 bit × 3, 3 bit × 3, 2 bit × 5, 2.82 bits on average")
    assert footers[1].startswith("2 bit × 11, 2.00 bits on average")
    assert footers[2].startswith("4 bit × 1, 3 bit × 1, 2 bit × 9")
    model = PMPDForCausalLM(job.model_path, kernel="reference").eval()
    model.scheduler = chat.Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=3)
    ids = model.tokenizer("What is a list?\n\n", return_tensors="pt")["input_ids"]
    expected = model.tokenizer.decode(
        model.generate(ids, 12).input_ids[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert expected.strip() in output, "the answer is not what generate gives for the rendered prompt"


def test_each_token_has_the_colour_of_its_precision_on_a_terminal(monkeypatch):
    output = talk(
        monkeypatch, ChatJob(max_new_tokens=12, scheduler="static 3"), "What is a list?", colour=True
    )
    answer = output.partition("high_bit_steps")[2]
    codes = re.findall(r"\x1b\[(3[1-3])m", answer)
    assert list(dict.fromkeys(codes)) == ["32", "33", "31"], "green at 4 bits, yellow at 3, red at 2"


def test_wrong_commands_say_what_is_known_and_change_nothing(monkeypatch):
    job = ChatJob(max_new_tokens=5, scheduler="uniform 3")
    wrong = ("lucky", "static", "uniform 7", "static pace=3")
    output = talk(
        monkeypatch, job, *(f"/scheduler {words}" for words in wrong), "/nonsense", "/help", "", "x"
    )
    assert "scheduler 'lucky': known are uniform, budget, confidence" in output
    assert "'static' needs the option high_bit_steps" in output
    assert "precision 7" in output
    assert "scheduler static, pace: its options are high_bit_steps" in output
    assert "/nonsense: no such command" in output
    assert output.count("schedulers: uniform, budget, confidence") == 2, "the help names them"
    assert output.count("[3 bit × 4") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("static 20", ("static", {"high_bit_steps": 20})),
        ("naive 20,60", ("naive", {"high_bit_steps": [20, 60]})),
        ("confidence 0.8 patience=3", ("confidence", {"threshold": 0.8, "patience": 3})),
        ("kv_cache save_dir=a/b", ("kv_cache", {"save_dir": "a/b"})),
        ("uniform 3", ("uniform", {"precision": 3})),
        ("random", ("random", {})),
    ],
)
def test_schedulers_are_typed_in_a_word_or_two(words, expected):
    assert parse_scheduler(words) == expected


def test_pieces_join_to_the_text_and_no_character_is_cut():
    tokenizer = byte_tokenizer()
    text = "naïve ☕ — 漢字 🙂!"
    pieces = Pieces(tokenizer)
    shown = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(shown) + pieces.rest() == text
    assert "\ufffd" not in "".join(shown)
