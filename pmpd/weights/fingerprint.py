"""What names a model: a hash over every byte of its weights, remembered while their file does not change.

Each tensor is hashed as a tree, 8 MiB a leaf, on all cores; how tensors are spread over files plays no part.
What was found for a file is kept in the user's cache folder with its size, times and inode, so that a
worker's start does not read 15 GB again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

LEAF_BYTES = 8 * 2**20
_DIGEST_BYTES = 16
_SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again within its clock's tick: nothing is kept of it."""


def tensor_digests(path: Path, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, str]:
    """Name -> hex digest of the tensor's dtype, shape and every byte, for tensors of the file `path`."""
    names = sorted(names)
    entry = cache_folder() / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    state = _state(path)
    known = _read(entry)
    found: dict[str, str] = known["tensors"] if known.get("state") == state else {}
    if not all(name in found for name in names):
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            found = {name: _digest(read(name), pool) for name in names}
        changed = max(state[1], state[2]) / 1e9
        if _state(path) == state and time.time() - changed > _SETTLED_SECONDS:
            _write(entry, {"file": str(path.resolve()), "state": state, "tensors": found})
    return {name: found[name] for name in names}


def cache_folder() -> Path:
    """`pmpd/fingerprints` in XDG_CACHE_HOME, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pmpd" / "fingerprints"


def _digest(tensor: Tensor, pool: ThreadPoolExecutor) -> str:
    content = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data

    def leaf(start: int) -> bytes:
        return hashlib.blake2b(content[start : start + LEAF_BYTES], digest_size=_DIGEST_BYTES).digest()

    root = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)} ".encode(), digest_size=_DIGEST_BYTES)
    for digest in pool.map(leaf, range(0, len(content), LEAF_BYTES)):
        root.update(digest)
    return root.hexdigest()


def _state(path: Path) -> list[int]:
    """Size, times of the content's and the inode's last change (ns), and inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(entry: Path) -> dict:
    try:
        content = json.loads(entry.read_text())
        return content if isinstance(content.get("tensors"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(entry: Path, content: dict) -> None:
    """A cache that can't be written (a read-only home, a full disk) is one that does not help."""
    partial = entry.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content))
        partial.replace(entry)
