"""The farm: any per-item work on a Ray cluster, every item exactly once.

Plain actors, each holding one model and pinned to a GPU (or a share of the CPUs), fed by a small driver:

    input datasets ──ids──▶ driver ──units of ids──▶ actors ──one shard per unit──▶ output dataset

* The output is the only truth: to-do = input ids - ids in readable output shards. A damaged shard is set aside and done again.
* An actor writes its unit as one shard, all or nothing, named by the unit's ids; a unit done twice overwrites itself.
* Actors are never restarted by Ray. The driver replaces a dead one and queues its units again; a unit that kills its worker twice is
  split into single rows, and a row that kills again becomes an error row.
* One run per output folder: a lease with a heartbeat; a worker publishes nothing for a run that lost its lease.
* At the end the ids of input and output are compared; they must be equal, each once.

This is the only library module that imports Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

import pyarrow as pa
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.state import actors
from ray._private.utils import read_ray_address
from ray.exceptions import RayError, RayTaskError
from ray.util.metrics import Gauge

from pmpd import tables

UNITS_IN_FLIGHT = 2
"""Per worker: the next unit is there before the result of the last one has travelled."""

KILLS_BEFORE_SPLIT = 2
NODE_LOSSES_BEFORE_BLAME = 5
"""A unit that was lost with so many nodes is suspected of killing them."""

FAILURES_BEFORE_STOP = 3
"""Failures outside of any row (a worker that can't start, an input shard that can't be read) before the run stops."""

START_RETRY_SECONDS = 30.0
"""Between two tries to start one more worker where others are up or load: a node that can start none costs the run nothing."""

POISONED = 17
"""Exit code of a worker whose GPU context is broken."""

Item = dict[str, dict[str, Any]]
"""Input name -> the item's row of that input."""


# ------------------------------------------------------------------------------------------------------------- what a task has to say


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    worker: str
    """Its name in the `worker` column: node/process, with the GPU ids if it has any."""
    threads: int
    gpu_ids: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_ids else "cpu"


@dataclass(frozen=True)
class BuiltTask:
    """A task with its model loaded, inside a worker."""

    run: Callable[[list[Item]], Iterable[dict[str, Any]]]
    """Rows for a unit of items, in any order. An exception is charged to the one row that raises it (the others are done again)."""
    schema: pa.Schema
    models: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints: part of what defines the rows, so they must be equal on all workers and in a continued run."""
    device: str = ""
    tokens: Callable[[dict[str, Any]], int] = lambda row: 0
    """Tokens that a row cost, for the rate."""


class FarmTask(ABC):
    """A picklable recipe for the work. `build` is called once per worker."""

    table: ClassVar[str]
    """Name of the output table."""
    id_column: ClassVar[str] = "prompt_id"
    """The item's id, in the inputs and in the output."""
    one_row_per_item: ClassVar[bool] = True
    """False: an item may give several rows, all in one shard (the turns of a conversation)."""

    @abstractmethod
    def build(self, place: Place) -> BuiltTask:
        """Loads what the work needs. A ValueError stops the run with its message."""


AUTO_UNIT_ROWS = 64
"""Items of a unit where the rows that decode together follow from a worker's memory."""


def batch_of(batch_size: int | Literal["auto"]) -> tuple[int | None, int]:
    """What a job's --batch-size means: (rows that decode together, None = as many as the worker's memory holds; items of a unit)."""
    return (None, AUTO_UNIT_ROWS) if batch_size == "auto" else (batch_size, batch_size)


@dataclass(frozen=True)
class FarmOptions:
    """How the work is spread. Nothing here changes a row."""

    num_workers: int | None = None
    """Default: one per GPU (or share of it); without GPUs one per two cores of a node."""
    gpus_per_worker: float | None = None
    """Default: 1 where the cluster has GPUs, else 0. A fraction puts several workers on one GPU."""
    unit_rows: int = 32
    """Items per unit, which is also the rows of a shard."""
    retry_errors: bool = False
    capacity_seconds: float = 8.0
    node_wait_seconds: float = 300.0
    """How long a started run waits for a node when all that could hold a worker are gone."""
    progress_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers {self.num_workers}: at least 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"--gpus-per-worker {self.gpus_per_worker}: 0, a fraction like 0.5, or a whole number")
        if self.gpus_per_worker is not None and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"--gpus-per-worker {self.gpus_per_worker}: above 1 it must be a whole number")
        if self.unit_rows < 1:
            raise ValueError(f"--batch-size {self.unit_rows}: at least 1")


@dataclass(frozen=True)
class FarmResult:
    """What a run did."""

    dataset: str
    rows: int
    """In the whole output."""
    errors: int
    """Rows of the output with an error."""
    new_items: int
    seconds: float
    """Of this run, first worker's start included."""
    rows_per_second: float
    """New items per second since the first worker was ready."""
    unreadable: tuple[str, ...] = ()
    """Damaged shards, where they were set aside."""


class ReconcileError(RuntimeError):
    """Output and input do not hold the same ids."""


