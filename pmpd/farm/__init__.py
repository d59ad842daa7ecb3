"""The farm: any per-item work on a Ray cluster, every item exactly once. The only room that imports Ray.

input datasets ──ids──▶ driver ──units of ids──▶ actors ──one shard per unit──▶ output dataset
"""

from __future__ import annotations

from pmpd.farm.capacity import FarmOptions
from pmpd.farm.connection import connect, output_folder
from pmpd.farm.driver import FarmResult, batch_of, run
from pmpd.farm.ledger import ReconcileError

__all__ = [
    "FarmOptions",
    "FarmResult",
    "ReconcileError",
    "batch_of",
    "connect",
    "output_folder",
    "run",
]
