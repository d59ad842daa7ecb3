"""What `pip install .` takes along."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_every_file_of_the_package_that_is_no_module_is_package_data():
    listed = subprocess.run(
        ["git", "ls-files", "pmpd"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "pmpd"
    ]
    packed = {
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / "pmpd").glob(pattern)
    }
    files = {name for name in listed if not name.endswith(".py")}
    assert any("autotune" in name for name in files)
    assert files <= packed, f"not in the wheel: {sorted(files - packed)}"


def test_lines_of_cuda_have_110_characters():
    folders = (ROOT / "pmpd" / "kernels" / "cuda", ROOT / "tests" / "cuda_host")
    for path in (
        path for folder in folders for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h")
    ):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path}:{number}"
