"""Which kernels multiply on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelsJob:
    """Which kernels multiply on this machine, and why."""

    plugins: str | None = None
    """Python modules to import first, comma-separated: kernels that they register are explained too."""
