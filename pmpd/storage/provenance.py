"""What code made a row: a fingerprint over the package's own sources, and the commit where it is known."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
COMMIT_FILE = PACKAGE / "_commit.txt"
"""Written into the wheel by `setup.py`, never into the source tree."""

_SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".j2", ".css", ".js", ".jsonl")


@cache
def source_fingerprint(package: Path = PACKAGE) -> str:
    """First 16 hex digits of the SHA-256 over names and contents of the package's sources. It is known
    wherever the package runs from: a checkout, a wheel, a submitted working directory."""
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in _SOURCES):
        name, content = path.relative_to(package).as_posix().encode(), path.read_bytes()
        digest.update(len(name).to_bytes(8, "big") + name + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]


@cache
def git_commit(package: Path = PACKAGE) -> str | None:
    """The commit the package was built from, or that of the checkout it lies in ("+" = with changes). None
    elsewhere: a repository around a virtual environment is not ours."""
    recorded = package / COMMIT_FILE.name
    if recorded.exists():
        return recorded.read_text().strip() or None
    return commit_of(package.parent)


def commit_of(root: Path) -> str | None:
    """The commit of the repository whose top folder this is; None where it is none or git can't tell."""
    if not ((root / ".git").exists() and (root / "setup.py").exists()):
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "pmpd")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
