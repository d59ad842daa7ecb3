"""The actor: a process of a Ray cluster with a workbench in it. Its methods return numbers only; rows go
straight to storage."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence

import ray

from pmpd import plugins, storage
from pmpd import threads as openmp
from pmpd.farm.task import Beat, FarmTask, Place, Unit, UnitResult, WorkerInfo, note_path
from pmpd.farm.workbench import Workbench, error_text

UNITS = 2
"""Under way at a time: one is worked on, the shard of the one before is written."""

POISONED = 17
"""Exit code of a worker whose GPU context is broken."""


class Worker:
    """`run` is called after `start`, in up to `UNITS` threads; `beat` from one of its own, at any time.
    Another `start`, once all units are done, begins another task."""

    def __init__(
        self, connections: Mapping[str, tuple[str, str]] | None = None, plugins: Sequence[str] = ()
    ) -> None:
        storage.connect(connections or {})
        self._plugins = plugins
        self._bench: Workbench | None = None

    def start(
        self,
        task: FarmTask,
        dataset: str,
        lease_path: str,
        lease_token: str,
        worker_id: str,
        gpus: float,
        workers_per_node: int,
    ) -> WorkerInfo:
        if self._bench is not None:
            self._bench = None
            if "torch" in sys.modules:
                from pmpd import gpu

                gpu.release_memory()  # of the model before this one
        context = ray.get_runtime_context()
        node_id = context.get_node_id()
        gpu_ids = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", []))
        own: dict[str, float] = next(
            (node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id), {}
        )
        share = gpus / own["GPU"] if gpus and own.get("GPU") else 1 / workers_per_node
        threads = max(1, int(own.get("CPU", 1) * share))
        if not openmp.prepare(threads):
            threads = int(os.environ["OMP_NUM_THREADS"].split(",")[0])
        if "torch" in sys.modules:  # imported while the task was unpickled: too late for the variables
            sys.modules["torch"].set_num_threads(threads)
        name = f"{ray.util.get_node_ip_address()}/{os.getpid()}" + (
            f"/gpu{'+'.join(gpu_ids)}" if gpu_ids else ""
        )
        plugins.load(self._plugins)
        place = Place(name, threads, gpu_ids)
        bench = Workbench(task, dataset, lease_path, lease_token, place, worker_id, self._poisoned)
        info = bench.build()
        self._bench = bench
        return info

    @ray.method(concurrency_group="units")
    def run(self, unit: Unit) -> UnitResult:
        assert self._bench is not None
        return self._bench.run(unit)

    @ray.method(concurrency_group="beat")
    def beat(self) -> Beat | None:
        return self._bench.beat() if self._bench is not None else None

    def _poisoned(self, unit: Unit, error: BaseException) -> None:
        """Ray would only tell that the process is gone, so why is left in the output folder."""
        assert self._bench is not None
        with contextlib.suppress(OSError):
            storage.write_bytes(note_path(self._bench.dataset, unit), error_text(error).encode())
        os._exit(POISONED)
