"""The only fast decode loop: rows come, decode together, and go.

Legend: S slots, n rows of a forward, J pairs of the precision chain, V vocabulary.

Rows live in the slots of one preallocated KV cache and join and leave at any step (continuous batching).
Every step sorts the live rows by precision, so the tokens of one precision are one contiguous segment, and
runs one forward for all of them. Steps, positions and precisions are known on the host (NumPy, by slot);
tokens stay on the device, and the host looks at them every `sync_every` steps: where that is more than one,
while the device already runs the next ones, so that it never waits for what the host makes of them.

A request may have *forks*: continuations that share its first decode forwards and then follow another plan.
A cache is only ever appended to, so a fork can start from its parent's slot at any later time; when the
parent ends, its last fork takes the slot over.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pmpd import gpu
from pmpd.decode.decoder import Decoder
from pmpd.decode.forced import GivenTokens, lay_out
from pmpd.decode.precision import RowDecision, RowPrecisions, token_statistics
from pmpd.decode.prompt_state import look_back, most_logits, probe_offset
from pmpd.decode.requests import Completion, Fork, Prefix, Request, TokenEvent
from pmpd.decode.sampling import RowSampling, highest
from pmpd.decode.slots import NEVER, TokenPlaces, within
from pmpd.schedulers.base import PrefillState, PromptState, Scheduler


@dataclass
class _Row:
    """A live row, or the finished one whose slot waits for its forks."""

    key: str
    request: Request
    slot: int
    pending: list[Fork]
    """Forks that are still to start from this slot, longest shared part last."""
    features: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    prefill_seconds: Callable[[], float] = float


def not_finite(dtype: torch.dtype) -> str:
    """What it means that logits are not finite, and the cure."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return (
            "the model's logits are not finite in float16, where activations overflow past 65504; load it "
            "as bfloat16 or float32 (--dtype, dtype=)"
        )
    return f"the model's logits are not finite in {name}; its weights may be damaged: make or copy them again"


class _NewTokens(NamedTuple):
    """Of n rows: what the host has not looked at yet."""

    at: np.ndarray
    """Slots, int [n]."""
    counts: np.ndarray
    """New tokens of each row, int [n], at least 1."""
    tokens: np.ndarray
    """int [n, most of `counts`], each row filled up with its last one."""
    bad: np.ndarray
    """int [n]: each row's first new token whose logits were not finite, or `NEVER`."""


@dataclass(frozen=True)
class _ComingTokens:
    """New tokens that are on their way to the host."""

    at: np.ndarray
    counts: np.ndarray
    columns: np.ndarray
    """int [n, most of `counts`]."""
    arrived: Callable[[], np.ndarray]
    """Waits for them: int [n, most of `counts` + 1], in the last column `bad`."""


