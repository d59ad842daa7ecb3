"""A Ray of its own for `bench/farm_gpu.py`, the commands as its jobs, and what GPUs and driver did
meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray  # noqa: F401  # it brings the psutil that it needs itself

import psutil  # isort: skip

FIRST_WORKER_PORT, LAST_WORKER_PORT = 26000, 29999
"""Ray's workers listen there, each Ray's in a thousand of them; the head's own ports are outside of it."""

STARTS = 3
"""Tries to start a head: on a busy host a node may come too late for Ray's fixed 30 s."""


def python_path() -> str:
    """This folder, before what was there."""
    return os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has, none of them among those that Rays usually take."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            if listener.getsockname()[1] > LAST_WORKER_PORT:
                found.append(listener.getsockname()[1])
    return found


@dataclass
class Job:
    """A command that ran as a Ray job."""

    arguments: list[str]
    code: int
    seconds: float
    output: str


@dataclass
class Head:
    """A Ray with token authentication, in a folder of its own: one node with all GPUs and CPUs, or `nodes`
    nodes of one GPU each (without GPUs, of `cpus` CPUs each)."""

    gpus: int
    cpus: int
    nodes: int = 0
    number: int = 0
    """0 to 3, another for each Ray that runs beside."""

    def __enter__(self) -> Head:
        for left in reversed(range(STARTS)):
            self._start()
            try:
                self._wait_until_jobs_are_taken(120)
            except (RuntimeError, subprocess.TimeoutExpired):
                self._stop()
                if not left:
                    raise
            else:
                return self
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pmpd-ray-"))
        port, dashboard, agent, client, grpc, metrics = free_ports(6)
        first = FIRST_WORKER_PORT + 1000 * self.number
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        (self.folder / "ray").mkdir()  # where Ray notes the address of its latest cluster, for others to find
        self.environment = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        self.environment.pop("RAY_ADDRESS", None)
        shared = [
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--temp-dir={self.folder}"),
        ]
        if self.nodes:
            each = [f"--nodes={self.nodes}", f"--cpus={self.cpus}", *["--gpus"] * bool(self.gpus)]
            command = ["-m", "bench._farm_nodes", *each, *shared]
        else:
            command = [
                *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", *shared),
                *(f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"),
                *(f"--min-worker-port={first}", f"--max-worker-port={first + 999}"),
                *(f"--num-gpus={self.gpus}", f"--num-cpus={self.cpus}"),
            ]
        with (self.folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def _stop(self) -> None:
        """Ends what was started here, by process id, children first remembered: some leave their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            below = parent.children(recursive=True)
            parent.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                parent.wait(timeout=20)
            for process in [*below, parent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(timeout=20)

    def _wait_until_jobs_are_taken(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        log = self.folder / "head.log"
        while time.monotonic() < deadline:
            up = "nodes are up" if self.nodes else "Ray runtime started"
            if up in log.read_text() and self._ray("job", "list", timeout=60).returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(1)
        raise RuntimeError(f"the head takes no jobs after {seconds:.0f} s:\n{log.read_text()[-2000:]}")

    def _ray(self, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def job(self, *arguments: str, timeout: float, module: Sequence[str] = ("pmpd",)) -> Job:
        """`pmpd ARGUMENTS` as a job of this head, from the current folder."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the head has ended:\n{(self.folder / 'head.log').read_text()[-1000:]}")
        begin = time.monotonic()
        runtime = json.dumps({"env_vars": {"PYTHONPATH": python_path()}})
        command = shlex.join([sys.executable, "-m", *module, *arguments])
        name = f"job_{secrets.token_hex(6)}"
        try:
            done = self._ray(
                *("job", "submit", "--submission-id", name, "--runtime-env-json", runtime, "--"),
                *("bash", "-c", f"cd {shlex.quote(os.getcwd())} && exec {command}"),
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as expired:
            self._ray("job", "stop", name, timeout=60)
            told = expired.stdout or b""
            tail = (told.decode(errors="replace") if isinstance(told, bytes) else told)[-700:]
            raise RuntimeError(
                f"{' '.join(arguments)}: not done after {timeout:.0f} s; its last words:\n{tail}"
            ) from None
        return Job(list(arguments), done.returncode, time.monotonic() - begin, done.stdout)


def driver_of(output: Path) -> psutil.Process | None:
    """The process of the command that writes to `output`."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "python" in "".join(line[:1]) and str(output) in line and "submit" not in line:
            return process
    return None


def gpu_percent() -> dict[int, float]:
    """GPU index -> busy percent, as nvidia-smi says; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:
        return {}
    found = [line.partition(",") for line in lines]
    return {int(index): float(busy) for index, _, busy in found if index.strip().isdigit()}


@dataclass
class Watch:
    """Looks at a run of labels into `output` from beside: from when its first shard is there to its end."""

    output: Path
    every: float = 0.5
    gpus: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """GPU index -> (time of day, busy percent)."""
    driver: list[tuple[float, float]] = field(default_factory=list)
    """(moment, the driver's CPU seconds so far)."""

    @property
    def driver_share(self) -> float | None:
        """Of a core, that the driver took; None where the run was too short to say."""
        if len(self.driver) < 2:
            return None
        (begin, before), (end, after) = self.driver[0], self.driver[-1]
        return round((after - before) / (end - begin), 3)

    def busy_percent(self, until: float) -> dict[int, float]:
        """GPU index -> busy percent, the mean up to a time of day: what comes after it is the way out."""
        looks = {gpu: [busy for at, busy in some if at <= until] for gpu, some in self.gpus.items()}
        return {gpu: round(statistics.mean(some), 1) for gpu, some in looks.items() if some}

    def look(self, driver: psutil.Process) -> None:
        for index, busy in gpu_percent().items():
            self.gpus.setdefault(index, []).append((time.time(), busy))
        with contextlib.suppress(psutil.Error):
            times = driver.cpu_times()
            self.driver.append((time.monotonic(), times.user + times.system))

    @contextlib.contextmanager
    def beside(self, at_first_shard: Callable[[], Any] = lambda: None) -> Iterator[Watch]:
        """Watches while the block runs; `at_first_shard` is called once."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(0.05):
                if any(self.output.glob("labels/data/*.parquet")):
                    break
            else:
                return
            at_first_shard()
            driver = driver_of(self.output)
            while driver is not None and not stop.wait(self.every):
                self.look(driver)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join(timeout=10)


def worker_processes(head: Head) -> list[int]:
    """Ids of the farm's worker actors below a head: their title names the actor."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(head.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::Worker"):
                    found.append(process.pid)
    return found


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
