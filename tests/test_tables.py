"""Tables: what is written is read back by any reader, whole or not at all, and damage is found."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pmpd import storage
from pmpd.cli.main import main as run_command
from pmpd.storage.dataset import parquet_options


def label_rows(count: int, head_dim: int = 4) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        features = None if i == 1 else rng.normal(size=(i + 1, head_dim)).astype(np.float16)
        pair = {
            "high": 4,
            "low": 3,
            "label": 1,
            "rouge_l": [0.5, None, 0.25, 1.0],
            "high_rouge_l": 0.5,
            "high_text": "t",
            "high_ids": [1, 2],
        }
        rows.append(
            {
                "prompt_id": f"{i:016x}",
                "prompt_tokens": i + 1,
                "pairs": [pair],
                "keys": features,
                "values": features,
                "error": None,
            }
        )
    rows[1]["error"] = "ValueError: bad"
    return rows


def write_dataset(
    folder: Path,
    rows: list[dict],
    schema: pa.Schema | None = None,
    complete: bool = True,
    counted: int | None = None,
) -> Path:
    schema = schema or storage.labels_schema(4)
    for start in range(0, len(rows), 4):
        storage.write_shard(
            storage.to_table(rows[start : start + 4], schema), folder / "data" / f"part-{start}.parquet"
        )
    counts = {"rows": len(rows) if counted is None else counted}
    storage.write_manifest(
        folder, schema, {"size": 3}, table="labels", complete=complete, counts=counts, models={"model": "abc"}
    )
    return folder


def test_float16_features_are_exact_in_every_reader(tmp_path):
    rows = label_rows(6)
    data = storage.data_folder(write_dataset(tmp_path / "labels", rows))
    wanted = {row["prompt_id"]: row["keys"] for row in rows}
    frame = pd.read_parquet(data)
    by_duckdb = duckdb.sql(f"select prompt_id, keys from '{data}/*.parquet'").fetchall()
    by_arrow = pq.read_table(data).to_pylist()
    assert len(frame) == len(by_duckdb) == len(by_arrow) == 6
    for key, features in [
        *zip(frame.prompt_id, frame["keys"], strict=True),
        *by_duckdb,
        *((row["prompt_id"], row["keys"]) for row in by_arrow),
    ]:
        if wanted[key] is None:
            assert features is None
        else:
            np.testing.assert_array_equal(
                np.stack([np.asarray(vector, np.float16) for vector in features]), wanted[key]
            )


def test_every_column_but_the_features_may_have_a_dictionary(tmp_path):
    """Parquet's own names of them, of every table."""
    for schema in (storage.PROMPTS, storage.CONVERSATIONS, storage.GENERATIONS, storage.labels_schema(64)):
        pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
        columns = pq.ParquetFile(tmp_path / "empty.parquet").schema
        paths = [columns.column(index).path for index in range(len(columns))]
        features = [path for path in paths if path.split(".")[0] in ("keys", "values")]
        assert sorted([*parquet_options(schema)["use_dictionary"], *features]) == sorted(paths)


def test_nulls_inside_a_pair_stay_null(tmp_path):
    pair = storage.read_table(write_dataset(tmp_path / "labels", label_rows(2)))["pairs"][0].as_py()[0]
    assert pair["rouge_l"] == [0.5, None, 0.25, 1.0]
    assert pair["branch_tokens"] is None


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt_id": "a", "promt_text": "x"}, "no column promt_text"),
        ({"prompt_id": "a", "prompt_tokens": "many"}, "prompt_tokens"),
        ({"prompt_id": "a", "input_ids": [2**40]}, "input_ids"),
    ],
)
def test_a_row_that_does_not_fit_names_the_column(row, named):
    with pytest.raises(ValueError, match=named):
        storage.to_table([row], storage.PROMPTS)


