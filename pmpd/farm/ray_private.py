"""Names of Ray that Ray does not promise to keep (checked with Ray 2.60).

Each is behind a function that says what happens without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray._private.state import actors, state
from ray._private.utils import read_ray_address
from ray.experimental.internal_kv import _internal_kv_get


def local_address() -> str | None:
    """Address of the Ray that `ray start` made on this machine. Without it, only RAY_ADDRESS names one."""
    return read_ray_address()


def use_token_file() -> None:
    """Turns token authentication on where there is a token file. Without it, set RAY_AUTH_MODE=token."""
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def make_token() -> None:
    """The token that a Ray of its own would make in the user's home, before it does: Ray's is readable by
    everybody on the machine. Without it that is so, and told (`connection.warn_of_open_token`)."""
    setup = authentication_token_setup
    by_default = hasattr(setup, "enable_token_auth_by_default")
    if os.environ.get("RAY_AUTH_MODE", "token" if by_default else "") != "token":
        return
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").exists():
        return
    before = os.umask(0o077)
    try:
        setup.generate_and_save_token()
    finally:
        os.umask(before)


def place_of(actor: ray.actor.ActorHandle) -> tuple[str, str]:
    """(node id, IP address) of an actor from when it begins to start; "" where it is not placed yet.

    Without it, a node's death is known only for workers that have answered.
    """
    address = actors(actor._actor_id.hex()).get("Address", {})
    return address.get("NodeID", ""), address.get("IPAddress", "")


def cluster_config() -> Any:
    """The autoscaler's configuration, None where there is none. Without it, see `autoscaler_status`."""
    return state.get_cluster_config()


def autoscaler_status() -> dict[str, Any]:
    """What the autoscaler last reported; {} where there is none.

    Without this and `cluster_config`, a run that could wait for nodes would end instead.
    """
    status = _internal_kv_get("__autoscaling_status")
    return json.loads(status) if status else {}


def draining_nodes() -> set[str]:
    """Ids of nodes that were told to go (a spot notice, an autoscaler's decision). Without it, a worker works
    until its node is gone, and its unit is done again."""
    return set(state.get_draining_nodes())


@contextmanager
def loopback_only() -> Iterator[None]:
    """A Ray started within has the address 127.0.0.1 and listens there only, as it does by default on macOS.
    Without it, it listens on all interfaces, and its token is what keeps others out."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    given = os.environ.get(name)
    os.environ[name] = "0"  # for the processes that Ray starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if given is not None:
            os.environ[name] = given
