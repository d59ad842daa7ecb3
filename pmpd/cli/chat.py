"""Talk to a model in the terminal: the answer streams, each token in the colour of its precision, with bits
and tokens per second below."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from pmpd import PMPDForCausalLM, demo, plugins
from pmpd.benchmarks.conversation import choose_template, stops, template_note
from pmpd.cli.flags.chat import ChatJob
from pmpd.decode.ending import StopStrings
from pmpd.decode.requests import Completion, Prefix, Request, Sampling, TokenEvent
from pmpd.errors import UserError
from pmpd.evaluation.answer import encode
from pmpd.metrics.precision import average_bits, decode_forwards
from pmpd.schedulers.base import Scheduler, find, names
from pmpd.weights.model_spec import ModelSpec

COLOURS = {16: "white", 8: "cyan", 4: "green", 3: "yellow", 2: "red"}
"""By precision; another one is magenta."""


HELP = """\
/scheduler NAME [VALUE] [OPTION=VALUE ...]   e.g. /scheduler static 20, /scheduler static 20,60,
                                             /scheduler confidence threshold=0.8, /scheduler uniform 3
/reset                                       forget the conversation
/help                                        this text
/quit                                        (or the end of the input) leave"""


def help_text() -> str:
    return f"{HELP}\nschedulers: uniform, {', '.join(sorted(names()))}"


@dataclass
class Chat:
    """One conversation with a loaded model."""

    model: PMPDForCausalLM
    job: ChatJob
    console: Console
    template: str
    scheduler: Scheduler | None = None
    prefill_bit: int | None = None
    turns: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    prefix: Prefix | None = None
    """Cache of the last prompt (of its prefill only: decode forwards ran at other precisions)."""

    def line(self, text: str) -> bool:
        """What one line of input does; False: leave."""
        command, _, rest = text.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            self.say(help_text())
        elif command == "/reset":
            self.turns, self.answers, self.prefix = [], [], None
        elif command == "/scheduler":
            try:
                self.set_scheduler(rest)
            except ValueError as error:
                self.say(f"{error} (nothing has changed)")
        elif command.startswith("/"):
            self.say(f"{command}: no such command\n{help_text()}")
        elif command:
            self.answer(text.strip())
        return True

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def set_scheduler(self, words: str) -> None:
        """ValueError, with what is known, for a scheduler that can't be."""
        chain = self.model.precisions
        name, options = parse_scheduler(words)
        if name == "uniform":
            bits = options.get("precision", chain[0])
            self.model.decide(None, bits)
            self.scheduler, self.prefill_bit = None, bits
        else:
            scheduler = Scheduler.get_scheduler(name, **{"precisions": chain, **options})
            self.model.decide(scheduler, None)
            self.scheduler, self.prefill_bit = scheduler, None
        self.prefix = None  # it may be of another precision
        described = (
            self.scheduler.describe() if self.scheduler else {"name": "uniform", "bits": self.prefill_bit}
        )
        self.say("scheduler: " + ", ".join(f"{key} {value}" for key, value in described.items()))

    def answer(self, turn: str) -> None:
        """Streams the answer to the next turn, then says what it took."""
        tokenizer = self.model.tokenizer
        _, ids = encode(self.model, self.template, [*self.turns, turn], self.answers)
        room = self.model.max_positions - self.job.max_new_tokens
        if room < 1:
            raise UserError(
                f"--max-new-tokens {self.job.max_new_tokens}: the model has {self.model.max_positions} "
                f"positions"
            )
        if len(ids) > room:
            self.say(f"(the conversation is too long: its first {len(ids) - room} tokens are left out)")
            ids = ids[len(ids) - room :]
        ends = stops(self.template, tokenizer)
        strings = StopStrings(tokenizer, ends.strings)
        request = Request(
            key="answer",
            draw_key=f"turn {len(self.turns)}",
            input_ids=ids,
            max_new_tokens=self.job.max_new_tokens,
            prefix=self._reusable(ids),
            want_prefix=True,
            sampling=sampling_of(self.job),
            stop=lambda tokens: tokens[-1] in ends.token_ids or bool(ends.strings and strings(tokens)),
        )
        tokens: list[int] = []
        completion, pieces, started = None, Pieces(tokenizer), time.perf_counter()
        try:
            for event in self.model.stream_request(request, self.scheduler, self.prefill_bit):
                if isinstance(event, TokenEvent):
                    tokens.append(event.token)
                    self._show(pieces.add(event.token), event.bits)
                else:
                    completion = event
        except KeyboardInterrupt:
            self.say(" (stopped)")
        self._show(pieces.rest(), 0)
        self.console.print()
        text = strings.cut(str(tokenizer.decode(tokens, skip_special_tokens=True))).strip()
        self.turns.append(turn)
        self.answers.append(text)
        if completion is not None:
            if completion.prefix is not None:
                self.prefix = completion.prefix.head(len(ids))
            self.say(footer(completion, time.perf_counter() - started))

    def _show(self, piece: str, bits: int) -> None:
        if piece:
            style = COLOURS.get(bits, "magenta") if bits else ""
            self.console.print(Text(piece, style), end="", soft_wrap=True)

    def _reusable(self, ids: Sequence[int]) -> Prefix | None:
        if self.prefix is None:
            return None
        equal = 0
        for old, new in zip(self.prefix.tokens, ids[:-1], strict=False):
            if old != new:
                break
            equal += 1
        return self.prefix.head(equal) if equal else None


