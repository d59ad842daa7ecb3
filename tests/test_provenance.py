"""What code made a row, and that a run which made none leaves nothing behind that refuses the next."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pmpd import storage
from pmpd.storage import provenance
from tests.ray_sessions import ROOT


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "setup.py").exists():
        (folder / "setup.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return git(folder, "rev-parse", "HEAD")


def package_in(folder: Path) -> Path:
    package = folder / "pmpd"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    return package


def test_fingerprint_is_of_the_sources_and_of_nothing_else(tmp_path):
    first, second = package_in(tmp_path / "one"), package_in(tmp_path / "two")
    (second / "__pycache__").mkdir()
    (second / "__pycache__" / "a.pyc").write_bytes(b"built")
    (second / "weights.safetensors").write_bytes(b"data")
    assert provenance.source_fingerprint(first) == provenance.source_fingerprint(second)
    third = package_in(tmp_path / "three")
    (third / "a.py").write_text("x = 2\n")
    fourth = package_in(tmp_path / "four")
    (fourth / "a.py").rename(fourth / "b.py")
    values = {provenance.source_fingerprint(package) for package in (first, third, fourth)}
    assert len(values) == 3


def test_every_kind_of_source_counts():
    """All files but data: kernels and judge prompts make rows as modules do."""
    data = (".so", ".json", ".typed", ".txt", ".pyc")
    files = [path for path in provenance.PACKAGE.rglob("*") if path.is_file() and path.suffix not in data]
    kinds = {path.suffix for path in files if provenance.PACKAGE / "demo" not in path.parents}
    assert kinds == set(provenance._SOURCES)


def test_commit_is_that_of_our_own_repository_or_of_the_build(tmp_path):
    """In a virtual environment inside another repository, that repository's commit was recorded."""
    other = tmp_path / "other"
    repository(other)
    inside = package_in(other / ".venv" / "lib" / "site-packages")
    assert provenance.git_commit(inside) is None
    (inside / provenance.COMMIT_FILE.name).write_text("abc123\n")
    provenance.git_commit.cache_clear()
    assert provenance.git_commit(inside) == "abc123"
    own = tmp_path / "own"
    package = package_in(own)
    commit = repository(own)
    assert provenance.git_commit(package) == commit
    (package / "a.py").write_text("x = 3\n")
    provenance.git_commit.cache_clear()
    assert provenance.git_commit(package) == commit + "+"


@pytest.mark.slow
def test_a_wheel_knows_the_commit_it_was_built_from(tmp_path):
    source = tmp_path / "source"
    names = git(ROOT, "ls-files", "pmpd", "setup.py", "pyproject.toml", "README.md", "LICENSE").splitlines()
    for name in names:
        if name.endswith((".cpp", ".h")):  # the library takes a minute, and an install without it is allowed
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    commit = repository(source)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")],
        cwd=source,
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert (tmp_path / "built" / "pmpd" / "_commit.txt").read_text().strip() == commit
    assert not (source / "pmpd" / "_commit.txt").exists()


def test_every_shard_says_which_sources_made_it(tmp_path, capsys):
    rows = [{"prompt_id": f"{i:016x}"} for i in range(4)]
    path = tmp_path / "prompts" / "data" / "part-0.parquet"
    storage.write_shard(storage.to_table(rows, storage.PROMPTS), path)
    own = provenance.source_fingerprint()
    assert pq.read_schema(path).metadata[b"pmpd.source"].decode() == own
    old = storage.read_shard(path)
    storage.write_shard(old.replace_schema_metadata({**old.schema.metadata, b"pmpd.source": b"older"}), path)
    storage.drop_rows(str(path), [0])
    assert pq.read_schema(path).metadata[b"pmpd.source"] == b"older", "rewritten rows are still of that code"
    storage.write_shard(storage.to_table(rows[:1], storage.PROMPTS), path.with_name("part-1.parquet"))
    assert len(storage.read_table(tmp_path / "prompts")) == 4
    storage.write_manifest(
        tmp_path / "prompts", storage.PROMPTS, {}, table="prompts", complete=True, counts={"rows": 4}
    )
    from pmpd.cli.main import main as run_command

    assert run_command(["inspect", str(tmp_path / "prompts")]) == 0
    assert ", ".join(sorted([own, "older"])) in capsys.readouterr().out
    assert storage.read_manifest(tmp_path / "prompts")["source_fingerprint"] == own


def dataset(folder: Path, config: dict, ids: list[str], fail_after: int | None = None) -> dict[str, int]:
    def rows(counts: Counter[str]):
        for index, key in enumerate(ids):
            if index == fail_after:
                raise RuntimeError("stopped")
            yield {"prompt_id": key, "error": "bad" if key == "b" else None}

    return storage.write_dataset(str(folder), storage.PROMPTS, rows, config, rows_per_shard=2)


def test_a_run_that_failed_before_its_first_row_refuses_no_other(tmp_path):
    with pytest.raises(RuntimeError):
        dataset(tmp_path / "x", {"size": 1}, ["a", "b", "c"], fail_after=0)
    assert storage.check_config(tmp_path / "x", {"size": 2}) is None
    with pytest.raises(RuntimeError):
        dataset(tmp_path / "x", {"size": 2}, ["a", "b", "c"], fail_after=2)
    with pytest.raises(ValueError, match="size: 2 -> 3"):
        storage.check_config(tmp_path / "x", {"size": 3})
    counts = dataset(tmp_path / "x", {"size": 2}, ["a", "b", "c"])
    assert counts == {"rows": 3, "errors": 1, "shards": 2}
    assert dataset(tmp_path / "x", {"size": 2}, ["never", "made"]) == counts, "it is there already"


def test_inputs_of_which_nothing_was_made_are_replaced_and_others_are_kept(tmp_path):
    prompts, labels = tmp_path / "prompts", tmp_path / "labels"
    dataset(prompts, {"size": 1}, ["a"])
    assert not storage.discard_unused(prompts, {"size": 1}, [labels]), "they are of this configuration"
    dataset(labels, {"size": 1}, ["a"])
    assert not storage.discard_unused(prompts, {"size": 2}, [labels])
    assert storage.list_shards(prompts)
    for path in storage.list_shards(labels):
        storage.remove(path)
    assert storage.discard_unused(prompts, {"size": 2}, [labels])
    assert dataset(prompts, {"size": 2}, ["a", "c"])["rows"] == 2


def test_the_two_ids_differ_in_how_they_write_what_is_not_ascii():
    """Known values: ids are for ever."""
    assert storage.ascii_id({"b": 1, "a": "x"}) == storage.utf8_id({"a": "x", "b": 1}) == "cdab067e9f3beb32"
    assert storage.ascii_id({"a": "é"}) != storage.utf8_id({"a": "é"})
    assert len(storage.ascii_id({"a": "\ud800"})) == 16
