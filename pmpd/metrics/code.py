"""Running generated code against tests, each program in a process of its own.

What the process may do is limited (`sandbox_child.py`): no network, CPU time, memory, size of files, an empty
environment, a temporary folder that goes with it, and an end after `SECONDS`. It still runs as the user who
asks for it and can read and delete that user's files, so it is off unless asked, and belongs in a container.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pmpd.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
TESTS = "\n# ---- tests ----\n"
"""Between the given code and the tests in a reference."""
SECONDS = 10.0
"""Of the clock, for a program; the child's limit of CPU seconds is below it."""
NO_SANDBOX = 97
"""Exit code of the child where it can't cut the network."""


def pass_tests(pairs: Sequence[tuple[str, str]], _: Any = True) -> list[float]:
    """For each (answer, reference) 1 where the code in the answer passes the tests of the reference, else 0.

    UserError where programs can't be kept from the network on this machine: nothing is run then.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [float(passed) for passed in pool.map(lambda pair: passes(program_of(*pair)), pairs)]


def program_of(answer: str, reference: str) -> str:
    """The given code, the answer's code, the tests. An answer without a code block is code as it stands, or,
    where it does not define the function anew, the continuation of the given code."""
    given, _, tests = reference.partition(TESTS)
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, flags=re.DOTALL)
    names = re.findall(r"^def (\w+)", given, flags=re.MULTILINE)
    wanted = f"def {names[-1]}" if names else "def "
    code = next((block for block in blocks if wanted in block), blocks[0] if blocks else answer)
    joint = "\n" if wanted in code else ""
    return f"{given}{joint}{code}\n{tests}"


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end within its limits."""
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="pmpd-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), word],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(program.encode(errors="surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
    if process.returncode == NO_SANDBOX:
        raise UserError(
            "--run-code: this machine lets no process give up its network (unshare is not allowed), so "
            "nothing was run; allow user namespaces, or score in a container that allows them"
        )
    # the word comes after the tests: code that ends the process early has not passed
    return process.returncode == 0 and said.endswith(word.encode())
