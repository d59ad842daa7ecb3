"""Which Ray a command joins."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pmpd import storage
from pmpd.errors import UserError
from pmpd.farm import ray_private


def connect() -> None:
    """Joins the Ray of RAY_ADDRESS (a submitted job has it), else the one that `ray start` made or joined on
    this machine, else starts one for this process. Such a Ray of another process is never joined: it ends
    with its process.

    ValueError: RAY_ADDRESS can't be joined, or the machine's own Ray refuses this process.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    given = os.environ.get("RAY_ADDRESS") or "auto"
    address = ray_private.local_address() if given == "auto" else given
    if address is None or address == "local" or (given == "auto" and not _answers(address)):
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    told = f"RAY_ADDRESS={address}" if given != "auto" else f"the Ray of this machine, {address}"
    if not _answers(address):
        raise UserError(f"{told}: no Ray answers there; start it, or unset RAY_ADDRESS")
    if given == "auto":
        ray_private.use_token_file()  # as Ray does where it looks for the address itself
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RayError, ValueError) as error:
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise UserError(
                f"{told}: it refuses this process's token; put the cluster's token into ~/.ray/auth_token "
                f"and set RAY_AUTH_MODE=token "
                "(RAY_ADDRESS=local starts a Ray of its own)"
            ) from error
        raise UserError(
            f"{told}: it can't be joined ({error}); give host:port of a running Ray (RAY_ADDRESS=local "
            f"starts one of its own)"
        ) from error


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself takes minutes to find that nothing does."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def output_folder(path: str) -> str:
    """A submitted job runs in a copy of the working directory that Ray deletes: there, a relative path is
    taken from home."""
    submitted = "/runtime_resources/working_dir_files/" in os.getcwd() and "://" not in path
    return storage.absolute(Path.home() / path if submitted else path)
