"""Finding and reading what `pmpd generate` wrote, with neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.fs as pafs

from pmpd import storage
from pmpd.errors import UserError
from pmpd.evaluation.compare import compare


def datasets_at(path: str, table: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(folder, manifest) of every data set of that table at or below `path`, in order. ValueError where there
    is no such folder."""
    file_system, inner = storage.resolve(path)
    if not storage.exists(path):
        raise UserError(f"{path}: no such folder; run pmpd generate first, or give its output folder")
    infos = file_system.get_file_info(pafs.FileSelector(inner, recursive=True))
    for info in sorted(infos, key=lambda info: info.path):
        if info.base_name != "manifest.json":
            continue
        relative = info.path[len(inner.rstrip("/")) + 1 :].rpartition("/")[0]
        folder = storage.join(path, relative) if relative else str(path)
        manifest = storage.read_manifest(folder)
        if manifest is not None and manifest.get("table") == table and storage.list_shards(folder):
            yield folder, manifest


def generation_datasets(path: str, static_search: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(folder, manifest) of every GENERATIONS data set at or below `path`, in order; see `read_generations`.
    ValueError where there is none."""
    found = False
    for folder, manifest in datasets_at(path, "generations"):
        if bool(manifest["config"].get("static_search")) == static_search:
            found = True
            yield folder, manifest
    if not found:
        raise UserError(
            f"{path}: no generations in it (the grid of a static search does not count); give the output "
            f"folder of pmpd generate"
        )


def read_judgments(path: str) -> Iterator[tuple[str, Mapping[str, Any], list[dict[str, Any]]]]:
    """(folder, manifest, rows) of every JUDGMENTS data set at or below `path`."""
    for folder, manifest in datasets_at(path, "judgments"):
        yield folder, manifest, storage.read_table(folder).to_pylist()


def read_generations(
    path: str, static_search: bool = False
) -> Iterator[tuple[str, Mapping[str, Any], list[dict[str, Any]]]]:
    """(folder, manifest, rows) of every GENERATIONS data set at or below `path`: the grids of static searches
    only, or all others.

    A conversation that failed as a whole is one row without a turn in the table; here it is one row for each
    of its turns. ValueError where there is such a row and the conversations are not beside the answers.
    """
    for folder, manifest in generation_datasets(path, static_search):
        yield folder, manifest, _by_turn(folder, storage.read_table(folder).to_pylist())


def _by_turn(folder: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if all(row["turn"] is not None for row in rows):
        return rows
    asked = storage.read_table(
        storage.join(storage.parent(storage.absolute(folder)), "conversations"),
        ["conversation_id", "turns"],
    )
    turns = {row["conversation_id"]: range(1, len(row["turns"]) + 1) for row in asked.to_pylist()}
    return [
        {**row, "turn": turn}
        for row in rows
        for turn in (turns[row["conversation_id"]] if row["turn"] is None else [row["turn"]])
    ]


def reportable(path: str) -> bool:
    """Whether a report has something to compare the answers at `path` with."""
    try:
        found = compare(row for _, _, rows in read_generations(path) for row in rows)
    except UserError:
        return False
    return all(comparison.has_reference for comparison in found)
