"""The workers of one run: they start as nodes come, are fed units, and are replaced when they die."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm import ray_private
from pmpd.farm.capacity import FarmOptions, autoscaler_present, live_nodes, plan
from pmpd.farm.progress import Progress
from pmpd.farm.worker import FarmTask, Unit, UnitResult, Worker, WorkerInfo, note_path, shard_path
from pmpd.storage.lease import Lease, LeaseLostError

UNITS_IN_FLIGHT = 2
"""Per worker: the next unit is there before the result of the last one has travelled."""

KILLS_BEFORE_SPLIT = 2
NODE_LOSSES_BEFORE_BLAME = 5
"""A unit that was lost with so many nodes is suspected of killing them."""

FAILURES_BEFORE_STOP = 3
"""Failures outside of any row (a worker that can't start, an input shard that can't be read) before the run
stops."""

START_RETRY_SECONDS = 30.0
"""Between two tries to start one more worker where others are up or load: a node that can start none costs
the run nothing."""


@dataclass
class _Slot:
    actor: Any
    start: Any
    """Reference of the pending start, None once it is ready."""
    info: WorkerInfo | None = None
    queue: deque[tuple[Any, Unit]] = field(default_factory=deque)
    """What it was given and has not reported, in order: the first is the one it works on."""


class Pool:
    """The workers of one run and the units they hold."""

    def __init__(
        self,
        task: FarmTask,
        dataset: str,
        lease: Lease,
        options: FarmOptions,
        progress: Progress,
        known_models: Mapping[str, Any],
    ):
        self.task, self.dataset, self.lease, self.options, self.progress = (
            task,
            dataset,
            lease,
            options,
            progress,
        )
        self.models: dict[str, Any] = dict(known_models)
        self.devices: set[str] = set()
        self.slots: list[_Slot] = []
        self.pending: deque[Unit] = deque()
        self.start_failures = 0
        self._actor = ray.remote(max_restarts=0, max_task_retries=0)(Worker)
        self._planned = 0.0
        self._grow_after = 0.0
        self._nodeless_since: float | None = None

    def work(self, units: Iterable[Unit]) -> None:
        """Returns when every unit is durable."""
        self.pending = deque(units)
        while self.pending or any(slot.queue for slot in self.slots):
            self.lease.check()
            self._plan()
            self._grow()
            self._assign()
            self._collect()
            self.progress.up = sum(slot.info is not None for slot in self.slots)
            self.progress.wanted = max(self.progress.up, self.wanted)
            self.progress.note = (
                ""
                if self.progress.up
                else "starting workers"
                if self._nodeless_since is None
                else "waiting for a node"
            )
            self.progress.tick()

    def close(self) -> None:
        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots.clear()

    def _plan(self) -> None:
        now = time.monotonic()
        if now - self._planned < 2:
            return
        self._planned = now
        nodes = live_nodes()
        self.wanted, self.demand, self.per_node = plan(self.options, nodes)
        if any(self.demand.fits(node) for node in nodes):
            self._nodeless_since = None
            return
        self._nodeless_since = self._nodeless_since or now
        if now - self._nodeless_since > self.options.node_wait_seconds and not autoscaler_present():
            raise UserError(
                f"for {self.options.node_wait_seconds:.0f} s no node could hold a worker ({self.demand}); "
                f"finished rows are kept: "
                "bring a node back and run the same command again"
            )

    def _grow(self) -> None:
        if time.monotonic() < self._grow_after and self.slots:
            return
        units = len(self.pending) + sum(len(slot.queue) for slot in self.slots)
        while len(self.slots) < min(self.wanted, units):
            actor: Any = self._actor.options(
                num_cpus=self.demand.cpus, num_gpus=self.demand.gpus, scheduling_strategy="SPREAD"
            ).remote(storage.connections())
            arguments = (
                self.task,
                self.dataset,
                self.lease.path,
                self.lease.token,
                self.demand.gpus,
                self.per_node,
            )
            self.slots.append(_Slot(actor, actor.start.remote(*arguments)))

    def _assign(self) -> None:
        ready = [slot for slot in self.slots if slot.info is not None]
        for depth in range(UNITS_IN_FLIGHT):
            for slot in ready:
                # A second unit only if that leaves one for each worker that is still starting.
                if (
                    self.pending
                    and len(slot.queue) <= depth
                    and (depth == 0 or len(self.pending) > len(self.slots) - len(ready))
                ):
                    unit = self.pending.popleft()
                    slot.queue.append((slot.actor.run.remote(unit), unit))

    def _collect(self) -> None:
        waiting = {slot.start: slot for slot in self.slots if slot.start is not None}
        waiting |= {reference: slot for slot in self.slots for reference, _ in slot.queue}
        if not waiting:
            time.sleep(0.2)
            return
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for reference in done:
            slot = waiting[reference]
            if slot not in self.slots:  # found dead by another of its references
                continue
            if reference == slot.start:
                self._started(slot)
            else:
                self._finished(slot, reference)

    def _started(self, slot: _Slot) -> None:
        try:
            info: WorkerInfo = ray.get(slot.start)
        except RayError as error:
            node, address, alive = self._node(slot)
            self._remove(slot)
            if not alive:
                self.progress.say(f"node {address} went while a worker started there")
                return
            self.progress.say(f"a worker could not start on {address}: {_short(error)}")
            if any(other.info is not None or self._node(other)[0] not in ("", node) for other in self.slots):
                self._grow_after = time.monotonic() + START_RETRY_SECONDS
                return
            self.start_failures += 1
            if isinstance(_rebuilt(error), ValueError):
                raise _rebuilt(error) from None
            if self.start_failures >= FAILURES_BEFORE_STOP:
                raise UserError(
                    f"{self.start_failures} workers could not start; the last one: {_short(error)}"
                ) from error
            return
        self.start_failures = 0
        slot.info, slot.start = info, None
        different = storage.differing_keys(self.models, info.models) if self.models else []
        if different:
            raise UserError(
                f"output folder {self.dataset}: another model than the one its rows are from (here "
                f"{info.place.worker}: "
                f"{'; '.join(different)}); choose another --output-dir, and see that all nodes have the same "
                f"checkpoint"
            )
        self.models = dict(info.models)
        self.devices.add(info.device)
        self.progress.ready()

    def _finished(self, slot: _Slot, reference: Any) -> None:
        index = next(i for i, (queued, _) in enumerate(slot.queue) if queued == reference)
        unit = slot.queue[index][1]
        try:
            result: UnitResult = ray.get(reference)
        except RayTaskError as error:
            del slot.queue[index]
            cause = getattr(error, "cause", None)
            if (
                isinstance(cause, storage.ShardWriteError | LeaseLostError)
                or unit.failures + 1 >= FAILURES_BEFORE_STOP
            ):
                raise (_rebuilt(cause) if cause is not None else error) from error
            self.progress.say(f"a unit failed outside of its rows and is tried again: {_short(error)}")
            self.pending.append(replace(unit, failures=unit.failures + 1))
        except RayError as error:  # of the actor, of its node, or Ray's memory monitor
            self._died(slot, error)
        else:
            del slot.queue[index]
            self.progress.add(result)

    def _died(self, slot: _Slot, error: RayError) -> None:
        """Replaces a dead worker: what it had finished counts, the unit it was at is blamed (unless its node
        went), the rest waits."""
        *_, node_alive = self._node(slot)
        self._remove(slot)
        place = slot.info.place.worker if slot.info else "?"
        self.progress.say(
            f"worker {place} is gone ({'its node too' if not node_alive else _death(error)}); its units are "
            f"done again"
        )
        again: list[Unit] = []
        blamed = False
        for _, unit in slot.queue:
            if self._is_durable(unit):
                errors = sum(
                    storage.inspect_shard(
                        shard_path(self.dataset, unit), self.task.id_column, full=False
                    ).errors
                )
                self.progress.add(UnitResult(len(unit.ids), errors, 0, 0.0))
            elif blamed:
                again.append(unit)
            else:
                blamed = True
                again += self._after_death(unit, node_alive, error)
        self.pending.extendleft(reversed(again))

    def _after_death(self, unit: Unit, node_alive: bool, error: RayError) -> list[Unit]:
        if not node_alive and unit.node_losses + 1 < NODE_LOSSES_BEFORE_BLAME:
            return [replace(unit, node_losses=unit.node_losses + 1)]
        note = storage.read_bytes(note_path(self.dataset, unit))
        if note is not None:
            storage.remove(note_path(self.dataset, unit))
        kills = unit.kills + 1
        if kills < (1 if unit.split else KILLS_BEFORE_SPLIT):
            return [replace(unit, kills=kills)]
        if len(unit.ids) > 1:
            return unit.singles()
        return [
            replace(
                unit,
                failed=f"WorkerDied: this row ended its worker process: "
                f"{note.decode() if note else _death(error)}",
            )
        ]

    def _is_durable(self, unit: Unit) -> bool:
        try:
            shard = storage.inspect_shard(shard_path(self.dataset, unit), self.task.id_column)
        except ValueError:
            return False
        return set(shard.ids) == set(unit.ids)

    def _node(self, slot: _Slot) -> tuple[str, str, bool]:
        """Id and address of the worker's node ("" and "?" until it has one), and whether that is alive. Ray's
        table knows it from when the worker begins to start, which is before the worker can say it."""
        node, address = ray_private.place_of(slot.actor)
        if not address:  # not placed yet: the id is that of a node which was asked
            return "", "?", True
        dead = any(known["NodeID"] == node and not known["Alive"] for known in ray.nodes())
        return node, address, not dead

    def _remove(self, slot: _Slot) -> None:
        self.slots.remove(slot)
        with contextlib.suppress(RayError):
            ray.kill(slot.actor)  # unreachable is not dead: it must not come back


def _rebuilt(error: BaseException) -> BaseException:
    """Ray's errors are also instances of their cause's class, with a page of remote traceback as text: the
    plain one again."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _death(error: RayError, limit: int = 300) -> str:
    """Ray's reason, without the ids before it."""
    text = " ".join(str(error).split())
    return text.partition("The actor is dead because ")[2][:limit] or text[:limit]


def _short(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(_rebuilt(error)).split())
    return f"{type(_rebuilt(error)).__name__}: {text}"[:limit]
