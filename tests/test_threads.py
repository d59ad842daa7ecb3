"""Which settings of OpenMP a process gets, and that a user's own are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmpd import threads

SCRIPT = """
import os
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # as Ray does
from pmpd import threads
print(threads.prepare(3), *(os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")))
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, f"True 3 {threads.SPINS}"),
        ({"OMP_NUM_THREADS": "7"}, f"False 7 {threads.SPINS}"),
        ({"GOMP_SPINCOUNT": "5"}, "True 3 5"),
        ({"OMP_WAIT_POLICY": "passive"}, "True 3 None"),
    ],
)
def test_a_users_own_settings_are_left_alone(own, expected):
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**cleaned, **own, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
