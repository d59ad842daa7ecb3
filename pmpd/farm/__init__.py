"""The farm: any per-item work, every item exactly once, on a Ray cluster or in this process.

input datasets ──ids──▶ driver ──units of ids──▶ workers ──one shard per unit──▶ output dataset

The only room that imports Ray, and only where a cluster is worked with: `pool`, `worker`, `capacity`,
`metrics`, `ray_private`, `train`.
"""

from __future__ import annotations

from pmpd.farm.connection import connect, output_folder
from pmpd.farm.driver import FarmResult, keep_workers, run
from pmpd.farm.ledger import ReconcileError
from pmpd.farm.options import FarmOptions, batch_of

__all__ = [
    "FarmOptions",
    "FarmResult",
    "ReconcileError",
    "batch_of",
    "connect",
    "keep_workers",
    "output_folder",
    "run",
]
