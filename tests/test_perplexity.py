"""Perplexity of a stream in windows, as a library call and as a command."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from pmpd.cli.flags.perplexity import PerplexityJob
from pmpd.cli.perplexity import main
from pmpd.cli.steps import Steps
from pmpd.evaluation.perplexity import Perplexity, perplexity, token_stream, windows
from tests.helpers import byte_tokenizer, write_dense


@given(tokens=st.integers(2, 300), window=st.integers(2, 50), data=st.data())
def test_every_token_with_one_before_it_in_its_window_is_scored_once(tokens, window, data) -> None:
    stride = data.draw(st.integers(1, window))
    scored = []
    for start, stop, first in windows(tokens, window, stride):
        assert start < first < stop <= min(start + window, tokens)
        scored += range(first, stop)
    assert len(scored) == len(set(scored))
    unscored = set(range(tokens)) - set(scored)
    assert unscored <= {0} | (set(range(0, tokens, window)) if stride == window else set())


def test_windows_are_those_of_a_plain_sum(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_dense(tmp_path, "llama"), dtype=torch.float32).eval()
    stream = torch.randint(0, 256, (75,), generator=torch.Generator().manual_seed(0))
    expected, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, 75, 16):
            piece = stream[start : start + 16]
            losses = nn.functional.cross_entropy(
                model(piece.unsqueeze(0)).logits[0, :-1], piece[1:], reduction="sum"
            )
            expected, count = expected + float(losses), count + len(piece) - 1
    found = perplexity(model, stream, 16)
    assert found.tokens == count
    assert found.nats == pytest.approx(expected, rel=1e-5)
    batched = perplexity(model, stream, 16, batch_size=3)
    assert batched.tokens == count
    assert batched.nats == pytest.approx(expected, rel=1e-5)
    strided = perplexity(model, stream, 16, stride=4)
    assert strided.tokens == 74
    assert strided.nats != pytest.approx(expected, rel=1e-3)
    assert Perplexity(1e9, 1).value == math.inf


def test_texts_are_told_apart_and_cut() -> None:
    tokenizer = byte_tokenizer()
    whole = token_stream(["ab", "c"], tokenizer)
    assert whole.tolist() == [*tokenizer("ab")["input_ids"], 256, *tokenizer("c")["input_ids"], 256]
    assert token_stream(iter(["ab", "c"]), tokenizer, 4).tolist() == whole.tolist()[:4]
    with pytest.raises(ValueError, match="hold 1 tokens"):
        token_stream([""], tokenizer)
    with pytest.raises(ValueError, match="stride"):
        list(windows(10, 4, 5))


def test_the_command_prints_every_precision(tmp_path: Path) -> None:
    text, output = io.StringIO(), tmp_path / "out.json"
    config = PerplexityJob(tokens=300, window=100, batch_size=2, output=str(output))
    found = main(config, Console(file=text, width=120))
    assert sorted(found) == [2, 3, 4]
    assert found[2].value > found[3].value > found[4].value > 1
    printed = text.getvalue()
    assert all(f"{value.value:,.2f}" in printed for value in found.values())
    assert "297 tokens scored, windows of 100" in printed
    assert "windows: 9/9" in printed, "progress where there is no terminal"
    assert json.loads(output.read_text())["perplexity"]["3"] == found[3].value
    with pytest.raises(ValueError, match=r"--stride 7: give 1\.\.4"):
        PerplexityJob(window=4, stride=7)


def test_a_log_gets_a_line_every_ten_seconds() -> None:
    now, text = [0.0], io.StringIO()
    with Steps(Console(file=text, width=100), clock=lambda: now[0]) as steps:
        for done in range(1, 31):
            now[0] += 1
            steps("layers", done, 30)
        steps("layers", 30, 30)
    lines = text.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["layers: 10/30", "layers: 20/30", "layers: 30/30"], (
        "the end is told once"
    )
    assert "about 20 s left" in lines[0]
