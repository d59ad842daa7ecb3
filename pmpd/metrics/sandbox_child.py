"""Runs a program from standard input within limits, and says the given word at its end. Not imported: a
process of its own (`code.passes`)."""

import ctypes
import io
import os
import resource
import sys

NO_SANDBOX = 97
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
LIMITS = {
    "RLIMIT_CPU": 8,
    "RLIMIT_AS": 2**30,
    "RLIMIT_FSIZE": 2**20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}


def main() -> None:
    word, program = sys.argv[1], sys.stdin.buffer.read().decode(errors="replace")
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    # a network of its own, without even a loopback that is up
    if unshare is None or (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0 and unshare(CLONE_NEWNET) != 0):
        os._exit(NO_SANDBOX)
    for name, value in LIMITS.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    out, sys.stdout, sys.stderr, sys.stdin = sys.stdout, io.StringIO(), io.StringIO(), io.StringIO()
    sys.argv = ["program"]
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit too: a program that leaves early has not passed
        os._exit(1)
    out.write(word)
    out.flush()
    os._exit(0)


main()
