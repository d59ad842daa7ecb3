"""Modules from outside that register a scheduler, a metric, a kernel …: a command imports those of
`--plugins`, and so does every worker that it starts."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from pmpd.errors import UserError

_loaded: list[str] = []


def load(modules: str | Iterable[str] | None) -> None:
    """Imports modules, given by name or as names with commas between them. UserError: one can't be found."""
    for name in modules.split(",") if isinstance(modules, str) else modules or ():
        name = name.strip()
        if not name or name in _loaded:
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--plugins {name}: {error}; give modules that are installed or on PYTHONPATH, on every node"
            ) from error
        _loaded.append(name)


def loaded() -> tuple[str, ...]:
    """The names of what this process has loaded, for its workers."""
    return tuple(_loaded)
