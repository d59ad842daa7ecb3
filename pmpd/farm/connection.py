"""Which Ray a command joins."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm.options import FarmOptions

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}

ANSWER_SECONDS = 5
"""How long something that listens may take to greet."""


def connect(options: FarmOptions | None = None) -> None:
    """Joins the Ray of RAY_ADDRESS (a submitted job has it), else the one that `ray start` made or joined on
    this machine, else starts one for this process, which listens on the loopback interface only. Such a Ray
    of another process is never joined: it ends with its process. Does nothing where the work is to be done
    in this process.

    UserError: RAY_ADDRESS can't be joined, or the machine's own Ray refuses this process.
    """
    if options is not None and options.in_process:
        return
    import ray

    if ray.is_initialized():
        return
    from pmpd.farm import ray_private

    warn_of_open_token()
    given = os.environ.get("RAY_ADDRESS") or "auto"
    address = ray_private.local_address() if given == "auto" else given
    if address is None or address == "local" or (given == "auto" and not _listens(address)):
        _start()
        return
    told = f"RAY_ADDRESS={address}" if given != "auto" else f"the Ray of this machine, {address}"
    if "://" not in address:  # ray://… is Ray's client, with a handshake of its own
        if not _listens(address):
            raise UserError(f"{told}: no Ray answers there; start it, or unset RAY_ADDRESS")
        ray_private.use_token_file()  # as Ray does where it looks for the address itself
        if not _speaks_http2(address):
            raise UserError(
                f"{told}: something listens there, but no Ray answers; give host:port of a running Ray, or "
                f"unset RAY_ADDRESS"
            )
    _join(address, told)


def _start() -> None:
    import ray

    from pmpd.farm import ray_private

    try:
        ray_private.make_token()
        with own_signals(), ray_private.loopback_only():
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        if "AF_UNIX" in str(error) or "path length" in str(error):
            where = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
            raise UserError(
                f"TMPDIR {where}: too long for the sockets that Ray makes there; give a short one, e.g. "
                f"RAY_TMPDIR=/tmp, or --num-workers 0 to work without Ray"
            ) from error
        raise


def _speaks_http2(address: str) -> bool:
    """Whether what listens there greets as a gRPC server does. Ray itself tries for minutes to talk to one
    that does not."""
    if os.environ.get("RAY_USE_TLS") == "1":
        return True
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
    try:
        with _connection(address) as stream:
            stream.sendall(preface)
            head = b""
            while len(head) < 9:
                more = stream.recv(9 - len(head))
                if not more:
                    return False
                head += more
    except (OSError, ValueError, OverflowError):
        return False
    return head[3] == 4 and head[5:] == bytes(4)  # its settings, of the connection as a whole


def _join(address: str, told: str) -> None:
    import ray
    from ray.exceptions import RayError

    from pmpd.farm import ray_private

    loopback = ray_private.loopback_only() if _on_loopback_only(address) else nullcontext()
    try:
        with own_signals(), loopback:
            ray.init(address=address, **QUIET)
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise UserError(
                f"{told}: it refuses this process's token; put the cluster's token into ~/.ray/auth_token "
                f"and set RAY_AUTH_MODE=token (RAY_ADDRESS=local starts a Ray of its own)"
            ) from error
        if "ersion mismatch" in str(error):
            raise UserError(
                f"{told}: {_versions(str(error))}; install the cluster's version of Ray, or start the "
                f"cluster with this one"
            ) from error
        raise UserError(
            f"{told}: it can't be joined ({_line(error)}); give host:port of a running Ray "
            f"(RAY_ADDRESS=local starts one of its own)"
        ) from error


def _versions(text: str) -> str:
    """ "the cluster has Ray 2.59.0, this process 2.60.0", from Ray's page about a version mismatch."""
    import ray

    found = re.findall(r"Ray: (\d[\w.]*)", text)
    cluster = next((version for version in found if version != ray.__version__), None)
    if cluster is None:
        return _line(Exception(text))
    return f"the cluster has Ray {cluster}, this process {ray.__version__}"


def _line(error: BaseException, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit]


@contextmanager
def own_signals() -> Iterator[None]:
    """Puts this process's handlers back afterwards: Ray's own end it with a trace, and Ray Train's starts a
    Ray to tell a controller that has long ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def warn_of_open_token() -> None:
    """Says on stderr if others on this machine can read the token that opens the cluster."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return
    if mode & 0o077:
        print(
            f"warning: {path} has mode {mode:04o}, so others on this machine can read the cluster's token; "
            f"chmod 600 {path}",
            file=sys.stderr,
        )


def _listens(address: str) -> bool:
    """Whether something listens there: Ray itself takes minutes to find that nothing does."""
    try:
        _connection(address).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _on_loopback_only(address: str) -> bool:
    """Whether that Ray was started with `--node-ip-address=127.0.0.1`. Ray takes a loopback address for the
    machine's own, and asks there for two minutes, deaf to Ctrl-C."""
    import ray

    host, _, port = address.rpartition(":")
    return host in ("127.0.0.1", "localhost", "[::1]") and not _listens(
        f"{ray.util.get_node_ip_address()}:{port}"
    )


def _connection(address: str) -> socket.socket:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS)


def output_folder(path: str) -> str:
    """A submitted job runs in a copy of the working directory that Ray deletes: there, a relative path is
    taken from home."""
    submitted = "/runtime_resources/working_dir_files/" in os.getcwd() and "://" not in path
    return storage.absolute(Path.home() / path if submitted else path)
