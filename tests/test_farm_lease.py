"""One run per output folder."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from pmpd import storage
from pmpd.errors import UserError
from pmpd.storage.lease import Lease, LeaseLostError


def test_a_folder_in_use_is_refused_at_once_and_says_by_whom(tmp_path):
    with Lease(tmp_path):
        begin = time.monotonic()
        with (
            pytest.raises(ValueError, match=rf"process {os.getpid()}.*another output folder"),
            Lease(tmp_path),
        ):
            pass
        assert time.monotonic() - begin < 1
    with Lease(tmp_path):
        pass


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path):
    lease = Lease(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    lease._record |= {"pid": dead.pid, "started": "1"}
    lease._write()
    begin = time.monotonic()
    with Lease(tmp_path):
        assert time.monotonic() - begin < 2


def test_the_lease_of_another_machine_is_judged_by_its_heartbeat(tmp_path):
    other = Lease(tmp_path, beat_seconds=0.1)
    other._record |= {"host": "elsewhere", "hostname": "elsewhere", "pid": 1}
    with (
        other,
        pytest.raises(ValueError, match="in use by a run on elsewhere"),
        Lease(tmp_path, stale_seconds=1),
    ):
        pass
    other._write()  # and then no beat any more
    with Lease(tmp_path, stale_seconds=1) as mine:
        mine.check()


def test_a_run_that_lost_its_lease_stops(tmp_path):
    with Lease(tmp_path, beat_seconds=0.05) as lease:
        storage.write_bytes(lease.path, b'{"token": "another"}')
        time.sleep(0.3)
        with pytest.raises(LeaseLostError, match="another run has taken it over"):
            lease.check()
    assert storage.read_bytes(lease.path) is not None, "the other run's lease is not ours to remove"


@pytest.mark.parametrize(
    "content",
    [
        b"\x1b[2J not a lease",
        b"[1, 2]",
        b"\xff\xfe}",
        b'{"pid": 5}',
        b'{"token": "a", "pid": "abc\x1b[31m", "host": 3}',
        b'{"token": "a", "somebody": "else"}',
    ],
)
def test_a_lease_file_that_no_run_wrote_is_named(tmp_path, content):
    path = tmp_path / "_lease.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="delete it if no run uses the folder") as raised:
        Lease(tmp_path, stale_seconds=0.2).__enter__()
    assert str(path) in str(raised.value)
    assert str(raised.value).isprintable()
    assert path.read_bytes() == content, "it is not ours"


def test_what_a_foreign_lease_says_is_printed_without_its_control_characters(tmp_path):
    other = Lease(tmp_path, beat_seconds=0.1)
    other._record |= {"host": "elsewhere", "hostname": "else\x1b[2Jwhere"}
    with other, pytest.raises(UserError, match=r"in use by a run on else\?\[2Jwhere"):
        Lease(tmp_path, stale_seconds=1).__enter__()


def test_half_a_lease_is_taken_over_when_nobody_renews_it(tmp_path):
    (tmp_path / "_lease.json").write_bytes(b'{"token": "ab')
    with Lease(tmp_path, stale_seconds=0.2) as lease:
        lease.check()