class LeaseLostError(ValueError):
    """Another run has taken over the output folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (LeaseLostError, self.args)


# ------------------------------------------------------------------------------------------------------------------------------ lease


def _host_identity() -> str:
    """Equal exactly for processes whose process ids can be compared: same machine, same boot, same container."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot}/{namespace}"


def _process_started(pid: int) -> str | None:
    """When the process started, in ticks since boot (so that a reused id is not taken for it); None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "?"


class Lease:
    """One run per folder, on any shared storage: a file with a random token and a heartbeat.

    A holder on the same machine is judged by its process id, at once. One on another machine is watched for `stale_seconds`: if its
    heartbeat moves the folder is in use, else the lease is taken over. No clocks are compared. If two take it at the same moment,
    the last writer has it and the other one sees that after a short settling time, or at its next heartbeat.

    ValueError: in use (says by whom and what to do). Use as a context manager.
    """

    def __init__(self, folder: str | Path, beat_seconds: float = 5.0, stale_seconds: float = 20.0) -> None:
        self.folder = str(folder)
        self.path = tables.join(folder, "_lease.json")
        self.token = uuid.uuid4().hex
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._record = {
            "token": self.token,
            "host": _host_identity(),
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_started(os.getpid()),
        }
        self._beat = 0
        self._stop = threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        holder = read_lease(self.path)
        if holder is not None and self._alive(holder):
            raise ValueError(
                f"output folder {self.folder}: in use by a run on {holder.get('hostname')} (process {holder.get('pid')}); wait for it to "
                f"end, stop it, or choose another --output-dir. If that run is certainly gone, delete {self.path}"
            )
        self._write()
        time.sleep(0.2 if "://" not in self.folder else 2.0)
        self._check_token()
        tables.remove_temporary(self.folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        with contextlib.suppress(OSError):
            if token_in(self.path) == self.token:
                tables.remove(self.path)

    def check(self) -> None:
        """LeaseLostError if the folder is no longer ours."""
        if self._problem is not None:
            raise self._problem

    def _alive(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("host") == self._record["host"]:
            started = _process_started(int(holder.get("pid", -1)))
            return started is not None and started == holder.get("started")
        deadline = time.monotonic() + self._stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._stale_seconds / 4))
            now = read_lease(self.path)
            if now is None:
                return False
            if now != holder:
                return True
        return False

    def _write(self) -> None:
        self._beat += 1
        tables.write_bytes(self.path, json.dumps({**self._record, "beat": self._beat}).encode())

    def _check_token(self) -> None:
        if token_in(self.path) != self.token:
            raise LeaseLostError(
                f"output folder {self.folder}: another run has taken it over; its rows are safe. Let one of the two finish, "
                "or choose another --output-dir"
            )

    def _keep(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._beat_seconds):
            try:
                self._check_token()
                self._write()
                last = time.monotonic()
            except LeaseLostError as error:
                self._problem = error
                return
            except OSError as error:  # a full disk or a storage hiccup: others only believe us for so long
                if time.monotonic() - last > 0.75 * self._stale_seconds:
                    self._problem = LeaseLostError(f"{self.path}: the heartbeat can't be written: {error}; run the same command again")
                    return


def read_lease(path: str) -> dict[str, Any] | None:
    content = tables.read_bytes(path)
    if content is None:
        return None
    try:
        holder = json.loads(content)
        return holder if isinstance(holder, dict) else {}
    except ValueError:
        return {}  # half-written by a file system that has no atomic rename: someone's, so it is watched


def token_in(path: str) -> str | None:
    return (read_lease(path) or {}).get("token")


# ----------------------------------------------------------------------------------------------------------------------------- worker


@dataclass(frozen=True)
class Unit:
    """Items done together by one worker, and written as one shard."""

    ids: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[str, int], ...]]
    """Input name -> (shard, row) per id."""
    kills: int = 0
    node_losses: int = 0
    failures: int = 0
    split: bool = False
    """A single row of a unit that killed its worker twice."""
    failed: str | None = None
    """Set: no work, only error rows with this text."""

    @property
    def name(self) -> str:
        return hashlib.sha256("/".join(sorted(self.ids)).encode()).hexdigest()[:16]

    def singles(self) -> list[Unit]:
        return [Unit((key,), {name: (at[i],) for name, at in self.rows.items()}, split=True) for i, key in enumerate(self.ids)]


@dataclass(frozen=True)
class UnitResult:
    items: int
    error_items: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class WorkerInfo:
    place: Place
    models: Mapping[str, Any]
    device: str


def shard_path(dataset: str, unit: Unit) -> str:
    return tables.join(tables.data_folder(dataset), f"part-{unit.name}.parquet")


def note_path(dataset: str, unit: Unit) -> str:
    """Where a worker that must end itself says why; temporary, as half-written files are."""
    return tables.join(dataset, f".death.{unit.name}.tmp")


def error_text(error: BaseException, tail_lines: int = 6) -> str:
    """Class, message and the end of the traceback."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip().splitlines()[-2 * tail_lines :]
    return f"{type(error).__name__}: {error}\n" + "\n".join(frames) if frames else f"{type(error).__name__}: {error}"


