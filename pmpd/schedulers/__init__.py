"""When to lower the precision: the schedulers, by name."""

from __future__ import annotations

from pmpd.schedulers.base import SCHEDULERS, Scheduler
from pmpd.schedulers.confidence import ConfidenceScheduler
from pmpd.schedulers.kv_cache import KVCacheScheduler
from pmpd.schedulers.random import RandomScheduler
from pmpd.schedulers.static import StaticScheduler

__all__ = ["SCHEDULERS", "Scheduler"]

SCHEDULERS.update(
    naive=(StaticScheduler, ("precisions", "high_bit_steps")),
    static=(StaticScheduler, ("precisions", "high_bit_steps")),
    random=(RandomScheduler, ("precisions", "seed", "prior")),
    confidence=(ConfidenceScheduler, ("precisions", "threshold", "patience")),
    kv_cache=(
        KVCacheScheduler,
        ("precisions", "precision_switch_points", "save_dir", "dim", "num_heads", "model_fingerprint"),
    ),
)
