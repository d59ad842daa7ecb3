"""Finding and reading what `jobs/generate.py` wrote, with neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.fs as pafs

from pmpd import tables


def generation_datasets(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(folder, manifest) of every GENERATIONS data set at or below `path`, in order. ValueError where there is none."""
    file_system, inner = tables.resolve(path)
    if not tables.exists(path):
        raise ValueError(f"--inputs {path}: no such folder; run jobs/generate.py first, or give its output folder")
    found = False
    infos = file_system.get_file_info(pafs.FileSelector(inner, recursive=True))
    for info in sorted(infos, key=lambda info: info.path):
        if info.base_name != "manifest.json":
            continue
        relative = info.path[len(inner.rstrip("/")) + 1 :].rpartition("/")[0]
        folder = tables.join(path, relative) if relative else str(path)
        manifest = tables.read_manifest(folder)
        if manifest is not None and manifest.get("table") == "generations" and tables.list_shards(folder):
            found = True
            yield folder, manifest
    if not found:
        raise ValueError(f"--inputs {path}: no generations in it; give the output folder of jobs/generate.py")


def read_generations(path: str) -> Iterator[tuple[str, Mapping[str, Any], list[dict[str, Any]]]]:
    """(folder, manifest, rows) of every GENERATIONS data set at or below `path`."""
    for folder, manifest in generation_datasets(path):
        yield folder, manifest, tables.read_table(folder).to_pylist()
