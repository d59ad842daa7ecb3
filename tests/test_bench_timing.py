"""What the timing of CUDA launches refuses, with a stand-in for the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

from bench import _contenders, _cuda, _peers, _timing
from bench._timing import Captured, Refused
from pmpd.kernels.cuda.cut import H100
from pmpd.kernels.cuda.cut import cut as cut_of_rules
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.kernels.triton import TritonMatrix

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


class Uncounted(StandIn):
    """Nobody counts the launches of its graphs."""

    def capture(self, calls: Sequence[Callable[[], torch.Tensor]]) -> Captured:
        return super().capture(calls)._replace(nodes=None)


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
    with pytest.raises(Refused, match="nan"):
        _timing.seconds_of([product], EXPECTED, 1e-6, Uncounted(lost=True))


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
        {"shape": "8b.o", "bits": 4, "tokens": 1, "impl": "bits", "refused": "why"},
    ]
    share, humming, upstream = _bars.check(rows, 3e12, h200=False)
    assert share["measured"] == pytest.approx(14336 * 4096 / 2 / 10e-6 / 3e12)
    assert (share["met"], upstream["met"], humming["met"]) == (True, True, False)
    expected = _bars.predictions({"14336x4096": (14336, 4096)}, 3e12)
    assert [round(p["us"], 1) for p in expected] == [11.1, 7.9, 5.2]


def test_what_the_product_takes_is_held_against_the_peers(capsys):
    """Not a faster kernel that nothing takes; a figure that was refused is no reason to be silent."""
    from bench import _bars

    at = {"shape": "8b.o", "n": 4096, "k": 4096, "bits": 3}
    rows = [
        at | {"tokens": 4, "impl": "halves w4", "us": 5.0},
        at | {"tokens": 4, "impl": "clusters", "us": 8.0, "taken": True},
        at | {"tokens": 4, "impl": "any-precision", "us": 6.0},
        at | {"tokens": 8, "impl": "clusters", "us": 8.0, "taken": True},
        at | {"tokens": 8, "impl": "any-precision", "refused": "an error of 1"},
        at | {"tokens": 8, "impl": "humming", "us": 16.0},
        at | {"tokens": 1, "impl": "bits w8", "refused": "why", "taken": True},
        at | {"tokens": 1, "impl": "halves w4", "us": 1.0},
        at | {"tokens": 1, "impl": "any-precision", "us": 6.0},
        at | {"tokens": 8, "bits": 0, "impl": "any-precision", "refused": "does not grow"},
    ]
    slower, no_peer, humming, no_ours = _bars.check(rows, 3e12, h200=False)
    assert (slower["met"], slower["measured"], slower["ours"]) == (False, 0.75, "clusters")
    assert not no_peer["met"]
    assert "an error of 1" in no_peer["why"]
    assert (humming["met"], humming["measured"]) == (True, 2.0)
    assert (no_ours["met"], no_ours["measured"]) == (False, None)
    printed = capsys.readouterr().out
    assert (
        "MISSED 8b.o b=3 M=4: times as fast as any-precision, at least 1: 0.75 (clusters 8.00 us" in printed
    )
    assert "at least as fast as any-precision: 0 of 3\nat least as fast as humming: 1 of 1\n" in printed


def test_a_graph_that_holds_a_launch_is_told_from_one_that_does_not():
    assert _timing.holds(product, StandIn())
    assert not _timing.holds(product, StandIn(lost=True))
    assert not _timing.holds(product, Uncounted())

    def not_now() -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert not _timing.holds(not_now, StandIn())


@pytest.mark.parametrize("columns", [1024, 1568])
def test_the_peers_kernel_is_asked_for_the_product_that_ours_gives(columns, monkeypatch):
    """A stand-in that reads planes, table and x as the extension does."""
    asked = []

    def matmul_kbit(x: torch.Tensor, planes: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
        asked.append(x.shape[1])
        assert all(one.is_contiguous() for one in (x, planes, table))
        assert (x.dtype, planes.dtype, table.dtype) == (torch.float16, torch.int32, torch.float16)
        assert (x.shape[0], planes.shape[1:], table.shape) == (1, (48, columns // 32), (48, 2**bits))
        weight = torch.empty(48, columns, dtype=torch.float64)
        for start in range(0, columns, 1024):
            lanes = min(1024, columns - start) // 32
            for column in range(32):  # of a lane: byte j, the highest first, then its bits, the highest first
                j, bit = divmod(column, 8)
                words = planes[:bits, :, start // 32 : start // 32 + lanes]
                ones = (words >> (31 - column)) & 1
                code = sum(ones[p].long() << (bits - 1 - p) for p in range(bits))
                at = start + 8 * lanes * j + 8 * torch.arange(lanes) + bit
                weight[:, at] = table.double().gather(1, code)
        return (x.double() @ weight.T).half()

    monkeypatch.setitem(sys.modules, "any_precision_ext", SimpleNamespace(matmul_kbit=matmul_kbit))
    monkeypatch.setattr(_contenders, "ROTATE_BYTES", 0)
    packed = _contenders.random_weights(48, columns, (2, 3, 4), 0, torch.device("cpu"))
    matrix = TritonMatrix(packed, torch.float16)
    for bits in (2, 3, 4):
        for tokens in (1, 2, 8, 9):
            x = torch.randn(tokens, columns).half()
            found = dict(_contenders.contenders("", packed, matrix, None, x, bits, sweep=False))
            assert list(found) == (["any-precision"] if tokens <= 8 else [])
            for call in found.get("any-precision", []):
                expected = ReferenceMatrix(packed, torch.float32).multiply(x.float(), bits)
                assert _timing.relative_error(call(), expected) < 1e-3
    assert set(asked) == {1, 2, 8}


def test_what_the_product_takes_has_the_name_of_its_row(monkeypatch):
    packed = _contenders.random_weights(64, 1024, (2, 3, 4), 0, torch.device("cpu"))
    matrix = CudaMatrix(packed, torch.float16)
    cut = cut_of_rules(64, 1024, (3,), H100)
    monkeypatch.setattr(CudaMatrix, "_cut", lambda self, bits: cut if len(bits) == 1 else None)
    monkeypatch.setattr(_contenders, "ROTATE_BYTES", 0)
    names = {}
    for tokens in (1, 4):
        x = torch.randn(tokens, 1024).half()
        found = _contenders.contenders("", packed, matrix, matrix, x, 3, sweep=False)
        names[tokens] = [name for name, _ in found if name != "any-precision"]
        assert names[tokens] == [_contenders.taken(matrix, tokens, 3)]
    assert names == {1: [_contenders.said(cut)], 4: ["halves"]}


@pytest.mark.parametrize("held", [True, False])
def test_a_row_says_how_the_peer_was_timed_and_which_kernel_the_product_takes(held, monkeypatch):
    def row(name, n, k, bits, tokens, impl, calls, *_, machine=None) -> dict:
        return {"bits": bits, "tokens": tokens, "impl": impl, "queued": isinstance(machine, _timing.Queued)}

    monkeypatch.setattr(_cuda, "timed_row", row)
    monkeypatch.setattr(_cuda, "unavailable", lambda *_: None)
    monkeypatch.setattr(_cuda, "humming_version", lambda: None)
    monkeypatch.setattr(_cuda, "ROTATE_BYTES", 0)
    monkeypatch.setattr(_contenders, "ROTATE_BYTES", 0)
    monkeypatch.setattr(_contenders, "any_precision", lambda: lambda x, planes, table, bits: x)
    monkeypatch.setattr(_timing, "holds", lambda call: held)
    cut = cut_of_rules(64, 2048, (3,), H100)
    monkeypatch.setattr(CudaMatrix, "_cut", lambda self, bits: cut if len(bits) == 1 else None)
    rows = list(_cuda.time_kernels(torch.device("cpu"), 1e12, {"a": (64, 2048)}, (1, 2, 8), (1, 8)))
    theirs = [r for r in rows if r["impl"] == "any-precision"]
    assert {(r["bits"], r["tokens"]) for r in theirs} == {(b, m) for b in (2, 3, 4) for m in (1, 2, 8)}
    assert {r["queued"] for r in theirs} == {not held}
    assert {r["launches"].split(",")[0] for r in theirs} == {f"{'current' if held else 'default'} stream"}
    taken = [(r["bits"], r["tokens"], r["impl"]) for r in rows if r.get("taken")]
    assert set(taken) == {
        (bits, tokens, _contenders.said(cut) if tokens == 1 else "halves")
        for bits in (2, 3, 4) for tokens in (1, 2, 8)
    }  # fmt: skip
    swept = {r["tokens"] for r in rows if r["impl"].startswith("halves w")}
    assert swept == {1, 8}, "of two tokens only what the product takes"
    assert not any(r["queued"] for r in rows if r["impl"] != "any-precision")


def test_a_peer_that_fails_ends_no_run(monkeypatch):
    """Building its matrices, or the first call, which compiles."""
    inputs = {tokens: torch.randn(tokens, 64) for tokens in (1, 8)}

    def broken(*_: object) -> None:
        raise AssertionError("no such type")

    monkeypatch.setattr(_cuda, "humming", broken)
    rows = list(_cuda.time_humming("8b.o", 32, 64, 3, inputs, torch.device("cpu"), 1e12))
    assert [(row["tokens"], row["refused"]) for row in rows] == [
        (tokens, "AssertionError: no such type") for tokens in (1, 8)
    ]
    monkeypatch.setattr(_cuda, "humming", lambda *_: ([broken], torch.randn(32, 64)))
    rows = list(_cuda.time_humming("8b.o", 32, 64, 3, inputs, torch.device("cpu"), 1e12))
    assert [row["refused"] for row in rows] == ["AssertionError: no such type"] * 2


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
