"""Ids of rows: the first 16 hex digits of the SHA-256 over the canonical JSON of what makes a row.

Canonical is: keys sorted, no spaces. In one thing the tables differ, and stay as they are, since ids are for
ever: texts of prompts are escaped to ASCII, keys of benchmark questions are UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def ascii_id(identity: Mapping[str, Any]) -> str:
    """The id over JSON with `\\uXXXX` for what is not ASCII: prompts. Any text of Python has one, half
    surrogate pairs too."""
    return _digest(json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True))


def utf8_id(identity: Mapping[str, Any]) -> str:
    """The id over JSON in UTF-8: questions of benchmarks."""
    return _digest(json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def _digest(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
