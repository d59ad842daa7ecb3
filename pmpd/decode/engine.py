"""The only fast decode loop: batched greedy decoding with a precision per row and step.

Legend: S slots, n rows of a forward, J pairs of the precision chain, V vocabulary.

Rows live in the slots of one preallocated KV cache and join and leave at any step (continuous batching).
Every step sorts the live rows by precision, so the tokens of one precision are one contiguous segment, and
runs one forward for all of them. Steps, positions and switch steps are known on the host (NumPy, by slot);
tokens stay on the device, and the host looks at them every `sync_every` steps.

A request may have *forks*: continuations that share its first decode forwards and then follow another plan. A
cache is only ever appended to, so a fork can start from its parent's slot at any later time; when the parent
ends, its last fork takes the slot over."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmpd.decode.graph_steps import GraphSteps, top_probability
from pmpd.decode.llama_cpu import recognise
from pmpd.decode.pulse import Pulse
from pmpd.decode.requests import Completion, Fork, Prefix, Request, TokenEvent
from pmpd.decode.slots import Plan, SlotCache, Stretch, slot_attention
from pmpd.errors import UserError
from pmpd.schedulers.base import PrefillState, Scheduler
from pmpd.schedulers.chain import NEVER, chain_bits
from pmpd.weights.base import cache_argument, shared_state

PREFILL_TOKENS = 4096
"""Prompt tokens of one prefill forward, at most (a longer prompt runs alone)."""


@dataclass
class _Row:
    """A live row, or the finished one whose slot waits for its forks."""

    key: str
    request: Request
    slot: int
    pending: list[Fork]
    """Forks that are still to start from this slot, longest shared part last."""
    features: tuple[np.ndarray, np.ndarray] | None = None
    prefill_seconds: float = 0.0


def not_finite(dtype: torch.dtype) -> str:
    """What it means that logits are not finite, and the cure."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return (
            "the model's logits are not finite in float16, where activations overflow past 65504; load it "
            "as bfloat16 or float32 (--dtype, dtype=)"
        )
    return f"the model's logits are not finite in {name}; its weights may be damaged: make or copy them again"


