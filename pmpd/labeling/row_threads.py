"""Threads that score rows beside the decoding."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any

Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class RowThreads(Executor):
    """As a `ThreadPoolExecutor`, but the interpreter ends without waiting for what they are at: after Ctrl-C
    that may be many rows of a slow rule, or one that hangs for ever. They end with this object, once all that
    they were given is done."""

    def __init__(self, count: int) -> None:
        calls: Calls = SimpleQueue()
        for number in range(count):
            threading.Thread(target=_serve, args=(calls,), name=f"label-rows-{number}", daemon=True).start()
        self._calls = calls
        weakref.finalize(self, _end, calls, count)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future


def _serve(calls: Calls) -> None:
    while (asked := calls.get()) is not None:
        future, call = asked
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # a rule that exits is at fault for its row, and ends no run
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        del asked, future, call  # a row's features must not wait here for the next row


def _end(calls: Calls, count: int) -> None:
    for _ in range(count):
        calls.put(None)
