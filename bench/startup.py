"""Seconds until a command answers: `python -m bench.startup`. Bar: under 1 s for help and a mistyped flag.

Each is a process of its own, the median of several; on a busy machine the figures say nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from bench import _record

BAR_SECONDS = 1.0
CALLS = (
    ["--help"],
    ["label", "--help"],
    ["generate", "--help"],
    ["train", "--help"],
    ["quantize", "--help"],
    ["label", "--szie", "3"],
)
ROUNDS = 5


def seconds_of(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pmpd", *arguments], capture_output=True, check=False)
    return time.perf_counter() - begin


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{'command':24} {'median s':>9}   bar {BAR_SECONDS} s; load {os.getloadavg()[0]:.1f}")
    results = []
    for arguments in CALLS:
        took = statistics.median(seconds_of(arguments) for _ in range(ROUNDS))
        met = took < BAR_SECONDS
        print(f"pmpd {' '.join(arguments):19} {took:9.2f}   {'met' if met else 'NOT MET'}")
        results.append({"command": " ".join(arguments), "seconds": round(took, 3), "met": met})
    path = _record.write("startup", {"load": os.getloadavg()[0], "commands": results})
    print(f"JSON: {path}")
    return int(not all(result["met"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
