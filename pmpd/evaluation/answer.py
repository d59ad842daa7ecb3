"""Conversations x scheduler settings over one loaded model -> generation rows. No I/O, no Ray.

A *run* is one scheduler setting of a sweep; a *conversation* is one question under one run (and choice). The
first turn of all conversations of a run decodes together, then the second, whose prompt holds the first
answer.

Prompts that do not fit: a prompt may have `max_positions - max_new_tokens` tokens. A longer one loses tokens
on its left (a leading begin-of-sequence token stays), and the row says how many."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmpd.benchmarks.base import Benchmark, Question
from pmpd.benchmarks.conversation import Stops, render, stops
from pmpd.benchmarks.tokens import encode_prompt, special_tokens, token_pieces
from pmpd.decode.ending import StopStrings
from pmpd.decode.requests import Completion, Prefix, Request
from pmpd.errors import UserError
from pmpd.evaluation.sweep import Run
from pmpd.model import PMPDForCausalLM

# ------------------------------------------------------------------------------------------------------------


def conversation_rows(
    benchmark: Benchmark,
    split: str,
    questions: Sequence[Question],
    runs: Sequence[Run],
    model_id: str,
    template: str,
    choices: int = 1,
) -> Iterator[dict[str, Any]]:
    """Rows of `storage.CONVERSATIONS`: every question x choice under every run. Ids sort by run, so that a
    unit of work holds few runs."""
    for index, run in enumerate(runs):
        settings = run.describe()
        for question in questions:
            for choice in range(choices):
                yield {
                    "conversation_id": f"{index:03}-{question.prompt_id}-{choice}",
                    "prompt_id": question.prompt_id,
                    "benchmark": benchmark.name,
                    "benchmark_version": benchmark.version,
                    "split": split,
                    "question_id": question.key,
                    "category": question.category,
                    "model_id": model_id,
                    "run": run.name,
                    "kind": run.kind,
                    "scheduler": settings,
                    "choice": choice,
                    "template": question.template or template,
                    "turns": list(question.turns),
                    "references": list(question.references),
                }


@dataclass
class _Turn:
    """One turn about to be decoded."""

    row: dict[str, Any]
    ids: list[int]
    prefix: Prefix | None


@dataclass
class _Conversation:
    """A conversation under way: its row of CONVERSATIONS and the rows of the turns so far."""

    source: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    prefix: Prefix | None = None
    """Cache of the last prompt (of its prefill only: decode forwards ran at other precisions)."""

    @property
    def failed(self) -> str | None:
        return next((row["error"] for row in self.rows if row["error"]), None)


class Generator:
    """Answers conversations with one model. `forward_seconds` is measured once, here, by the worker that
    answers."""

    def __init__(
        self,
        model: PMPDForCausalLM,
        runs: Sequence[Run],
        slots: int | None = 32,
        reuse_cache: bool = True,
        device: str = "",
    ) -> None:
        self.model = model
        self.runs = {run.name: run for run in runs}
        self.slots = slots
        self.reuse_cache = reuse_cache
        self.device = device
        longest = max(run.max_new_tokens for run in runs)
        self.max_prompt = model.max_positions - longest
        if self.max_prompt < 1:
            raise UserError(
                f"--max-new-tokens {longest}: this model has {model.max_positions} positions, so there is no "
                f"room for a prompt"
            )
        for run in runs:
            model.decide(run.scheduler(), run.prefill_bit)
        widths = sorted({bits for run in runs for bits in (*run.precisions, run.prefill_bit)}, reverse=True)
        self.forward_seconds = measure_forwards(model, widths)

    def answer(self, conversations: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of `storage.GENERATIONS` without `worker`: all turns of a conversation one after another,
        conversations in any order."""
        by_run: dict[str, list[_Conversation]] = defaultdict(list)
        for source in conversations:
            by_run[source["run"]].append(_Conversation(source))
        for name, group in by_run.items():
            self._answer_run(self.runs[name], group)
            for conversation in group:
                yield from conversation.rows

    def _answer_run(self, run: Run, group: list[_Conversation]) -> None:
        for number in itertools.count():
            open_ones = [conversation for conversation in group if number < len(conversation.source["turns"])]
            if not open_ones:
                return
            turns: dict[str, tuple[_Conversation, _Turn]] = {}
            for conversation in open_ones:
                row = self._empty_row(conversation, number)
                conversation.rows.append(row)
                if conversation.failed:
                    row["error"] = (
                        f"turn {number} failed, so turn {number + 1} could not be asked: "
                        f"{conversation.failed.splitlines()[0]}"
                    )
                    continue
                try:
                    turn = self._prepare(conversation, row, number)
                except (
                    ValueError,
                    TypeError,
                    KeyError,
                ) as error:  # a template or tokenizer that cannot serve this one text
                    row["error"] = f"{type(error).__name__}: {error}"
                    continue
                turns[f"{row['prompt_id']}/{row['choice']}/{row['turn']}"] = conversation, turn
            self._decode(run, turns, want_prefix=number + 1 < max(len(c.source["turns"]) for c in open_ones))

    def _empty_row(self, conversation: _Conversation, number: int) -> dict[str, Any]:
        source = conversation.source
        copied = {name: value for name, value in source.items() if name not in ("turns", "references")}
        digest = hashlib.sha256(
            f"{source['conversation_id']}/{source['run']}/{source['scheduler']}/{number + 1}".encode()
        ).hexdigest()
        return {
            "row_id": digest[:16],
            **copied,
            "turn": number + 1,
            "model_fingerprint": self.model.fingerprint,
            "reference_text": source["references"][number],
            "forward_seconds": self.forward_seconds,
            "device": self.device,
            "error": None,
        }

    def _prepare(self, conversation: _Conversation, row: dict[str, Any], number: int) -> _Turn:
        source = conversation.source
        answers = [earlier["output_text"] for earlier in conversation.rows[:number]]
        text, ids = encode(self.model, source["template"], source["turns"][: number + 1], answers)
        ids, dropped = cut_left(ids, self.max_prompt, getattr(self.model.tokenizer, "bos_token_id", None))
        prefix = self._reusable(conversation.prefix, ids)
        row |= {
            "prompt_text": text,
            "prompt_tokens": len(ids),
            "dropped_tokens": dropped,
            "reused_tokens": len(prefix.tokens) if prefix else 0,
            "input_ids": ids,
        }
        return _Turn(row, ids, prefix)

    def _reusable(self, prefix: Prefix | None, ids: Sequence[int]) -> Prefix | None:
        """The part of the last prompt's cache that is a beginning of `ids` too. One token at least stays to
        be prefilled."""
        if prefix is None:
            return None
        equal = sum(
            1
            for _ in itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(prefix.tokens, ids[:-1], strict=False)
            )
        )
        return prefix.head(equal) if equal else None

    def _decode(self, run: Run, turns: Mapping[str, tuple[_Conversation, _Turn]], want_prefix: bool) -> None:
        if not turns:
            return
        scheduler = run.scheduler()
        keep = want_prefix and self.reuse_cache
        # Long prompts first: the last rows to end are short ones, so slots stay busy.
        ordered = sorted(turns.items(), key=lambda item: -len(item[1][1].ids))
        ending = StopStrings(self.model.tokenizer, run.sampling.stop) if run.sampling.stop else None
        requests = [
            Request(
                key, turn.ids, run.max_new_tokens, prefix=turn.prefix, want_prefix=keep,
                sampling=run.sampling.of(turn.row["category"]), stop=ending,
            )
            for key, (_, turn) in ordered
        ]  # fmt: skip
        stop = {
            name: stops(name, self.model.tokenizer)
            for name in {turn.row["template"] for _, turn in turns.values()}
        }
        ends = self.model.eos_token_ids.union(
            *(end_tokens(self.model.tokenizer, entry) for entry in stop.values())
        )
        slots = None if self.slots is None else min(self.slots, len(requests))
        for completion in self.model.complete(requests, scheduler, run.prefill_bit, slots, ends):
            conversation, turn = turns[completion.key]
            conversation.prefix = completion.prefix.head(len(turn.ids)) if completion.prefix else None
            turn.row |= self._result(completion, stop[turn.row["template"]], ending)

    def _result(self, completion: Completion, stop: Stops, ending: StopStrings | None) -> dict[str, Any]:
        if completion.error:
            return {"error": completion.error, "finish_reason": "error"}
        classes, scores = completion.classes, completion.scores
        tokenizer = self.model.tokenizer
        text = stop.cut(str(tokenizer.decode(completion.tokens, skip_special_tokens=True)))
        return {
            "output_text": (ending.cut(text) if ending else text).strip(),
            "output_tokens": len(completion.tokens),
            "output_ids": completion.tokens,
            "output_pieces": token_pieces(tokenizer, completion.tokens),
            "finish_reason": completion.finish_reason,
            "precision_trace": [{"bits": bits, "count": count} for bits, count in completion.precision_trace],
            "switch_steps": list(completion.switch_steps),
            "classes": None if classes is None else classes.tolist(),
            "decision_scores": None if scores is None else scores.tolist(),
            "prefill_seconds": completion.prefill_seconds,
            "decode_seconds": completion.decode_seconds,
            "decision_seconds": completion.decision_seconds,
        }


