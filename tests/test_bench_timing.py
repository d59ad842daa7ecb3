"""What the timing of CUDA launches refuses, with a stand-in for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from bench import _peers, _timing
from bench._timing import Captured, Refused

EXPECTED = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


class StandIn:
    """A replay runs again what was captured, and takes `seconds_each` a launch."""

    def __init__(self, seconds_each: float = 1e-5, lost: bool = False, constant: float = 0.0) -> None:
        self.seconds_each, self.lost, self.constant = seconds_each, lost, constant

    def capture(self, calls: Sequence[Callable[[], torch.Tensor]]) -> Captured:
        outputs = [call() for call in calls]

        def replay() -> None:
            self.last = self.constant + len(outputs) * self.seconds_each
            if not self.lost:
                for output, call in zip(outputs, calls, strict=True):
                    output.copy_(call())

        return Captured(outputs, replay, None if self.lost is None else 0 if self.lost else len(calls))

    def seconds(self, replay: Callable[[], None]) -> float:
        replay()
        return self.last


def product() -> torch.Tensor:
    return EXPECTED.float().clone()


def test_the_time_of_one_call_and_the_error_come_back():
    seconds, error = _timing.seconds_of([product] * 3, EXPECTED, 1e-6, StandIn(), rounds=2)
    assert seconds == pytest.approx(1e-5)
    assert error < 1e-6


def test_an_empty_graph_is_refused():
    with pytest.raises(Refused, match="another stream"):
        _timing.seconds_of([product], EXPECTED, 1e-6, StandIn(lost=True))


def test_a_replay_that_computes_nothing_is_refused_where_nobody_counts_launches():
    machine = StandIn(lost=True)
    count = machine.capture
    machine.capture = lambda calls: count(calls)._replace(nodes=None)  # type: ignore[method-assign]
    with pytest.raises(Refused, match="nan"):
        _timing.seconds_of([product], EXPECTED, 1e-6, machine)


def test_a_wrong_product_is_refused():
    with pytest.raises(Refused, match="error of"):
        _timing.seconds_of([lambda: product() * 1.1], EXPECTED, 1e-2, StandIn())


def test_a_time_that_does_not_grow_with_the_calls_is_refused():
    with pytest.raises(Refused, match="twice"):
        _timing.seconds_of([product], EXPECTED, 1e-6, StandIn(1e-8, constant=1e-6))


def test_what_memory_can_not_deliver_is_refused():
    _timing.check_bandwidth(1e-5, 3e7, 3e12)
    with pytest.raises(Refused, match="memory delivers"):
        _timing.check_bandwidth(1e-6, 3e7, 3e12)


def test_a_time_that_does_not_grow_with_the_bytes_is_refused():
    _timing.check_growth({1e7: 5e-6, 1.5e7: 5e-6, 2e7: 9e-6}, 4e12)
    with pytest.raises(Refused, match="grow with the bytes"):
        _timing.check_growth({1e7: 5e-6, 2e7: 5.1e-6}, 4e12)


def test_a_kernel_that_memory_does_not_bind_may_take_longer_for_fewer_bytes():
    """`halves` on an H200: 4 and 2 bits, 32 rows. At 2 bits it spills registers."""
    _timing.check_growth({31.1e6: 26.2e-6, 16.1e6: 36.1e-6}, 4.1e12)


def test_calls_that_no_graph_holds_are_timed_in_a_queue(monkeypatch):
    """Each replay computes anew: what it gave before is poison by then."""
    waits = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    monkeypatch.setattr(_timing.Cuda, "seconds", lambda self, replay: replay() or 2e-6 * calls())
    made = []

    def calls() -> int:
        count, made[:] = len(made), []
        return count

    def call() -> torch.Tensor:
        made.append(1)
        return product()

    seconds, error = _timing.seconds_of([call] * 4, EXPECTED, 1e-6, _timing.Queued())
    assert seconds == pytest.approx(2e-6)
    assert error < 1e-6
    assert len(waits) == 2 * 18, "a measurement without a wait times the host"


def test_bars_take_the_fastest_plan_and_the_peers_of_the_same_run():
    from bench import _bars

    at = {"shape": "14336x4096", "n": 14336, "k": 4096, "bits": 4, "tokens": 1}
    rows = [
        at | {"impl": "bits w8 p2 s4 l1 b2 r1", "us": 12.0},
        at | {"impl": "bits w8 p1 s4 l1 b2 r1", "us": 10.0},
        at | {"impl": "humming", "us": 9.0},
        at | {"impl": "any-precision", "us": 20.0},
        at | {"impl": "torch", "bits": 16, "us": 40.0},
        {"shape": "8b.o", "impl": "bits", "refused": "why"},
    ]
    share, upstream, humming = _bars.check(rows, 3e12, h200=False)
    assert share["measured"] == pytest.approx(14336 * 4096 / 2 / 10e-6 / 3e12)
    assert (share["met"], upstream["met"], humming["met"]) == (True, True, False)
    expected = _bars.predictions({"14336x4096": (14336, 4096)}, 3e12)
    assert [round(p["us"], 1) for p in expected] == [11.1, 7.9, 5.2]


def test_a_peer_whose_program_may_not_be_run_is_told_with_the_cure(tmp_path, monkeypatch):
    """A wheel unpacked as a plain archive loses the modes of its files."""
    program = tmp_path / "peer" / "_native" / "x86_64" / "compile"
    program.parent.mkdir(parents=True)
    (tmp_path / "peer" / "__init__.py").touch()
    (program.parent / "manifest.json").touch()
    program.touch(0o644)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"chmod \+x"):
        _peers.check_programs("peer")
    program.chmod(0o755)
    _peers.check_programs("peer")
    _peers.check_programs("no_such_package")