class DecodeLoop:
    """One `Engine.run`: its rows, by slot."""

    def __init__(
        self,
        engine: Decoder,
        requests: Iterable[Request],
        scheduler: Scheduler | None,
        prefill_bits: int,
        eos: Collection[int],
        stream: bool,
    ) -> None:
        self.engine = engine
        self.cache = engine.cache
        self.device = engine.device
        self.waiting = iter(requests)
        self.next_request: Request | None = next(self.waiting, None)
        self.precision = RowPrecisions(scheduler, prefill_bits, engine.slots, engine.max_length)
        self.eos = frozenset(eos)
        self.eos_array = np.asarray(sorted(self.eos), dtype=np.int64)
        self.stream = stream
        self.sync_every = 1 if stream or self.precision.wanted else engine.sync_every
        slots = engine.slots
        self.rows: list[_Row | None] = [None] * slots
        self.free = list(range(slots))
        self.holders: set[int] = set()  # slots whose row has forks that wait for a slot
        self.alive = np.zeros(slots, dtype=bool)
        self.prompt_length = np.zeros(slots, dtype=np.int64)
        self.produced = np.zeros(slots, dtype=np.int64)
        self.seen = np.zeros(slots, dtype=np.int64)  # tokens the host has looked at
        self.limit = np.zeros(slots, dtype=np.int64)
        self.stops = np.zeros(slots, dtype=bool)  # rows that a rule of their own may end
        self.sampling = RowSampling(slots, self.device)
        self.decode_seconds = np.zeros(slots)
        self.decision_seconds = np.zeros(slots)
        self.tokens, self.bad = engine.tokens, engine.bad
        self.known = np.zeros(tuple(self.tokens.shape), dtype=np.int64)  # the tokens that the host has seen
        self.coming: deque[_ComingTokens] = deque()
        self.done: deque[TokenEvent | Completion] = deque()

    def events(self) -> Iterator[TokenEvent | Completion]:
        while True:
            self._start_forks()
            self._admit()
            yield from self._drain()
            if not self.alive.any():
                if self.next_request is None and not self.holders:
                    return
                continue
            left = self.sync_every
            while left and (ran := self._decode_steps(left)):
                left -= ran  # a row that is full waits for the others: a look costs more
            self._look_at_tokens()  # of the steps before these
            self._fetch(self.alive)
            if self.sync_every == 1:
                self._look_at_tokens()
            yield from self._drain()

    def _drain(self) -> Iterator[TokenEvent | Completion]:
        while self.done:
            yield self.done.popleft()

    # -- rows come
    # ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Prefills waiting requests into free slots, several at once; waits until an eighth of the slots is
        free. An iterator that had no more may have some again."""
        if self.next_request is None:
            self.next_request = next(self.waiting, None)
        if self.next_request is None or (
            self.alive.any() and len(self.free) < max(1, self.engine.slots // 8)
        ):
            return
        while self.next_request is not None and self.free:
            batch: list[_Row] = []
            tokens = 0
            while self.next_request is not None and self.free:
                request = self.next_request
                problem = request.problem(self.engine.vocabulary, self.engine.max_length)
                new = len(request.input_ids) - (len(request.prefix.tokens) if request.prefix else 0)
                if not problem and batch and tokens + new > self.engine.prefill_tokens:
                    break
                self.next_request = next(self.waiting, None)
                if problem:
                    self._fail(request, problem)
                    continue
                tokens += new
                batch.append(
                    _Row(
                        request.key,
                        request,
                        heapq.heappop(self.free),
                        sorted(request.forks, key=lambda fork: fork.step),
                    )
                )
            if batch:
                self._prefill(batch)

    def _fail(self, request: Request | Fork, error: str) -> None:
        self.done.append(Completion(request.key, [], [], (), "error", error))
        for fork in request.forks:
            self._fail(fork, error)

    def _prefill(self, batch: list[_Row]) -> None:
        """Gives the device the prompts of `batch` behind the steps that it still has: nothing here waits for
        it, unless the scheduler decides by what it finds."""
        stopwatch = gpu.Stopwatch(self.device)
        new: list[GivenTokens] = []
        for row in batch:
            prefix = row.request.prefix
            offset = len(prefix.tokens) if prefix else 0
            if prefix:
                self.cache.write_slot(row.slot, prefix.layers)
            new.append(GivenTokens(row.slot, offset, row.request.input_ids[offset:]))
        flat, places, behind = lay_out(self.engine, new, leftovers=False)
        ends = (behind - 1).tolist()
        self.engine.state.set_uniform(self.precision.prefill_bits)
        probes = self._probes(batch, ends)
        keep = [*ends, *itertools.chain.from_iterable(probes)]
        logits = self.engine.forward(flat, places, self._tensor(keep))
        known = list(logits[len(ends) :].split([len(probe) for probe in probes]))
        logits = logits[: len(ends)]

        at = np.asarray([row.slot for row in batch])
        for row in batch:
            self.rows[row.slot] = row
            self.precision.start(row.slot, row.request.switch_steps)
            self.sampling.start(row.slot, row.request, logits.shape[1])
        self.alive[at] = True
        self.prompt_length[at] = [len(row.request.input_ids) for row in batch]
        self.limit[at] = [row.request.max_new_tokens for row in batch]
        self.stops[at] = [row.request.stop is not None for row in batch]
        for array in (self.produced, self.seen, self.decode_seconds, self.decision_seconds):
            array[at] = 0
        statistics = self._take_tokens(at, logits)
        begun = np.zeros_like(self.alive)
        begun[at] = True
        self._fetch(begun)
        self.engine.pulse.step([self.precision.prefill_bits] * len(batch))
        took, count = stopwatch.stop(), len(batch)  # a row is not to hold the others
        for row in batch:
            row.prefill_seconds = lambda: took() / count
            if row.pending:
                self.holders.add(row.slot)
        self._send_features([row for row in batch if row.request.want_features])
        self._decide(at, 0, statistics, dict(zip(at.tolist(), known, strict=False)))
        if self.sync_every == 1:
            self._look_at_tokens()

    def _send_features(self, batch: Sequence[_Row]) -> None:
        """Sends for the KV features of prompts, all in one transfer, which rows wait for when asked."""
        if not batch:
            return
        lengths = [len(row.request.input_ids) for row in batch]
        coming = self.cache.send_features([row.slot for row in batch], lengths, self.device)
        for row, features in zip(batch, coming, strict=True):
            row.features = features

    def _probes(self, batch: Sequence[_Row], ends: Sequence[int]) -> list[list[int]]:
        """Of each row of a prefill, whose last tokens are at `ends`, the tokens whose logits the scheduler
        will ask for. [] where it asks for none, or they are too many or not of this forward: then looking at
        the prompts takes one forward more."""
        asks = self.precision.prompt_bits[:1] == (self.precision.prefill_bits,)
        if not asks or any(row.request.prefix or row.request.switch_steps for row in batch):
            return []
        probes = [
            list(range(end + 1 - len(ids) + probe_offset(len(ids)), end + 1))
            for end, ids in zip(ends, (row.request.input_ids for row in batch), strict=True)
        ]
        return probes if sum(map(len, probes)) <= most_logits(self.engine) else []

    def _decide(
        self,
        at: np.ndarray,
        step: int | np.ndarray,
        statistics: Tensor | None,
        known: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Those of the rows `at` that have come to their decision point, having run decode forward `step`.
        `known`: slot -> logits after its probe's tokens in the prefill."""
        due = self.precision.due(at, step)
        if len(due) == 0:
            return
        rows = [self._row(slot) for slot in due]
        consumed = self.prompt_length[due] + (0 if isinstance(step, int) else step[np.isin(at, due)])
        chosen = None if statistics is None else statistics[self._tensor(np.flatnonzero(np.isin(at, due)))]
        state = PrefillState(
            keys=[row.request.draws_from for row in rows],
            max_new_tokens=[row.request.max_new_tokens for row in rows],
            prompt_lengths=[len(row.request.input_ids) for row in rows],
            features=lambda: self._features(due, consumed),
            statistics=self._by_name(chosen),
            prompts=lambda precisions: self._prompts(due, precisions, known or {}),
        )
        started = time.perf_counter()
        self.precision.decide(due, state)
        seconds = (time.perf_counter() - started) / len(due)
        self.decision_seconds[due] = seconds
        self.decode_seconds[due] += seconds

    def _prompts(
        self, at: np.ndarray, precisions: Sequence[int], known: Mapping[int, Tensor]
    ) -> list[PromptState]:
        prompts = [(slot, self._row(slot).request.input_ids) for slot in at.tolist()]
        of_prefill = precisions[0] == self.precision.prefill_bits and all(
            slot in known for slot, _ in prompts
        )
        return look_back(
            self.engine, prompts, precisions, [known[slot] for slot, _ in prompts] if of_prefill else None
        )

    def _by_name(self, statistics: Tensor | None) -> dict[str, np.ndarray]:
        if statistics is None:
            return {}
        return dict(zip(self.precision.wanted, statistics.cpu().numpy().T, strict=True))

    def _features(self, at: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        features = [self.cache.mean_features(*row) for row in zip(at.tolist(), lengths.tolist(), strict=True)]
        keys = torch.nn.utils.rnn.pad_sequence([keys for keys, _ in features], batch_first=True)
        values = torch.nn.utils.rnn.pad_sequence([values for _, values in features], batch_first=True)
        return keys, values, self._tensor(lengths)

    def _row(self, slot: int) -> _Row:
        row = self.rows[slot]
        assert row is not None
        return row

    # -- steps
    # --------------------------------------------------------------------------------------------------------

    def _decode_steps(self, most: int) -> int:
        """Up to `most` more tokens for the rows whose turn it is, as long as they and their precisions stay
        the same: how many it were. 0: all are full."""
        started = time.perf_counter()
        live = np.flatnonzero(self.alive & (self.produced < self.limit))
        if len(live) == 0:
            return 0
        step = self.produced[live]
        bits = self.precision.bits(live, step)
        order = np.argsort(-bits, kind="stable")
        at, step, bits = live[order], step[order], bits[order]
        sampled = self.sampling.is_needed(at)
        room = int((self.limit[at] - step).min())
        count = 1 if sampled else min(most, room, self.precision.alike(at, step))
        position = self.prompt_length[at] + step - 1
        self.precision.log[at[:, None], step[:, None] + np.arange(count)] = bits[:, None]
        self.engine.state.set_tokens(bits)
        if self.engine.steps is not None:
            wanted = self.precision.wanted
            statistics, logits = self.engine.steps.run(
                self.engine, at, step, position, count, wanted, sampled
            )
            if logits is not None:
                self.tokens[self._tensor(at), self._tensor(step)] = self.sampling.choose(at, step, logits)
            self.produced[at] += count
        else:
            statistics = None
            for done in range(count):
                slots, positions = self._tensor(at), self._tensor(position + done)
                longest = int(position.max()) + done + 1
                places = TokenPlaces(slots, positions, longest, int(at.max()) + 1)
                tokens = self.tokens[slots, self._tensor(step - 1 + done)]
                statistics = self._take_tokens(at, self.engine.forward(tokens, places, None))
        step = step + count - 1
        if self.precision.scheduler is not None and self.precision.scheduler.observes:
            keys = [self._row(slot).request.draws_from for slot in at]
            self.precision.observe(at, step, keys, self._by_name(statistics))
        self.decode_seconds[at] += (time.perf_counter() - started) / len(at)
        self._decide(at, step, statistics)
        self.engine.pulse.step(bits, count)
        return count

    def _take_tokens(self, at: np.ndarray, logits: Tensor) -> Tensor | None:
        """Appends the next token of each row; the statistics [n, k] that the scheduler wants."""
        top, tokens = highest(logits)
        if self.sampling.is_needed(at):
            tokens = self.sampling.choose(at, self.produced[at], logits)
        slots, new = self._tensor(at), self._tensor(self.produced[at])
        self.tokens[slots, new] = tokens
        before = torch.where(new > 0, self.bad[slots], NEVER)
        self.bad[slots] = torch.minimum(before, torch.where(torch.isfinite(top), NEVER, new))
        self.produced[at] += 1
        return token_statistics(self.precision.wanted, logits) if self.precision.wanted else None

    # -- rows go
    # --------------------------------------------------------------------------------------------------------

    def _look_at_tokens(self) -> None:
        """Waits for the tokens that are coming, if any, and ends the rows that have ended."""
        while self.coming:
            started = time.perf_counter()
            coming = self.coming.popleft()
            tokens = coming.arrived()
            # a GPU has run the forwards by now, but not when they were given to it
            self.decode_seconds[coming.at] += (time.perf_counter() - started) / len(coming.at)
            self.known[coming.at[:, None], coming.columns] = tokens[:, :-1]
            self._end_rows(_NewTokens(coming.at, coming.counts, tokens[:, :-1], tokens[:, -1]))

    def _fetch(self, of: np.ndarray) -> None:
        """Sends for what the host has not seen yet of the rows in the slots `of` bool [S], in one transfer.
        What is on its way already is not theirs."""
        at = np.flatnonzero(of & (self.produced > self.seen))
        if len(at) == 0:
            return
        seen, produced = self.seen[at], self.produced[at]
        columns = seen[:, None] + np.arange((produced - seen).max())
        columns = np.minimum(columns, produced[:, None] - 1)  # a row's last new token, again
        width = self.engine.told.shape[1]
        places = np.concatenate([columns, np.full((len(at), 1), width - 1)], 1) + width * at[:, None]
        new = self.engine.told.take(self._tensor(places))
        self.coming.append(_ComingTokens(at, produced - seen, columns, gpu.to_host(new)))

    def _end_rows(self, new: _NewTokens) -> None:
        """Looks at each row only where something is to be done about it."""
        is_end = np.isin(new.tokens, self.eos_array)
        ended = np.asarray(is_end.any(axis=1))
        seen = self.seen[new.at]
        count = seen + np.where(ended, is_end.argmax(axis=1) + 1, new.counts)
        self.seen[new.at] = seen + new.counts
        due = ended | (new.bad < count) | self.stops[new.at] | (count >= self.limit[new.at]) | self.stream
        unclean = []
        for index in np.flatnonzero(due).tolist():
            slot, tokens = int(new.at[index]), new.tokens[index, : new.counts[index]]
            end, reason = int(count[index]), "eos" if ended[index] else None
            if self.stops[slot]:
                end, reason = self._stop_of(slot, int(seen[index]), end, reason)
            if self.stream:
                self._stream_tokens(slot, int(seen[index]), tokens[: end - seen[index]])
            if new.bad[index] < end:  # what a row runs on to behind its end is not its own
                reason = "error"
            elif reason is None and end >= self.limit[slot]:
                reason = "length"
            if reason is None:
                continue
            # new token i lies at position `prompt_length` + i once a forward has read it
            prompt, read = int(self.prompt_length[slot]), int(self.produced[slot]) - 1
            unclean.append((slot, 0 if reason == "error" else prompt + end - 1, prompt + read))
            self.produced[slot] = end
            self._finish(slot, reason)
        self._clear(unclean)
        heirs = [slot for slot, first, stop in unclean if stop > first and self.alive[slot]]
        if heirs:
            self.bad.index_fill_(0, self._tensor(heirs), NEVER)  # of what their parents ran on to

    def _clear(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """Zeros in the cache for (slot, first position, the one behind the last): what rows ran on to behind
        their end, and all of rows that are not finite. A fork that takes its parent's slot over has less than
        what is kept."""
        slots, firsts, stops = np.asarray(parts, dtype=np.int64).reshape(-1, 3).T
        counts = stops - firsts
        if counts.any():
            positions = np.repeat(firsts, counts) + within(counts)
            where = self._tensor(np.stack([np.repeat(slots, counts), positions]))
            self.cache.clear_tokens(*where)

    def _stop_of(self, slot: int, seen: int, count: int, reason: str | None) -> tuple[int, str | None]:
        """(new tokens of the row, why it ends with them; None: it does not), asked of its own rule for every
        new token up to its end token."""
        stop = self._row(slot).request.stop
        assert stop is not None
        tokens = self.known[slot, :count].tolist()
        for end in range(seen + 1, count + 1 - (reason is not None)):
            if stop(tokens[:end]):
                return end, "stop"
        return count, reason

    def _stream_tokens(self, slot: int, seen: int, new: np.ndarray) -> None:
        bits = self.precision.log[slot, seen:]
        for token, precision in zip(new.tolist(), bits.tolist(), strict=False):
            self.done.append(TokenEvent(self._row(slot).key, token, precision))

    def _finish(self, slot: int, reason: str) -> None:
        row = self._row(slot)
        self.alive[slot] = False
        if reason == "error":
            error = f"FloatingPointError: {not_finite(self.engine.dtype)}"
            self._fail(Fork(row.key, 0, (), tuple(row.pending)), error)
            self._release(slot)
            return
        count = int(self.produced[slot])
        decision = self.precision.decision(slot, count)
        self.done.append(self._completion(row, row.key, decision, count, reason))
        # a fork behind the end of its parent never leaves it: the same tokens under the fork's name
        late = [fork for fork in row.pending if fork.step + 1 >= count]
        row.pending = [fork for fork in row.pending if fork.step + 1 < count]
        while late:
            fork = late.pop()
            plan = RowDecision(np.asarray(fork.switch_steps))
            self.done.append(self._completion(row, fork.key, plan, count, reason))
            late += [child for child in fork.forks if child.step + 1 >= count]
            row.pending += [child for child in fork.forks if child.step + 1 < count]
        row.pending.sort(key=lambda fork: fork.step)
        if not row.pending:
            self._release(slot)
            return
        heir = (
            row.pending.pop()
        )  # shares the longest part, so the others can still start from what it leaves untouched
        self._become_fork(slot, slot, heir, row.pending)

    def _completion(self, row: _Row, key: str, decision: RowDecision, count: int, reason: str) -> Completion:
        slot, request = row.slot, row.request
        consumed = int(self.prompt_length[slot]) + count - 1
        tokens = self.known[slot, :count].tolist()
        prefix = None
        if request.want_prefix:
            prefix = Prefix((*request.input_ids, *tokens[:-1]), self.cache.read_slot(slot, consumed))
        return Completion(
            key=key,
            tokens=tokens,
            precision_trace=self.precision.trace(slot, count),
            switch_steps=tuple(int(min(step, request.max_new_tokens - 1)) for step in decision.switch_steps),
            finish_reason=reason,
            classes=decision.classes,
            scores=decision.scores,
            features=row.features() if row.features and key == request.key else None,
            prefix=prefix,
            prefill_seconds=row.prefill_seconds(),
            decode_seconds=float(self.decode_seconds[slot]),
            decision_seconds=float(self.decision_seconds[slot]),
        )

    def _release(self, slot: int) -> None:
        self.rows[slot] = None
        self.holders.discard(slot)
        heapq.heappush(self.free, slot)

    # -- forks
    # --------------------------------------------------------------------------------------------------------

    def _start_forks(self) -> None:
        """Copies the cache of rows that have come far enough into free slots, for the forks that wait
        there."""
        copies: list[tuple[int, int, int]] = []
        for slot in sorted(self.holders):
            row = self._row(slot)
            while row.pending and self.free and row.pending[0].step < self.seen[slot]:
                fork = row.pending.pop(0)
                target = heapq.heappop(self.free)
                copies.append((slot, target, int(self.prompt_length[slot]) + fork.step))
                self._become_fork(slot, target, fork, [])
            if not row.pending:
                self.holders.discard(slot)
        if not copies:
            return
        # a source is a row from before, a target was free: none is both
        of, to, kept = self._tensor(np.asarray(copies).T)
        self.cache.copy_slots(of, to, kept, max(length for _, _, length in copies))
        self.tokens[to] = self.tokens[of]
        self.bad.index_fill_(0, to, NEVER)

    def _become_fork(self, source: int, target: int, fork: Fork, inherited: list[Fork]) -> None:
        """Makes `target`, which holds or will hold the shared part of `source`'s cache, the live row of
        `fork`."""
        row = _Row(
            fork.key,
            self._row(source).request,
            target,
            sorted([*fork.forks, *inherited], key=lambda other: other.step),
        )
        self.rows[target] = row
        for array in (self.prompt_length, self.limit, self.stops):
            array[target] = array[source]
        self.produced[target] = self.seen[target] = fork.step + 1
        self.known[target, : fork.step + 1] = self.known[source, : fork.step + 1]
        self.precision.fork(source, target, fork.step, fork.switch_steps)
        self.sampling.fork(source, target, lambda: self.tokens[source, : fork.step + 1])
        self.decode_seconds[target] = self.decision_seconds[target] = 0.0
        self.alive[target] = True
        if row.pending:
            self.holders.add(target)
        else:
            self.holders.discard(target)

    def _tensor(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return gpu.to_device(np.asarray(values), self.device)
