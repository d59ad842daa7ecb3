"""The scan of a dataset, its index, and compaction: the shards stay the only truth."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd import storage
from pmpd.cli.main import main as run_command
from pmpd.errors import UserError
from pmpd.storage import compaction, keys


@settings(deadline=None)
@given(st.lists(st.one_of(st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.text("abxyz-_/ ", min_size=1))))
def test_ids_survive_as_keys_and_sort_as_text(ids):
    for some in (ids, [key for key in ids if len(key) == 16 and set(key) <= set("0123456789abcdef")]):
        found = keys.encode(some)
        assert keys.decode(found) == some
        assert keys.decode(np.sort(found)) == sorted(some, key=str.encode)
        assert keys.decode(keys.encode(pa.chunked_array([pa.array(["x", *some], pa.string())[1:]]))) == some


def test_distinct_keys_are_sorted_and_there_once():
    for few in (["0" * 15 + "2", "f" * 16, "0" * 15 + "2"], ["b", "aa", "b", "a"], []):
        assert keys.decode(keys.distinct(keys.encode(few))) == sorted(set(few))


def test_keys_of_both_kinds_compare():
    wanted, held = keys.encode(["0" * 16, "f" * 16]), keys.encode(["conversation", "f" * 16])
    assert (wanted.dtype, held.dtype.kind) == (np.uint64, "S")
    assert keys.missing(wanted, held).tolist() == [0]
    assert keys.decode(keys.concatenate([wanted, held])) == ["0" * 16, "f" * 16, "conversation", "f" * 16]


def write_shard(folder: Path, name: str, ids: list[int], error: bool = False) -> Path:
    rows = [
        {"prompt_id": f"{i:016x}", "prompt_tokens": i, "error": "bad" if error else None, "prompt_text": "x"}
        for i in ids
    ]
    path = folder / "data" / name
    storage.write_shard(storage.to_table(rows, storage.PROMPTS), path)
    old = time.time() - 3600
    os.utime(path, (old, old))
    return path


@pytest.fixture
def dataset(tmp_path):
    """Eighty shards of three rows, one of them an error."""
    folder = tmp_path / "labels"
    for shard in range(80):
        write_shard(folder, f"part-{shard:03}.parquet", [3 * shard, 3 * shard + 1])
        if shard % 10 == 0:
            write_shard(folder, f"part-{shard:03}-e.parquet", [3 * shard + 2], error=True)
    storage.write_manifest(folder, storage.PROMPTS, {}, table="labels", complete=True, counts={"rows": 168})
    return folder


def content(found: storage.Scan) -> list[tuple]:
    return [(shard.path, shard.ids, shard.errors, shard.lengths) for shard in found.shards]


def test_a_resumed_scan_reads_only_what_is_new_and_finds_the_same(dataset):
    first = storage.scan(dataset, remember=True)
    assert (first.read, len(first), int(first.errors.sum())) == (88, 168, 8)
    second = storage.scan(dataset)
    assert second.read == 0
    assert content(second) == content(first)
    write_shard(dataset, "part-new.parquet", [1000])
    (dataset / "data" / "part-003.parquet").unlink()
    third = storage.scan(dataset)
    (dataset / "_index.npz").unlink()
    assert third.read == 1
    assert content(third) == content(storage.scan(dataset))
    assert third.place(len(third) - 1) == (len(third.paths) - 1, 0)


@pytest.mark.parametrize(
    "what", ["truncated", "older version", "other column", "planted", "misfit", "unverified", "young"]
)
def test_an_index_in_doubt_is_not_believed(dataset, what):
    storage.scan(dataset, full=what != "unverified", remember=True)
    path = dataset / "_index.npz"
    if what == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif what == "planted":
        np.savez(path, head=np.array([{"a": "pickle"}], object))
    elif what in ("older version", "young", "misfit"):
        with np.load(path) as stored:
            parts = dict(stored)
        head = json.loads(parts["head"].tobytes())
        head |= {"older version": {"version": 0}, "young": {"written": int(parts["times"][0])}}.get(what, {})
        parts["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        parts["keys"] = parts["keys"][: -1 if what == "misfit" else None]
        np.savez(path, **parts)
    id_column = "prompt_text" if what == "other column" else "prompt_id"
    assert storage.scan(dataset, id_column).read == 88


def test_a_shard_that_changed_is_read_again_and_damage_is_found(dataset):
    storage.scan(dataset, remember=True)
    path = dataset / "data" / "part-007.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found = storage.scan(dataset)
    assert list(found.unreadable) == [str(path)]
    path.write_bytes(whole)
    assert not storage.scan(dataset).unreadable


def test_what_a_run_has_finished_is_known_without_opening_it(dataset, monkeypatch):
    """A run that was killed after many shards has written their ids in parts."""
    first = storage.scan(dataset)
    for _ in range(2):
        journal = storage.Journal(str(dataset), "prompt_id")
        for path in storage.list_shards(dataset):
            table = storage.read_shard(path)
            rows = storage.rows_of(table, "prompt_id")
            journal.add(storage.entry_of(path, Path(path).stat().st_size, rows))
        journal.flush()
    assert len(list(dataset.glob("_index-*.npz"))) == 2
    again = storage.scan(dataset, remember=True)
    assert (first.read, again.read) == (88, 0)
    assert content(again) == content(first)
    assert [path.name for path in dataset.glob("_index*")] == ["_index.npz"], "the parts are one index now"
    path = write_shard(dataset, "part-005.parquet", [15, 17])
    os.utime(path)
    assert storage.scan(dataset).read == 1
    assert storage.entry_of(str(path), 1, storage.rows_of(storage.read_shard(path), "prompt_id")) is None


def test_a_shard_too_young_to_be_believed_waits_for_the_next_part(dataset):
    journal = storage.Journal(str(dataset), "prompt_id")
    for path in storage.list_shards(dataset):
        os.utime(path)
        rows = storage.rows_of(storage.read_shard(path), "prompt_id")
        journal.add(storage.entry_of(path, Path(path).stat().st_size, rows))
    journal.flush()
    assert not list(dataset.glob("_index*"))


def rows_of(dataset: Path) -> list[dict]:
    return storage.read_table(dataset).sort_by("prompt_id").to_pylist()


def test_compaction_keeps_every_row_and_says_it_again(dataset, capsys, monkeypatch):
    before = rows_of(dataset)
    assert run_command(["compact", str(dataset)]) == 0
    assert "168 rows: 88 files" in capsys.readouterr().out
    assert [path.name for path in sorted((dataset / "data").iterdir())] == ["compact-00000.parquet"]
    assert sorted(path.name for path in dataset.iterdir()) == ["data", "manifest.json"]
    assert rows_of(dataset) == before
    assert run_command(["compact", str(dataset)]) == 0
    assert run_command(["inspect", str(dataset)]) == 0
    write_shard(dataset, "part-late.parquet", [5000])
    compaction.compact(dataset)
    assert len(rows_of(dataset)) == 169


def test_row_groups_and_files_have_the_size_asked_for(dataset):
    size = storage.read_table(dataset).nbytes
    compaction.compact(dataset, row_group_bytes=size // 5, file_bytes=size // 2)
    groups = [pq.ParquetFile(path).num_row_groups for path in storage.list_shards(dataset)]
    assert len(groups) >= 2
    assert sum(groups) in (5, 6, 7)


STEPS = ["_copy", "_compare", "_exchange", "write_bytes", "_duplicate", "remove"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_stopped_anywhere_all_rows_are_seen_and_the_next_call_finishes(dataset, monkeypatch, step, exchange):
    before = rows_of(dataset)
    with monkeypatch.context() as patch:
        if not exchange:
            patch.setattr(compaction, "_exchange", lambda folder: False)
        real, calls = getattr(compaction, step), []

        def stop(*arguments):
            calls.append(arguments)
            if len(calls) == (3 if step == "remove" else 1):
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(compaction, step, stop)
        try:
            compaction.compact(dataset)
        except KeyboardInterrupt:
            assert rows_of(dataset) == before
            assert len(storage.scan(dataset)) == len(before)
        else:
            assert exchange, f"{step} was never reached"
    storage.remove_temporary(dataset)  # as the next farm run does
    assert rows_of(dataset) == before
    compaction.compact(dataset)
    assert rows_of(dataset) == before
    assert len(list((dataset / "data").iterdir())) == 1


def test_what_must_not_be_compacted_is_refused(dataset, tmp_path):
    path = dataset / "data" / "part-007.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"run the command that made .* again"):
        compaction.compact(dataset)
    path.write_bytes(whole)
    storage.write_manifest(dataset, storage.PROMPTS, {}, table="prompts", complete=True)
    with pytest.raises(UserError, match="workers read single rows of prompts"):
        compaction.compact(dataset)
    with pytest.raises(UserError, match="no dataset with rows"):
        compaction.compact(tmp_path)


def test_a_folder_in_use_is_not_compacted(dataset, capsys):
    with storage.Lease(dataset.parent):
        assert run_command(["compact", str(dataset)]) == 1
    assert "in use by a run" in capsys.readouterr().err
    assert len(storage.list_shards(dataset)) == 88


def test_provenance_survives_compaction(dataset):
    path = dataset / "data" / "part-000.parquet"
    storage.write_shard(storage.read_shard(path).replace_schema_metadata({b"pmpd.source": b"older"}), path)
    own = storage.source_fingerprint()
    compaction.compact(dataset)
    (path,) = storage.list_shards(dataset)
    assert pq.read_schema(path).metadata[b"pmpd.source"].decode().split(",") == sorted([own, "older"])