class Pieces:
    """Text as tokens come: a token that only starts a character adds "", the one that completes it all of
    it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        return "" if text.endswith("\ufffd") else self._new(text)

    def rest(self) -> str:
        return (
            self._new(self.tokenizer.decode(self._tokens, skip_special_tokens=True)) if self._tokens else ""
        )

    def _new(self, text: str) -> str:
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece


def parse_scheduler(words: str) -> tuple[str, dict[str, Any]]:
    """("static 20") -> name and options. A value without a name is the scheduler's first option after the
    precisions. Values are JSON (20, 0.8, [20, 40]), lists without brackets (20,40), or text."""
    name, *rest = words.split() or [""]
    if name == "uniform":
        takes: tuple[str, ...] = ("precision",)
    elif name in names():
        takes = tuple(option for option in find(name)[1].takes if option != "precisions")
    else:
        raise UserError(f"scheduler {name!r}: known are uniform, {', '.join(sorted(names()))}")
    options: dict[str, Any] = {}
    for word in rest:
        key, separator, value = word.partition("=")
        if not separator:
            if options or not takes:
                raise UserError(f"scheduler {name}, {word}: give further options as OPTION=VALUE")
            key, value = takes[0], word
        elif key not in takes:
            raise UserError(f"scheduler {name}, {key}: its options are {', '.join(takes)}")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    for candidate in (text, f"[{text}]"):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return text


def footer(completion: Completion, seconds: float) -> str:
    """One line: precisions of the decode, average bits, tokens per second."""
    if completion.error:
        return f"[failed: {completion.error}]"
    trace = [{"bits": bits, "count": count} for bits, count in completion.precision_trace]
    forwards = decode_forwards(trace)
    bits = average_bits(forwards)
    parts = [f"{width} bit × {forwards[width]}" for width in sorted(forwards, reverse=True)]
    if bits is not None:
        parts.append(f"{bits:.2f} bits on average")
    parts.append(f"{len(completion.tokens) / max(seconds, 1e-9):.1f} tokens/s")
    return f"[{', '.join(parts)}]"


def lines(console: Console) -> Iterator[str]:
    """Lines of standard input, with a prompt where it is a terminal; Ctrl-C at the prompt leaves."""
    while True:
        try:
            yield console.input("> ") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return


def sampling_of(job: ChatJob) -> Sampling:
    return Sampling(job.temperature, job.top_p, job.top_k, job.seed, job.repetition_penalty)


def main(job: ChatJob, console: Console | None = None) -> None:
    console = console or Console()
    plugins.load(job.plugins)
    chain = None
    if job.precisions is not None:
        try:
            chain = [int(bits) for bits in job.precisions.split(",")]
        except ValueError:
            raise UserError(
                f"--precisions {job.precisions}: bit widths with commas between them, e.g. 4,3,2"
            ) from None
    spec = ModelSpec(
        job.model_path,
        precisions=None if chain is None else tuple(chain),
        kernel=job.kernel,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
        head_bits=job.head_bits,
    )
    model = PMPDForCausalLM.from_spec(spec, torch.device("cpu")).eval()
    name = "demo" if job.model_path == str(demo.ANYPREC) else Path(job.model_path).name
    template = choose_template(name, model.tokenizer, job.template)
    chat = Chat(model, job, console, template, prefill_bit=model.precisions[0])
    note = template_note(template, name, job.template)
    chat.say(f"{job.model_path}: {', '.join(map(str, model.precisions))} bit, template {note}; /help")
    if job.scheduler is not None:
        chat.set_scheduler(job.scheduler)
    for line in lines(console):
        if not chat.line(line):
            break