class Engine:
    """Decodes requests for one model. Not thread-safe; one `run` at a time.

    `slots`: rows that decode together. `max_length`: prompt plus new tokens that a row may have.
    `sync_every`: steps between two looks at the tokens (more hides the device's latency; rows run on past
    their end in between).
    `lean`: take the written-out forward of `pmpd.decode.llama_cpu` where it knows the model. `head_bits` 8:
    its head multiplies from 8 bits (bfloat16 models on a CPU with AVX2).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 32,
        max_length: int = 2304,
        sync_every: int = 1,
        lean: bool = True,
        head_bits: int = 16,
    ) -> None:
        if slots < 1:
            raise UserError(f"slots {slots}: an engine needs one slot at least")
        if head_bits not in (16, 8):
            raise UserError(f"head bits {head_bits}: a head has 16 or 8")
        self.model = model
        self.slots = slots
        self.max_length = max_length
        self.sync_every = sync_every
        self.state = shared_state(model)
        self.cache_argument = cache_argument(model)
        self.device = next(model.parameters()).device
        self.dtype = cast(Tensor, model.get_input_embeddings().weight).dtype
        self.vocabulary = len(cast(Tensor, model.get_input_embeddings().weight))
        self.lean = recognise(model, self.state, head_bits) if lean else None
        self.steps = GraphSteps.of(model) if lean and self.device.type == "cuda" else None
        spare = 1 if self.steps else 0  # a slot for the unused rows of a captured step
        self.cache = SlotCache(slots + spare, max_length)
        self.tokens = torch.zeros(slots + spare, max_length + 1, dtype=torch.int64, device=self.device)
        self.bad = torch.zeros(slots + spare, dtype=torch.bool, device=self.device)
        self.pulse = Pulse()

    def run(
        self,
        requests: Iterable[Request],
        scheduler: Scheduler | None,
        prefill_bits: int,
        eos_token_ids: Collection[int],
    ) -> Iterator[Completion]:
        """Decodes all `requests`, in any order of completion. `scheduler` None: every forward at
        `prefill_bits`.

        A request that does not fit `max_length`, or whose logits are not finite, completes with `error` set.
        """
        events = _Run(self, requests, scheduler, prefill_bits, eos_token_ids, stream=False).events()
        return (event for event in events if isinstance(event, Completion))

    def stream(
        self,
        requests: Iterable[Request],
        scheduler: Scheduler | None,
        prefill_bits: int,
        eos_token_ids: Collection[int],
    ) -> Iterator[TokenEvent | Completion]:
        """As `run`, with a `TokenEvent` for every token before the row's `Completion`. Looks at the tokens
        after every step."""
        return _Run(self, requests, scheduler, prefill_bits, eos_token_ids, stream=True).events()

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, plan: Plan, keep: Tensor | None) -> Tensor:
        """Logits [len(keep), V] after the tokens `keep` int64 of the flat forward `input_ids` int64 [n]; None
        keeps all."""
        if self.lean is not None:
            return self.lean(input_ids, plan, keep, self.cache)
        with slot_attention(self.model, self.cache, plan):
            output = self.model(
                input_ids=input_ids[None],
                position_ids=plan.positions[None],
                use_cache=True,
                logits_to_keep=0 if keep is None else keep,
                **{self.cache_argument: self.cache},
            )
        return output.logits[0]


class _Run:
    """The state of one `Engine.run`."""

    def __init__(
        self,
        engine: Engine,
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
        self.scheduler = scheduler
        self.chain = scheduler.precisions if scheduler else (prefill_bits,)
        self.prefill_bits = prefill_bits
        self.eos = frozenset(eos)
        self.eos_array = np.asarray(sorted(self.eos), dtype=np.int64)
        self.stream = stream
        every_step = stream or (scheduler is not None and scheduler.needs_probability)
        self.sync_every = 1 if every_step else engine.sync_every
        slots = engine.slots
        self.rows: list[_Row | None] = [None] * slots
        self.free = list(range(slots))
        self.holders: set[int] = set()  # slots whose row has forks that wait for a slot
        self.alive = np.zeros(slots, dtype=bool)
        self.prompt_length = np.zeros(slots, dtype=np.int64)
        self.produced = np.zeros(slots, dtype=np.int64)
        self.seen = np.zeros(slots, dtype=np.int64)  # tokens the host has looked at
        self.limit = np.zeros(slots, dtype=np.int64)
        self.switch_steps = np.zeros((slots, len(self.chain) - 1), dtype=np.int32)
        self.decode_seconds = np.zeros(slots)
        self.tokens, self.bad = engine.tokens, engine.bad
        self.done: deque[TokenEvent | Completion] = deque()

    def events(self) -> Iterator[TokenEvent | Completion]:
        steps = 0
        while True:
            self._start_forks()
            self._admit()
            yield from self._drain()
            if not self.alive.any():
                if self.next_request is None and not self.holders:
                    return
                continue
            self._decode_step()
            steps += 1
            if steps % self.sync_every == 0 or self._someone_is_full():
                self._look_at_tokens()
            yield from self._drain()

    def _drain(self) -> Iterator[TokenEvent | Completion]:
        while self.done:
            yield self.done.popleft()

    def _someone_is_full(self) -> bool:
        return bool((self.alive & (self.produced >= self.limit)).any())

    # -- rows come
    # ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Prefills waiting requests into free slots, several at once; waits until an eighth of the slots is
        free."""
        if self.next_request is None or (
            self.alive.any() and len(self.free) < max(1, self.engine.slots // 8)
        ):
            return
        while self.next_request is not None and self.free:
            batch: list[_Row] = []
            tokens = 0
            while self.next_request is not None and self.free:
                request = self.next_request
                problem = self._refuse(request)
                cached = len(request.prefix.tokens) if request.prefix else 0
                if not problem and batch and tokens + len(request.input_ids) - cached > PREFILL_TOKENS:
                    break
                self.next_request = next(self.waiting, None)
                if problem:
                    self._fail(request, problem)
                    continue
                tokens += len(request.input_ids) - cached
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

    def _refuse(self, request: Request) -> str | None:
        length = len(request.input_ids)
        if length == 0:
            return "ValueError: the prompt has no tokens"
        if min(request.input_ids) < 0 or max(request.input_ids) >= self.engine.vocabulary:
            return (
                f"ValueError: the prompt has tokens outside 0..{self.engine.vocabulary - 1}, which is all "
                f"that the model knows"
            )
        if request.max_new_tokens < 1:
            return f"ValueError: max_new_tokens {request.max_new_tokens}: one new token at least"
        if length + request.max_new_tokens - 1 > self.engine.max_length:
            return (
                f"ValueError: a prompt of {length} tokens with {request.max_new_tokens} new ones "
                f"needs {length + request.max_new_tokens - 1} positions; there are {self.engine.max_length}"
            )
        if request.prefix is not None:
            cached = request.prefix.tokens
            if len(cached) >= length or tuple(request.input_ids[: len(cached)]) != cached:
                return (
                    f"ValueError: the given cache of {len(cached)} tokens is not a beginning of the "
                    f"prompt's {length} tokens"
                )
        return None

    def _fail(self, request: Request | Fork, error: str) -> None:
        self.done.append(Completion(request.key, [], [], (), "error", error))
        for fork in request.forks:
            self._fail(fork, error)

    def _prefill(self, batch: list[_Row]) -> None:
        started = time.perf_counter()
        flat: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        stretches, ends = [], []
        for row in batch:
            ids, prefix = list(row.request.input_ids), row.request.prefix
            offset = len(prefix.tokens) if prefix else 0
            if prefix:
                self.cache.write_slot(row.slot, prefix.layers)
            stretches.append(Stretch(len(flat), len(flat) + len(ids) - offset, row.slot, offset))
            flat += ids[offset:]
            slots += [row.slot] * (len(ids) - offset)
            positions += range(offset, len(ids))
            ends.append(len(flat) - 1)
        plan = Plan(
            self._tensor(slots), self._tensor(positions), max(positions) + 1, self.engine.slots, stretches
        )
        self.engine.state.set_uniform(self.prefill_bits)
        logits = self.engine.forward(self._tensor(flat), plan, self._tensor(ends))

        at = np.asarray([row.slot for row in batch])
        for row in batch:
            self.rows[row.slot] = row
        self.alive[at] = True
        self.prompt_length[at] = [len(row.request.input_ids) for row in batch]
        self.limit[at] = [row.request.max_new_tokens for row in batch]
        for array in (self.produced, self.seen, self.decode_seconds):
            array[at] = 0
        probability = self._take_tokens(at, logits)
        fetched = self._fetch()
        self.engine.pulse.step([self.prefill_bits] * len(batch))
        seconds = (time.perf_counter() - started) / len(batch)
        for row in batch:
            row.prefill_seconds = seconds
            if row.request.want_features:
                keys, values = self.cache.mean_features(row.slot, len(row.request.input_ids))
                row.features = (keys.half().cpu().numpy(), values.half().cpu().numpy())
            if row.pending:
                self.holders.add(row.slot)
        self._decide(batch, at, probability)
        self._end_rows(*fetched)

    def _decide(self, batch: list[_Row], at: np.ndarray, probability: Tensor | None) -> None:
        if self.scheduler is None:
            return
        planned = [row.request.switch_steps for row in batch]
        open_rows = [i for i, steps in enumerate(planned) if steps is None]
        for i, steps in enumerate(planned):
            if steps is not None:
                self.switch_steps[at[i]] = steps
        if open_rows:
            rows = [batch[i] for i in open_rows]
            state = PrefillState(
                keys=[row.request.draw_key or row.key for row in rows],
                max_new_tokens=[row.request.max_new_tokens for row in rows],
                prompt_lengths=[len(row.request.input_ids) for row in rows],
                features=lambda: self._features(rows),
                top_probability=None if probability is None else probability[open_rows],
            )
            self.switch_steps[at[open_rows]] = self.scheduler.begin(state)

    def _features(self, rows: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
        features = [self.cache.mean_features(row.slot, len(row.request.input_ids)) for row in rows]
        keys = torch.nn.utils.rnn.pad_sequence([keys for keys, _ in features], batch_first=True)
        values = torch.nn.utils.rnn.pad_sequence([values for _, values in features], batch_first=True)
        return keys, values, self._tensor([len(keys) for keys, _ in features])

    # -- one step
    # -------------------------------------------------------------------------------------------------------

    def _decode_step(self) -> None:
        started = time.perf_counter()
        live = np.flatnonzero(self.alive & (self.produced < self.limit))
        step = self.produced[live]
        bits = chain_bits(self.chain, self.switch_steps[live], step)
        order = np.argsort(-bits, kind="stable")
        at, step, bits = live[order], step[order], bits[order]
        position = self.prompt_length[at] + step - 1
        self.engine.state.set_tokens(bits.tolist())
        if self.engine.steps is not None:
            wanted = self.scheduler is not None and self.scheduler.needs_probability
            probability = self.engine.steps.run(self.engine, at, step, position, wanted)
            self.produced[at] += 1
        else:
            slots = self._tensor(at)
            plan = Plan(slots, self._tensor(position), int(position.max()) + 1, int(at.max()) + 1)
            logits = self.engine.forward(self.tokens[slots, self._tensor(step - 1)], plan, None)
            probability = self._take_tokens(at, logits)
        if probability is not None and self.scheduler is not None:
            switch_steps = self.switch_steps[at]
            self.scheduler.observe(switch_steps, step, probability.cpu().numpy())
            self.switch_steps[at] = switch_steps
        self.engine.pulse.step(bits)
        seconds = (time.perf_counter() - started) / len(at)
        self.decode_seconds[at] += seconds

    def _take_tokens(self, at: np.ndarray, logits: Tensor) -> Tensor | None:
        """Appends the greedy token of each row; its probability where the scheduler wants it."""
        top, tokens = logits.max(dim=-1)
        slots = self._tensor(at)
        self.tokens[slots, self._tensor(self.produced[at])] = tokens
        self.bad[slots] = self.bad[slots] * self._tensor(self.produced[at] > 0) | ~torch.isfinite(top)
        self.produced[at] += 1
        if self.scheduler is None or not self.scheduler.needs_probability:
            return None
        return top_probability(top, logits)

    # -- rows go
    # --------------------------------------------------------------------------------------------------------

    def _look_at_tokens(self) -> None:
        """Brings the new tokens to the host and ends the rows that have ended."""
        started = time.perf_counter()
        live, first, fetched = self._fetch()
        # a GPU has run the forwards by now, but not when they were given to it
        self.decode_seconds[live] += (time.perf_counter() - started) / len(live)
        self._end_rows(live, first, fetched)

    def _fetch(self) -> tuple[np.ndarray, int, np.ndarray]:
        """(live slots, the first column fetched, new tokens and the flag of bad logits by slot), in one
        transfer."""
        live = np.flatnonzero(self.alive)
        first, last = int(self.seen[live].min()), int(self.produced[live].max())
        return live, first, torch.cat([self.tokens[:, first:last], self.bad[:, None]], dim=1).cpu().numpy()

    def _end_rows(self, live: np.ndarray, first: int, fetched: np.ndarray) -> None:
        for slot in live.tolist():
            seen, produced = int(self.seen[slot]), int(self.produced[slot])
            new = fetched[slot, seen - first : produced - first]
            self.seen[slot] = produced
            is_end = np.isin(new, self.eos_array)
            ended = bool(is_end.any())
            if ended:
                produced = self.produced[slot] = seen + int(is_end.argmax()) + 1
            if self.stream:
                self._stream_tokens(slot, seen, new[: produced - seen])
            if fetched[slot, -1]:
                self._finish(slot, "error", f"FloatingPointError: {not_finite(self.engine.dtype)}")
            elif ended:
                self._finish(slot, "eos")
            elif produced >= self.limit[slot]:
                self._finish(slot, "length")

    def _stream_tokens(self, slot: int, seen: int, new: np.ndarray) -> None:
        row = self.rows[slot]
        assert row is not None
        for index, token in enumerate(new, start=seen):
            bits = int(self._bits_until(slot, index + 1)[index])
            self.done.append(TokenEvent(row.key, int(token), bits))

    def _bits_until(self, slot: int, count: int) -> np.ndarray:
        """Precision of the forwards that produced the first `count` new tokens: int [count]."""
        steps = np.arange(1, count)
        bits = chain_bits(
            self.chain,
            np.broadcast_to(self.switch_steps[slot], (count - 1, self.switch_steps.shape[1])),
            steps,
        )
        return np.concatenate([[self.prefill_bits], bits])

    def _finish(self, slot: int, reason: str, error: str | None = None) -> None:
        row = self.rows[slot]
        assert row is not None
        self.alive[slot] = False
        if error is not None:
            self._fail(Fork(row.key, 0, (), tuple(row.pending)), error)
            self.cache.clear_slot(slot)
            self._release(slot)
            return
        count = int(self.produced[slot])
        self.done.append(self._completion(row, row.key, self.switch_steps[slot], count, reason))
        # a fork behind the end of its parent never leaves it: the same tokens under the fork's name
        late = [fork for fork in row.pending if fork.step + 1 >= count]
        row.pending = [fork for fork in row.pending if fork.step + 1 < count]
        while late:
            fork = late.pop()
            self.done.append(self._completion(row, fork.key, np.asarray(fork.switch_steps), count, reason))
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

    def _completion(
        self, row: _Row, key: str, switch_steps: np.ndarray, count: int, reason: str
    ) -> Completion:
        slot, request = row.slot, row.request
        bits = self._bits_until(slot, count)
        consumed = int(self.prompt_length[slot]) + count - 1
        tokens = self.tokens[slot, :count].tolist()
        prefix = None
        if request.want_prefix:
            prefix = Prefix((*request.input_ids, *tokens[:-1]), self.cache.read_slot(slot, consumed))
        return Completion(
            key=key,
            tokens=tokens,
            precision_trace=[(int(value), len(list(group))) for value, group in itertools.groupby(bits)],
            switch_steps=tuple(int(min(step, request.max_new_tokens - 1)) for step in switch_steps),
            finish_reason=reason,
            features=row.features if key == request.key else None,
            prefix=prefix,
            prefill_seconds=row.prefill_seconds,
            decode_seconds=float(self.decode_seconds[slot]),
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
        for slot in sorted(self.holders):
            row = self.rows[slot]
            assert row is not None
            while row.pending and self.free and row.pending[0].step < self.seen[slot]:
                fork = row.pending.pop(0)
                target = heapq.heappop(self.free)
                self.cache.copy_slot(slot, target, int(self.prompt_length[slot]) + fork.step)
                self._become_fork(slot, target, fork, [])
            if not row.pending:
                self.holders.discard(slot)

    def _become_fork(self, source: int, target: int, fork: Fork, inherited: list[Fork]) -> None:
        """Makes `target`, which holds the shared part of `source`'s cache, the live row of `fork`."""
        parent = self.rows[source]
        assert parent is not None
        row = _Row(
            fork.key, parent.request, target, sorted([*fork.forks, *inherited], key=lambda other: other.step)
        )
        self.rows[target] = row
        for array in (self.prompt_length, self.limit):
            array[target] = array[source]
        self.tokens[target, : fork.step + 1] = self.tokens[source, : fork.step + 1]
        self.bad[target] = False
        self.produced[target] = self.seen[target] = fork.step + 1
        self.switch_steps[target] = fork.switch_steps
        self.decode_seconds[target] = 0.0
        self.alive[target] = True
        if row.pending:
            self.holders.add(target)
        else:
            self.holders.discard(target)

    def _tensor(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values), device=self.device)


def never(chain: Sequence[int]) -> tuple[int, ...]:
    """Switch steps of a row that stays at the chain's first precision."""
    return (NEVER,) * (len(chain) - 1)
