"""Progress of a command that works in one process: bars in a terminal, else one line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class Steps:
    """`with Steps(console) as steps: steps("layers quantized", done, total)`"""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._tasks: dict[str, object] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last: dict[str, int] = {}
        self._told = clock()

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are done."""
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
            return
        if self._last.get(stage) == done == total:  # told before: a stage may end on a step that was counted
            return
        self._last[stage] = done
        now = self._clock()
        began, first = self._started.setdefault(stage, (now, done))
        if now - self._told >= SECONDS_BETWEEN_LINES or done == total:
            self._told = now
            pace = (now - began) / (done - first) if done > first else 0.0
            left = f", about {pace * (total - done):.0f} s left" if pace and done < total else ""
            self._console.print(f"{stage}: {done}/{total}{left}", soft_wrap=True)
