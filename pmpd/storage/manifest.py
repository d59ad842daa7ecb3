"""manifest.json: what made a dataset."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from pmpd.errors import UserError
from pmpd.storage.dataset import dataset_folder, list_shards
from pmpd.storage.files import read_bytes, remove, write_bytes
from pmpd.storage.provenance import git_commit, source_fingerprint
from pmpd.storage.scan import scan
from pmpd.storage.schemas import SCHEMA_VERSION
from pmpd.storage.uri import join, redacted, shown

# ------------------------------------------------------------------------------------------------------------


MANIFEST_KEYS = (
    "table",
    "schema_version",
    "complete",
    "config",
    "models",
    "counts",
    "seconds",
    "device",
    "packages",
    "python",
    "git_commit",
    "source_fingerprint",
)


def write_manifest(
    dataset: str | Path,
    schema: pa.Schema | None,
    config: Mapping[str, Any],
    *,
    table: str,
    complete: bool,
    models: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
    seconds: float = 0.0,
    device: str = "",
    run: Mapping[str, Any] | None = None,
) -> None:
    """`config` is what defines the rows (a folder of another one is refused); `run` is what does not
    (workers, batch size, …)."""
    manifest = {
        "table": table,
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "config": dict(config),
        "models": dict(models or {}),
        "counts": dict(counts or {}),
        "seconds": round(seconds, 3),
        "device": device,
        "run": dict(run or {}),
        "packages": package_versions(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "git_commit": git_commit(),
        "source_fingerprint": source_fingerprint(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "columns": {} if schema is None else {column.name: str(column.type) for column in schema},
    }
    write_bytes(
        join(dataset, "manifest.json"),
        redacted(json.dumps(manifest, indent=1, sort_keys=False, default=str)).encode() + b"\n",
    )


def add_counts(dataset: str | Path, counts: Mapping[str, int]) -> dict[str, int]:
    """Adds to the counts of a dataset's manifest; all of them."""
    manifest = read_manifest(dataset)
    assert manifest is not None, f"{dataset} has no manifest"
    manifest["counts"] |= counts
    write_bytes(join(dataset, "manifest.json"), json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest["counts"]


def read_manifest(dataset: str | Path) -> dict[str, Any] | None:
    """The manifest, None where there is none. ValueError where it is damaged or of another schema version."""
    path = join(dataset_folder(dataset), "manifest.json")
    content = read_bytes(path)
    if content is None:
        return None
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{shown(path)}: damaged ({error}); move the folder away or choose another --output-dir"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise UserError(
            f"{shown(path)}: schema version {version}, this program writes {SCHEMA_VERSION}; choose another "
            "output folder, or use the version of the program that wrote it"
        )
    return manifest


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key in which two configurations differ (compared as JSON holds them). Of
    two mappings the names that only one has, and how the first of the others differs: all of a sweep would
    fill a screen."""
    before, after = (json.loads(json.dumps(dict(config), default=str)) for config in (old, new))
    keys = sorted(set(before) | set(after))
    return [
        _difference(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    ]


def _difference(key: str, before: Any, after: Any) -> str:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return f"{key}: {before!r} -> {after!r}"
    gone = [name for name in before if name not in after]
    more = [name for name in after if name not in before]
    others = [name for name in before if name in after and before[name] != after[name]]
    parts = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(more)}"] * bool(more)
    if others:
        was, now = before[others[0]], after[others[0]]
        both = isinstance(was, dict) and isinstance(now, dict)
        within = "; ".join(differing_keys(was, now)) if both else f"{was!r} -> {now!r}"
        parts.append(f"another {others[0]} ({within})")
    if len(others) > 1:
        parts.append(f"and {len(others) - 1} more that differ")
    return f"{key}: {', '.join(parts)}"


def check_config(dataset: str | Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of an earlier run into this folder, if any. ValueError, naming the keys, where that had
    another configuration and left rows. A run that failed before its first row refuses nothing."""
    manifest = read_manifest(dataset)
    if manifest is None:
        if list_shards(dataset):
            raise UserError(
                f"output folder {shown(dataset)}: it holds Parquet but no manifest.json, so it can't be "
                f"continued; choose another --output-dir"
            )
        return None
    different = differing_keys(manifest["config"], config)
    if different and not manifest["complete"] and not list_shards(dataset):
        return None
    if different:
        raise UserError(
            f"output folder {shown(dataset)}: made with another configuration ({'; '.join(different)}); "
            f"choose another --output-dir, "
            "or give the same flags to continue it"
        )
    return manifest


def discard_unused(dataset: str | Path, config: Mapping[str, Any], derived: Sequence[str]) -> bool:
    """Removes a dataset of another configuration where no row of `derived` was made from it yet: what a run
    that failed early left behind. Whether it did. Only for the one run that holds the folder."""
    manifest = read_manifest(dataset)
    if (
        manifest is None
        or not differing_keys(manifest["config"], config)
        or any(list_shards(other) for other in derived)
    ):
        return False
    for path in [*list_shards(dataset), join(dataset, "manifest.json")]:
        remove(path)
    return True


def is_whole(dataset: str | Path, manifest: Mapping[str, Any], id_column: str) -> bool:
    """Whether the manifest calls the dataset complete and its shards, all readable, hold as many rows as it
    counts."""
    if not manifest["complete"]:
        return False
    found = scan(dataset, id_column)
    return not found.unreadable and len(found) == manifest["counts"].get("rows")


@cache
def package_versions() -> dict[str, str]:
    """Versions of what can change a row."""
    versions = {}
    for name in ("pmpd", "torch", "transformers", "tokenizers", "ray", "pyarrow", "numpy", "rouge_score"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
