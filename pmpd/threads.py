"""How many OpenMP threads a process has, and how they wait: set before torch loads, a user's own settings
kept."""

from __future__ import annotations

import os
from pathlib import Path

SPINS = "1000"
"""GOMP_SPINCOUNT: how often a waiting thread looks before it sleeps. libgomp's own is millions: where others
use the processors, the one waited for is not running, and spinning takes the processor that it needs. A
decode step that is one native call has one such wait, so a low number costs it nothing (`bench.busy`)."""

_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def prepare(threads: int | None = None) -> bool:
    """Sets the environment of this process where its user has not; no effect on a torch that is loaded
    already.

    `threads`: of this process (None: left to the libraries). False where the user has set OMP_NUM_THREADS.
    """
    given = _environment_at_start()
    if "GOMP_SPINCOUNT" not in given and "OMP_WAIT_POLICY" not in given:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if threads is not None:
        for variable in _COUNTS:
            if variable not in given:
                os.environ[variable] = str(threads)
    return "OMP_NUM_THREADS" not in given


def _environment_at_start() -> set[str]:
    """Names of the variables this process was started with: Ray sets OMP_NUM_THREADS in its workers after
    that."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return set(os.environ)
    return {entry.split(b"=")[0].decode(errors="replace") for entry in entries if entry}
