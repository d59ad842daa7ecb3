"""The native CPU library as a machine has it or not: built, missing, and what `pmpd kernels` says
of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmpd import gpu
from pmpd.cli import kernels
from pmpd.kernels import cpu, dispatch, native

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
COMPILERS = (os.environ.get("CXX", "c++"), "g++", "clang++")


@pytest.fixture
def no_library(monkeypatch):
    """A process that has not looked for the library yet, and will find none."""
    monkeypatch.setattr(native._sources, "LIBRARY", "absent.so")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_where_there_is_a_compiler_the_library_is_in_use():
    """Without it all tests of the kernels are skipped, and nothing else would fail."""
    assert cpu.unavailable(CPU, torch.float32) is None


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
def test_without_a_compiler_the_build_succeeds_and_says_what_is_missing(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(tmp_path / "temp"),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "_native" in done.stderr
    assert "failed" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_the_library_the_slow_path_is_taken_and_said_once(no_library, caplog):
    for _ in range(2):
        assert dispatch.choose(CPU, torch.float32).name == "reference"
    (record,) = caplog.records
    assert "was not built" in record.message
    assert "pip install -v ." in record.message
    assert "slowly" in record.message


def test_the_page_says_what_is_in_use(monkeypatch, capsys):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    kernels.main(kernels.KernelsJob())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["cpu", "float32"],
        ["cpu", "bfloat16"],
        ["cpu", "float16"],
    ]
    assert all(
        dispatch.explain(CPU, dtype) in line
        for dtype, line in zip((torch.float32, torch.bfloat16), lines, strict=False)
    )
    assert native.describe() in lines[3]
    assert lines[4].startswith("cuda")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (dispatch.ENVIRONMENT, "cpu", "float16   error: kernel 'cpu' was asked for, but"),
        (dispatch.ENVIRONMENT, "abacus", "known are cpu, triton, cuda, dense, reference"),
        pytest.param(
            *(native.LEVEL_VARIABLE, "avx9000", "error: PMPD_CPU_LEVEL=avx9000"),
            marks=pytest.mark.skipif(
                cpu.unavailable(CPU, torch.float32) is not None, reason="no library, no levels"
            ),
        ),
    ],
)
def test_the_page_explains_settings_that_cannot_work(monkeypatch, capsys, variable, value, words):
    monkeypatch.setenv(variable, value)
    kernels.main(kernels.KernelsJob())
    assert words in capsys.readouterr().out


def test_the_page_says_why_there_is_no_library(no_library, capsys):
    kernels.main(kernels.KernelsJob())
    lines = [line for line in capsys.readouterr().out.splitlines() if "was not built" in line]
    said = [" ".join(line.split()[:2]) for line in lines]
    assert said == ["cpu float32", "cpu bfloat16", "native CPU", "cpu no:"], "the last in the list of kernels"


def test_the_page_says_which_kernels_a_gpu_would_run(monkeypatch, capsys):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu, "capability", lambda device: (7, 5))
    kernels.main(kernels.KernelsJob())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda")]
    assert len(lines) == 3
    assert all("reference" in line for line in lines)