def encode(
    model: PMPDForCausalLM, template: str, turns: Sequence[str], answers: Sequence[str]
) -> tuple[str, list[int]]:
    """Text and tokens of the prompt for the next answer; see `conversation.render`."""
    text = render(template, turns, answers, model.tokenizer)
    said = itertools.chain.from_iterable(itertools.zip_longest(turns, answers, fillvalue=""))
    return text, encode_prompt(model.tokenizer, text, list(said))


def end_tokens(tokenizer: Any, stop: Stops) -> set[int]:
    """Tokens that end an answer. A stop string that is a special token is one: it has no text to be cut
    at."""
    special = {spelled: token for token, spelled in special_tokens(tokenizer).items()}
    return {*stop.token_ids, *(special[string] for string in stop.strings if string in special)}


def cut_left(ids: list[int], limit: int, bos_token_id: int | None) -> tuple[list[int], int]:
    """(the last `limit` tokens, number of tokens dropped). A leading begin-of-sequence token is kept in
    front."""
    dropped = max(0, len(ids) - limit)
    if not dropped:
        return ids, 0
    if bos_token_id is not None and ids[0] == bos_token_id and limit > 1:
        return [ids[0], *ids[len(ids) - limit + 1 :]], dropped
    return ids[dropped:], dropped


