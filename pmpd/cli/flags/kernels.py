"""Which kernels multiply on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelsJob:
    """Which kernels multiply on this machine, and why."""
