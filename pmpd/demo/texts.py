"""Texts that are on every Python installation: the demo's training and held-out documents.

Two sources, both part of CPython itself, so nothing is downloaded and nothing is copied into this package:

* the language reference as `help()` shows it (`pydoc_data.topics`), one document per topic;
* the docstrings of the standard library, read from its source files with `ast` (nothing is imported).

The split is by *document group* (a topic, or a whole source module), so no held-out docstring has a sibling
in training.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "held_out"]

MIN_CHARACTERS = 40
"""Shorter docstrings ("Return self.") say nothing."""

MIN_PROMPT_CHARACTERS = 160
"""Shorter texts are for training only: a continuation of them can't be judged."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__", "ensurepip"}
)


@dataclass(frozen=True)
class Document:
    """One text: `key` is stable on one Python version (`topics/if`,
    `argparse/ArgumentParser.add_argument`)."""

    key: str
    group: str
    text: str

    @property
    def split(self) -> Split:
        """Held-out: 2 of 16 groups, validation (model selection while training): 1 of 16, by a hash of the
        group."""
        bucket = int(hashlib.sha256(self.group.encode()).hexdigest()[:8], 16) % 16
        return "held_out" if bucket < 2 else "validation" if bucket == 2 else "train"


@cache
def documents() -> tuple[Document, ...]:
    """All documents of this Python installation, in a fixed order, without exact duplicates."""
    seen: set[str] = set()
    result = []
    for document in (*_topics(), *_docstrings()):
        if len(document.text) >= MIN_CHARACTERS and document.text not in seen:
            seen.add(document.text)
            result.append(document)
    return tuple(result)


def documents_of(split: Split) -> list[Document]:
    return [document for document in documents() if document.split == split]


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(key=f"topics/{name}", group=f"topics/{name}", text=text.strip())


def _docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template or a deliberately broken file
            continue
        module = ".".join(relative.with_suffix("").parts)
        for name, text in _docstrings_of(tree, ""):
            yield Document(key=f"{module}/{name}", group=module, text=text)


def _docstrings_of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield name or "<module>", inspect.cleandoc(text)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings_of(child, f"{name}.{child.name}".lstrip("."))
