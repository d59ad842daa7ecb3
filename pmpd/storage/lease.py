"""One run per output folder: a lease with a heartbeat, on any shared storage."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmpd.errors import UserError
from pmpd.storage.compaction import remove_temporary
from pmpd.storage.files import join, read_bytes, remove, write_bytes


class LeaseLostError(UserError):
    """Another run has taken over the output folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (LeaseLostError, self.args)


def _host_identity() -> str:
    """Equal exactly for processes whose process ids can be compared: same machine, same boot, same
    container."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot}/{namespace}"


def _process_started(pid: int) -> str | None:
    """When the process started, in ticks since boot (so that a reused id is not taken for it); None if there
    is none."""
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

    A holder on the same machine is judged by its process id, at once. One on another machine is watched for
    `stale_seconds`: if its heartbeat moves the folder is in use, else the lease is taken over. No clocks are
    compared. If two take it at the same moment, the last writer has it and the other one sees that after a
    short settling time, or at its next heartbeat.

    ValueError: in use (says by whom and what to do). Use as a context manager.
    """

    def __init__(self, folder: str | Path, beat_seconds: float = 5.0, stale_seconds: float = 20.0) -> None:
        self.folder = str(folder)
        self.path = join(folder, "_lease.json")
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
        self._revoked: list[str] = []
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        holder = read_lease(self.path)
        if holder is not None and self._alive(holder):
            raise UserError(
                f"output folder {self.folder}: in use by a run on {_printable(holder.get('hostname'))} "
                f"(process {_printable(holder.get('pid'))}); wait for it to "
                f"end, stop it, or choose another output folder. If that run is certainly gone, delete "
                f"{self.path}"
            )
        if holder is not None and not _well_formed(holder):
            raise UserError(
                f"{self.path}: not a lease as a run writes it, and nothing renews it; look what it is, and "
                f"delete it if no run uses the folder"
            )
        self._write()
        time.sleep(0.2 if "://" not in self.folder else 2.0)
        self._check_token()
        remove_temporary(self.folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        with contextlib.suppress(OSError):
            if token_in(self.path) == self.token:
                remove(self.path)

    def check(self) -> None:
        """LeaseLostError if the folder is no longer ours."""
        if self._problem is not None:
            raise self._problem

    def revoke(self, worker_id: str) -> None:
        """From here on nothing that this worker has done is published: it was replaced. Durable on return."""
        self._revoked.append(worker_id)
        self._write()

    def _alive(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("host") == self._record["host"] and _well_formed(holder):
            started = _process_started(holder.get("pid", -1))
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
        with self._writing:
            self._beat += 1
            record = {**self._record, "beat": self._beat, "revoked": self._revoked}
            write_bytes(self.path, json.dumps(record).encode())

    def _check_token(self) -> None:
        if token_in(self.path) != self.token:
            raise LeaseLostError(
                f"output folder {self.folder}: another run has taken it over; its rows are safe. Let one of "
                f"the two finish, "
                "or choose another output folder"
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
                    self._problem = LeaseLostError(
                        f"{self.path}: the heartbeat can't be written: {error}; run the same command again"
                    )
                    return


_FIELDS = {"token": str, "host": str, "hostname": str, "pid": int, "started": str | None, "beat": int,
           "revoked": list}  # fmt: skip
"""What a run writes into its lease."""


def _well_formed(holder: Mapping[str, Any]) -> bool:
    """Whether a run can have written this: it has a token, and nothing that a run does not write. Half of a
    lease (a file system without atomic rename, a run that was killed) is empty."""
    return holder == {} or (
        "token" in holder and all(isinstance(holder[key], _FIELDS.get(key, ())) for key in holder)
    )


def _printable(value: Any) -> str:
    """Text from a file that anyone may have written, for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))[:80]


def read_lease(path: str) -> dict[str, Any] | None:
    """The lease's fields, {} for an empty or half-written one, None where there is none. What is no lease at
    all has the field "content"."""
    content = read_bytes(path)
    if content is None:
        return None
    if b"}" not in content and content[:1] in (b"", b"{"):
        return {}  # half-written: someone's, so it is watched
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        holder = None
    return holder if isinstance(holder, dict) else {"content": content}


def token_in(path: str) -> str | None:
    return (read_lease(path) or {}).get("token")


def check_publication(path: str, token: str, worker_id: str) -> None:
    """LeaseLostError unless the run with this token holds the folder and has not replaced this worker."""
    holder = read_lease(path) or {}
    if holder.get("token") != token:
        raise LeaseLostError(
            f"output folder {posixpath.dirname(path)}: this run no longer holds it; nothing was written"
        )
    if worker_id in holder.get("revoked", ()):
        raise LeaseLostError(
            f"output folder {posixpath.dirname(path)}: this worker has been replaced; nothing was written"
        )
