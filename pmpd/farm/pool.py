"""The workers of one run on a Ray cluster: they start as nodes come, are fed units, and are replaced when
they die or make no progress."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pmpd import plugins, storage
from pmpd.errors import UserError
from pmpd.farm import ray_private
from pmpd.farm.blame import after_kill, after_node_loss, after_stall
from pmpd.farm.capacity import Demand, autoscaler_present, check_capacity, live_nodes, staff
from pmpd.farm.local_pool import FAILURES_BEFORE_STOP, check_models
from pmpd.farm.options import FarmOptions
from pmpd.farm.progress import Progress
from pmpd.farm.task import Beat, FarmTask, Unit, UnitResult, WorkerInfo, note_path, shard_path
from pmpd.farm.worker import UNITS, Worker
from pmpd.storage.lease import Lease, LeaseLostError

START_RETRY_SECONDS = 30.0
"""Between two tries to start one more worker where others are up or load: a node that can start none costs
the run nothing."""

NOT_NICE = {"env_vars": {"RAY_worker_niceness": "0"}}
"""Ray gives its workers a niceness of 15: on a machine that others use, they had what is left, and a GPU
waited for a worker's Python."""

_kept: list[tuple[Any, Demand]] | None = None
"""Workers of the last run, with what each holds, where `keep_workers` is on."""


@contextlib.contextmanager
def keep_workers() -> Iterator[None]:
    """Inside, the workers of a run stay for the next one, which starts its task in them: Python and its
    modules are there already."""
    global _kept
    _kept = []
    try:
        yield
    finally:
        for actor, _ in _kept:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        _kept = None


BEAT_SECONDS = 2.0
STALL_SECONDS = 300.0
STALL_STEPS = 20
"""A worker is taken for stalled after so many of the longest steps that any worker needed."""

PAUSE_SECONDS = 30.0
"""A driver that stood still for longer has no opinion on who else did."""


@dataclass(eq=False)
class _Seat:
    """One worker, from the moment it is asked for."""

    actor: Any
    id: str
    start: Any
    """Reference of the pending start, None once it is ready."""
    info: WorkerInfo | None = None
    node: str = ""
    queue: deque[tuple[Any, Unit]] = field(default_factory=deque)
    """What it was given and has not reported, in order: the first is the one it works on."""
    beat: Any = None
    """Reference of the beat that was asked for."""
    asked: float = 0.0
    seen: Beat | None = None
    moved: float = field(default_factory=time.monotonic)
    """When it last made progress; while it starts: when it got its node, or was asked for."""


