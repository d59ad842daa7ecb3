"""Readers of other people's files: every layout gives the same records, and one bad record costs that
record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pmpd.benchmarks import BENCHMARKS, load_questions
from pmpd.labeling.prompts import PromptConfig, make_prompts
from pmpd.storage import record_rows as reader
from pmpd.storage.records import RecordSource
from tests.helpers import byte_tokenizer

TEXTS = ["one text", "two\ntexts", "трети текст 三"]


def write(path: Path, *rows: object, compress: bool = False, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    content = "".join(line + "\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def texts(path: object, **options) -> list:
    return [record.fields["text"] for record in RecordSource(str(path), **options)]


def problems(path: object, **options) -> list[tuple[str, str]]:
    return [(r.place, r.problem) for r in RecordSource(str(path), **options) if r.problem]


def test_every_container_gives_the_same_records(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    files = [
        write(tmp_path / "a.jsonl", *rows),
        write(tmp_path / "a.json.gz", *rows, compress=True),
        write(tmp_path / "array.json", json.dumps(rows, indent=1)),
        write(tmp_path / "objects.json", *(json.dumps(row, indent=1) for row in rows)),
        write(tmp_path / "utf16.jsonl", *rows, encoding="utf-16"),
        write(tmp_path / "mark.jsonl", *rows, encoding="utf-8-sig"),
        write(tmp_path / "crlf.jsonl", "\r\n".join(json.dumps(row) for row in rows)),
    ]
    quoted = [f'"{text}"' for text in TEXTS]
    files.append(write(tmp_path / "a.csv", "n,text", *(f"{i},{text}" for i, text in enumerate(quoted))))
    pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    for path in (*files, tmp_path / "a.parquet", tmp_path / "saved", f"file://{tmp_path}/a.jsonl"):
        assert texts(path, columns=("text",)) == TEXTS, path
    write(tmp_path / "a.txt", "first\n\n\nsecond\nline\n")
    assert texts(tmp_path / "a.txt") == ["first", "second\nline"]


def test_a_split_is_that_splits_files_or_is_refused(tmp_path):
    for split in ("train", "validation"):
        rows = [{"text": f"{split} {i}"} for i in range(2)]
        write(tmp_path / f"c4-{split}.00000-of-00001.json.gz", *rows, compress=True)
    assert texts(tmp_path, split="validation") == ["validation 0", "validation 1"]
    assert texts(tmp_path, split="dev") == ["validation 0", "validation 1"], "another word for it"
    assert texts(tmp_path) == ["train 0", "train 1"], "as the hub's default is"
    with pytest.raises(ValueError, match=r"--split test: the file names of .* name only train, validation"):
        texts(tmp_path, split="test")
    one = tmp_path / "c4-train.00000-of-00001.json.gz"
    assert texts(one, split="train") == ["train 0", "train 1"]
    with pytest.raises(ValueError, match="--split validation"):
        texts(one, split="validation")
    (tmp_path / "c4-train.00000-of-00001.json.gz").rename(tmp_path / "c4-test.json.gz")
    with pytest.raises(ValueError, match="test, validation; choose with --split"):
        texts(tmp_path)


def test_folders_name_splits_and_configurations_too(tmp_path):
    for config in ("1.0.0", "3.0.0"):
        for split in ("train_sft", "test"):
            write(tmp_path / config / f"{split}-0.jsonl", {"text": f"{config} {split}"})
    assert texts(tmp_path, config="3.0.0", split="test") == ["3.0.0 test"]
    assert texts(tmp_path, config="3.0.0", split="train_sft") == ["3.0.0 train_sft"]
    with pytest.raises(ValueError, match=r"--dataset-config 2\.0\.0: .*there are 1\.0\.0, 3\.0\.0"):
        texts(tmp_path, config="2.0.0")


def test_a_clone_of_a_hub_data_set_is_read_as_its_card_says(tmp_path):
    clone = tmp_path / "clone"
    for name in (
        "data/a-0.jsonl",
        "data/b-0.jsonl",
        "raw/question.jsonl",
        ".git/lfs/x.json",
        "other/o.jsonl",
    ):
        write(clone / name, {"text": name})
    write(clone / "dataset_infos.json", {"default": {}})
    configs = [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/a-*"},
                {"split": "test", "path": ["data/b-*"]},
            ],
        },
        {"config_name": "other", "data_files": "other/**"},
    ]
    write(clone / "README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n# A data set")
    assert texts(clone) == ["data/a-0.jsonl"]
    assert texts(clone, split="test") == ["data/b-0.jsonl"]
    assert texts(clone, config="other") == ["other/o.jsonl"]
    (clone / "README.md").unlink()
    assert len(texts(clone)) == 4, "no card: every file of records, but none of git"


def test_a_saved_dataset_knows_its_split(tmp_path):
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both", split="test") == ["test"]
    write(tmp_path / "x-train.jsonl", {"text": "x"})
    loaded = datasets.load_dataset("json", data_files={"test": str(tmp_path / "x-train.jsonl")}, split="test",
                                   cache_dir=str(tmp_path / "cache"))  # fmt: skip
    loaded.save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one", split="test") == ["x"]
    with pytest.raises(ValueError, match="only test"):
        texts(tmp_path / "one", split="train")


def test_one_bad_record_costs_that_record(tmp_path):
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = write(
        tmp_path / "a.jsonl", {"text": "good"}, '{"text": "cut', "17", deep, '{"id": ' + "9" * 5000 + "}",
        {"text": "last"},
    )  # fmt: skip
    found = list(RecordSource(str(path)))
    assert [record.fields is None for record in found] == [False, True, True, True, False, False]
    assert found[4].fields["id"] == "9" * 5000
    assert [place for place, _ in problems(path)] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert "malformed JSON" in found[1].problem
    assert "it is a int" in found[2].problem
    assert "nested too deeply" in found[3].problem
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", "id,text", f"1,{long}", "2", '3,"a"b', "4,fine")
    assert texts_of(path) == [long, "fine"]
    assert [place for place, _ in problems(path)] == ["a.csv:3", "a.csv:4"]
    bad = pa.array([b"fine", b"\xff\xfe", b"too"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["fine", "too"]
    assert [place for place, _ in problems(tmp_path / "a.parquet")] == ["a.parquet:row 2"]


def texts_of(path: Path) -> list:
    return [record.fields["text"] for record in RecordSource(str(path)) if record.fields is not None]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'[{"text": "a"},\n{"text": ]', r"a\.json:2: malformed JSON"),
        ("a.json", b'[{"text": "a"},\n' + b"[" * 99_999, r"a\.json:2: malformed JSON: nested too deeply"),
        ("a.json", b'[{"text": "a"}', r"a\.json:1: malformed JSON: a comma or \] is missing"),
        ("a.csv", b'text\n"never closed\nb\n', r"a\.csv:2: a quotation mark that opens here"),
        ("a.csv", b"title\nx\n", r"a\.csv: a record needs the field 'text'; the file has title"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: can't be read"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: can't be read as Parquet"),
        ("a.jsonl", "\ufeffx".encode("utf-16-le") + b"\x00", r"a\.jsonl:\d: not utf-16"),
        ("a.xml", b"<a/>", "unknown kind of file"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_with_its_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        texts(tmp_path / name, columns=("text",))


def test_a_cut_off_gzip_file_is_never_taken_for_a_short_one(tmp_path):
    rows = [{"text": f"{i} {hash(str(i))}"} for i in range(3000)]
    whole = write(tmp_path / "a.jsonl.gz", *rows, compress=True).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't be read after line"):
        list(RecordSource(str(tmp_path / "a.jsonl.gz")))


def test_rows_of_any_length_are_read_in_bounded_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_BATCH_BYTES", 10_000)
    pq.write_table(pa.table({"text": [f"{i}" * 4000 for i in range(10)]}), tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.parquet")) as file:
        sizes = [batch.num_rows for batch in reader._batches(file, "a.parquet", ["text"])]
    assert max(sizes) <= 4
    assert sum(sizes) == 10
    giant = "word " * 2**21
    path = write(tmp_path / "giant.jsonl", {"text": giant}, {"text": "small"})
    rows = list(make_prompts(PromptConfig(str(path)), byte_tokenizer(), 64))
    assert [row["prompt_tokens"] <= 64 and row["error"] is None for row in rows] == [True, True]
    assert rows[0]["document_tokens"] == 2**20, "only its beginning is tokenized"


def test_benchmarks_are_read_from_their_published_layouts(tmp_path):
    """Clones of the hub's data sets and the authors' own files, each the test split only."""
    cnn = {"article": "A man walked.", "highlights": "A man moved.", "id": "abc"}
    for version in ("1.0.0", "3.0.0"):
        for split in ("train", "validation", "test"):
            path = tmp_path / "cnn" / version / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([{**cnn, "id": f"{version} {split}"}]), path)
    (question,) = load_questions(BENCHMARKS["cnn_dm"], question_file=tmp_path / "cnn")
    assert question.key == "3.0.0 test"
    for split in ("train", "test"):
        row = [f"{split}_0_1", '"#A#: Hi.\n#B#: ""Yes"", hello."', "They greet.", "greeting"]
        write(tmp_path / "dialogsum" / f"{split}.csv", "id,dialogue,summary,topic", ",".join(row))
    (question,) = load_questions(BENCHMARKS["dialogsum"], question_file=tmp_path / "dialogsum")
    assert (question.key, question.category) == ("test_0_1", "greeting")
    assert '#B#: "Yes", hello.' in question.turns[0]
    authors = {
        "fname": "test_0",
        "dialogue": "#A#: Hi.",
        "summary1": "one",
        "topic1": "greeting",
        "summary2": "two",
    }
    path = write(tmp_path / "dialogsum.test.jsonl", authors)
    (question,) = load_questions(BENCHMARKS["dialogsum"], question_file=path)
    assert (question.key, question.references) == ("test_0", ("one",))
    for language in ("fr", "de"):
        for split in ("train", "test"):
            path = tmp_path / "iwslt" / f"iwslt2017-{language}-en" / split / "0000.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"translation": [{language: "mot " * 80, "en": f"{split} " * 80}]}), path)
    (question,) = load_questions(BENCHMARKS["iwslt"], question_file=f"file://{tmp_path}/iwslt")
    assert question.references[0].split()[0] == "test"
    hub = {"prompt": ["a?", "b?"], "prompt_id": 7, "category": "writing", "reference": []}
    path = tmp_path / "mt" / "data" / "train-00000-of-00001-abc.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([hub]), path)
    (question,) = load_questions(BENCHMARKS["mt_bench"], question_file=tmp_path / "mt")
    assert question.turns == ("a?", "b?")


def test_what_lies_beside_the_data_in_a_clone_is_no_record(tmp_path):
    """A licence in a .txt file was read as documents, and package.json as a record."""
    write(tmp_path / "data" / "a.jsonl", {"text": "real"})
    for name in ("LICENSE.txt", "Licence-MIT.txt", "requirements.txt", "NOTICE.txt", "README.txt"):
        (tmp_path / name).write_text("no text of the data set\n\nnor this")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    assert texts(tmp_path) == ["real"]
    write(tmp_path / "data" / "noticeable.txt", "a document")
    assert texts(tmp_path) == ["real", "a document"]
    assert texts(tmp_path / "LICENSE.txt")[0] == "no text of the data set", "unless it is asked for by name"


def test_a_configuration_that_the_card_has_not_is_refused_with_those_it_has(tmp_path):
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("de", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    for name in ("de", "fr"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    assert texts(tmp_path, config="fr") == ["fr"]
    with pytest.raises(ValueError, match=r"--dataset-config en: the card of .* has de, fr"):
        texts(tmp_path, config="en")


def test_ids_of_benchmark_records_may_be_numbers(tmp_path):
    rows = {
        "cnn_dm": {"id": 7, "article": "a", "highlights": "h"},
        "dialogsum": {"id": 7, "dialogue": "d", "summary": "s"},
    }
    for name, row in rows.items():
        path = write(tmp_path / f"{name}.jsonl", row)
        assert [question.key for question in load_questions(BENCHMARKS[name], question_file=path)] == ["7"]
