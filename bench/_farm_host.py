"""A Ray head for `bench/farm_gpu.py`, the commands as its jobs, and what the GPUs did meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST_WORKER_PORT, LAST_WORKER_PORT = 20002, 24999
"""Ray's workers listen there; the head's own ports are outside of it."""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has, none of them among the workers'."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if not FIRST_WORKER_PORT <= port <= LAST_WORKER_PORT:
                found.append(port)
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
    """A Ray head with token authentication, in a folder of its own."""

    gpus: int
    cpus: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="pmpd-ray-")))

    def __enter__(self) -> Head:
        self.port, self.dashboard, agent, self.client = free_ports(4)
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        self.environment.pop("RAY_ADDRESS", None)
        command = [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
            ),
            *(
                "--node-ip-address=127.0.0.1",
                f"--port={self.port}",
                f"--ray-client-server-port={self.client}",
            ),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"),
            f"--dashboard-agent-listen-port={agent}",
            *(f"--min-worker-port={FIRST_WORKER_PORT}", f"--max-worker-port={LAST_WORKER_PORT}"),
            *(f"--num-gpus={self.gpus}", f"--num-cpus={self.cpus}", f"--temp-dir={self.folder}"),
        ]
        self.log = (self.folder / "head.log").open("w")
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._wait_until_jobs_are_taken(120)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()

    def _wait_until_jobs_are_taken(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            listing = self._ray("job", "list", timeout=60)
            if listing.returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(1)
        told = (self.folder / "head.log").read_text()[-2000:]
        raise RuntimeError(f"the head takes no jobs after {seconds:.0f} s: {listing.stdout[-500:]}\n{told}")

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

    def job(self, *arguments: str, timeout: float) -> Job:
        """`pmpd ARGUMENTS` as a job of this head, from the current folder."""
        begin = time.monotonic()
        runtime = json.dumps({"env_vars": {"PYTHONPATH": self.environment.get("PYTHONPATH", ".")}})
        done = self._ray(
            *("job", "submit", "--runtime-env-json", runtime, "--"),
            *(
                "bash",
                "-c",
                f"cd {os.getcwd()} && exec {sys.executable} -m pmpd {' '.join(arguments)}",
            ),
            timeout=timeout,
        )
        return Job(list(arguments), done.returncode, time.monotonic() - begin, done.stdout)


def worker_processes(head: Head) -> list[int]:
    """Ids of the farm's worker actors below a head: descendants of its raylet whose title names the actor."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes()
            if title.startswith("ray::Worker") and str(head.folder).encode() in environment:
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def utilisation(gpus: Sequence[int], every: float = 0.5) -> Iterator[dict[int, list[float]]]:
    """GPU index -> busy percent, sampled by nvidia-smi while the block runs; empty where there is none."""
    samples: dict[int, list[float]] = {index: [] for index in gpus}
    stop = threading.Event()

    def sample() -> None:
        query = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
        while gpus and not stop.wait(every):
            for line in subprocess.run(
                query, capture_output=True, text=True, check=False
            ).stdout.splitlines():
                index, _, busy = line.partition(",")
                if index.strip().isdigit() and int(index) in samples:
                    samples[int(index)].append(float(busy))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join(timeout=10)