# ------------------------------------------------------------------------------------------------------------


def measure_forwards(
    model: PMPDForCausalLM, widths: Sequence[int], forwards: int = 32, repeats: int = 3
) -> list[dict[str, Any]]:
    """Values of the column `forward_seconds`: for each precision the median seconds of one decode forward of
    a row alone, after a prompt of 64 tokens, the `repeats` behind it, and whether the machine was `idle`
    before and after (None: can't be told).

    The precisions take turns, so that a slow moment of the machine hits all of them. Prefill and start-up are
    subtracted: they are timed by a continuation of one token.
    """
    vocabulary = int(model.model.config.vocab_size)
    ids = [(17 * index + 5) % vocabulary for index in range(min(64, model.max_positions - forwards - 1))]
    engine = model.engine(1, len(ids) + forwards + 1)

    def seconds(bits: int, new_tokens: int) -> float:
        started = time.perf_counter()
        for completion in engine.run([Request("speed", ids, new_tokens)], None, bits, ()):
            if completion.error:
                raise UserError(
                    f"the model's forward at {bits} bits gives no finite logits: {completion.error}"
                )
        return time.perf_counter() - started

    idle = machine_is_idle()
    samples: dict[int, list[float]] = {bits: [] for bits in widths}
    for bits in widths:  # warm-up: kernels are built, tables are dequantized
        seconds(bits, 3)
    for _ in range(repeats):
        for bits in widths:
            samples[bits].append(max(seconds(bits, forwards + 1) - seconds(bits, 1), 1e-9) / forwards)
    later = machine_is_idle()
    return [
        {
            "bits": bits,
            "seconds": statistics.median(values),
            "repeats": values,
            "idle": None if idle is None or later is None else idle and later,
        }
        for bits, values in samples.items()
    ]


BUSY_SHARE = 0.1
"""Of the processors' time, from which on a machine is not idle."""


def machine_is_idle(seconds: float = 0.2) -> bool | None:
    """Whether this machine's processors did next to nothing while this process slept; None where it does not
    tell (no /proc)."""

    def ticks() -> tuple[int, int]:
        numbers = [int(n) for n in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return numbers[3] + numbers[4], sum(numbers)  # idle and waiting for disks

    try:
        idle, total = ticks()
        time.sleep(seconds)
        idle_after, total_after = ticks()
    except (OSError, ValueError, IndexError):
        return None
    passed = total_after - total
    return passed > 0 and 1 - (idle_after - idle) / passed < BUSY_SHARE
