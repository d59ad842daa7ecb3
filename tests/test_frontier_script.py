"""bench/frontier.sh with a stand-in for Python: where its parts run, and that all of them do."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "frontier.sh"

STAND_IN = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES $*" >>"$LOG"
case "$*" in *"$FAILS"*) exit 3 ;; *"$HANGS"*) sleep 60 ;; esac
"""


@pytest.fixture
def run(tmp_path):
    """(fails, hangs, **environment) -> what the stand-in was called with, device first."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "continuations.jsonl").write_text("{}\n")
    for kind in ("continuations", "instructions"):
        (tmp_path / "study" / "main" / "kl" / kind / "labels").mkdir(parents=True)
    (tmp_path / "study" / "pack").mkdir()
    (tmp_path / "study" / "pack" / "curves-0.npz").write_text("curves")

    def called(fails: str = "nothing", hangs: str = "nothing", **environment: str) -> list[str]:
        log = tmp_path / "log"
        log.write_text("")
        settings = {"PYTHON": str(python), "LOG": str(log), "FAILS": fails, "HANGS": hangs, **environment}
        arguments = [tmp_path / "texts", "questions", "quantized", "unquantized", tmp_path / "study", "it"]
        done = subprocess.run(
            ["bash", SCRIPT, *map(str, arguments)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "4,7", **settings},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1].startswith("== end")
        return log.read_text().splitlines()

    return called


def of(calls: list[str], *words: str) -> list[str]:
    return [call for call in calls if all(word in call for word in words)]


def test_parts_and_judges_are_spread_over_the_devices(run):
    calls = run(PARTS="4")
    for part, device in enumerate("4747"):
        (call,) = of(calls, f"--part {part}/4")
        assert call.startswith(f"{device} "), "a part is not on its GPU"
    assert sorted(call[0] for call in of(calls, "--name cost_")) == ["4", "7"], "one rule a GPU at a time"
    judges = [call[0] for what in ("online", "fit") for call in of(calls, f"bench.frontier {what} ")]
    assert len(judges) == 5
    assert abs(judges.count("4") - judges.count("7")) == 1


@pytest.mark.parametrize("fails", ["frontier_labels", "bench.frontier ", "--finish", "pack", "steps"])
def test_a_step_that_fails_keeps_no_other_from_running(run, fails, tmp_path):
    calls = run(fails, PARTS="2", BACK=str(tmp_path / "back"))
    steps = (
        "cost_auto",
        "bench.frontier steps",
        "--part 1/2",
        "--finish",
        "bench.frontier pack",
        "fit",
        "bench.frontier study",
    )
    assert [step for step in steps if not of(calls, step)] == []
    assert (tmp_path / "back" / "curves-0.npz").read_text() == "curves", "what there is comes back"
    assert (tmp_path / "back" / "small.tar.gz").stat().st_size > 0


def test_who_runs_out_of_time_still_packs_and_judges(run):
    started = time.monotonic()
    calls = run(
        "nothing", "--part 0/2", PARTS="2", LIMIT="16", KEEP="13", STEPS="labels finish pack judge study"
    )
    assert time.monotonic() - started < 40, "the part that hangs is ended"
    assert of(calls, "bench.frontier pack")
    assert len(of(calls, "bench.frontier fit")) == 4
