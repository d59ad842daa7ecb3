"""What a quantization that is not finished keeps on disk: safetensors files, each whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd import storage

UPLOAD_SECONDS = 300.0
"""A file that is written again and again (moments, tuned tables) is copied to the store no more often."""


class WorkFolder:
    """Files by name; `meta` is any JSON that goes with the tensors. Knows the time spent on them, over all
    runs: a killed run's up to its last file."""

    def __init__(self, path: Path, copy: str | None = None) -> None:
        """`copy`: a URI under which the files are kept too, for a run that goes on on another machine."""
        self.path, self.copy = path, copy
        self._copied: dict[str, float] = {}
        path.mkdir(parents=True, exist_ok=True)
        for file in storage.list_files(copy) if copy is not None else ():
            target = path / storage.base_name(file)
            if not target.exists():
                storage.write_bytes(str(target), storage.read_bytes(file) or b"")
        self._began = time.monotonic(), time.process_time()
        spent = path / "spent.json"
        self._before = tuple(json.loads(spent.read_text())) if spent.exists() else (0.0, 0.0)

    def spent(self) -> tuple[float, float]:
        """(seconds, processor seconds)"""
        began, before = self._began, self._before
        return before[0] + time.monotonic() - began[0], before[1] + time.process_time() - began[1]

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
        partial = self.path / f"spent.partial-{os.getpid()}"
        partial.write_text(json.dumps(self.spent()))
        partial.replace(self.path / "spent.json")
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


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Under `path` is either the whole file or none."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(path)