def test_a_shard_that_can_not_be_written_leaves_nothing_behind(tmp_path):
    """The limit on file size stands for a full disk: the same error at the same place."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from pmpd import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path)!r}) / "data" / "part-0.parquet"
small = storage.to_table([{{"prompt_id": "a", "prompt_text": "old"}}], storage.PROMPTS)
storage.write_shard(small, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import random
big = storage.to_table(
    [
        {{"prompt_id": str(i), "prompt_text": random.randbytes(60).hex()}} for i in range(2000)
    ],
    storage.PROMPTS,
)
try:
    storage.write_shard(big, path)
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "part-0.parquet" in result.stdout
    assert "Free space" in result.stdout
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["part-0.parquet"]
    assert storage.read_table(tmp_path)["prompt_text"].to_pylist() == ["old"]


@pytest.mark.parametrize("kind", ["shard", "manifest", "bytes"])
def test_whatever_can_not_be_written_is_told_with_path_and_cure(tmp_path, monkeypatch, kind):
    """To users it is a ValueError; who waits for a storage hiccup to pass sees an OSError."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pmpd.storage.files.os.fsync", full)
    write = {
        "shard": lambda: storage.write_shard(
            storage.to_table([{"prompt_id": "a"}], storage.PROMPTS), tmp_path / "data" / "part-0.parquet"
        ),
        "manifest": lambda: storage.write_manifest(
            tmp_path, storage.PROMPTS, {}, table="prompts", complete=False
        ),
        "bytes": lambda: storage.write_bytes(tmp_path / "_lease.json", b"{}"),
    }[kind]
    with pytest.raises(
        ValueError,
        match=rf"{tmp_path}/.*: can't be written \(.*No space left.*Free space.*run the same command",
    ) as caught:
        write()
    assert isinstance(caught.value, OSError)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "half a file was left behind"


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_the_place_of_the_output_folder_is_told(tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        ValueError, match=r"a file is in the place of the folder; choose another --output-dir"
    ):
        storage.check_config(tmp_path / folder, {})
    with pytest.raises(ValueError, match=r"can't be written .*choose another --output-dir"):
        storage.write_bytes(tmp_path / folder / "_lease.json", b"{}")
    with pytest.raises(ValueError, match=r"/proc/no/_lease\.json: can't be written"):
        storage.write_bytes("/proc/no/_lease.json", b"{}")


