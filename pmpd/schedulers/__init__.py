"""When to lower the precision: the schedulers, by name."""

from __future__ import annotations

from pmpd.schedulers import budget, confidence, kv_cache, online, random, regression, static
from pmpd.schedulers.base import SCHEDULERS, Scheduler, SchedulerEntry

__all__ = ["SCHEDULERS", "Scheduler", "SchedulerEntry"]

SCHEDULERS.update(
    static=static.ENTRY,
    confidence=confidence.ENTRY,
    random=random.ENTRY,
    kv_cache=kv_cache.ENTRY,
    online=online.ENTRY,
    budget=budget.ENTRY,
    regression=regression.ENTRY,
)
