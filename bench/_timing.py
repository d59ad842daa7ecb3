"""Times of launches on a CUDA device that can be believed: a figure is refused where the graph is empty,
where what it computed is wrong, or where it does not take longer to read more.

Why: a kernel that launches on another stream than the captured one leaves an empty graph, whose replay takes
a microsecond.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Call = Callable[[], Tensor]
GROWTH = 1.05
"""A figure that reads twice the bytes of another must be that much slower at least."""
BOUND = 1 / 3
"""Of the bandwidth: what reads slower is bound by something else than bytes, and need not grow with them."""
OVER_ROOF = 1.15
"""How far above the bandwidth measured in the same run a figure may lie: caches help a little."""


class Refused(Exception):
    """A figure that would mean nothing, and why."""


class Captured(NamedTuple):
    """Calls recorded as one graph."""

    outputs: list[Tensor]
    """What each call gave back; a replay writes there again."""
    replay: Callable[[], None]
    nodes: int | None
    """Launches in the graph; None where nobody can count them."""


class Machine(Protocol):
    """What records and times: a CUDA device, or a stand-in."""

    def capture(self, calls: Sequence[Call]) -> Captured: ...

    def seconds(self, replay: Callable[[], None]) -> float: ...


class Cuda:
    """PyTorch's current device."""

    def capture(self, calls: Sequence[Call]) -> Captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
        nodes = _nodes(graph.raw_cuda_graph())
        graph.instantiate()
        return Captured(outputs, graph.replay, nodes)

    def seconds(self, replay: Callable[[], None]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Queued:
    """PyTorch's current device, for what launches on the default stream whatever the current one is: no graph
    holds it. The calls queue behind a kernel that waits, so that the device never waits for the host."""

    WAIT_CYCLES = 20_000_000
    """Some 10 ms: longer than it takes to launch a round of calls."""

    def capture(self, calls: Sequence[Call]) -> Captured:
        outputs = [call() for call in calls]

        def replay() -> None:
            outputs[:] = [call() for call in calls]

        return Captured(outputs, replay, None)

    def seconds(self, replay: Callable[[], None]) -> float:
        torch.cuda._sleep(self.WAIT_CYCLES)
        return Cuda().seconds(replay)


def holds(call: Call, machine: Machine | None = None) -> bool:
    """Whether a graph holds what `call` launches. No: it goes to the default stream whatever the current one
    is, or nobody can count the launches of a graph."""
    try:
        return bool((machine or Cuda()).capture([call]).nodes)
    except RuntimeError:  # some launches may not be made while a graph is captured
        return False


def _nodes(graph: int) -> int | None:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    code, _, count = driver.cuGraphGetNodes(driver.CUgraph(graph))
    return None if int(code) else int(count)


def seconds_of(
    calls: Sequence[Call],
    expected: Tensor,
    limit: float,
    machine: Machine | None = None,
    rounds: int = 1,
    repeats: int = 15,
) -> tuple[float, float]:
    """(seconds of one call, error): all of `calls`, `rounds` times, in one graph; the median over replays.

    Every call gives the product, that is `expected` float64 with a relative error (of norms) below `limit`.
    Refused: the graph holds fewer launches than calls; a replay gives no product, or a wrong one; twice as
    many calls do not take about twice as long.
    """
    machine = machine or Cuda()
    every = list(calls) * rounds
    captured = machine.capture(every)
    if captured.nodes is not None and captured.nodes < len(every):
        raise Refused(
            f"a graph of {len(every)} calls holds {captured.nodes} launches: they went to another stream"
        )
    for output in captured.outputs:
        output.fill_(float("nan"))
    captured.replay()
    error = max(relative_error(output, expected) for output in (captured.outputs[0], captured.outputs[-1]))
    if not error < limit:  # NaN too
        raise Refused(f"a replay gives a product with an error of {error:.1e}, above {limit:.1e}")
    one = _median(machine, captured.replay, repeats)
    two = _median(machine, machine.capture(every * 2).replay, repeats)
    if not 1.5 < two / one < 2.5:
        raise Refused(
            f"twice {len(every)} calls take {two / one:.2f} times as long: it is not the calls that are timed"
        )
    return one / len(every), error


def _median(machine: Machine, replay: Callable[[], None], repeats: int) -> float:
    return statistics.median([machine.seconds(replay) for _ in range(repeats + 3)][3:])


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def check_bandwidth(seconds: float, read_bytes: float, bytes_per_second: float) -> None:
    """Refused: faster than memory can deliver what is read."""
    if read_bytes / seconds > OVER_ROOF * bytes_per_second:
        raise Refused(
            f"{read_bytes / seconds / 1e9:.0f} GB/s, but memory delivers {bytes_per_second / 1e9:.0f}: "
            f"weights came from a cache, or were not read"
        )


def check_growth(seconds_by_bytes: dict[float, float], bytes_per_second: float) -> None:
    """Of one kernel, shape and number of tokens, at several precisions. Refused: reading twice the bytes or
    more is not slower, though memory bounds the smaller one."""
    for few, fast in seconds_by_bytes.items():
        if few / fast < BOUND * bytes_per_second:
            continue
        for many, slow in seconds_by_bytes.items():
            if many >= 1.9 * few and slow < GROWTH * fast:
                raise Refused(
                    f"{many / 1e6:.1f} MB take {slow * 1e6:.2f} us, {few / 1e6:.1f} MB {fast * 1e6:.2f} us: "
                    f"the time does not grow with the bytes"
                )
