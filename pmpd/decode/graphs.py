"""CUDA graphs of a step of many small operations, decoding above all: one for each (layout, batch bucket),
replayed over static buffers.

A layout is whatever a captured step bakes in (the precision segments, the bound of the attention's length);
anything else must be read from the buffers on the device. A step runs once before it is recorded, from the
same contents of the buffers.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import Tensor

from pmpd import gpu

_log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Buffers = Mapping[str, Tensor]
Step = Callable[[Buffers, Hashable], None]


class StepGraphs:
    """Runs `step(buffers, layout)` through captured graphs.

    `make_buffers(rows)` allocates the static tensors of a bucket (once), with values that are harmless for
    rows that a run does not use. `capture(closure, reset)` returns the replay (`pmpd.gpu.capture`). `most`
    graphs are kept, the least recently used one goes.
    """

    def __init__(
        self,
        step: Step,
        make_buffers: Callable[[int], dict[str, Tensor]],
        buckets: Sequence[int] = BUCKETS,
        capture: Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]] | None = gpu.capture,
        most: int = 128,
    ) -> None:
        self._step = step
        self._make_buffers = make_buffers
        self._buckets = sorted(buckets)
        self._capture = capture
        self._most = most
        self._buffers: dict[int, dict[str, Tensor]] = {}
        self._replays: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self.why_eager: str | None = None if capture else "graphs are switched off"
        """Why steps run without a graph; None while they run with one."""

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`; past the largest, `rows` itself."""
        return next((size for size in self._buckets if size >= rows), rows)

    def buffers(self, rows: int) -> dict[str, Tensor]:
        """The static tensors of the bucket of `rows`: write the inputs of the next `run` into them, in
        place. One that a step needs later may be added before its first run."""
        size = self.bucket(rows)
        if size not in self._buffers:
            self._buffers[size] = self._make_buffers(size)
        return self._buffers[size]

    def run(self, rows: int, layout: Hashable) -> dict[str, Tensor]:
        """One step over the buffers of `rows`; returns them. Falls back to eager for good where a capture
        fails, and logs why."""
        size, buffers = self.bucket(rows), self.buffers(rows)
        if self.why_eager is None and (size, layout) not in self._replays:
            self._record(size, layout, buffers)
        replay = self._replays.get((size, layout))
        if replay is None:
            self._step(buffers, layout)
        else:
            self._replays.move_to_end((size, layout))
            replay()
        return buffers

    def _record(self, size: int, layout: Hashable, buffers: dict[str, Tensor]) -> None:
        assert self._capture is not None
        kept = {name: tensor.clone() for name, tensor in buffers.items()}

        def reset() -> None:
            for name, tensor in kept.items():
                buffers[name].copy_(tensor)

        try:
            replay = self._capture(lambda: self._step(buffers, layout), reset)
        except RuntimeError as error:
            if gpu.is_out_of_memory(error):
                raise
            self.why_eager = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.warning(
                "steps run without CUDA graphs (slower), since capturing one failed: %s",
                self.why_eager,
            )
            return
        finally:
            reset()
        self._replays[(size, layout)] = replay
        if len(self._replays) > self._most:
            self._replays.popitem(last=False)
