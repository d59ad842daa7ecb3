"""Tables of unknown origin run no code: a file with an extension type that unpickles is refused before
pyarrow builds it."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pmpd import storage
from pmpd.cli.main import main as run_command
from pmpd.storage.parquet import extension_names
from tests.ray_sessions import ROOT

NAME = "ray.data.arrow_pickled_object"


class Planted(pa.ExtensionType):
    """As Ray Data's, whose deserialization is that of pickle."""

    def __init__(self, payload: bytes = b""):
        self.payload = payload
        super().__init__(pa.binary(), NAME)

    def __arrow_ext_serialize__(self) -> bytes:
        return self.payload

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> pa.ExtensionType:
        pickle.loads(serialized)
        return cls(serialized)


class Touch:
    """Unpickled, it leaves a mark."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def planted(tmp_path):
    """(mark, function that plants the column into a shard). The type is registered, as Ray Data does."""
    mark = tmp_path / "mark"
    rays = True  # Ray Data's own type is there already, if something in this process has imported it
    try:
        pa.unregister_extension_type(NAME)
    except pa.ArrowKeyError:
        rays = False
    pa.register_extension_type(Planted())

    def plant(path: Path, nested: bool = False) -> None:
        type_ = Planted(pickle.dumps(Touch(mark)))
        column = pa.ExtensionArray.from_storage(type_, pa.array([b""], pa.binary()))
        if nested:
            column = pa.StructArray.from_arrays([column], ["inner"])
        table = pa.table({"prompt_id": ["0" * 16], "text": ["a"], "extra": column})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        if mark.exists():
            mark.rmdir()

    yield mark, plant
    pa.unregister_extension_type(NAME)
    if rays:
        from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

        pa.register_extension_type(ArrowPythonObjectType())


@pytest.mark.parametrize("nested", [False, True])
def test_the_planted_type_is_refused_by_name_before_it_is_built(tmp_path, planted, nested):
    mark, plant = planted
    path = tmp_path / "labels" / "data" / "part-0.parquet"
    plant(path, nested)
    readers = [
        lambda: storage.read_shard(path),
        lambda: storage.read_rows(path, [0]),
        lambda: storage.inspect_shard(path, "prompt_id", full=False),
        lambda: storage.scan(tmp_path / "labels"),
        lambda: storage.read_table(tmp_path / "labels", ["prompt_id"]),
        lambda: storage.check_tables([str(path)]),
    ]
    for read in readers:
        with pytest.raises(storage.ForeignTypeError, match=NAME):
            read()
        assert not mark.exists()
    with pq.ParquetFile(path):
        pass
    assert mark.exists(), "this test proves nothing where opening the file runs nothing"


@pytest.mark.parametrize("command", ["train", "inspect", "report", "label", "generate"])
def test_no_command_runs_a_planted_table(tmp_path, planted, capsys, command, monkeypatch):
    mark, plant = planted
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "set" / "data" / "part-0.parquet")
    kind = {"report": "generations"}.get(command, "labels")
    models = {"model": "m", "num_key_value_heads": 2}
    storage.write_manifest("set", None, {}, table=kind, complete=True, models=models)
    plant(tmp_path / "texts.parquet")
    flags = {
        "train": ["--data-path", "set", "--output-dir", "out"],
        "inspect": ["set"],
        "report": ["--inputs", "set", "--output-dir", "out"],
        "label": ["--dataset", "texts.parquet", "--output-dir", "out"],
        "generate": ["--question-file", "texts.parquet", "--bench-name", "mt_bench", "--output-dir", "out"],
    }[command]
    monkeypatch.setattr("pmpd.farm.connect", lambda *arguments, **named: None)
    assert run_command([command, *flags]) == 1
    printed = capsys.readouterr()
    assert NAME in printed.out + printed.err
    assert not mark.exists()


def test_extension_types_of_arrow_itself_and_strange_footers_are_refused_too(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"u": pa.array([b"0" * 16], pa.uuid())}), path)
    with pytest.raises(storage.ForeignTypeError, match=r"arrow\.uuid"):
        storage.read_shard(path)
    schema = pa.schema({"a": pa.int8()})
    assert extension_names(schema.serialize().to_pybytes()) == []
    pq.write_table(pa.table({"ARROW:schema": [1]}), path)
    with pytest.raises(storage.ForeignTypeError, match="not where a Parquet writer puts it"):
        storage.read_shard(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_are_refused_likewise(tmp_path, planted, kind, capsys):
    mark, _ = planted
    type_ = Planted(pickle.dumps(Touch(mark)))
    column = pa.ExtensionArray.from_storage(type_, pa.array([b""], pa.binary()))
    table = pa.table({"text": ["a"], "extra": column})
    path = tmp_path / "texts.arrow"
    writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with writer(path, table.schema) as sink:
        sink.write_table(table)
    if mark.exists():
        mark.rmdir()
    flags = ["--dataset", str(path), "--output-dir", str(tmp_path / "out"), "--num-workers", "0"]
    assert run_command(["label", *flags]) == 1
    assert NAME in capsys.readouterr().err
    assert not mark.exists()


def test_what_others_write_with_plain_columns_is_read(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"text": pd.Categorical(["a", "b"]), "when": pd.to_datetime(["2020", "2021"])})
    frame.to_parquet(tmp_path / "x.parquet")
    assert storage.read_shard(tmp_path / "x.parquet")["text"].to_pylist() == ["a", "b"]


def test_parquet_is_opened_in_one_place_only():
    """Whoever opens a file with pyarrow itself has not looked at its types first."""
    openers = {"ParquetFile", "read_table", "read_metadata", "read_schema", "ParquetDataset"}
    openers |= {"open_stream", "open_file"}
    found = []
    for path in sorted((ROOT / "pmpd").rglob("*.py")):
        if path.relative_to(ROOT).as_posix() == "pmpd/storage/parquet.py":
            continue
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in openers
            and ast.unparse(node.func.value) in ("pq", "parquet", "pa.parquet", "pa.ipc", "ipc")
        ]
    assert found == []
