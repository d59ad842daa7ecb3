"""What every result file says about where its figures come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pmpd import gpu

RESULTS = Path(__file__).parent / "results"


def hardware(device: str = "cpu") -> str:
    """GPU name, or processor name with the number of threads torch uses."""
    if device == "cuda":
        return gpu.device_name(torch.device("cuda"))
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


def need_cuda() -> None:
    """Ends a benchmark of a GPU with a sentence where there is none."""
    if not torch.cuda.is_available():
        sys.exit("error: this needs a CUDA device, and there is none here (or this torch is without CUDA)")


def commit() -> str | None:
    """What was measured: the short id of the commit, with `+changes` where the tree differs from it.

    The environment variable PMPD_COMMIT says it of a tree that was copied without its repository; None
    without either.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parents[1], check=False
        ).stdout.strip()

    if told := os.environ.get("PMPD_COMMIT"):
        return told
    name = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "pmpd", "bench/*.py")
    return f"{name}+changes" if name and changed else name or None


def write(name: str, results: Any, device: str = "cpu", folder: Path = RESULTS) -> Path:
    """Writes `results` with hardware, date, commit and versions to `folder/name.json`; returns that path."""
    import transformers

    record = {
        "benchmark": name,
        "hardware": hardware(device),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
