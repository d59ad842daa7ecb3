"""What result files say about themselves: which code was measured, and which settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import _record, linear


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit in place of this one."""
    monkeypatch.setattr(_record, "RESULTS", tmp_path / "bench" / "results")
    (tmp_path / "pmpd").mkdir()
    (tmp_path / "pmpd" / "code.py").write_text("one = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_result_names_the_commit_and_whether_the_code_is_another(repository, monkeypatch):
    monkeypatch.delenv("PMPD_COMMIT", raising=False)
    path = _record.write("one", {}, folder=_record.RESULTS)
    commit = json.loads(path.read_text())["commit"]
    assert len(commit) >= 7
    assert _record.commit() == commit, "a result beside the code is no change of it"
    (repository / "pmpd" / "code.py").write_text("one = 2\n")
    assert _record.commit() == f"{commit}+changes"


def test_the_name_of_a_result_of_one_layer_follows_its_settings():
    assert linear.LinearBenchConfig().result_name == "linear_cpu_2_threads"
    assert linear.LinearBenchConfig(threads=1, clock="cpu").result_name == "linear_cpu_1_thread"
    assert linear.LinearBenchConfig(name="mine").result_name == "mine"
    assert (_record.RESULTS / "linear_cpu_2_threads.json").is_file()


@pytest.mark.parametrize(
    "command", [["bench._cuda", "--wide"], ["bench.mixed_steps"], ["bench.decode", "--device", "cuda"]]
)
def test_a_benchmark_of_a_gpu_says_in_a_line_that_there_is_none(command):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: this needs a CUDA device")
    assert len(done.stderr.splitlines()) == 1
