"""Progressive mixed-precision decoding (PMPD, ICLR 2025): model, schedulers, and the farm that labels and
evaluates them.

from pmpd import PMPDForCausalLM, Scheduler
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmpd.model import PMPDForCausalLM
    from pmpd.schedulers.base import Scheduler

__all__ = ["PMPDForCausalLM", "Scheduler"]
__version__ = "0.2.0.dev0"

_HOMES = {"PMPDForCausalLM": "pmpd.model", "Scheduler": "pmpd.schedulers"}


def __getattr__(name: str) -> Any:
    # on demand, so that `pmpd.storage` and `pmpd.report` run without torch
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pmpd' has no attribute {name!r}")
