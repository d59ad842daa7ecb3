"""Schema, row counts and nulls of a dataset; checks its manifest."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pmpd import plugins
from pmpd.cli.flags.inspect import InspectJob
from pmpd.errors import UserError
from pmpd.storage.dataset import (
    SOURCE_KEY,
    data_folder,
    dataset_folder,
    datasets_under,
    list_shards,
    read_shard,
)
from pmpd.storage.files import exists, join, resolve
from pmpd.storage.manifest import MANIFEST_KEYS, read_manifest
from pmpd.storage.schemas import SCHEMA_VERSION


def describe(dataset: str | Path) -> tuple[list[str], list[str]]:
    """Lines that describe a dataset folder or a single Parquet file, and the problems found in it."""
    single = str(dataset).endswith(".parquet")
    paths = [str(dataset)] if single else list_shards(dataset)
    lines, problems = [f"{dataset}"], []
    rows, error_rows, size = 0, 0, 0
    nulls: dict[str, int] = {}
    types: dict[str, str] = {}
    ids: dict[str, int] = {}
    versions, sources = set(), set()
    for path in paths:
        try:
            table = read_shard(path)
        except (pa.ArrowException, OSError, EOFError) as error:
            problems.append(f"{path}: unreadable: {error}")
            continue
        rows += len(table)
        size += resolve(path)[0].get_file_info(resolve(path)[1]).size
        versions.add((table.schema.metadata or {}).get(b"pmpd.schema_version", b"none").decode())
        sources |= {(table.schema.metadata or {}).get(SOURCE_KEY, b"unknown").decode()}
        for column in table.schema:
            if types.setdefault(column.name, str(column.type)) != str(column.type):
                problems.append(
                    f"{path}: column {column.name} is {column.type}, elsewhere {types[column.name]}"
                )
            nulls[column.name] = nulls.get(column.name, 0) + table[column.name].null_count
        error_rows += len(table) - table["error"].null_count if "error" in table.column_names else 0
        key = table.column_names[0]
        if not table.schema.field(key).nullable and key.endswith("_id"):
            for value in table[key].to_pylist():
                ids[value] = ids.get(value, 0) + 1
    lines.append(
        f"  {rows} rows, {len(paths)} shard(s), {size / 1e6:.2f} MB, {error_rows} row(s) with an error"
    )
    width = max((len(name) for name in types), default=0)
    lines += [
        f"    {name:{width}}  {type_}" + (f"  ({nulls[name]} null)" if nulls[name] else "")
        for name, type_ in types.items()
    ]
    twice = sorted(key for key, count in ids.items() if count > 1)
    if twice:
        problems.append(f"{len(twice)} id(s) more than once, e.g. {', '.join(twice[:3])}")
    if versions - {str(SCHEMA_VERSION)}:
        problems.append(
            f"schema version {', '.join(sorted(versions))} in the shards, this program knows {SCHEMA_VERSION}"
        )
    if single:
        return lines, problems
    try:
        manifest = read_manifest(dataset)
    except ValueError as error:
        return lines, [*problems, str(error)]
    if manifest is None:
        return lines, [*problems, "no manifest.json"]
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        problems.append(f"manifest.json lacks {', '.join(missing)}")
    if not manifest.get("complete"):
        problems.append(
            "manifest.json says that the run is not complete: run the same command again to finish it"
        )
    elif manifest.get("counts", {}).get("rows") != rows:
        problems.append(
            f"manifest.json says {manifest.get('counts', {}).get('rows')} rows, the shards hold {rows}"
        )
    commit = (manifest.get("git_commit") or "")[:12]
    made = (
        f"  manifest: {manifest.get('table')}, schema version {manifest['schema_version']}, written "
        f"{manifest.get('written', '')}"
    )
    lines.append(
        made
        + (f", commit {commit}" if commit else "")
        + (f", on {manifest['device']}" if manifest.get("device") else "")
    )
    lines.append(f"    made by sources {', '.join(sorted(sources))}")
    lines += [f"    {key} = {value}" for key, value in manifest.get("config", {}).items()]
    lines += [f"    model {role}: {model}" for role, model in manifest.get("models", {}).items()]
    return lines, problems


def _is_checkpoint(folder: str) -> bool:
    """`pmpd quantize` writes a manifest, too, of another kind than a dataset's."""
    return exists(join(folder, "config.json")) and not exists(data_folder(folder))


def _scheduler(folder: str) -> str | None:
    """The kind of scheduler that `pmpd train` wrote there; None where there is none."""
    from pmpd.schedulers.artefact import architecture  # torch, which takes a second and datasets do without

    return architecture(folder)


def main(job: InspectJob) -> int:
    """Prints what is at the path. Exit code 1 if there is a problem."""
    plugins.load(job.plugins)
    path = dataset_folder(job.path)
    if not exists(path):
        raise UserError(f"{path}: no such file or folder")
    found = [path] if path.endswith(".parquet") else list(datasets_under(path))
    checkpoints = [folder for folder in found if _is_checkpoint(folder)]
    found = [folder for folder in found if folder not in checkpoints]
    if checkpoints == [path]:
        raise UserError(
            f"{path}: a checkpoint, no dataset; `pmpd perplexity --model-path {path}` says what its "
            "precisions are worth"
        )
    if not found and (kind := _scheduler(path)) is not None:
        raise UserError(
            f"{path}: a scheduler ({kind}), no dataset; `pmpd generate --classifier-path {path}` answers "
            "with it, its metrics.json has its figures on held-out prompts"
        )
    if not found:
        raise UserError(
            f"{path}: no dataset in it, nor right below it (a dataset is a folder with data/*.parquet and "
            "manifest.json)"
        )
    failed = False
    for dataset in found:
        lines, problems = describe(dataset)
        print("\n".join(lines))
        print("  ok" if not problems else "\n".join(f"  PROBLEM: {problem}" for problem in problems))
        failed |= bool(problems)
    return int(failed)
