"""Prompts: stable ids, cuts that depend on nothing but seed and id, and clear words for bad input."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd import storage
from pmpd.demo import texts
from pmpd.farm import FarmOptions, prompt_task
from pmpd.farm.prompt_task import PromptTask
from pmpd.labeling import prompts
from pmpd.labeling.prompts import PromptConfig, cut_length, make_prompts
from pmpd.storage import keys
from pmpd.weights.model_spec import ModelSpec
from tests.helpers import byte_tokenizer

TEXTS = ["one " * 30, "two " * 100, "three " * 400, "four"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_lines(path: Path, records: list, compress: bool = False) -> Path:
    content = "".join(
        (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
    ).encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def made(tokenizer, dataset, max_prompt_tokens=512, **options) -> list[dict]:
    return list(make_prompts(PromptConfig(str(dataset), **options), tokenizer, max_prompt_tokens))


def c4(texts: list) -> list[dict]:
    return [
        {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in texts
    ]


@given(
    tokens=st.integers(1, 5000),
    seed=st.integers(0, 99),
    key=st.text("0123456789abcdef", min_size=16, max_size=16),
)
def test_cut_length_is_in_its_range_and_repeats(tokens, seed, key):
    length = cut_length(tokens, seed, key)
    assert max(1, min(32, tokens // 2)) <= length <= tokens
    assert length == cut_length(tokens, seed, key)


def test_cut_lengths_reach_both_ends_and_change_with_the_seed():
    lengths = {cut_length(40, 0, f"{key:016x}") for key in range(2000)}
    assert lengths == set(range(20, 41))
    assert [cut_length(1000, 0, f"{k:016x}") for k in range(9)] != [
        cut_length(1000, 1, f"{k:016x}") for k in range(9)
    ]


def test_every_container_of_the_same_texts_gives_the_same_prompts(tokenizer, tmp_path):
    write_lines(tmp_path / "d.json.gz", c4(TEXTS), compress=True)
    write_lines(tmp_path / "d.jsonl", c4(TEXTS))
    (tmp_path / "d.json").write_text(json.dumps(c4(TEXTS), indent=1))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    (tmp_path / "d.txt").write_text("\n\n\n".join(TEXTS))
    expected = {text.strip() for text in TEXTS}
    for name in ("d.json.gz", "d.jsonl", "d.json", "d.parquet", "d.txt"):
        rows = made(tokenizer, tmp_path / name)
        assert len(rows) == 4
        assert all(any(text.startswith(row["prompt_text"].strip()) for text in expected) for row in rows)
        assert rows[0]["source"].startswith(name)
        assert [row["prompt_tokens"] for row in rows] == [len(row["input_ids"]) for row in rows]
        assert len(storage.to_table(rows, storage.PROMPTS)) == 4


def test_ids_do_not_depend_on_place_shards_order_or_size(tokenizer, tmp_path):
    one, other = tmp_path / "a" / "c4", tmp_path / "b" / "c4"
    one.mkdir(parents=True)
    other.mkdir(parents=True)
    write_lines(one / "c4-train.00000.json.gz", c4(TEXTS), compress=True)
    write_lines(other / "c4-train.00000.json.gz", c4(TEXTS[2:]), compress=True)
    write_lines(other / "c4-train.00001.json.gz", c4(TEXTS[:2]), compress=True)
    rows = {row["prompt_id"]: row["input_ids"] for row in made(tokenizer, one)}
    assert rows == {row["prompt_id"]: row["input_ids"] for row in made(tokenizer, other)}
    assert {row["prompt_id"] for row in made(tokenizer, one, size=2)} < set(rows)
    assert not set(rows) & {row["prompt_id"] for row in made(tokenizer, one, seed=1)}
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in rows)


def test_prompts_are_truncated_to_what_the_positions_leave(tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", c4(["x" * 5000 + str(i) for i in range(40)]))
    longest = max(row["prompt_tokens"] for row in made(tokenizer, path, max_prompt_tokens=100))
    assert 90 < longest <= 100
    assert max(row["prompt_tokens"] for row in made(tokenizer, path, max_prompt_tokens=10**6)) <= 2048
    with pytest.raises(ValueError, match="--max-new-tokens"):
        made(tokenizer, path, max_prompt_tokens=0)


def test_equal_records_are_one_row_and_counted(tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", c4([*TEXTS, *TEXTS, "new"]))
    counts: Counter[str] = Counter()
    rows = list(make_prompts(PromptConfig(str(path)), tokenizer, 512, counts))
    assert len(rows) == len({row["prompt_id"] for row in rows}) == 5
    assert counts == {"records": 9, "duplicates": 4}


@pytest.mark.parametrize("text", ["", "  \n "])
def test_a_document_without_tokens_is_an_error_row(tokenizer, tmp_path, text):
    rows = made(tokenizer, write_lines(tmp_path / "d.jsonl", c4([text, "fine"])))
    assert [row["error"] for row in rows] == ["the document tokenizes to nothing", None]
    assert rows[0]["input_ids"] == []


def test_half_a_surrogate_pair_is_an_error_row_and_counted(tokenizer, tmp_path):
    counts: Counter[str] = Counter()
    path = write_lines(tmp_path / "d.jsonl", c4(["a \ud83d b", "fine \U0001f600"]))
    rows = list(make_prompts(PromptConfig(str(path)), tokenizer, 512, counts))
    assert [row["error"] for row in rows] == [
        "the document is no text: character 2 is U+D83D, half of a surrogate pair",
        None,
    ]
    assert counts["malformed"] == 1
    assert storage.to_table(rows, storage.PROMPTS).num_rows == 2


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"text": "b"', "malformed JSON"),
        ({"txt": "b", "url": "u"}, "a record needs the field 'text'; it has txt, url"),
        ({"text": None}, "the field 'text' must be a string, it is None"),
        ("17", "it is a int"),
        ('{"text": "caf\udce9"}', "a byte 0xE9 that is not UTF-8"),
    ],
)
def test_an_unusable_record_is_an_error_row_that_names_its_place(tokenizer, tmp_path, bad, told):
    lines = [json.dumps({"text": "a"}), bad if isinstance(bad, str) else json.dumps(bad), '{"text": "z"}']
    path = tmp_path / "d.jsonl"
    path.write_bytes("\n".join([*lines, lines[1]]).encode("utf-8", "surrogateescape"))
    counts: Counter[str] = Counter()
    rows = list(make_prompts(PromptConfig(str(path)), tokenizer, 512, counts))
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert told in rows[1]["error"]
    assert rows[1]["source"] == "d.jsonl:2"
    assert counts == {"records": 4, "malformed": 1, "duplicates": 1}
    assert storage.to_table(rows, storage.PROMPTS).num_rows == 3


def test_a_dataset_of_unusable_records_is_refused_with_the_first(tokenizer, tmp_path):
    lines = [{"text": None}] + [{"article": str(i)} for i in range(500)]
    with pytest.raises(ValueError, match=r"no usable record in 2; the first one is d\.jsonl:1: the field"):
        made(tokenizer, write_lines(tmp_path / "d.jsonl", lines[:2]))
    with pytest.raises(ValueError, match="no usable record in 100"):
        made(tokenizer, write_lines(tmp_path / "d.jsonl", lines), size=400)


def test_an_empty_dataset_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no record"):
        made(tokenizer, tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no file of records in the folder"):
        made(tokenizer, tmp_path / "folder")


@pytest.mark.parametrize(
    "dataset", ["no/such/folder/here", "./d.jsonl", "missing.txt", "wikitext", "/nowhere/c4"]
)
def test_an_unknown_dataset_lists_what_is_allowed(dataset):
    with pytest.raises(ValueError, match="give demo, a Hugging Face id"):
        PromptConfig(dataset).kind  # noqa: B018 - the property raises


@pytest.mark.parametrize("options", [{"size": 0}, {"split": "test"}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"--size 0|--split test"):
        PromptConfig(**options)


def test_a_hub_dataset_is_streamed_with_config_and_split(tokenizer, monkeypatch):
    """Runs without network: only the call into `datasets` is replaced."""
    import datasets

    calls = []

    def load_dataset(path, name=None, *, split, streaming):
        calls.append((path, name, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter(c4(TEXTS)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = made(tokenizer, "allenai/c4", size=3)
    made(tokenizer, "allenai/c4", config="realnewslike", split="validation")
    assert calls == [("allenai/c4", "en", "train", True), ("allenai/c4", "realnewslike", "validation", True)]
    assert [row["source"] for row in rows] == ["train:0", "train:1", "train:2"]


def test_a_hub_that_does_not_answer_is_a_clear_error(tokenizer, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"allenai/c4 \(config en, split train\): ConnectionError: no route"):
        made(tokenizer, "allenai/c4")


def test_a_hub_that_stops_answering_is_a_clear_error(tokenizer, monkeypatch):
    import datasets

    def rows(*_, **__):
        yield {"text": "first"}
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(ValueError, match=r"allenai/c4 \(config en, split train\): ConnectionError: reset"):
        made(tokenizer, "allenai/c4")


def test_demo_prompts_are_held_out_documents_long_enough_to_continue(tokenizer):
    by_key = {document.key: document for document in texts.documents()}
    rows = made(tokenizer, "demo", size=40)
    assert {by_key[row["source"]].split for row in rows} == {"held_out"}
    assert min(len(by_key[row["source"]].text) for row in rows) >= texts.MIN_PROMPT_CHARACTERS
    assert {by_key[row["source"]].split for row in made(tokenizer, "demo", size=5, split="train")} == {
        "train"
    }
    assert len({row["source"].split("/")[0] for row in rows}) > 10, (
        "a small size must be a sample, not the first documents"
    )


@pytest.fixture
def write(dense_folder, tmp_path):
    """Makes the prompts of a dataset on the farm, in this process; their counts."""

    def make(config: PromptConfig, identity: dict) -> dict[str, int]:
        task = PromptTask(ModelSpec(str(dense_folder())), config, 512)
        return prompt_task.write_prompts(task, str(tmp_path / "out" / "prompts"), identity, FarmOptions(0))

    return make


def test_the_farm_makes_the_prompts_of_the_plain_loop(write, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_task, "ROWS_PER_SHARD", 3)
    lines = [*c4([f"text number {i}" for i in range(10)]), {"text": ""}, "no JSON", *c4(["text number 3"])]
    config = PromptConfig(str(write_lines(tmp_path / "d.jsonl", lines)))
    counts = write(config, {"size": 64})
    expected: Counter[str] = Counter()
    rows = list(make_prompts(config, tokenizer, 512, expected))
    found = storage.read_table(tmp_path / "out" / "prompts").to_pylist()
    assert sorted(found, key=lambda row: row["prompt_id"]) == sorted(rows, key=lambda row: row["prompt_id"])
    for name in ("records", "duplicates", "empty", "malformed"):
        assert counts[name] == expected[name] == {"records": 13}.get(name, 1)
    assert (counts["rows"], counts["errors"], counts["shards"]) == (12, 2, 4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prompts"], "documents are gone"


def test_a_book_is_a_shard_of_its_own(write, tmp_path, monkeypatch):
    """1,024 documents of a megabyte would not fit into a worker."""
    monkeypatch.setattr(prompt_task, "UNIT_CHARACTERS", 2000)
    config = PromptConfig(str(write_lines(tmp_path / "d.jsonl", c4([f"{i} " * 900 for i in range(5)]))))
    assert write(config, {})["shards"] == 5


def test_prompts_are_reused_when_whole_and_what_is_missing_is_made(write, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_task, "ROWS_PER_SHARD", 3)
    path = write_lines(tmp_path / "d.jsonl", c4([f"text number {i}" for i in range(10)]))
    config, folder, identity = PromptConfig(str(path)), tmp_path / "out" / "prompts", {"size": 64}
    counts = write(config, identity)
    first = {row["prompt_id"]: row for row in storage.read_table(folder).to_pylist()}
    path.unlink()
    assert write(PromptConfig("demo"), identity) == counts, "whole: nothing is read again"
    write_lines(path, c4([f"text number {i}" for i in range(10)]))
    for spoil in (lambda shard: shard.write_bytes(b"damaged"), Path.unlink):
        _, shard, *others = map(Path, storage.list_shards(folder))
        before = [other.stat().st_mtime_ns for other in others]
        spoil(shard)
        again = write(config, identity)
        assert {row["prompt_id"]: row for row in storage.read_table(folder).to_pylist()} == first
        assert [other.stat().st_mtime_ns for other in others] == before
        assert {name: again[name] for name in ("rows", "records", "duplicates")} == {
            name: counts[name] for name in ("rows", "records", "duplicates")
        }
    with pytest.raises(ValueError, match="size: 64 -> 65"):
        write(config, {"size": 65})


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 8))
def test_seen_is_a_set(numbers, few):
    seen, plain = keys.Seen(), set()
    seen._FEW = few
    for number in numbers:
        key = number * 2**58 + 1  # beyond what a float holds
        assert seen.add(key) == (key not in plain)
        plain.add(key)
        assert len(seen) == len(plain)


def test_whole_and_chat_prompts_are_not_cut_and_have_ids_of_their_own(tokenizer, tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", c4(TEXTS))
    cut, whole = made(tokenizer, path), made(tokenizer, path, form="whole", longest=150)
    assert [row["prompt_tokens"] for row in whole] == [min(row["document_tokens"], 150) for row in whole], (
        "whole prompts lose nothing but what is too long"
    )
    assert not {row["prompt_id"] for row in cut} & {row["prompt_id"] for row in whole}
    with pytest.raises(ValueError, match="--prompt-form chat: the model's tokenizer has no chat template"):
        made(tokenizer, path, form="chat")
    chatty = byte_tokenizer()
    chatty.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}!"
    rows = made(chatty, path, form="chat", longest=450)
    assert rows[0]["prompt_text"] == f"<{TEXTS[0]}>!"
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert "the question takes" in rows[2]["error"]
    assert "450 fit" in rows[2]["error"], "a question without its end is another question"


def test_a_huge_document_is_read_as_far_as_a_prompt_goes_and_a_huge_question_is_an_error(
    tokenizer, tmp_path, monkeypatch
):
    path = write_lines(tmp_path / "texts.jsonl", c4([*TEXTS, "five " * 10_000]))
    whole = made(tokenizer, path), made(tokenizer, path, form="whole", longest=150)
    read: list[int] = []
    monkeypatch.setattr(prompts, "MAX_DOCUMENT_CHARACTERS", 3000)
    tokens_of = prompts.encode_document
    monkeypatch.setattr(
        prompts,
        "encode_document",
        lambda tokenizer, text: read.append(len(text)) or tokens_of(tokenizer, text),
    )
    for before, form in zip(whole, ({}, {"form": "whole", "longest": 150}), strict=True):
        after = made(tokenizer, path, **form)
        assert [row["input_ids"] for row in after] == [row["input_ids"] for row in before]
    assert max(read) == 3000
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}!"
    counts: Counter[str] = Counter()
    rows = list(make_prompts(PromptConfig(str(path), form="chat"), tokenizer, 2048, counts))
    assert [row["error"] for row in rows] == [
        None,
        None,
        "the question takes 2403 tokens, 2048 fit",
        None,
        "the question has 50,000 characters, 3,000 at most; shorten it, or take the beginnings of texts with "
        "--prompt-form cut",
    ]
    assert not counts["malformed"], "it was well written"