def poisons_process(error: BaseException | None) -> bool:
    """Whether the GPU context of this process is beyond repair. Running out of GPU memory is not that."""
    while error is not None:
        kind, text = type(error).__name__, str(error)
        if kind != "OutOfMemoryError" and (
            kind == "AcceleratorError" or any(s in text for s in ("CUDA error", "CUBLAS_STATUS", "device-side"))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


class Worker:
    """The actor: a loop around a task. Its methods return numbers only; rows go straight to storage."""

    def start(self, task: FarmTask, dataset: str, lease_path: str, lease_token: str, gpus: float, workers_per_node: int) -> WorkerInfo:
        context = ray.get_runtime_context()
        node_id = context.get_node_id()
        gpu_ids = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", []))
        own: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id), {})
        share = gpus / own["GPU"] if gpus and own.get("GPU") else 1 / workers_per_node
        threads = max(1, int(own.get("CPU", 1) * share))
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ[variable] = str(threads)
        if "torch" in sys.modules:  # imported while the task was unpickled: too late for the variables
            sys.modules["torch"].set_num_threads(threads)
        name = f"{ray.util.get_node_ip_address()}/{os.getpid()}" + (f"/gpu{'+'.join(gpu_ids)}" if gpu_ids else "")
        self.place = Place(name, threads, gpu_ids)
        self.task, self.dataset = task, dataset
        self.lease_path, self.lease_token = lease_path, lease_token
        if tables.read_bytes(lease_path) is None:
            raise ValueError(
                f"output folder {dataset}: node {name} does not see it; --output-dir must be on storage that all nodes share (NFS, s3://…)"
            )
        self._check_lease()
        self.built = task.build(self.place)
        return WorkerInfo(self.place, dict(self.built.models), self.built.device)

    def run(self, unit: Unit) -> UnitResult:
        """Does a unit and writes its shard; returns when that is durable."""
        begin = time.monotonic()
        self.unit = unit
        rows: dict[str, list[dict[str, Any]]] = {}
        items = self._read(unit)
        for key, item in items.items():
            problem = unit.failed or next((f"{name}: {row['error']}" for name, row in item.items() if row.get("error")), None)
            if problem is not None:
                rows[key] = [self._error_row(item, problem)]
        self._work({key: item for key, item in items.items() if key not in rows}, rows)
        table = self._table(items, rows)
        self._check_lease()
        tables.write_shard(table, shard_path(self.dataset, unit))
        error_items = sum(any(row.get("error") for row in rows[key]) for key in unit.ids)
        tokens = sum(self.built.tokens(row) for key in unit.ids for row in rows[key] if not row.get("error"))
        return UnitResult(len(unit.ids), error_items, tokens, time.monotonic() - begin)

    def _read(self, unit: Unit) -> dict[str, Item]:
        items: dict[str, Item] = {key: {} for key in unit.ids}
        for name, where in unit.rows.items():
            by_shard: dict[str, list[tuple[str, int]]] = {}
            for key, (path, index) in zip(unit.ids, where, strict=True):
                by_shard.setdefault(path, []).append((key, index))
            for path, wanted in by_shard.items():
                for (key, _), row in zip(wanted, tables.read_rows(path, [index for _, index in wanted]), strict=True):
                    if row[self.task.id_column] != key:
                        raise RuntimeError(f"{path}: changed while it was in use")
                    items[key][name] = row
        return items

    def _work(self, items: dict[str, Item], rows: dict[str, list[dict[str, Any]]]) -> None:
        """Fills `rows`. After an exception the items not yet done are tried one by one, to find the row it belongs to."""
        try:
            if items:
                self._collect(list(items.values()), rows)
        except Exception as error:
            if poisons_process(error):
                with contextlib.suppress(OSError):  # Ray would only tell that the process is gone
                    tables.write_bytes(note_path(self.dataset, self.unit), error_text(error).encode())
                os._exit(POISONED)
            left = {key: item for key, item in items.items() if key not in rows}
            if len(items) > 1:
                for key, item in left.items():
                    self._work({key: item}, rows)
            else:
                rows.update({key: [self._error_row(item, error_text(error))] for key, item in left.items()})
        for key, item in items.items():
            if key not in rows:
                rows[key] = [self._error_row(item, "the task returned no row for it")]

    def _collect(self, items: list[Item], rows: dict[str, list[dict[str, Any]]]) -> None:
        expected = {next(iter(item.values()))[self.task.id_column] for item in items}
        for row in self.built.run(items):
            key = row[self.task.id_column]
            assert key in expected, f"a row of an item that was not asked for: {key}"
            assert not (self.task.one_row_per_item and key in rows), f"two rows of one item: {key}"
            rows.setdefault(key, []).append(row)

    def _table(self, items: Mapping[str, Item], rows: dict[str, list[dict[str, Any]]]) -> pa.Table:
        """The unit's shard. An item with a value that its column can't hold becomes an error row, in `rows` too."""

        def table(keys: Iterable[str]) -> pa.Table:
            flat = [row for key in keys for row in rows[key]]
            if "worker" in self.built.schema.names:
                flat = [{**row, "worker": row.get("worker") or self.place.worker} for row in flat]
            return tables.to_table(flat, self.built.schema)

        try:
            return table(items)
        except ValueError:
            for key, item in items.items():
                try:
                    table([key])
                except ValueError as error:
                    rows[key] = [self._error_row(item, error_text(error))]
            return table(items)

    def _error_row(self, item: Item, text: str) -> dict[str, Any]:
        """What the first input knows of the item, in the columns that the output shares with it, and the error."""
        source = next(iter(item.values()))
        row = {name: source.get(name) for name in self.built.schema.names if name in source} | {"error": text}
        # The table's own key must not be null; where that is not the item's id it is derived from it.
        first = self.built.schema.names[0]
        return row if first in row else {first: hashlib.sha256(f"{row[self.task.id_column]}/error".encode()).hexdigest()[:16], **row}

    def _check_lease(self) -> None:
        if token_in(self.lease_path) != self.lease_token:
            raise LeaseLostError(f"output folder {self.dataset}: this run no longer holds it; nothing was written")


