"""The numbers of a run, and the line that shows them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from pmpd.farm.task import Beat, UnitResult

Publish = Callable[[dict[str, float], Counter[int]], None]
"""Called about once a second with the numbers and the forwards by precision."""


class Progress:
    """One line: a bar in a terminal, else a line every `every` seconds. What units under way have done counts
    in rates and in the time left, by forwards; as done it counts when it is durable."""

    def __init__(
        self,
        stage: str,
        total: int,
        done: int,
        errors: int,
        stream: TextIO | None = None,
        every: float = 10.0,
        most_forwards: float | None = None,
        publish: Publish | None = None,
    ) -> None:
        self.stage, self.total, self.done, self.errors = stage, total, done, errors
        self.new, self.tokens, self.up, self.wanted, self.queued, self.stalls = 0, 0, 0, 0, 0, 0
        self.new_errors = 0
        self.worker_seconds = 0.0
        self.by_bits: Counter[int] = Counter()
        """Forwards of finished units."""
        self.beats: dict[str, Beat] = {}
        """Worker -> what it has done of the unit it is at."""
        self.note = ""
        self._told = False
        self._most_forwards = most_forwards
        self._publish = publish
        self._console = Console(file=sys.stderr if stream is None else stream, highlight=False, markup=False)
        self._bar: Bar | None = None
        if self._console.is_terminal:
            every = 0.5
            self._bar = Bar(
                TextColumn(stage),
                BarColumn(24),
                TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=False)),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(stage, total=total, completed=done, line="")
        self._every = every
        self._first_ready: float | None = None
        self._last = time.monotonic()
        self._last_published = 0.0

    def ready(self) -> None:
        """The first worker is ready: from here on the rate is counted."""
        if self._first_ready is None:
            self._first_ready = time.monotonic()

    def tell_how(self, note: str) -> None:
        """How workers were built: of the first one that has something to say."""
        if note and not self._told:
            self._told = True
            self.say(note)

    def add(self, result: UnitResult) -> None:
        self.done += result.items
        self.new += result.items
        self.errors += result.error_items
        self.new_errors += result.error_items
        self.tokens += result.tokens
        self.by_bits.update(result.forwards)

    @property
    def rows_per_second(self) -> float:
        """Durable rows since the first worker was ready."""
        return self.new / self._seconds() if self._first_ready is not None else 0.0

    def _seconds(self) -> float:
        return max(time.monotonic() - (self._first_ready or time.monotonic()), 1e-9)

    def numbers(self) -> dict[str, float]:
        beats = list(self.beats.values())
        finished = sum(self.by_bits.values())
        at_work = sum(beat.forwards for beat in beats)
        forwards_per_row = finished / self.new if finished else self._most_forwards
        under_way = at_work / forwards_per_row if forwards_per_row else float(sum(b.rows for b in beats))
        under_way = min(under_way, float(self.total - self.done))
        seconds = self._seconds()
        rate = (self.new + under_way) / seconds if self._first_ready is not None else 0.0
        tokens = finished + at_work if finished + at_work else self.tokens
        return {
            "rows_done": self.done,
            "rows_total": self.total,
            "rows_under_way": under_way,
            "rows_per_second": rate,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if self._first_ready is not None else 0.0,
            "eta_seconds": (self.total - self.done - under_way) / rate if rate else float("nan"),
            "seconds_per_row": self.worker_seconds / self.new if self.new else float("nan"),
            "workers_up": self.up,
            "workers_wanted": self.wanted,
            "queued_rows": self.queued,
            "row_errors": self.errors,
            "stalls": self.stalls,
        }

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
        doing = next((beat.doing for beat in self.beats.values() if beat.doing), "")
        if doing and self.total == 1:  # rows and tokens say nothing of a long piece of work
            return f"{doing}  workers {self.up}/{self.wanted}  errors {self.errors}"
        bound = "<" * (not self.new and eta == eta)  # an item's most forwards are all that is known of it yet
        share = (self.done + n["rows_under_way"]) / max(self.total, 1)
        under_way = f", {n['rows_under_way']:.0f} under way" * (n["rows_under_way"] >= 0.5)
        text = (
            f"{self.done}/{self.total} rows{under_way} ({share:.1%})  {n['rows_per_second']:.2f} rows/s  "
            f"{n['tokens_per_second']:.0f} tokens/s  ETA {bound}{left}  "
            f"workers {self.up}/{self.wanted}  errors {self.errors}"
        )
        return text + (f"  stalls {self.stalls}" * bool(self.stalls)) + (f"  ({self.note})" * bool(self.note))

    def end(self) -> None:
        """The last line, with the workers that there were; as metrics, none is up any more."""
        self.tick(force=True)
        self.up = 0
        self._publish_numbers()

    def _publish_numbers(self) -> None:
        if self._publish is not None:
            by_bits = self.by_bits.copy()
            self._publish({name: value for name, value in self.numbers().items() if value == value}, by_bits)

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last_published >= 1 or force:
            self._last_published = now
            self._publish_numbers()
        if now - self._last < self._every and not force:
            return
        self._last = now
        if self._bar is None:
            self._console.print(f"{self.stage}: {self.line()}", soft_wrap=True)
            return
        self._bar.start()
        self._bar.update(self._task, completed=self.done, total=self.total, line=self.line(), refresh=True)
        if force:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, for what a person should know."""
        self._console.print(f"{self.stage}: {text}", soft_wrap=True)
