"""What the driver costs, without Ray: units per second of driver code, and the workers that it keeps busy.

    PYTHONPATH=. python bench/scale.py

The pool is the farm's own; `ray.get`, `ray.wait` and actors are replaced by a simulation with a clock of its
own, in which a worker takes `row_seconds` for a row and answers at the right moment. What is real is the
driver's Python: its time is part of the simulated clock, so a driver that is too slow makes workers wait.
"""

from __future__ import annotations

import heapq
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

from bench import _record
from pmpd.farm import pool as pool_module
from pmpd.farm.options import FarmOptions
from pmpd.farm.progress import Progress
from pmpd.farm.task import Place, Unit, UnitResult, WorkerInfo


@dataclass(frozen=True)
class Config:
    units: int = 30_000
    """Units of the first figure, on 32 workers that take no time."""
    workers: int = 256
    rows: int = 20
    """Rows per worker of the second figure."""
    row_seconds: float = 1.0
    output: Path = _record.RESULTS


class Clock:
    """Real time of the driver, and the waits that it slept through without waiting."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.real = time.monotonic

    def now(self) -> float:
        return self.real() + self.skipped

    def wait_until(self, moment: float) -> None:
        self.skipped += max(0.0, moment - self.now())


class Reference:
    __slots__ = ("result", "when")

    def __init__(self, when: float, result: Any) -> None:
        self.when, self.result = when, result


class Method:
    def __init__(self, call: Any) -> None:
        self.remote = call


class Actor:
    """A worker in the simulation."""

    def __init__(self, ray: SimulatedRay) -> None:
        self.ray, self.free, self.busy = ray, ray.clock.now(), 0.0
        self.start, self.run, self.beat = Method(self._start), Method(self._run), Method(self._beat)

    def _start(self, *arguments: Any) -> Reference:
        return self.ray.add(Reference(self.ray.clock.now(), WorkerInfo(Place("w", 1), {}, "simulated")))

    def _run(self, unit: Unit) -> Reference:
        seconds = self.ray.row_seconds * len(unit.ids)
        self.free = max(self.free, self.ray.clock.now()) + seconds
        self.busy += seconds
        return self.ray.add(Reference(self.free, UnitResult(len(unit.ids), 0, 0, seconds)))

    def _beat(self) -> Reference:
        return self.ray.add(Reference(self.ray.clock.now(), None))


class SimulatedRay:
    """`wait`, `get`, `kill`, `remote` and `nodes` of Ray, over simulated workers."""

    def __init__(self, clock: Clock, row_seconds: float, cpus: int) -> None:
        self.clock, self.row_seconds, self.cpus = clock, row_seconds, cpus
        self.actors: list[Actor] = []
        self.due: list[tuple[float, int, Reference]] = []

    def add(self, reference: Reference) -> Reference:
        heapq.heappush(self.due, (reference.when, id(reference), reference))
        return reference

    def remote(self, **_: Any) -> Any:
        def make(_: type) -> Any:
            maker = mock.Mock()
            maker.options.side_effect = lambda **_: mock.Mock(remote=self._actor)
            return maker

        return make

    def _actor(self, *_: Any) -> Actor:
        self.actors.append(Actor(self))
        return self.actors[-1]

    def wait(
        self, references: list[Reference], num_returns: int, timeout: float
    ) -> tuple[list[Reference], list]:
        if timeout and self.due:
            self.clock.wait_until(min(self.due[0][0], self.clock.now() + timeout))
        done = []
        now = self.clock.now()
        while self.due and self.due[0][0] <= now and len(done) < num_returns:
            done.append(heapq.heappop(self.due)[2])
        for reference in done if timeout else ():
            heapq.heappush(
                self.due, (reference.when, id(reference), reference)
            )  # the second look takes them all
        return done, []

    def get(self, reference: Reference) -> Any:
        return reference.result

    def kill(self, actor: Actor) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "n", "Alive": True, "Resources": {"CPU": float(self.cpus)}}]


def simulate(units: list[Unit], workers: int, row_seconds: float) -> tuple[float, float, SimulatedRay]:
    """(seconds of the driver's own, seconds on the simulated clock, the simulation)."""
    clock = Clock()
    ray = SimulatedRay(clock, row_seconds, workers)
    lease = mock.Mock(path="", token="")
    options = FarmOptions(num_workers=workers, progress_seconds=1e9)
    quiet = Progress("bench", 10**9, 0, 0, every=1e9)
    names = {
        "ray": ray,
        "live_nodes": lambda: {"n": {"CPU": float(workers)}},
        "check_capacity": lambda *_: None,
        "autoscaler_present": lambda: False,
        "ray_private": mock.Mock(draining_nodes=set, place_of=lambda actor: ("n", "n")),
    }
    with mock.patch.multiple(pool_module, **names), mock.patch.object(time, "monotonic", clock.now):
        pool = pool_module.ClusterPool(mock.Mock(), "", lease, options, quiet, {}, mock.Mock())
        begin, began = time.process_time(), clock.now()
        pool.work(iter(units), len(units))
        return time.process_time() - begin, clock.now() - began, ray


def units_of(count: int, rows: int = 1) -> list[Unit]:
    return [Unit(tuple(f"{index:08x}{row:08x}" for row in range(rows)), {}) for index in range(count)]


def main(config: Config) -> None:
    seconds, _, _ = simulate(units_of(config.units), 32, 0.0)
    rate = config.units / seconds
    total = config.workers * config.rows
    own, wall, ray = simulate(units_of(total), config.workers, config.row_seconds)
    busy = sum(actor.busy for actor in ray.actors) / (wall * config.workers)
    bars = [
        {"bar": "units per second of driver code, at least 3,000", "measured": rate, "met": rate >= 3000},
        {
            "bar": f"{config.workers} workers at {config.row_seconds:g} s rows busy, at least 0.95",
            "measured": busy,
            "met": busy >= 0.95,
        },
    ]
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']:.4g}")
    print(f"{own / total * 1e6:.0f} µs of driver code per unit with {config.workers} workers")
    results = {
        "units": config.units,
        "workers": config.workers,
        "rows_per_worker": config.rows,
        "row_seconds": config.row_seconds,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bars": bars,
    }
    print(_record.write("scale_driver", results, "cpu", config.output))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
