"""The pool that needs no Ray: units are done in this process, one after another."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm.options import FarmOptions
from pmpd.farm.progress import Progress
from pmpd.farm.task import FarmTask, Place, Unit
from pmpd.farm.workbench import Workbench, error_text
from pmpd.storage.lease import Lease, LeaseLostError

FAILURES_BEFORE_STOP = 3
"""Failures of a unit outside of its rows (an input shard that can't be read) before the run stops."""


class LocalPool:
    """The only worker is this process. A row that ends its process ends the run; the same command goes on
    after it."""

    wanted = 1

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
        self.lease, self.progress, self.options, self.journal = lease, progress, options, journal
        self.models: dict[str, Any] = dict(known_models)
        self.devices: set[str] = set()
        self.dataset = dataset
        place = Place(f"{platform.node()}/{os.getpid()}", os.cpu_count() or 1, _gpu(options))
        self._bench = Workbench(task, dataset, lease.path, lease.token, place, "local", _poisoned)
        self._built = False

    def work(self, units: Iterable[Unit], count: int) -> None:
        """Returns when every unit is durable."""
        if not self._built:
            info = self._bench.build()
            check_models(self.dataset, self.models, info.models, info.place.worker)
            self.models, self._built = dict(info.models), True
            self.devices.add(info.device)
            self.progress.tell_how(info.note)
            self.progress.worker_seconds += info.seconds
        self.progress.ready()
        self.progress.up = self.progress.wanted = 1
        begin = time.monotonic()
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watcher.start()
        try:
            waiting = iter(units)
            unit = next(waiting, None)
            while unit is not None:
                later = next(waiting, None)
                self._do(unit, later)
                unit = later
        finally:
            ended.set()
            watcher.join()
            self.progress.worker_seconds += time.monotonic() - begin
            self.progress.beats.clear()

    def close(self) -> None:
        pass

    def _do(self, unit: Unit, later: Unit | None) -> None:
        while True:
            self.lease.check()
            try:
                result = self._bench.run(unit, later)
            except (storage.ShardWriteError, LeaseLostError):
                raise
            except Exception as error:
                if unit.failures + 1 >= FAILURES_BEFORE_STOP or isinstance(error, UserError):
                    raise
                unit = replace(unit, failures=unit.failures + 1)
                text = error_text(error).splitlines()[0]
                self.progress.say(f"a unit failed outside of its rows and is tried again: {text}")
            else:
                self.progress.beats.clear()
                self.progress.add(result)
                self.journal.add(result.entry)
                return

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            beat = self._bench.beat()
            if beat is not None:
                self.progress.beats["local"] = beat
            self.progress.tick()


def check_models(dataset: str, known: Mapping[str, Any], found: Mapping[str, Any], worker: str) -> None:
    """UserError where a worker has loaded another model than the one the folder's rows are from."""
    different = storage.differing_keys(known, found) if known else []
    if different:
        raise UserError(
            f"output folder {dataset}: another model than the one its rows are from (here {worker}: "
            f"{'; '.join(different)}); choose another output folder, and see that all nodes have the same "
            f"checkpoint"
        )


def _gpu(options: FarmOptions) -> tuple[str, ...]:
    if options.gpus_per_worker == 0:
        return ()
    import torch

    return ("0",) if torch.cuda.is_available() else ()


def _poisoned(unit: Unit, error: BaseException) -> None:
    raise UserError(
        f"the GPU's context is broken ({error_text(error).splitlines()[0]}) at one of the rows "
        f"{', '.join(unit.ids[:3])}, …; finished rows are kept: run the same command again"
    )
