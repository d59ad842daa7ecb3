"""Which sources a native library belongs to. `setup.py` runs this file too, so it imports nothing of the
package."""

from __future__ import annotations

import hashlib
from pathlib import Path

LIBRARY = "_native.so"
"""File name of the library, beside this file."""

FOLDER = Path(__file__).parent / "csrc"


def sources() -> list[Path]:
    """The files to compile."""
    return sorted(FOLDER.glob("*.cpp"))


def fingerprint() -> str:
    """16 hex digits over the names and contents of all sources: compiled into the library, compared when it
    is loaded."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
