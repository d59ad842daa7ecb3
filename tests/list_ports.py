"""Starts the Ray that a command starts for itself, and prints the local addresses on which it listens."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

from pmpd import farm


def sockets_of(pids: set[int]) -> set[str]:
    """Inode numbers of the sockets that the processes hold."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(entry)
                    if target.startswith("socket:["):
                        found.add(target[8:-1])
    return found


def descendants(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(stat[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(inodes: set[str]) -> list[str]:
    addresses = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                packed = fields[1].partition(":")[0]
                words = [int(packed[i : i + 8], 16) for i in range(0, len(packed), 8)]
                address = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
                addresses.append(address.removeprefix("::ffff:"))
    return addresses


def main() -> None:
    import ray

    farm.connect()
    ray.get(ray.remote(lambda: 1).remote())  # a worker listens too
    print("\n".join(listening(sockets_of(descendants(os.getpid())))))


if __name__ == "__main__":
    main()
