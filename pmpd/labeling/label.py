"""Labels for the KV-cache scheduler: which switch class keeps the quality of never switching. No I/O, no Ray.

For every pair (high, low) of the chain, a prompt is decoded at the high precision throughout and once per
switch class k, at the high precision for `class_steps[k]` decode forwards and at the low one after. The label
is the smallest class whose likeness to the unquantized model's output is no lower than that of the high
trajectory (`pmpd.labeling.rule`; by default ROUGE-L of the texts, rounded to three digits).

All trajectories of a prompt are one request with forks, so they share every decode forward that they have in
common:

    prefill ── high of pair 1 ──────────────▶            class 3 of pair 1
              │        │        └ fork at 2(m//3) ─▶     class 2
              │        └ fork at m//3 ─────────────▶     class 1
              └ fork at 0 = high of pair 2 ────────▶     class 0 of pair 1, and class 3 of pair 2, …"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import pairwise
from typing import Any, cast

from pmpd.decode.requests import Completion, Fork, Request
from pmpd.labeling import published
from pmpd.labeling.config import LabelConfig, error_row
from pmpd.labeling.forced import forced_labels
from pmpd.labeling.row_threads import RowThreads
from pmpd.labeling.scoring import PairBranches, RowScorer, Score, decode_text
from pmpd.labeling.scoring_process import ScoringProcesses
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.chain import NUM_CLASSES, class_steps
from pmpd.schedulers.static import StaticScheduler

SWITCH_SECONDS = 2e-4
"""How long the decode loop waits for the interpreter while rows are scored beside it: it lets go of it in
every call of torch, and Python's 5 ms would starve a GPU."""

SCORING_PROCESSES = 3
"""Many rows end together, at the limit of their tokens, and their unit is over once they are scored."""

Row = dict[str, Any]
Rows = Mapping[str, Mapping[str, Any]]
"""prompt_id -> row."""


def reference_prompts(
    model: PMPDForCausalLM, prompts: Iterable[Mapping[str, Any]], config: LabelConfig
) -> Iterator[dict[str, Any]]:
    """Reference outputs: the greedy continuation by `model` (unquantized) of each row of the PROMPTS table.
    Yields REFERENCES rows without `worker`, in any order."""
    rows = {row["prompt_id"]: row for row in prompts}
    requests = [Request(key, row["input_ids"], config.max_new_tokens) for key, row in rows.items()]
    for completion in model.complete(requests, None, model.precisions[0], config.slots):
        yield {
            "prompt_id": completion.key,
            "prompt_tokens": len(rows[completion.key]["input_ids"]),
            "reference_text": None if completion.error else decode_text(model.tokenizer, completion.tokens),
            "reference_ids": None if completion.error else completion.tokens,
            "finish_reason": completion.finish_reason,
            "seconds": completion.prefill_seconds + completion.decode_seconds,
            "error": completion.error,
        }


def label_prompts(
    model: PMPDForCausalLM,
    prompts: Iterable[Mapping[str, Any]],
    references: Mapping[str, Mapping[str, Any]],
    config: LabelConfig,
    unquantized: PMPDForCausalLM | None = None,
) -> Iterator[dict[str, Any]]:
    """Labels of each row of the PROMPTS table. `references`: prompt_id -> REFERENCES row. `unquantized`: the
    model of the references, for teacher-forced rules. Yields LABELS rows without `worker`, each as soon as
    all its trajectories have ended; `keys` and `values` are float16 arrays [T, D].

    A prompt whose reference is missing, an error or nothing that can be scored, or whose logits are not
    finite, becomes a row with `error` set.
    """
    return in_order(row for _, row in Labeler(model, config, unquantized)(prompts, references))


