"""What a quantization that is not finished keeps on disk: safetensors files, each whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd import storage

UPLOAD_SECONDS = 300.0
"""A file that is written again and again (moments, tuned tables) is copied to the store no more often."""

SECONDS_PER_SAVE = 20.0
"""Such a file is written no more often."""

SAVE_SHARE = 0.1
"""Of the time goes into writing such a file, at most."""

_BYTES_PER_SECOND = 1e9
"""A disk's, until the first file was written."""

_SPENT = "stage-seconds.json"


class Clock:
    """Seconds by stage, every one of them counted once: for the innermost of the stages that are under
    way."""

    def __init__(self, stage: str) -> None:
        """`stage`: what counts while no other is under way."""
        self._stage, self._since = stage, time.monotonic()
        self._processor = time.process_time()
        self._seconds: dict[str, float] = {}
        self._processor_before = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> str:
        now, before = time.monotonic(), self._stage
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._stage, self._since = name, now
        return before

    def read(self) -> tuple[dict[str, float], float]:
        """(stage -> seconds, processor seconds)"""
        self._switch(self._stage)
        return dict(self._seconds), self._processor_before + time.process_time() - self._processor

    def add(self, seconds: dict[str, float], processor: float) -> None:
        """What an earlier run took."""
        for stage, value in seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + value
        self._processor_before += processor


class WorkFolder:
    """Files by name; `meta` is any JSON that goes with the tensors. Keeps what `clock` says, over all runs: a
    killed run's up to its last file."""

    def __init__(self, path: Path, clock: Clock, copy: str | None = None) -> None:
        """`copy`: a URI under which the files are kept too, for a run that goes on on another machine."""
        self.path, self.clock, self.copy = path, clock, copy
        self._copied: dict[str, float] = {}
        path.mkdir(parents=True, exist_ok=True)
        for file in storage.list_files(copy) if copy is not None else ():
            target = path / storage.base_name(file)
            if not target.exists():
                storage.write_bytes(str(target), storage.read_bytes(file) or b"")
        spent = path / _SPENT
        if spent.exists():
            clock.add(*json.loads(spent.read_text()))

    def file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether the file is there and readable: a full disk may leave half a one."""
        try:
            with safe_open(self.file(name), framework="pt"):
                return True
        except (OSError, safetensors.SafetensorError):
            return False

    def save(self, name: str, tensors: dict[str, Tensor], meta: Any = None) -> None:
        save(tensors, self.file(name), {"meta": json.dumps(meta)})
        partial = self.path / f"{_SPENT}.partial-{os.getpid()}"
        partial.write_text(json.dumps(self.clock.read()))
        partial.replace(self.path / _SPENT)
        if self.copy is not None and time.monotonic() - self._copied.get(name, -1e9) > UPLOAD_SECONDS:
            storage.write_bytes(storage.join(self.copy, self.file(name).name), self.file(name).read_bytes())
            self._copied[name] = time.monotonic()

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.file(name))

    def open(self, name: str) -> Any:
        """The file as a memory-mapped dict (`keys`, `get_tensor`), a context manager."""
        return safe_open(self.file(name), framework="pt")

    def meta(self, name: str) -> Any:
        with self.open(name) as file:
            return json.loads(file.metadata()["meta"])

    def remove(self, name: str) -> None:
        self.file(name).unlink(missing_ok=True)
        if self.copy is not None:
            storage.remove(storage.join(self.copy, self.file(name).name))

    def discard(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.path)
        if self.copy is not None:
            storage.remove_dataset(self.copy)


class Saves:
    """A file of a work folder that is written again and again while its content grows.

    A kill loses what was done since it was last written: as much as `SECONDS_PER_SAVE`, or what takes
    1 / `SAVE_SHARE` times as long as writing it, whichever is more.
    """

    def __init__(self, work: WorkFolder, name: str) -> None:
        self._work, self._name = work, name
        self._since, self._took = time.monotonic(), 0.0

    def offer(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Writes it where it is time to."""
        took = self._took or sum(tensor.nbytes for tensor in tensors.values()) / _BYTES_PER_SECOND
        if time.monotonic() - self._since >= max(SECONDS_PER_SAVE, took / SAVE_SHARE):
            self.save(tensors, meta)

    def save(self, tensors: dict[str, Tensor], meta: Any) -> None:
        begin = time.monotonic()
        self._work.save(self._name, tensors, meta)
        self._since = time.monotonic()
        self._took = self._since - begin


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Under `path` is either the whole file or none."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(path)