def test_write_error_survives_the_way_from_worker_to_driver():
    error = pickle.loads(pickle.dumps(storage.ShardWriteError("full")))
    assert isinstance(error, storage.ShardWriteError)
    assert str(error) == "full"


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_one_byte_of_a_feature(path: Path) -> None:
    """In a column that identifies no row: only the checksums know."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = next(
        column
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.startswith("keys")
    )
    position = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 2
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncate, damage_one_byte_of_a_feature, damage_empty])
def test_a_damaged_shard_is_never_counted(tmp_path, damage):
    folder = write_dataset(tmp_path / "labels", label_rows(8))
    damage(folder / "data" / "part-4.parquet")
    found = storage.scan(folder)
    assert [Path(shard.path).name for shard in found.shards] == ["part-0.parquet"]
    assert [Path(path).name for path in found.unreadable] == ["part-4.parquet"]
    aside = storage.set_aside(next(iter(found.unreadable)), folder)
    assert Path(aside).exists()
    assert len(storage.read_table(folder)) == 4


def test_leftovers_of_killed_writers_are_invisible_and_go(tmp_path):
    folder = write_dataset(tmp_path / "labels", label_rows(4))
    (folder / "data" / ".part-9.parquet.abc.tmp").write_bytes(b"half")
    assert len(storage.read_table(folder)) == len(pd.read_parquet(folder / "data")) == 4
    (folder / ".manifest.json.abc.tmp").write_bytes(b"half")
    storage.remove_temporary(folder)
    assert [path.name for path in (folder / "data").iterdir()] == ["part-0.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == ["data", "manifest.json"]


def test_read_rows_reads_the_row_groups_it_needs_in_the_order_asked(tmp_path):
    rows = [{"prompt_id": f"{i}", "prompt_tokens": i} for i in range(100)]
    storage.write_shard(storage.to_table(rows, storage.PROMPTS), tmp_path / "p.parquet", row_group_rows=16)
    assert [
        row["prompt_tokens"] for row in storage.read_rows(tmp_path / "p.parquet", [99, 0, 16, 15, 17])
    ] == [99, 0, 16, 15, 17]


def test_one_code_path_serves_uris(tmp_path):
    uri = f"file://{tmp_path}/labels"
    rows = label_rows(5)
    storage.write_shard(
        storage.to_table(rows, storage.labels_schema(4)),
        storage.join(storage.data_folder(uri), "part-0.parquet"),
    )
    assert len(storage.read_table(tmp_path / "labels")) == len(storage.read_table(uri)) == 5


class PutOnly(pafs.FileSystemHandler):
    """An object store as far as writing goes: objects appear by one put, there is no rename."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}

    def get_type_name(self):
        return "store"

    def normalize_path(self, path):
        return path

    def get_file_info(self, paths):
        return [
            pafs.FileInfo(path, pafs.FileType.File if path in self.objects else pafs.FileType.NotFound)
            for path in paths
        ]

    def get_file_info_selector(self, selector):
        return [
            pafs.FileInfo(path, pafs.FileType.File)
            for path in self.objects
            if path.startswith(selector.base_dir)
        ]

    def open_input_stream(self, path):
        return self.open_input_file(path)

    def open_input_file(self, path):
        if path not in self.objects:
            raise FileNotFoundError(path)
        return pa.PythonFile(pa.BufferReader(self.objects[path]), mode="r")

    def open_output_stream(self, path, metadata):
        handler = self

        sink = pa.BufferOutputStream()

        class Stream:
            closed = False

            def write(self, data):
                sink.write(data)
                return len(data)

            def flush(self):
                pass

            def close(self):
                if not self.closed:
                    self.closed = True
                    handler.objects[path] = sink.getvalue().to_pybytes()

        return pa.PythonFile(Stream(), mode="w")

    def delete_file(self, path):
        del self.objects[path]

    def _unsupported(self, *_):
        raise NotImplementedError

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = (
        open_append_stream
    ) = _unsupported


def test_an_object_store_gets_one_put_and_no_rename(monkeypatch):
    store = PutOnly()
    file_system = pafs.PyFileSystem(store)
    for module in ("files", "dataset", "parquet"):
        monkeypatch.setattr(
            f"pmpd.storage.{module}.resolve", lambda path: (file_system, str(path).removeprefix("store://"))
        )
    write_dataset(Path("labels"), label_rows(6))
    assert sorted(store.objects) == [
        "labels/data/part-0.parquet",
        "labels/data/part-4.parquet",
        "labels/manifest.json",
    ]
    assert sorted(key for shard in storage.scan("labels").shards for key in shard.ids) == [
        f"{i:016x}" for i in range(6)
    ]
    assert storage.read_manifest("labels")["complete"]


def test_manifest_says_what_made_the_rows(tmp_path):
    manifest = json.loads((write_dataset(tmp_path / "labels", label_rows(3)) / "manifest.json").read_text())
    assert set(storage.MANIFEST_KEYS) <= set(manifest)
    assert manifest["schema_version"] == storage.SCHEMA_VERSION
    assert manifest["models"] == {"model": "abc"}
    assert manifest["packages"]["pyarrow"] == pa.__version__


def test_a_folder_of_another_configuration_is_refused_by_its_keys(tmp_path):
    write_dataset(tmp_path / "labels", label_rows(3))
    assert storage.check_config(tmp_path / "labels", {"size": 3}) is not None
    with pytest.raises(ValueError, match=r"size: 3 -> 4; stage: None -> 'x'") as raised:
        storage.check_config(tmp_path / "labels", {"size": 4, "stage": "x"})
    assert "--output-dir" in str(raised.value)