class Labeler:
    """Labels prompts, a unit a call. What `offer` gives meanwhile, of the unit that comes next, decodes in
    slots that the last rows of a unit leave free; the call for that unit goes on with it. Rows are scored
    beside the decoding, so a unit's last ones are still to come when its decoding has ended."""

    def __init__(
        self,
        model: PMPDForCausalLM,
        config: LabelConfig,
        unquantized: PMPDForCausalLM | None = None,
        offer: Callable[[], Rows] = dict,
        own_process: bool = False,
    ) -> None:
        """`own_process`: trajectories are scored in other processes, so that no Python of theirs keeps this
        one from giving a GPU its next steps."""
        self._model, self._config, self._unquantized = model, config, unquantized
        self._branches = _CarriedBranches(offer)
        scorer = RowScorer(model.tokenizer, frozenset(model.eos_token_ids), config)
        count = SCORING_PROCESSES if own_process else 1
        self._score: Score = ScoringProcesses(scorer, count) if own_process else scorer
        self._threads = RowThreads(count)

    def __call__(
        self, prompts: Iterable[Mapping[str, Any]], references: Rows
    ) -> Iterator[tuple[str, Future[Row]]]:
        """(prompt_id, its row as in `label_prompts`), in any order. All of it is to be taken before the next
        call; the rows themselves may be waited for later."""
        model, config = self._model, self._config
        usable = {}
        for row in prompts:
            reference = references.get(row["prompt_id"])
            if reference is None or reference["error"]:
                why = reference["error"] if reference else "not in the references"
                yield _there(error_row(row, config, f"ValueError: no reference output ({why})"))
            else:
                usable[row["prompt_id"]] = row
        if not usable:
            return
        if config.rule.branches == "teacher_forced":
            assert self._unquantized is not None, "a teacher-forced rule needs the unquantized model"
            yield from map(_there, forced_labels(model, self._unquantized, usable, references, config))
            return
        decode = _published_branches if config.rule.branches == "published" else self._branches
        calls = (
            (key, functools.partial(_label_row, self._score, usable[key], references[key], pairs, config))
            for key, pairs in decode(model, usable, config)
        )
        yield from submitted(self._threads, calls)


def _there(row: Row) -> tuple[str, Future[Row]]:
    """A row that is made already."""
    future: Future[Row] = Future()
    future.set_result(row)
    return row["prompt_id"], future


