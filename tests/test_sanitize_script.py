"""`tests/sanitize_cuda.sh` with stand-ins for compute-sanitizer and python3."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sanitize_cuda.sh"
KERNELS = ["bits_product", "rotary_attention", "halves_product", "teams_product"]


@pytest.fixture
def run(tmp_path):
    """(arguments, kernel that something is found in) -> exit status, standard error, checks that ran."""
    log = tmp_path / "log"

    def found(*arguments: str, bad: str = "none") -> tuple[int, str, list[str]]:
        sanitizer = f'echo "$*" >>{log}; case "$*" in *kernel_substring={bad}*) exit 9 ;; esac'
        for name, body in (("compute-sanitizer", sanitizer), ("python3", "exit 0")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        done = subprocess.run(
            ["sh", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )  # fmt: skip
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return done.returncode, done.stderr, lines

    return found


def test_every_check_runs_though_one_finds_something(run):
    status, told, checks = run(bad="rotary_attention")
    assert status == 1
    assert "memcheck of rotary_attention, racecheck of rotary_attention" in told
    assert len(checks) == 2 * len(KERNELS)


def test_one_tool_on_one_kernel_can_be_asked_for(run):
    status, _, checks = run("racecheck", "halves_product")
    assert (status, len(checks)) == (0, 1)


def test_an_unknown_kernel_is_told(run):
    status, told, checks = run("racecheck", "other_product")
    assert status == 2
    assert "other_product" in told
    assert not checks