def test_sweeps_that_differ_are_told_by_their_runs_and_not_in_whole():
    old = {"runs": {f"r{index}": {"steps": 1} for index in range(9)}}
    new = {"runs": {f"r{index}": {"steps": 2} for index in range(1, 10)}}
    (told,) = storage.differing_keys(old, new)
    assert told == "runs: without r0, with r9, another r1 (steps: 1 -> 2), and 7 more that differ"


def test_parquet_without_a_manifest_is_not_taken_for_ours(tmp_path):
    storage.write_shard(
        storage.to_table([{"prompt_id": "a"}], storage.PROMPTS), tmp_path / "data" / "x.parquet"
    )
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        storage.check_config(tmp_path, {})


def test_a_manifest_of_another_schema_version_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema version 99"):
        storage.read_manifest(tmp_path)


def test_command_line_prints_schema_rows_and_nulls_and_accepts_both_paths(tmp_path, capsys):
    folder = write_dataset(tmp_path / "labels", label_rows(6))
    for path in (folder, folder / "data", tmp_path):
        assert run_command(["inspect", str(path)]) == 0
        printed = capsys.readouterr().out
        assert "6 rows, 2 shard(s)" in printed
        assert "1 row(s) with an error" in printed
        assert "(1 null)" in printed
        assert "size = 3" in printed
        assert printed.rstrip().endswith("ok")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: damage_truncate(folder / "data" / "part-0.parquet"), "unreadable"),
        (lambda folder: write_dataset(folder, label_rows(6), counted=7), "says 7 rows, the shards hold 6"),
        (lambda folder: write_dataset(folder, label_rows(6), complete=False), "not complete"),
        (
            lambda folder: (folder / "data" / "copy.parquet").write_bytes(
                (folder / "data" / "part-0.parquet").read_bytes()
            ),
            "more than once",
        ),
    ],
)
def test_command_line_finds_problems(tmp_path, capsys, spoil, problem):
    folder = write_dataset(tmp_path / "labels", label_rows(6))
    spoil(folder)
    assert run_command(["inspect", str(folder)]) == 1
    assert problem in capsys.readouterr().out


def test_command_line_says_when_there_is_nothing(tmp_path, capsys):
    assert run_command(["inspect", str(tmp_path)]) == run_command(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("text")
    assert run_command(["inspect", str(tmp_path / "README.md")]) == run_command(["inspect", "foo://x"]) == 1
    told = capsys.readouterr().err
    assert "no dataset in it" in told
    assert "path foo://x" in told


def test_command_line_finds_a_dataset_that_has_no_shard_yet(tmp_path, capsys):
    write_dataset(tmp_path / "labels", label_rows(6))
    storage.write_manifest(tmp_path / "references", None, {}, table="references", complete=False)
    assert run_command(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path}/references\n  0 rows" in capsys.readouterr().out


def test_a_checkpoint_is_called_one_and_is_no_problem_of_the_datasets_beside_it(tmp_path, capsys):
    checkpoint = tmp_path / "anyprec"
    checkpoint.mkdir()
    for name in ("config.json", "manifest.json"):
        (checkpoint / name).write_text("{}")
    assert run_command(["inspect", str(checkpoint)]) == 1
    assert f"a checkpoint, no dataset; `pmpd perplexity --model-path {checkpoint}`" in capsys.readouterr().err
    assert run_command(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path}: no dataset in it" in capsys.readouterr().err
    write_dataset(tmp_path / "labels", label_rows(6))
    assert run_command(["inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize("kind", ["regression", "kv_cache"])
def test_a_scheduler_is_called_one(tmp_path, capsys, kind):
    """Its own folder, and the one that `pmpd train` wrote it in."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "config.json").write_text(f'{{"architecture": "{kind}"}}')
    for folder in (tmp_path, tmp_path / "scheduler"):
        assert run_command(["inspect", str(folder)]) == 1
        told = capsys.readouterr().err
        assert (
            f"{folder}: a scheduler ({kind}), no dataset; `pmpd generate --classifier-path {folder}`" in told
        )


def test_importing_tables_imports_neither_torch_nor_ray():
    script = "import sys, pmpd.storage; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