class ClusterPool:
    """The workers of one run and the units they hold."""

    def __init__(
        self,
        task: FarmTask,
        dataset: str,
        lease: Lease,
        options: FarmOptions,
        progress: Progress,
        known_models: Mapping[str, Any],
        journal: storage.Journal,
    ) -> None:
        """UserError where no node can ever hold a worker."""
        self.task, self.dataset, self.lease = task, dataset, lease
        self.options, self.progress, self.journal = options, progress, journal
        self.models: dict[str, Any] = dict(known_models)
        self.devices: set[str] = set()
        self.seats: list[_Seat] = []
        self.pending: deque[Unit] = deque()
        """Units that came back, before those not drawn yet."""
        self._source: Iterator[Unit] = iter(())
        self._undrawn = 0
        self.start_failures = 0
        self.draining: set[str] = set()
        actor: Any = ray.remote  # its types do not know concurrency groups
        self._actor = actor(
            max_restarts=0, max_task_retries=0, concurrency_groups={"beat": 1, "units": UNITS}
        )(Worker)
        self._longest_step = 0.0
        self._planned = 0.0
        self._grow_after = 0.0
        self._nodeless_since: float | None = None
        self._turned = time.monotonic()
        check_capacity(options, progress.say)
        self._plan()

    @property
    def wanted(self) -> int:
        return self.staffing.workers

    def work(self, units: Iterable[Unit], count: int) -> None:
        """Returns when every one of the `count` units is durable. They are drawn as workers take them."""
        self._source, self._undrawn = iter(units), count
        self._turned = time.monotonic()
        while self._waiting or any(seat.queue for seat in self.seats):
            self.lease.check()
            self._plan()
            self._grow()
            self._assign()
            self._ask_for_beats()
            self._collect()
            self._replace_stalled()
            self._report()

    @property
    def _waiting(self) -> int:
        """Units that no worker has."""
        return len(self.pending) + self._undrawn

    def close(self) -> None:
        for seat in self.seats:
            idle = seat.info is not None and not seat.queue and seat.node not in self.draining
            if _kept is not None and idle:
                _kept.append((seat.actor, self.staffing.demand))
            else:
                ray.kill(seat.actor)
        self.seats.clear()

    def _report(self) -> None:
        now = time.monotonic()
        progress = self.progress
        progress.up = sum(seat.info is not None for seat in self.seats)
        progress.worker_seconds += progress.up * (now - self._turned)
        self._turned = now
        progress.wanted = max(progress.up, self.wanted)
        given = sum(len(unit.ids) for seat in self.seats for _, unit in seat.queue)
        progress.queued = progress.total - progress.done - given
        waiting = "starting workers" if self._nodeless_since is None else "waiting for a node"
        progress.note = "" if progress.up else waiting
        progress.tick()

    # -- workers come

    def _plan(self) -> None:
        now = time.monotonic()
        if now - self._planned < 2:
            return
        self._planned = now
        nodes = live_nodes()
        leaving = ray_private.draining_nodes() & set(nodes)
        for node in sorted(leaving - self.draining):
            self.progress.say(f"node {node[:8]} is about to go: its workers get no new units")
        self.draining = leaving
        self.nodes = {node: resources for node, resources in nodes.items() if node not in leaving}
        self.staffing = staff(self.options, list(self.nodes.values()))
        for seat in [seat for seat in self.seats if seat.node in leaving and not seat.queue]:
            self._remove(seat)
        if any(self.staffing.demand.fits(node) for node in self.nodes.values()):
            self._nodeless_since = None
            return
        self._nodeless_since = self._nodeless_since or now
        waited = self.options.node_wait_seconds
        if now - self._nodeless_since > waited and not autoscaler_present():
            raise UserError(
                f"for {waited:.0f} s no node could hold a worker ({self.staffing.demand}); finished rows are "
                f"kept: bring a node back and run the same command again"
            )

    def _grow(self) -> None:
        if time.monotonic() < self._grow_after and self.seats:
            return
        units = self._waiting + sum(len(seat.queue) for seat in self.seats)
        demand = self.staffing.demand
        while sum(seat.node not in self.draining for seat in self.seats) < min(self.wanted, units):
            actor = self._kept_worker() or self._actor.options(
                num_cpus=demand.cpus, num_gpus=demand.gpus, scheduling_strategy="SPREAD", runtime_env=NOT_NICE
            ).remote(storage.connections(), plugins.loaded())
            worker_id = uuid.uuid4().hex[:12]
            start = actor.start.remote(
                self.task, self.dataset, self.lease.path, self.lease.token, worker_id, demand.gpus,
                self.staffing.per_node,
            )  # fmt: skip
            self.seats.append(_Seat(actor, worker_id, start))

    def _kept_worker(self) -> Any:
        """One of the run before, None: there is none. Those that hold something else than a worker of this
        run give it back."""
        while _kept:
            actor, held = _kept.pop()
            if held == self.staffing.demand:
                return actor
            ray.kill(actor)
        return None

    def _started(self, seat: _Seat) -> None:
        try:
            info: WorkerInfo = ray.get(seat.start)
        except RayError as error:
            self._start_failed(seat, error)
            return
        self.start_failures = 0
        seat.info, seat.start, seat.moved = info, None, time.monotonic()
        seat.node = self._node(seat)[0]
        check_models(self.dataset, self.models, info.models, info.place.worker)
        self.models = dict(info.models)
        self.devices.add(info.device)
        self.progress.tell_how(info.note)
        self.progress.worker_seconds += info.seconds
        self.progress.ready()

    def _start_failed(self, seat: _Seat, error: RayError) -> None:
        node, address, alive = self._node(seat)
        self._remove(seat)
        if not alive:
            self.progress.say(f"node {address} went while a worker started there")
            return
        self.progress.say(f"a worker could not start on {address}: {_short(error)}")
        if any(other.info is not None or self._node(other)[0] not in ("", node) for other in self.seats):
            self._grow_after = time.monotonic() + START_RETRY_SECONDS
            return
        self.start_failures += 1
        if isinstance(_rebuilt(error), ValueError):
            raise _rebuilt(error) from None
        if self.start_failures >= FAILURES_BEFORE_STOP:
            raise UserError(
                f"{self.start_failures} workers could not start; the last one: {_short(error)}"
            ) from error

    # -- units go and come back

    def _assign(self) -> None:
        ready = [seat for seat in self.seats if seat.info is not None and seat.node not in self.draining]
        for depth in range(UNITS):
            for seat in ready:
                # A second unit only if that leaves one for each worker that is still starting.
                if len(seat.queue) > depth or (depth and self._waiting <= len(self.seats) - len(ready)):
                    continue
                # Where a process ended is blamed on the first unit that is not durable: one that may end it
                # has a worker for itself.
                if any(unit.suspected for _, unit in seat.queue):
                    continue
                unit = self._next_for(seat, ready, alone=not seat.queue)
                if unit is not None:
                    if not seat.queue:
                        seat.moved = time.monotonic()
                    seat.queue.append((seat.actor.run.remote(unit), unit))

    def _next_for(self, seat: _Seat, ready: list[_Seat], alone: bool) -> Unit | None:
        """The next unit; one that ended a process on this node only if no other node has a worker, a
        suspected one only if the worker has no other."""
        for index, unit in enumerate(self.pending):
            if unit.suspected and not alone:
                continue
            if unit.failed or seat.node not in unit.kills or all(other.node in unit.kills for other in ready):
                del self.pending[index]
                return unit
        if self._undrawn:
            self._undrawn -= 1
            return next(self._source)
        return None

    def _collect(self) -> None:
        waiting = {seat.start: seat for seat in self.seats if seat.start is not None}
        waiting |= {reference: seat for seat in self.seats for reference, _ in seat.queue}
        waiting |= {seat.beat: seat for seat in self.seats if seat.beat is not None}
        if not waiting:
            time.sleep(0.2)
            return
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for reference in done:
            seat = waiting[reference]
            if seat not in self.seats:  # found dead by another of its references
                continue
            if reference == seat.start:
                self._started(seat)
            elif reference == seat.beat:
                self._beat(seat)
            else:
                self._finished(seat, reference)

    def _finished(self, seat: _Seat, reference: Any) -> None:
        index = next(i for i, (queued, _) in enumerate(seat.queue) if queued == reference)
        unit = seat.queue[index][1]
        seat.moved = time.monotonic()
        try:
            result: UnitResult = ray.get(reference)
        except RayTaskError as error:
            del seat.queue[index]
            cause = getattr(error, "cause", None)
            if (
                isinstance(cause, storage.ShardWriteError | LeaseLostError)
                or unit.failures + 1 >= FAILURES_BEFORE_STOP
            ):
                raise (_rebuilt(cause) if cause is not None else error) from error
            self.progress.say(f"a unit failed outside of its rows and is tried again: {_short(error)}")
            self.pending.append(replace(unit, failures=unit.failures + 1))
        except RayError as error:  # of the actor, of its node, or Ray's memory monitor
            self._died(seat, error)
        else:
            del seat.queue[index]
            self.progress.beats.pop(seat.id, None)
            self.progress.add(result)
            self.journal.add(result.entry)

    # -- workers that hang

    def _ask_for_beats(self) -> None:
        now = time.monotonic()
        every = max(BEAT_SECONDS, 0.02 * len(self.seats))
        for seat in self.seats:
            if seat.queue and seat.beat is None and now - seat.asked > every:
                seat.asked, seat.beat = now, seat.actor.beat.remote()

    def _beat(self, seat: _Seat) -> None:
        reference, seat.beat = seat.beat, None
        try:
            beat: Beat | None = ray.get(reference)
        except RayError:  # it is dead, which its unit tells
            return
        if beat is not None and seat.queue:
            self._longest_step = max(self._longest_step, beat.longest_seconds)
            self.progress.beats[seat.id] = beat
        if beat != seat.seen:
            seat.seen, seat.moved = beat, time.monotonic()

    def _stall_seconds(self) -> float:
        return self.options.stall_seconds or max(STALL_SECONDS, STALL_STEPS * self._longest_step)

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        if now - self._turned > PAUSE_SECONDS:
            for seat in self.seats:
                seat.moved = now
        for seat in list(self.seats):
            still = now - seat.moved
            if seat.info is not None and seat.queue and still > self._stall_seconds():
                self._stalled(seat, still)
            elif seat.info is None and still > self.options.start_seconds:
                if not self._node(seat)[0]:
                    seat.moved = now  # it waits for a node, that is no stall
                    continue
                self.progress.stalls += 1
                self._start_failed(seat, RayError(f"it has not started in {still:.0f} s"))

    def _stalled(self, seat: _Seat, still: float) -> None:
        """Its late result must not be published: it is struck from the lease before its unit is given to
        another one."""
        assert seat.info is not None
        self.progress.stalls += 1
        self.progress.say(
            f"worker {seat.info.place.worker} has made no progress for {still:.0f} s; it is replaced and its "
            f"units are done again"
        )
        self.lease.revoke(seat.id)
        self._remove(seat)
        self._requeue(seat, lambda unit: after_stall(unit, still))

    # -- workers that go

    def _died(self, seat: _Seat, error: RayError) -> None:
        """Replaces a dead worker: what it had finished counts, the unit it was at is blamed (unless its node
        went), the rest waits."""
        node, _, node_alive = self._node(seat)
        self._remove(seat)
        place = seat.info.place.worker if seat.info else "?"
        self.progress.say(
            f"worker {place} is gone ({'its node too' if not node_alive else _death(error)}); its units are "
            f"done again"
        )
        alive = set(live_nodes())
        others = any(
            self.staffing.demand.fits(resources) for other, resources in self.nodes.items() if other != node
        )

        def blame(unit: Unit) -> list[Unit]:
            if not node_alive:
                return after_node_loss(unit)
            note = storage.read_bytes(note_path(self.dataset, unit))
            if note is not None:
                storage.remove(note_path(self.dataset, unit))
            return after_kill(unit, node, alive, others, note.decode() if note else _death(error))

        self._requeue(seat, blame)

    def _requeue(self, seat: _Seat, blame: Any) -> None:
        """Units of a worker that is gone: the first that is not durable is blamed."""
        again: list[Unit] = []
        blamed = False
        for _, unit in seat.queue:
            errors = self._durable_errors(unit)
            if errors is not None:
                self.progress.add(UnitResult(len(unit.ids), errors, 0, 0.0))
            elif blamed:
                again.append(unit)
            else:
                blamed = True
                again += blame(unit)
        self.pending.extendleft(reversed(again))

    def _durable_errors(self, unit: Unit) -> int | None:
        """Rows with an error in the unit's shard, None where that is not there as a whole."""
        try:
            shard = storage.inspect_shard(shard_path(self.dataset, unit), self.task.id_column)
        except ValueError:
            return None
        return sum(shard.errors) if set(shard.ids) == set(unit.ids) else None

    def _node(self, seat: _Seat) -> tuple[str, str, bool]:
        """Id and address of the worker's node ("" and "?" until it has one), and whether that is alive. Ray's
        table knows it from when the worker begins to start, which is before the worker can say it."""
        node, address = ray_private.place_of(seat.actor)
        if not address:  # not placed yet: the id is that of a node which was asked
            return "", "?", True
        dead = any(known["NodeID"] == node and not known["Alive"] for known in ray.nodes())
        return node, address, not dead

    def _remove(self, seat: _Seat) -> None:
        self.seats.remove(seat)
        self.progress.beats.pop(seat.id, None)
        with contextlib.suppress(RayError):
            ray.kill(seat.actor)  # unreachable is not dead: it must not come back


def _rebuilt(error: BaseException) -> BaseException:
    """Ray's errors are also instances of their cause's class, with a page of remote traceback as text: the
    plain one again."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _death(error: RayError, limit: int = 300) -> str:
    """Ray's reason, without the ids before it and the guesses behind it."""
    text = " ".join(str(error).split()).partition(" Some common causes include")[0]
    return text.partition("The actor is dead because ")[2][:limit] or text[:limit]


def _short(error: BaseException, limit: int = 300) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(_rebuilt(error)).split()))
    return f"{type(_rebuilt(error)).__name__}: {text}"[:limit]
