"""What the CUDA kernel is expected to do, said before it is measured, and what was promised of it.

The expectations are those of the prototype that the kernel was made from, measured on one H100 of 3.0 TB/s:
the share of the read bandwidth of its own run. The kernel as released has not been measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXPECTED_SHARE = {
    ("14336x4096", 4): 0.88, ("14336x4096", 3): 0.93, ("14336x4096", 2): 0.94,
    ("8b.gate_up", 4): 0.94, ("8b.gate_up", 3): 0.95, ("8b.gate_up", 2): 0.98,
    ("8b.down", 4): 0.78, ("8b.down", 3): 0.89, ("8b.down", 2): 0.86,
    ("8b.o", 4): 0.66, ("8b.o", 3): 0.66, ("8b.o", 2): 0.59,
}  # fmt: skip
"""(shape, bits) -> of the read bandwidth, one token; the bytes are those of the planes."""

PROMISED_SHARE = {
    ("14336x4096", 4): 0.85, ("14336x4096", 3): 0.90, ("14336x4096", 2): 0.90,
    ("8b.o", 4): 0.75, ("8b.o", 3): 0.75, ("8b.o", 2): 0.75,
}  # fmt: skip
"""On an H100; on an H200 14336x4096 is promised 0.80."""

OURS = ("bits", "digits", "halves", "clusters", "teams")
"""How our contenders' names begin."""


def predictions(shapes: dict[str, tuple[int, int]], bytes_per_second: float) -> list[dict[str, Any]]:
    """Microseconds that are expected at this bandwidth."""
    found = []
    for (name, bits), share in EXPECTED_SHARE.items():
        if name in shapes:
            rows, columns = shapes[name]
            seconds = rows * columns * bits / 8 / (share * bytes_per_second)
            found.append({"shape": name, "bits": bits, "tokens": 1, "us": seconds * 1e6, "share": share})
            print(
                f"predicted {name:12} b={bits} M=1 {seconds * 1e6:7.2f} us ({100 * share:.0f} %)", flush=True
            )
    return found


def check(rows: Sequence[dict], bytes_per_second: float, h200: bool) -> list[dict[str, Any]]:
    """The fastest plan of `bits.cu` against what was promised, and against the peers in the same run."""
    timed = [r for r in rows if "us" in r]
    bars: list[dict[str, Any]] = []

    def bar(said: str, least: float, measured: float) -> None:
        bars.append({"bar": f"{said}, at least {least:g}", "measured": measured, "met": measured >= least})

    def fastest(impl: str, of: Sequence[dict]) -> float | None:
        return min((r["us"] for r in of if r["impl"].startswith(impl)), default=None)

    keys = dict.fromkeys((r["shape"], r["bits"], r["tokens"]) for r in timed if r["bits"] < 16)
    for name, bits, tokens in keys:
        at = [r for r in timed if (r["shape"], r["bits"], r["tokens"]) == (name, bits, tokens)]
        said = f"{name} b={bits} M={tokens}"
        mine = fastest("bits", at)
        if mine and tokens == 1 and (promised := PROMISED_SHARE.get((name, bits))):
            least = 0.80 if h200 and name == "14336x4096" else promised
            share = at[0]["n"] * at[0]["k"] * bits / 8 / (mine / 1e6) / bytes_per_second
            bar(f"{said}: part of the read bandwidth", least, share)
        ours = min((us for impl in OURS if (us := fastest(impl, at))), default=None)
        for peer in ("any-precision", "humming"):
            if ours and (theirs := fastest(peer, at)):
                bar(f"{said}: times as fast as {peer}", 1, theirs / ours)
    for one in bars:
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['bar']}: {one['measured']:.2f}", flush=True)
    return bars
