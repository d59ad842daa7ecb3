"""How the work of a run is spread."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from pmpd.errors import UserError

AUTO_UNIT_ROWS = 64
"""Items of a unit where the rows that decode together follow from a worker's memory."""


def batch_of(batch_size: int | Literal["auto"]) -> tuple[int | None, int]:
    """What a command's --batch-size means: (slots, None = as many as the worker's memory holds; items of a
    unit)."""
    if isinstance(batch_size, int) and batch_size < 1:
        raise UserError(f"batch_size {batch_size}: at least 1, or auto")
    return (None, AUTO_UNIT_ROWS) if batch_size == "auto" else (batch_size, batch_size)


def ray_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


@dataclass(frozen=True)
class FarmOptions:
    """How the work is spread. Nothing here changes a row."""

    num_workers: int | None = None
    """Default: one per GPU (or share of it); without GPUs one per two cores. 0: no Ray, the work is done in
    this process."""
    gpus_per_worker: float | None = None
    """Default: 1 where the cluster has GPUs, else 0. A fraction puts several workers on one GPU."""
    unit_rows: int = 32
    """Items per unit, which is also the rows of a shard."""
    retry_errors: bool = False
    stall_seconds: float | None = None
    """A worker without progress for so long is replaced. Default: `STALL_STEPS` of the longest step seen, and
    300 at least."""
    price_per_worker_hour: float | None = None
    """Goes into the run's summary as cost."""
    capacity_seconds: float = 8.0
    node_wait_seconds: float = 300.0
    """How long a started run waits for a node when all that could hold a worker are gone."""
    start_seconds: float = 1800.0
    """How long a worker that has a node may take to load its model."""
    progress_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"num_workers {self.num_workers}: 0 (in this process) or more")
        if self.num_workers and not ray_installed():
            raise UserError(
                f"num_workers {self.num_workers}: workers need Ray, which is not installed; "
                f"pip install 'pmpd[farm]', or leave it out: the work is then done in this process"
            )
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker <= 1:
            raise UserError(
                f"gpus_per_worker {self.gpus_per_worker:g}: 0, a fraction like 0.5, or 1; one worker holds "
                f"one model on one GPU, more GPUs are more workers"
            )
        if self.unit_rows < 1:
            raise UserError(f"unit_rows {self.unit_rows}: at least 1")
        for name in ("stall_seconds", "price_per_worker_hour"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} {value:g}: more than 0")

    @property
    def in_process(self) -> bool:
        """Whether units are done in this process, without Ray."""
        return self.num_workers == 0 or not ray_installed()
