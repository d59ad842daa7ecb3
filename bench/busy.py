"""What others on the machine cost: decoding beside busy loops, by how OpenMP's threads wait.

`python -m bench.busy` decodes the demo model (16 rows of 64 tokens, 2 threads) in fresh processes, alone and
beside loops that keep processors busy, for several settings of libgomp. Settings take turns; figures are
medians of rounds. What takes longer than `--limit` counts as that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench import _record
from pmpd import threads

SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    f"GOMP_SPINCOUNT={threads.SPINS} (ours)": {"GOMP_SPINCOUNT": threads.SPINS},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}

DECODE = """
import sys, time, torch
from pmpd import PMPDForCausalLM, demo
from pmpd.decode.requests import Request
torch.set_num_threads(2)
model = PMPDForCausalLM(demo.ANYPREC, dtype=getattr(torch, sys.argv[1])).eval()
requests = [Request(str(i), [5 + i] * 16, 64) for i in range(16)]
engine = model.engine(16, 80)
for turn in range(2):
    start = time.perf_counter()
    list(engine.run(requests, None, 4, ()))
    seconds = time.perf_counter() - start
print(seconds)
"""


def seconds_of(setting: dict[str, str], dtype: str, limit: float) -> float:
    """Of the second run in a process of its own: the first lays out the weights."""
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment = {**cleaned, **setting, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", DECODE, dtype]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=2 * limit
        )
    except subprocess.TimeoutExpired:
        return limit
    return min(limit, float(done.stdout.split()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", type=int, default=4, help="busy loops beside")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a run may take at most")
    parser.add_argument("--out", type=Path, default=_record.RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    rows = []
    for loops in (0, options.loops):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            for dtype in ("float32", "bfloat16"):
                seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
                for _ in range(options.rounds):
                    for name, setting in SETTINGS.items():
                        seconds[name].append(seconds_of(setting, dtype, options.limit))
                for name, some in seconds.items():
                    row = {
                        "loops": loops,
                        "dtype": dtype,
                        "setting": name,
                        "seconds": statistics.median(some),
                    }
                    rows.append({**row, "load": os.getloadavg()[0]})
                    print(f"{loops} loops, {dtype:8} {name:30} {row['seconds']:7.2f} s", flush=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(
        _record.write(
            "busy_cpu", {"rounds": options.rounds, "limit": options.limit, "rows": rows}, folder=options.out
        )
    )


if __name__ == "__main__":
    main()
