"""The progress line of a run, and the same numbers as metrics of the cluster."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ray.util.metrics import Gauge

from pmpd.farm.worker import UnitResult


class Progress:
    """One line: a bar in a terminal, else a line every `every` seconds. The same numbers go to
    `ray.util.metrics`."""

    NAMES = (
        "rows_done",
        "rows_total",
        "rows_per_second",
        "tokens_per_second",
        "eta_seconds",
        "workers_up",
        "workers_wanted",
        "row_errors",
    )

    def __init__(
        self,
        stage: str,
        total: int,
        done: int,
        errors: int,
        stream: TextIO | None = None,
        every: float = 10.0,
    ) -> None:
        self.stage, self.total, self.done, self.errors = stage, total, done, errors
        self.new, self.tokens, self.up, self.wanted = 0, 0, 0, 0
        self.note = ""
        self._stream = sys.stderr if stream is None else stream
        self._every = 0.5 if self._stream.isatty() else every
        self._first_ready: float | None = None
        self._last = time.monotonic()
        self._last_metrics = 0.0
        self._gauges = {
            name: Gauge(f"pmpd_{name}", f"PMPD farm: {name}", tag_keys=("stage",)) for name in self.NAMES
        }

    def ready(self) -> None:
        """The first worker is ready: from here on the rate is counted."""
        if self._first_ready is None:
            self._first_ready = time.monotonic()

    def add(self, result: UnitResult) -> None:
        self.done += result.items
        self.new += result.items
        self.errors += result.error_items
        self.tokens += result.tokens

    @property
    def rows_per_second(self) -> float:
        return (
            self.new / max(time.monotonic() - self._first_ready, 1e-9)
            if self._first_ready is not None
            else 0.0
        )

    def numbers(self) -> dict[str, float]:
        rate = self.rows_per_second
        tokens = self.tokens * rate / self.new if self.new else 0.0
        eta = (self.total - self.done) / rate if rate else float("nan")
        return dict(
            zip(
                self.NAMES,
                (self.done, self.total, rate, tokens, eta, self.up, self.wanted, self.errors),
                strict=True,
            )
        )

    def line(self) -> str:
        n = self.numbers()
        eta = n["eta_seconds"]
        left = (
            "--:--"
            if eta != eta
            else f"{int(eta // 60)}:{int(eta % 60):02}"
            if eta < 3600
            else f"{eta / 3600:.1f} h"
        )
        text = (
            f"{self.done}/{self.total} rows  {n['rows_per_second']:.2f} rows/s  {n['tokens_per_second']:.0f} "
            f"tokens/s  ETA {left}  "
            f"workers {self.up}/{self.wanted}  errors {self.errors}"
        )
        return text + (f"  ({self.note})" if self.note else "")

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last_metrics >= 1 or force:
            self._last_metrics = now
            for name, value in self.numbers().items():
                if value == value:
                    self._gauges[name].set(value, tags={"stage": self.stage})
        if now - self._last < self._every and not force:
            return
        self._last = now
        if self._stream.isatty():
            filled = int(24 * self.done / max(self.total, 1))
            self._stream.write(
                f"\r{self.stage} {'█' * filled}{'░' * (24 - filled)} {self.line()}\x1b[K"
                + ("\n" if force else "")
            )
        else:
            self._stream.write(f"{self.stage}: {self.line()}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line of its own, for what a person should know."""
        self._stream.write(("\r\x1b[K" if self._stream.isatty() else "") + f"{self.stage}: {text}\n")
        self._stream.flush()