# --------------------------------------------------------------------------------------------------------------------------- progress


class Progress:
    """One line: a bar in a terminal, else a line every `every` seconds. The same numbers go to `ray.util.metrics`."""

    NAMES = ("rows_done", "rows_total", "rows_per_second", "tokens_per_second", "eta_seconds", "workers_up", "workers_wanted", "row_errors")

    def __init__(self, stage: str, total: int, done: int, errors: int, stream: TextIO | None = None, every: float = 10.0) -> None:
        self.stage, self.total, self.done, self.errors = stage, total, done, errors
        self.new, self.tokens, self.up, self.wanted = 0, 0, 0, 0
        self.note = ""
        self._stream = sys.stderr if stream is None else stream
        self._every = 0.5 if self._stream.isatty() else every
        self._first_ready: float | None = None
        self._last = time.monotonic()
        self._last_metrics = 0.0
        self._gauges = {name: Gauge(f"pmpd_{name}", f"PMPD farm: {name}", tag_keys=("stage",)) for name in self.NAMES}

    def ready(self) -> None:
        """The first worker is ready: from here on the rate is counted."""
        if self._first_ready is None:
            self._first_ready = time.monotonic()

    def add(self, result: UnitResult) -> None:
        self.done += result.items
        self.new += result.items
        self.errors += result.error_items
        self.tokens += result.tokens

    @property
    def rows_per_second(self) -> float:
        return self.new / max(time.monotonic() - self._first_ready, 1e-9) if self._first_ready is not None else 0.0

    def numbers(self) -> dict[str, float]:
        rate = self.rows_per_second
        tokens = self.tokens * rate / self.new if self.new else 0.0
        eta = (self.total - self.done) / rate if rate else float("nan")
        return dict(zip(self.NAMES, (self.done, self.total, rate, tokens, eta, self.up, self.wanted, self.errors), strict=True))

    def line(self) -> str:
        n = self.numbers()
        eta = n["eta_seconds"]
        left = "--:--" if eta != eta else f"{int(eta // 60)}:{int(eta % 60):02}" if eta < 3600 else f"{eta / 3600:.1f} h"
        text = (
            f"{self.done}/{self.total} rows  {n['rows_per_second']:.2f} rows/s  {n['tokens_per_second']:.0f} tokens/s  ETA {left}  "
            f"workers {self.up}/{self.wanted}  errors {self.errors}"
        )
        return text + (f"  ({self.note})" if self.note else "")

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last_metrics >= 1 or force:
            self._last_metrics = now
            for name, value in self.numbers().items():
                if value == value:
                    self._gauges[name].set(value, tags={"stage": self.stage})
        if now - self._last < self._every and not force:
            return
        self._last = now
        if self._stream.isatty():
            filled = int(24 * self.done / max(self.total, 1))
            self._stream.write(f"\r{self.stage} {'█' * filled}{'░' * (24 - filled)} {self.line()}\x1b[K" + ("\n" if force else ""))
        else:
            self._stream.write(f"{self.stage}: {self.line()}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line of its own, for what a person should know."""
        self._stream.write(("\r\x1b[K" if self._stream.isatty() else "") + f"{self.stage}: {text}\n")
        self._stream.flush()


# --------------------------------------------------------------------------------------------------------------------------- cluster


def connect() -> None:
    """Joins the Ray of RAY_ADDRESS (a submitted job has it), else the one that `ray start` made or joined on this machine, else starts
    one for this process. Such a Ray of another process is never joined: it ends with its process.

    ValueError: RAY_ADDRESS can't be joined, or the machine's own Ray refuses this process.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    given = os.environ.get("RAY_ADDRESS") or "auto"
    address = read_ray_address() if given == "auto" else given
    if address is None or address == "local" or (given == "auto" and not _answers(address)):
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    told = f"RAY_ADDRESS={address}" if given != "auto" else f"the Ray of this machine, {address}"
    if not _answers(address):
        raise ValueError(f"{told}: no Ray answers there; start it, or unset RAY_ADDRESS")
    if given == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does where it looks for the address itself
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RayError, ValueError) as error:
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise ValueError(
                f"{told}: it refuses this process's token; put the cluster's token into ~/.ray/auth_token and set RAY_AUTH_MODE=token "
                "(RAY_ADDRESS=local starts a Ray of its own)"
            ) from error
        raise ValueError(
            f"{told}: it can't be joined ({error}); give host:port of a running Ray (RAY_ADDRESS=local starts one of its own)"
        ) from error


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself takes minutes to find that nothing does."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def output_folder(path: str) -> str:
    """A submitted job runs in a copy of the working directory that Ray deletes: there, a relative path is taken from home."""
    submitted = "/runtime_resources/working_dir_files/" in os.getcwd() and "://" not in path
    return tables.absolute(Path.home() / path if submitted else path)


def live_nodes() -> list[dict[str, float]]:
    """Total resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def autoscaler_present() -> bool:
    """Whether something can add nodes to this cluster."""
    from ray._private.state import state

    if (
        state.get_cluster_config() is not None or Path("~/ray_bootstrap_config.yaml").expanduser().exists()
    ):  # `ray up` writes it on the head
        return True
    return bool(_autoscaler_node_types())


def _autoscaler_node_types() -> list[str]:
    """Node types of a `ray up` autoscaler. A cluster without one reports a type per node, named after the node's id."""
    from ray.experimental.internal_kv import _internal_kv_get

    status = _internal_kv_get("__autoscaling_status")
    if not status:
        return []
    return node_types_in(json.loads(status))


def node_types_in(status: Mapping[str, Any]) -> list[str]:
    """Names of the node types in an autoscaler's status; those of a cluster without one are not counted."""
    report = status.get("autoscaler_report") or {}
    types = {name for kind in ("active_nodes", "idle_nodes", "pending_launches") for name in report.get(kind) or {}}
    types |= set((report.get("node_type_mapping") or {}).values())
    return sorted(name for name in types if not name.startswith("node_"))


@dataclass(frozen=True)
class Demand:
    """What one worker asks of a node."""

    cpus: float
    gpus: float

    def fits(self, node: Mapping[str, float]) -> bool:
        return node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {kind}" for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount)


def plan(options: FarmOptions, nodes: Sequence[Mapping[str, float]]) -> tuple[int, Demand, int]:
    """Number of workers wanted, what one asks for, and workers per node (CPU workers share its cores)."""
    gpu_nodes = [node for node in nodes if node.get("GPU", 0) > 0]
    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else float(bool(gpu_nodes))
    if gpus:
        # A GPU is the scarce thing: CPUs are not asked for, so that a node's last core, held by someone else, never idles its GPU.
        fitting = sum(int(node.get("GPU", 0) / gpus + 1e-9) for node in gpu_nodes)
        return options.num_workers or max(1, fitting), Demand(0, gpus), 1
    cpu_nodes = [node["CPU"] for node in nodes if node.get("CPU", 0) > 0] or [1.0]
    wanted = options.num_workers or sum(max(1, int(cpus) // 2) for cpus in cpu_nodes)
    per_node = -(-wanted // len(cpu_nodes))
    return wanted, Demand(max(0.01, int(100 * min(1.0, min(cpu_nodes) / per_node)) / 100), 0), per_node


def check_capacity(options: FarmOptions, say: Callable[[str], None]) -> None:
    """ValueError, within `capacity_seconds`, if no node can ever hold a worker and nothing can add one."""
    deadline = time.monotonic() + options.capacity_seconds
    while True:
        nodes = live_nodes()
        _, demand, _ = plan(options, nodes)
        if any(demand.fits(node) for node in nodes):
            return
        if autoscaler_present():
            say(f"no node can hold a worker ({demand}) yet; waiting for the autoscaler to bring one")
            return
        if time.monotonic() > deadline:
            has = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes) or "no node"
            raise ValueError(
                f"a worker asks for {demand} on one node, the cluster has: {has}; change --gpus-per-worker, add a node that has it, "
                "or use a cluster with an autoscaler"
            )
        time.sleep(0.5)


# ----------------------------------------------------------------------------------------------------------------------------- driver


@dataclass
class _Slot:
    actor: Any
    start: Any
    """Reference of the pending start, None once it is ready."""
    info: WorkerInfo | None = None
    queue: deque[tuple[Any, Unit]] = field(default_factory=deque)
    """What it was given and has not reported, in order: the first is the one it works on."""


class _Pool:
    """The workers of one run and the units they hold."""

    def __init__(
        self, task: FarmTask, dataset: str, lease: Lease, options: FarmOptions, progress: Progress, known_models: Mapping[str, Any]
    ):
        self.task, self.dataset, self.lease, self.options, self.progress = task, dataset, lease, options, progress
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
            self.progress.note = "" if self.progress.up else "starting workers" if self._nodeless_since is None else "waiting for a node"
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
            raise ValueError(
                f"for {self.options.node_wait_seconds:.0f} s no node could hold a worker ({self.demand}); finished rows are kept: "
                "bring a node back and run the same command again"
            )

    def _grow(self) -> None:
        if time.monotonic() < self._grow_after and self.slots:
            return
        units = len(self.pending) + sum(len(slot.queue) for slot in self.slots)
        while len(self.slots) < min(self.wanted, units):
            actor: Any = self._actor.options(num_cpus=self.demand.cpus, num_gpus=self.demand.gpus, scheduling_strategy="SPREAD").remote()
            arguments = (self.task, self.dataset, self.lease.path, self.lease.token, self.demand.gpus, self.per_node)
            self.slots.append(_Slot(actor, actor.start.remote(*arguments)))

    def _assign(self) -> None:
        ready = [slot for slot in self.slots if slot.info is not None]
        for depth in range(UNITS_IN_FLIGHT):
            for slot in ready:
                # A second unit only if that leaves one for each worker that is still starting.
                if self.pending and len(slot.queue) <= depth and (depth == 0 or len(self.pending) > len(self.slots) - len(ready)):
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
                raise ValueError(f"{self.start_failures} workers could not start; the last one: {_short(error)}") from error
            return
        self.start_failures = 0
        slot.info, slot.start = info, None
        different = tables.differing_keys(self.models, info.models) if self.models else []
        if different:
            raise ValueError(
                f"output folder {self.dataset}: another model than the one its rows are from (here {info.place.worker}: "
                f"{'; '.join(different)}); choose another --output-dir, and see that all nodes have the same checkpoint"
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
            if isinstance(cause, tables.ShardWriteError | LeaseLostError) or unit.failures + 1 >= FAILURES_BEFORE_STOP:
                raise (_rebuilt(cause) if cause is not None else error) from error
            self.progress.say(f"a unit failed outside of its rows and is tried again: {_short(error)}")
            self.pending.append(replace(unit, failures=unit.failures + 1))
        except RayError as error:  # of the actor, of its node, or Ray's memory monitor
            self._died(slot, error)
        else:
            del slot.queue[index]
            self.progress.add(result)

    def _died(self, slot: _Slot, error: RayError) -> None:
        """Replaces a dead worker: what it had finished counts, the unit it was at is blamed (unless its node went), the rest waits."""
        *_, node_alive = self._node(slot)
        self._remove(slot)
        place = slot.info.place.worker if slot.info else "?"
        self.progress.say(f"worker {place} is gone ({'its node too' if not node_alive else _death(error)}); its units are done again")
        again: list[Unit] = []
        blamed = False
        for _, unit in slot.queue:
            if self._is_durable(unit):
                errors = sum(tables.inspect_shard(shard_path(self.dataset, unit), self.task.id_column, full=False).errors)
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
        note = tables.read_bytes(note_path(self.dataset, unit))
        if note is not None:
            tables.remove(note_path(self.dataset, unit))
        kills = unit.kills + 1
        if kills < (1 if unit.split else KILLS_BEFORE_SPLIT):
            return [replace(unit, kills=kills)]
        if len(unit.ids) > 1:
            return unit.singles()
        return [replace(unit, failed=f"WorkerDied: this row ended its worker process: {note.decode() if note else _death(error)}")]

    def _is_durable(self, unit: Unit) -> bool:
        try:
            shard = tables.inspect_shard(shard_path(self.dataset, unit), self.task.id_column)
        except ValueError:
            return False
        return set(shard.ids) == set(unit.ids)

    def _node(self, slot: _Slot) -> tuple[str, str, bool]:
        """Id and address of the worker's node ("" and "?" until it has one), and whether that is alive. Ray's table knows it from when
        the worker begins to start, which is before the worker can say it."""
        address = actors(slot.actor._actor_id.hex()).get("Address", {})
        if not address.get("IPAddress"):  # not placed yet: the id is that of a node which was asked
            return "", "?", True
        dead = any(node["NodeID"] == address["NodeID"] and not node["Alive"] for node in ray.nodes())
        return address["NodeID"], address["IPAddress"], not dead

    def _remove(self, slot: _Slot) -> None:
        self.slots.remove(slot)
        with contextlib.suppress(RayError):
            ray.kill(slot.actor)  # unreachable is not dead: it must not come back


def _rebuilt(error: BaseException) -> BaseException:
    """Ray's errors are also instances of their cause's class, with a page of remote traceback as text: the plain one again."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _death(error: RayError, limit: int = 300) -> str:
    """Ray's reason, without the ids before it."""
    text = " ".join(str(error).split())
    return text.partition("The actor is dead because ")[2][:limit] or text[:limit]


def _short(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(_rebuilt(error)).split())
    return f"{type(_rebuilt(error)).__name__}: {text}"[:limit]


def run(
    task: FarmTask,
    inputs: Mapping[str, str],
    dataset: str | Path,
    config: Mapping[str, Any],
    options: FarmOptions,
    lease: Lease | None = None,
    stream: TextIO | None = None,
) -> FarmResult:
    """Does `task` for every item of the inputs that is not in `dataset` yet. The first input says which items there are.

    `config` is what defines the rows. Needs `connect()` first, and a `lease` on a folder that holds the dataset (taken here if None).
    ValueError: what a user can mend. ReconcileError: the output does not hold exactly the input's ids.
    """
    target = tables.absolute(dataset)
    manifest = tables.check_config(target, config)
    with contextlib.ExitStack() as stack:
        held = lease if lease is not None else stack.enter_context(Lease(target))
        return _run(task, {name: tables.absolute(path) for name, path in inputs.items()}, target, config, options, held, stream, manifest)


def _run(
    task: FarmTask,
    inputs: Mapping[str, str],
    dataset: str,
    config: Mapping[str, Any],
    options: FarmOptions,
    lease: Lease,
    stream: TextIO | None,
    manifest: Mapping[str, Any] | None,
) -> FarmResult:
    begin = time.monotonic()
    found = {name: tables.scan(path, task.id_column) for name, path in inputs.items()}
    for name, scan in found.items():
        if scan.unreadable:
            raise ValueError(
                f"input {name}: {next(iter(scan.unreadable.values()))}; run the stage that makes it (--stage {name}): it does the rows of "
                "that shard again and keeps the others"
            )
    where = {name: scan.where() for name, scan in found.items()}
    primary, *others = inputs
    ids = where[primary]
    if not ids:
        raise ValueError(f"input {inputs[primary]}: it holds no rows; nothing to do")
    for name in others:
        lacking = [key for key in ids if key not in where[name]]
        if lacking:
            raise ValueError(
                f"input {name} lacks {len(lacking)} of {len(ids)} ids, e.g. {', '.join(lacking[:3])}; run the stage that makes it first"
            )
    lengths = {key: found[primary].shards[shard].lengths[row] for key, (shard, row) in ids.items()}

    tables.remove_temporary(dataset)
    output = tables.scan(dataset, task.id_column)
    unreadable = [tables.set_aside(path, dataset) for path in output.unreadable]
    _drop_duplicates(output, task.one_row_per_item)
    if options.retry_errors:
        _drop_errors(tables.scan(dataset, task.id_column, full=False))
    output = tables.scan(dataset, task.id_column, full=False)
    done = _items(output)
    unknown = [key for key in done if key not in ids]
    if unknown:
        raise ValueError(
            f"output folder {dataset}: it holds {len(unknown)} ids that are not in the input, e.g. {', '.join(unknown[:3])}: the input has "
            "changed; choose another --output-dir"
        )
    models = dict((manifest or {}).get("models", {})) if done else {}
    seconds_before = float((manifest or {}).get("seconds", 0.0))
    device = str((manifest or {}).get("device", ""))
    progress = Progress(task.table, len(ids), len(done), sum(done.values()), stream, options.progress_seconds)
    for path in unreadable:
        progress.say(f"a damaged shard was set aside as {path}; its rows are done again")
    if done:
        progress.say(f"{len(done)} of {len(ids)} rows are there already")

    pool = None
    try:
        for attempt in range(3):
            todo = sorted((key for key in ids if key not in done), key=lambda key: (-lengths[key], key))
            if not todo:
                break
            if pool is None:
                tables.write_manifest(
                    dataset, None, config, table=task.table, complete=False, models=models, seconds=seconds_before, device=device
                )
                check_capacity(options, progress.say)
                pool = _Pool(task, dataset, lease, options, progress, models)
            elif attempt:
                progress.say(f"{len(todo)} rows are not where they were written; doing them again")
            pool.work(_units(todo, where, found, options))
            models = pool.models
            output = tables.scan(dataset, task.id_column, full=False)
            _drop_duplicates(output, task.one_row_per_item)
            output = tables.scan(dataset, task.id_column, full=False)
            done = _items(output)
            lease.check()
    finally:
        if pool is not None:
            pool.close()
            device = ", ".join(sorted(pool.devices)) or device
            progress.up = 0
            progress.tick(force=True)

    _reconcile(ids, output, dataset, task.one_row_per_item)
    seconds = time.monotonic() - begin
    schema = output.shards[0].schema if output.shards else None
    rows = sum(len(shard.ids) for shard in output.shards)
    errors = sum(sum(shard.errors) for shard in output.shards)
    if pool is not None or manifest is None or not manifest["complete"] or unreadable:
        tables.write_manifest(
            dataset,
            schema,
            config,
            table=task.table,
            complete=True,
            models=models,
            counts={"rows": rows, "items": len(done), "errors": errors, "shards": len(output.shards), "unreadable": len(unreadable)},
            seconds=seconds_before + seconds,
            device=device,
            run={"unit_rows": options.unit_rows, "num_workers": options.num_workers, "gpus_per_worker": options.gpus_per_worker},
        )
    return FarmResult(dataset, rows, errors, progress.new, seconds, progress.rows_per_second, tuple(unreadable))


def _items(output: tables.Scan) -> dict[str, bool]:
    """Item id -> whether one of its rows has an error."""
    items: dict[str, bool] = {}
    for shard in output.shards:
        for key, error in zip(shard.ids, shard.errors, strict=True):
            items[key] = items.get(key, False) or error
    return items


def _units(todo: Sequence[str], where: Mapping[str, Any], found: Mapping[str, tables.Scan], options: FarmOptions) -> Iterable[Unit]:
    """Units of neighbours in length, long ones first; not larger than gives every worker one."""
    wanted, _, _ = plan(options, live_nodes())
    size = max(1, min(options.unit_rows, -(-len(todo) // wanted)))
    for first in range(0, len(todo), size):
        ids = tuple(todo[first : first + size])
        rows = {name: tuple((found[name].shards[at[key][0]].path, at[key][1]) for key in ids) for name, at in where.items()}
        yield Unit(ids, rows)


def _drop_duplicates(output: tables.Scan, one_row_per_item: bool) -> None:
    """An item that is in two shards (a worker outlived its run) stays in one: one without error if there is one."""
    best: dict[str, tuple[bool, int, int]] = {}
    for index, shard in enumerate(output.shards):
        for row, (key, error) in enumerate(zip(shard.ids, shard.errors, strict=True)):
            candidate = (error, index, row)
            if key not in best or candidate < best[key]:
                best[key] = candidate
    for index, shard in enumerate(output.shards):
        drop = [row for row, key in enumerate(shard.ids) if best[key][1] != index or (one_row_per_item and best[key][2] != row)]
        if drop:
            tables.drop_rows(shard.path, drop)


def _drop_errors(output: tables.Scan) -> None:
    """Takes the items with an error out, so that they are to do again."""
    for shard in output.shards:
        bad = {key for key, error in zip(shard.ids, shard.errors, strict=True) if error}
        if bad:
            tables.drop_rows(shard.path, [row for row, key in enumerate(shard.ids) if key in bad])


def _reconcile(ids: Mapping[str, Any], output: tables.Scan, dataset: str, one_row_per_item: bool) -> None:
    """ReconcileError unless every input id is in the output exactly once, and no other."""
    counts: Counter[str] = Counter()
    for shard in output.shards:
        counts.update(shard.ids if one_row_per_item else set(shard.ids))
    problems = {
        "missing": [key for key in ids if key not in counts],
        "more than once": [key for key, count in counts.items() if count > 1],
        "unknown": [key for key in counts if key not in ids],
    }
    told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})" for what, keys in problems.items() if keys]
    if output.unreadable:
        told.append(f"{len(output.unreadable)} unreadable shard(s) ({next(iter(output.unreadable))})")
    if told:
        raise ReconcileError(
            f"output {dataset} is not complete: ids {'; '.join(told)}. Run the same command again: it does what is missing"
        )


# ----------------------------------------------------------------------------------------------------------------- tasks of labeling


@dataclass(frozen=True)
class ModelSource:
    """How a worker gets its model."""

    path: str
    precisions: tuple[int, ...] | None = None
    kernel: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if os.path.exists(self.path):  # a worker's working directory may be another; a Hugging Face id stays as it is
            object.__setattr__(self, "path", os.path.abspath(self.path))

    def load(self, place: Place) -> tuple[Any, str]:
        """The model on the worker's device, and that device's name. Where Ray gives out GPUs that torch does not see, the CPU."""
        import torch

        from pmpd.model import PMPDForCausalLM
        from pmpd.quantize.convert import local_folder
        from pmpd.weights.base import compute_dtype

        torch.set_num_threads(place.threads)
        device = torch.device("cuda" if place.gpu_ids and torch.cuda.is_available() else "cpu")
        model = PMPDForCausalLM(
            local_folder(self.path),
            self.precisions,
            dtype=compute_dtype(device),
            kernel=self.kernel,
            trust_remote_code=self.trust_remote_code,
        ).eval()
        return model.to(device), torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class ReferenceTask(FarmTask):
    """PROMPTS -> REFERENCES: the unquantized model's continuations."""

    model: ModelSource
    max_new_tokens: int
    slots: int | None
    table = "references"

    def build(self, place: Place) -> BuiltTask:
        from pmpd.labeling import LabelConfig, reference_prompts

        model, device = self.model.load(place)
        config = LabelConfig(max_new_tokens=self.max_new_tokens, slots=self.slots)
        return BuiltTask(
            run=lambda items: reference_prompts(model, [item["prompts"] for item in items], config),
            schema=tables.REFERENCES,
            models={"reference_model": model.fingerprint},
            device=device,
            tokens=lambda row: len(row["reference_ids"]),
        )


@dataclass(frozen=True)
class LabelTask(FarmTask):
    """PROMPTS and REFERENCES -> LABELS: the label of every pair and the KV features."""

    model: ModelSource
    precisions: tuple[int, ...]
    max_new_tokens: int
    slots: int | None
    table = "labels"

    def build(self, place: Place) -> BuiltTask:
        from pmpd.labeling import LabelConfig, label_prompts

        model, device = self.model.load(place)
        config = LabelConfig(self.precisions, self.max_new_tokens, self.slots)

        def label(items: list[Item]) -> Iterable[dict[str, Any]]:
            references = {item["references"]["prompt_id"]: item["references"] for item in items}
            return label_prompts(model, [item["prompts"] for item in items], references, config)

        return BuiltTask(
            run=label,
            schema=tables.labels_schema(model.head_dim),
            models={"model": model.fingerprint, "num_key_value_heads": model.kv_heads},
            device=device,
            tokens=lambda row: sum(sum(pair["branch_tokens"]) for pair in row["pairs"]),
        )