def submitted(
    threads: Executor, calls: Iterable[tuple[str, Callable[[], Row]]]
) -> Iterator[tuple[str, Future[Row]]]:
    """What `calls` will give, in their order. They run in `threads`, so that whatever makes them (a GPU that
    decodes) goes on meanwhile."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        for key, call in calls:
            yield key, threads.submit(call)
    finally:
        sys.setswitchinterval(before)


def in_order(futures: Iterable[Future[Row]]) -> Iterator[Row]:
    """Each as soon as it and those before it are there."""
    waiting: deque[Future[Row]] = deque()
    for future in futures:
        waiting.append(future)
        while waiting and waiting[0].done():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _own_branches(
    model: PMPDForCausalLM, rows: Rows, config: LabelConfig, more: Callable[[int], Rows]
) -> Iterator[tuple[str, list[PairBranches]]]:
    """(prompt_id, the branches of every pair), each to its own end, as soon as all have ended. `more` gives
    further rows, of prompts of so many tokens at most."""
    plan = LabelPlan(config)

    def requests(rows: Rows) -> list[Request]:
        return [plan.request(key, row["input_ids"]) for key, row in rows.items()]

    model.decide(plan.scheduler, config.precisions[0])
    open_rows: dict[str, dict[str, Completion]] = {}
    for completion in model.complete(
        requests(rows), plan.scheduler, config.precisions[0], config.slots,
        more=lambda length: requests(more(length - config.max_new_tokens)),
    ):  # fmt: skip
        key, _, name = completion.key.partition("/")
        trajectories = open_rows.setdefault(key, {})
        trajectories[name] = completion
        if len(trajectories) == plan.trajectories:
            del open_rows[key]
            yield key, plan.pairs_of(trajectories)


class _CarriedBranches:
    """`_own_branches` of the rows of each call, in one decode for as long as rows are under way."""

    def __init__(self, offer: Callable[[], Rows]) -> None:
        self._offer = offer
        self._decode: Iterator[tuple[str, list[PairBranches]]] | None = None
        self._under_way: set[str] = set()
        self._left: dict[str, Mapping[str, Any]] = {}
        """Of the call: not under way yet."""
        self._early: dict[str, list[PairBranches]] = {}
        """Not asked for yet."""

    def __call__(
        self, model: PMPDForCausalLM, rows: Rows, config: LabelConfig
    ) -> Iterator[tuple[str, list[PairBranches]]]:
        wanted = set(rows)
        self._left = {
            key: row for key, row in rows.items() if key not in self._early and key not in self._under_way
        }
        try:
            for key in self._early.keys() & wanted:
                wanted.remove(key)
                yield key, self._early.pop(key)
            while wanted:
                if self._decode is None:
                    first, self._left = self._left, {}
                    self._under_way = set(first)
                    self._decode = _own_branches(model, first, config, self._more)
                found = next(self._decode, None)
                if found is None:  # what is left is longer than this decode has room for
                    assert self._left, f"rows that were never decoded: {sorted(wanted)[:3]}"
                    self._decode = None
                    continue
                key, branches = found
                self._under_way.remove(key)
                if key in wanted:
                    wanted.remove(key)
                    yield key, branches
                else:
                    self._early[key] = branches
            if not self._under_way:
                self._end()  # the model's cache is free again
        except BaseException:
            self._end()
            raise

    def _more(self, length: int) -> Rows:
        taken = {key: row for key, row in self._left.items() if len(row["input_ids"]) <= length}
        self._left = {key: row for key, row in self._left.items() if key not in taken}
        if not taken:
            taken = {key: row for key, row in self._offer().items() if len(row["input_ids"]) <= length}
        self._under_way |= set(taken)
        return taken

    def _end(self) -> None:
        if self._decode is not None:
            cast("Generator[Any]", self._decode).close()
        self._decode, self._under_way = None, set()


def _published_branches(
    model: PMPDForCausalLM, rows: Mapping[str, Mapping[str, Any]], config: LabelConfig
) -> Iterator[tuple[str, list[PairBranches]]]:
    """The same as the published code has them: pair by pair, each prefilled at its own high precision, no
    end of sequence."""
    never = config.max_new_tokens - 1
    done: dict[str, list[PairBranches]] = {key: [] for key in rows}
    chain = config.precisions
    for high, low in pairwise(chain):
        scheduler = StaticScheduler((high, low), [never])
        requests = [
            published.request(key, row["input_ids"], config.max_new_tokens, want_features=high == chain[0])
            for key, row in rows.items()
        ]
        model.decide(scheduler, high)
        open_rows: dict[str, dict[str, Completion]] = {}
        for completion in model.complete(requests, scheduler, high, config.slots, eos_token_ids=()):
            key, _, name = completion.key.partition("/")
            found = open_rows.setdefault(key, {})
            found[name] = completion
            if len(found) == NUM_CLASSES:
                del open_rows[key]
                done[key].append(PairBranches(found["3"], (found["0"], found["1"], found["2"])))
                if low == chain[-1]:
                    yield key, done.pop(key)


class LabelPlan:
    """The tree of trajectories of one prompt. Names: "high0" is pair 0's high trajectory, "0/1" class 1 of
    pair 0."""

    def __init__(self, config: LabelConfig) -> None:
        self.config = config
        self.pairs = len(config.precisions) - 1
        self.steps = class_steps(config.max_new_tokens)
        self.never = config.max_new_tokens - 1
        self.scheduler = StaticScheduler(config.precisions, [self.never] * self.pairs)
        self.trajectories = 1 + self.pairs * (NUM_CLASSES - 1)

    def request(self, key: str, input_ids: Sequence[int]) -> Request:
        return Request(
            key=f"{key}/high0",
            input_ids=input_ids,
            max_new_tokens=self.config.max_new_tokens,
            switch_steps=(self.never,) * self.pairs,
            want_features=True,
            forks=self._forks(key, 0),
        )

    def pairs_of(self, trajectories: Mapping[str, Completion]) -> list[PairBranches]:
        """By pair. The high trajectory of a later pair is class 0 of the pair before it."""
        highs = ["high0", *(f"{pair}/0" for pair in range(self.pairs - 1))]
        return [
            PairBranches(
                trajectories[high], tuple(trajectories[f"{pair}/{k}"] for k in range(NUM_CLASSES - 1))
            )
            for pair, high in enumerate(highs)
        ]

    def _forks(self, key: str, pair: int) -> tuple[Fork, ...]:
        """Classes 0..2 of `pair`. Class 0 runs at the low precision throughout: it is the high trajectory of
        the next pair."""
        forks = []
        for k, step in enumerate(self.steps[:-1]):
            switch_steps = (0,) * pair + (step,) + (self.never,) * (self.pairs - pair - 1)
            children = self._forks(key, pair + 1) if k == 0 and pair + 1 < self.pairs else ()
            forks.append(Fork(f"{key}/{pair}/{k}", step, switch_steps, children))
        return tuple(forks)


def _label_row(
    score: Score,
    row: Mapping[str, Any],
    reference: Mapping[str, Any],
    decoded: Sequence[PairBranches],
    config: LabelConfig,
) -> Row:
    completions = [completion for pair in decoded for completion in (pair.high, *pair.branches)]
    errors = [completion.error for completion in completions if completion.error]
    if errors:
        return error_row(row, config, errors[0])
    first = decoded[0].high
    features, first.features = first.features, None  # large, and nothing to score
    assert features is not None
    made = score(row, reference, decoded)
    if made["error"] is None:
        made |= {"keys": features[0], "values": features[1], "feature_tokens": len(features[0])}
    return made
