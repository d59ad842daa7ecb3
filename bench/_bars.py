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

PEERS = ("any-precision", "humming")


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
    """The fastest plan of `bits.cu` against what was promised, and ours against the peers in the same run."""
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
    bars += (beside := beside_peers(rows))
    for one in bars:
        measured = one["why"] if one["measured"] is None else f"{one['measured']:.2f}"
        figures = f" ({one['ours']} {one['us']:.2f} us, theirs {one['peer_us']:.2f})" if "ours" in one else ""
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['bar']}: {measured}{figures}", flush=True)
    for peer in dict.fromkeys(one["peer"] for one in beside):
        met = [one["met"] for one in beside if one["peer"] == peer]
        print(f"at least as fast as {peer}: {sum(met)} of {len(met)}", flush=True)
    return bars


def beside_peers(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """For each figure of a peer how many times as fast what the product takes is (where no row says which
    that is, the fastest of ours). Where one of the two was refused, the bar is not met and says why."""
    bars = []
    for theirs in (r for r in rows if r["impl"] in PEERS and r["bits"]):
        key = theirs["shape"], theirs["bits"], theirs["tokens"]
        at = [r for r in rows if (r["shape"], r["bits"], r["tokens"]) == key]
        mine = [r for r in at if r.get("taken")] or [r for r in at if r["impl"].startswith(OURS)]
        ours = min((r for r in mine if "us" in r), key=lambda r: r["us"], default=None)
        one: dict[str, Any] = {
            "bar": f"{key[0]} b={key[1]} M={key[2]}: times as fast as {theirs['impl']}, at least 1",
            "peer": theirs["impl"],
        }
        if ours is None or "us" not in theirs:
            why = f"no figure of {theirs['impl']}: {theirs['refused']}" if ours else "no figure of ours"
            bars.append(one | {"measured": None, "met": False, "why": why})
        else:
            ratio = theirs["us"] / ours["us"]
            figures = {"ours": ours["impl"], "us": ours["us"], "peer_us": theirs["us"]}
            bars.append(one | {"measured": ratio, "met": ratio >= 1} | figures)
    return bars
