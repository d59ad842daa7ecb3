"""Which Ray a command joins."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from pmpd import farm
from pmpd.errors import UserError
from pmpd.farm import connection, ray_private
from tests.ray_sessions import environment


@pytest.fixture
def joined(monkeypatch):
    """joined(RAY_ADDRESS, address left by `ray start`, error of ray.init) -> addresses given to ray.init."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_private, "use_token_file", lambda: None)
    monkeypatch.setattr(connection, "warn_of_open_token", lambda: None)

    def connect(given: str | None, left: str | None, error: Exception | None = None) -> list[str]:
        found: list[str] = []

        def init(address: str, **_) -> None:
            found.append(address)
            if error is not None:
                raise error

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray_private, "local_address", lambda: left)
        if given is None:
            monkeypatch.delenv("RAY_ADDRESS", raising=False)
        else:
            monkeypatch.setenv("RAY_ADDRESS", given)
        begin = time.monotonic()
        farm.connect()
        assert time.monotonic() - begin < 5
        return found

    return connect


@pytest.fixture
def listening():
    """Address of something that greets as a Ray does, and says no more."""
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    with server_of(settings) as address:
        yield address


@contextlib.contextmanager
def server_of(answer: bytes):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client, contextlib.suppress(OSError):
                        client.recv(100)
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_only_a_ray_that_is_meant_for_others_is_joined(joined, listening):
    """The Ray that another run started for itself leaves no address, and one that is gone answers no more."""
    assert (
        joined(None, None)
        == joined("", None)
        == joined("auto", None)
        == joined("local", listening)
        == ["local"]
    )
    assert joined(None, "127.0.0.1:1") == ["local"], "what a Ray left behind that is gone"
    assert (
        joined(None, listening) == joined(listening, None) == joined(listening, "127.0.0.1:1") == [listening]
    )


def test_a_ray_that_can_not_be_joined_is_told_with_its_cure(joined, listening):
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray answers there; start it"):
        joined("127.0.0.1:1", None)
    with pytest.raises(
        ValueError,
        match=f"the Ray of this machine, {listening}: it refuses this process's token; put the cluster's "
        f"token",
    ):
        joined(None, listening, ray.exceptions.AuthenticationError("token"))
    with pytest.raises(ValueError, match=f"RAY_ADDRESS={listening}: it can't be joined .*give host:port"):
        joined(listening, None, ConnectionError("no"))


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.0 400 Bad request\r\n\r\n", b"-ERR unknown command 'PRI'\r\n", b""],
    ids=["http", "redis", "mute"],
)
def test_something_else_than_ray_is_told_at_once(joined, answer):
    with (
        server_of(answer) as address,
        pytest.raises(UserError, match="something listens there, but no Ray answers"),
    ):
        joined(address, None)


def test_a_ray_on_loopback_only_is_asked_there(joined, listening, monkeypatch):
    """Ray takes 127.0.0.1 for the machine's own address, and asks there for minutes."""
    seen = []
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    monkeypatch.setattr(ray_private, "loopback_only", lambda: seen.append(1) or contextlib.nullcontext())
    joined(listening, None)
    joined(None, listening)
    assert len(seen) == 2
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")  # it answers there too
    joined(listening, None)
    assert len(seen) == 2


def test_another_version_of_ray_is_told_with_both(joined, listening):
    page = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.9\nThis process "
        f"on node 127.0.0.1 was started with:\n    Ray: {ray.__version__}\n    Python: 3.11.9\n"
    )
    told = f"the cluster has Ray 2.59.0, this process {ray.__version__}; install the cluster's version"
    with pytest.raises(UserError, match=told):
        joined(listening, None, RuntimeError(page))


def test_a_token_that_others_can_read_is_warned_of(tmp_path, monkeypatch, capsys):
    token = tmp_path / "auth_token"
    token.write_text("a")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for mode, warned in ((0o600, False), (0o644, True), (0o640, True)):
        token.chmod(mode)
        connection.warn_of_open_token()
        assert ("chmod 600" in capsys.readouterr().err) == warned, oct(mode)


def test_a_private_ray_listens_on_loopback_only():
    with environment() as env:
        command = [sys.executable, str(Path(__file__).parent / "list_ports.py")]
        found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=170, check=False)
    assert found.returncode == 0, found.stderr
    addresses = found.stdout.split()
    assert len(addresses) > 5, "Ray has more listeners than that: the list is not of Ray"
    assert all(address.startswith("127.") for address in addresses), addresses


def test_a_folder_name_too_long_for_sockets_is_told(tmp_path):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with environment() as env:
        env = env | {"RAY_TMPDIR": str(deep), "TMPDIR": str(deep)}
        code = "from pmpd import farm, errors\ntry: farm.connect()\nexcept errors.UserError as e: print(e)"
        command = [sys.executable, "-c", code]
        told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert told.stdout.count("\n") == 1, told.stderr
    assert "too long for the sockets that Ray makes there" in told.stdout


def test_the_token_of_a_first_ray_is_its_owners_alone(tmp_path, monkeypatch):
    """And one that is there already, or given, or not wanted, is left as it is."""
    token = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "a"), ("RAY_AUTH_TOKEN_PATH", "b")):
        monkeypatch.setenv(name, value)
        ray_private.make_token()
        assert not token.exists(), name
        monkeypatch.delenv(name)
    umask = os.umask(0o022)
    try:
        ray_private.make_token()
        (tmp_path / "after").touch()
    finally:
        os.umask(umask)
    assert token.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "after").stat().st_mode & 0o777 == 0o644, "what is written later is as the user has it"
    before = token.read_text()
    assert len(before) >= 32
    ray_private.make_token()
    assert token.read_text() == before
