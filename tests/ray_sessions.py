"""Ray for tests: sessions of their own, quiet, with their own token, never the Ray of the machine.

Ray keeps the authentication mode of the moment it is imported, and the first token it sees, for the life of
the process. So both are set here, once, when the tests are collected: a token file in the user's home then
decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a" * 32,
    "RAY_ADDRESS": "local",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "150",
}
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name.startswith("RAY_AUTH")})
if "ray" in sys.modules:
    sys.modules["ray"]._raylet.Config.initialize("")

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Sets `ENVIRONMENT` for this process and its children; yields all of it. Whoever runs the tests with a
    number of threads means these: workers of a farm reckon their own."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    os.environ.pop("OMP_NUM_THREADS", None)
    try:
        yield dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def local_ray(num_cpus: int, **options) -> Iterator[None]:
    import ray

    from tests import farm_fakes

    with environment():
        _start(num_cpus=num_cpus, **options)
        ray.cloudpickle.register_pickle_by_value(farm_fakes)
        try:
            yield
        finally:
            ray.cloudpickle.unregister_pickle_by_value(farm_fakes)
            ray.shutdown()


def _start(**options) -> None:
    """Ray gives itself 30 s to start, which a machine that does much else may not give it."""
    import ray

    for attempt in range(3):
        try:
            ray.init(address="local", include_dashboard=False, **QUIET, **options)
            return
        except Exception as error:
            ray.shutdown()
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
