"""What a quantization that is not finished keeps on disk: safetensors files, each whole or absent."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class WorkFolder:
    """Files by name; `meta` is any JSON that goes with the tensors. Knows the time spent on them, over all
    runs: a killed run's up to its last file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
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


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Under `path` is either the whole file or none."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(path)
