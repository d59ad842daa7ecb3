"""Progressive mixed-precision decoding (PMPD, ICLR 2025): model, schedulers, and the farm that labels and evaluates them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmpd.model import PMPDForCausalLM
    from pmpd.schedulers import Scheduler

__all__ = ["PMPDForCausalLM", "Scheduler"]
__version__ = "0.1.0"

_HOMES = {"PMPDForCausalLM": "pmpd.model", "Scheduler": "pmpd.schedulers"}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that reading tables or a report (`python -m pmpd.tables`) does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
