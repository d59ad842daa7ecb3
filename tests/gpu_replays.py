"""What `-m gpu` tests of overlapping launches share."""

from __future__ import annotations

from collections.abc import Callable

import torch


def assert_replays_equal(run: Callable[[], torch.Tensor], eager: torch.Tensor) -> None:
    """A graph of `run`, replayed a thousand times, gives the bits of `eager` each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        y.fill_(float("nan"))
        graph.replay()
        different += (y != eager).any()
    assert different.item() == 0, "launches overlap wrongly"
