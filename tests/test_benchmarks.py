"""Benchmarks: ids, published schemas, templates, malformed input."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pmpd.benchmarks import BENCHMARKS, get_benchmark, load_questions
from pmpd.benchmarks.conversation import (
    PLAIN,
    TOKENIZER,
    Stops,
    choose_template,
    render,
    stops,
    template_names,
    template_note,
)

RECORDS = {
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Now make it rhyme."]},
    "cnn_dm": {"article": "A man walked.\nHe ran.", "highlights": "A man moved.", "id": "abc"},
    "dialogsum": {
        "id": "test_0",
        "dialogue": "#A#: Hi.\n#B#: Hello.",
        "summary": "Two people greet.",
        "topic": "greeting",
    },
    "iwslt": {"translation": {"fr": "mot " * 80, "en": "word " * 80}},
    "gsm8k": {"question": "How many?", "answer": "Six times seven.\n#### 42"},
    "passkey": {"id": "p", "tokens": 256, "depth": 0.5, "key": "12345"},
    "humaneval": {"task_id": "H/0", "prompt": "def f():\n", "test": "def check(c): ...", "entry_point": "f"},
    "demo": {"id": "x", "category": "statements", "turns": ["a?", "b?"], "reference": None},
}


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_reads_its_published_schema_from_a_local_file(name: str, tmp_path: Path) -> None:
    (question,) = load_questions(
        get_benchmark(name), question_file=write_lines(tmp_path / "q.jsonl", RECORDS[name])
    )
    assert len(question.prompt_id) == 16
    assert len(question.references) == len(question.turns)
    expected = {"cnn_dm": "A man moved.", "dialogsum": "Two people greet.", "iwslt": ("word " * 80).strip()}
    if name not in ("gsm8k", "passkey", "humaneval"):  # those have tests of their own
        assert question.references[0] == expected.get(name)
    for suffix, text in (
        (".json", json.dumps([RECORDS[name]], indent=1)),
        (".json", json.dumps(RECORDS[name])),
    ):
        path = tmp_path / f"again{suffix}"
        path.write_text(text)
        assert load_questions(get_benchmark(name), question_file=path)[0] == question
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(json.dumps(RECORDS[name]))
    assert load_questions(get_benchmark(name), question_file=tmp_path / "q.jsonl.gz")[0] == question


def test_both_published_schemas_of_mt_bench_give_the_same_question(tmp_path: Path) -> None:
    fastchat = write_lines(tmp_path / "question.jsonl", RECORDS["mt_bench"])
    hub = write_lines(
        tmp_path / "hub.jsonl",
        {"prompt_id": 81, "category": "writing", "prompt": RECORDS["mt_bench"]["turns"], "reference": []},
    )
    assert load_questions(get_benchmark("mt_bench"), question_file=fastchat) == load_questions(
        get_benchmark("mt_bench"), question_file=hub
    )


def test_dialogsum_reads_the_csv_that_is_published(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text('id,dialogue,summary,topic\ntest_0,"#A#: Hi, you.\n#B#: Hello.",They greet.,greeting\n')
    assert load_questions(get_benchmark("dialogsum"), question_file=path)[0].references == ("They greet.",)
    path.write_text("id,dialogue,summary,topic\ntest_0,only two\n")
    with pytest.raises(ValueError, match=r"test\.csv:2: 2 columns in place of 4"):
        load_questions(get_benchmark("dialogsum"), question_file=path)


def test_ids_do_not_depend_on_order_or_range_and_differ_between_splits_and_benchmarks(tmp_path: Path) -> None:
    records = [{"id": str(n), "category": "c", "turns": [f"question {n}"]} for n in range(6)]
    forward = load_questions(BENCHMARKS["demo"], question_file=write_lines(tmp_path / "a.jsonl", *records))
    backward = load_questions(
        BENCHMARKS["demo"], question_file=write_lines(tmp_path / "b.jsonl", *records[::-1])
    )
    part = load_questions(BENCHMARKS["demo"], question_file=tmp_path / "a.jsonl", begin=2, end=4)
    assert forward == backward[::-1]
    assert part == forward[2:4]
    validation = load_questions(BENCHMARKS["demo"], question_file=tmp_path / "a.jsonl", split="validation")
    assert not {q.prompt_id for q in forward} & {q.prompt_id for q in validation}


def test_the_demo_has_a_dozen_two_turn_questions_and_continuations_of_unseen_documents() -> None:
    from pmpd.demo.texts import documents_of

    questions = load_questions(BENCHMARKS["demo"])
    assert sum(len(question.turns) == 2 for question in questions) == 12
    continuations = [question for question in questions if question.category == "continuation"]
    assert len(continuations) >= 20
    held_out = {document.key: document.text for document in documents_of("held_out")}
    for question in continuations:
        assert held_out[question.key].startswith(question.turns[0] + question.references[0])
    validation = load_questions(BENCHMARKS["demo"], split="validation")
    assert not {question.key for question in validation} & {question.key for question in questions}


def test_iwslt_keeps_only_long_sources(tmp_path: Path) -> None:
    short = {"translation": {"fr": "mot " * 60, "en": "word"}}
    path = write_lines(tmp_path / "q.jsonl", short, RECORDS["iwslt"])
    assert len(load_questions(BENCHMARKS["iwslt"], question_file=path)) == 1
    assert (
        len(
            load_questions(
                BENCHMARKS["iwslt"], question_file=path, count_tokens=lambda text: 2 * len(text.split())
            )
        )
        == 2
    )


def test_a_huge_text_is_refused_without_counting_all_of_its_tokens(tmp_path: Path) -> None:
    huge = {"translation": {"fr": "mot " * 2**20, "en": "word"}}
    path = write_lines(tmp_path / "q.jsonl", huge, RECORDS["iwslt"])
    counted, told = [], []
    load_questions(
        BENCHMARKS["iwslt"], question_file=path, left_out=told,
        count_tokens=lambda text: counted.append(len(text)) or len(text),
    )  # fmt: skip
    assert "4,194,356 characters; 1,048,576 at most" in told[0], "with what the benchmark puts around it"
    assert max(counted) == 2**20


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"question_id": 1, "category": "c", "turns": ["a"', "malformed JSON"),
        ('["a"]', "an object with named fields, it is a list"),
        ('{"question_id": 1, "category": "c", "turns": "a"}', "'turns' .* must be a list of texts"),
        ('{"question_id": 1, "category": "c", "turns": ["a", " "]}', "'turns'"),
        ('{"question_id": 1, "category": "c", "turns": ["a", null]}', "'turns'"),
        ('{"category": "c", "turns": ["a"]}', "'question_id'"),
        ('{"question_id": 1, "turns": ["a"]}', "field 'category'"),
        (
            '{"question_id": 81, "category": "c", "turns": ["a"]}',
            r"the id '81' is taken by question\.jsonl:1",
        ),
        ('{"question_id": 1, "category": "c", "turns": ["half \\ud83d"]}', "half of a surrogate pair"),
        (
            json.dumps({"question_id": 1, "category": "c", "turns": ["x" * 2**21]}),
            "2,097,152 characters.* shorten it",
        ),
    ],
)
def test_a_record_that_is_no_question_is_left_out_and_told(tmp_path: Path, bad: str, said: str) -> None:
    path = tmp_path / "question.jsonl"
    good = RECORDS["mt_bench"]
    path.write_text(f"{json.dumps(good)}\n\n{bad}\n{json.dumps({**good, 'question_id': 82})}\n")
    told: list[str] = []
    questions = load_questions(BENCHMARKS["mt_bench"], question_file=path, left_out=told)
    assert [question.key for question in questions] == ["81", "82"]
    assert re.search(rf"^question\.jsonl:3: .*{said}", told[0])
    assert len(told) == 1
    if "taken" not in said and not bad.startswith("["):
        path.write_text(bad + "\n")
        schema = 'Expected: {"question_id": 81'
        with pytest.raises(ValueError, match=f"no usable question in 1 records.*{said}.*{schema}"):
            load_questions(BENCHMARKS["mt_bench"], question_file=path)


def test_an_element_of_an_array_is_named_as_that(tmp_path: Path) -> None:
    path = tmp_path / "question.json"
    good = RECORDS["mt_bench"]
    path.write_text("\n" + json.dumps([good, {**good, "question_id": None}, good, "text"], indent=1))
    told: list[str] = []
    assert len(load_questions(BENCHMARKS["mt_bench"], question_file=path, left_out=told)) == 1
    assert [place.split(":")[1] for place in told] == ["element 2", "element 3", "element 4"]
    assert "taken by question.json:element 1" in told[1]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(RECORDS["mt_bench"]), encoding="utf-8-sig")
    assert load_questions(BENCHMARKS["mt_bench"], question_file=path)[0].key == "81"


@pytest.mark.parametrize("damage", ["not gzip", "cut off", "flipped bits", "not Parquet"])
def test_a_damaged_file_is_named_and_no_traceback(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(
        b"".join(json.dumps({**RECORDS["mt_bench"], "question_id": n}).encode() + b"\n" for n in range(500))
    )
    path = tmp_path / ("q.parquet" if damage == "not Parquet" else "q.jsonl.gz")
    path.write_bytes(
        {"cut off": content[:-20], "flipped bits": content[:40] + bytes(40) + content[80:]}.get(
            damage, b"plain text"
        )
    )
    with pytest.raises(ValueError, match=rf"{path.name}: can't be read"):
        load_questions(BENCHMARKS["mt_bench"], question_file=path)


HUB = {
    "mt_bench": {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
    "cnn_dm": {"path": "abisee/cnn_dailymail", "name": "3.0.0", "split": "test"},
    "dialogsum": {"path": "knkarthick/dialogsum", "split": "test"},
    "iwslt": {
        "path": "IWSLT/iwslt2017",
        "data_dir": "iwslt2017-fr-en",
        "revision": "refs/convert/parquet",
        "split": "test",
    },
}


@pytest.mark.parametrize("name", HUB)
def test_a_benchmark_asks_the_hub_for_its_data_set_and_split(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda **options: asked.append(options) or [RECORDS[name]])
    assert load_questions(BENCHMARKS[name])[0].category
    if name != "mt_bench":
        load_questions(BENCHMARKS[name], split="validation")
    assert asked[0] == {**HUB[name], "streaming": True}
    assert [options["split"] for options in asked[1:]] == ["validation"] * (name != "mt_bench")


def test_a_hub_that_cannot_be_reached_names_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        ValueError,
        match=r"abisee/cnn_dailymail .*: ConnectionError: no route; give a local copy with --question-file",
    ):
        load_questions(BENCHMARKS["cnn_dm"])


def test_iwslt_is_read_from_the_folders_that_the_hub_keeps_parquet_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for language in ("fr", "de"):
        for split in ("train", "validation", "test"):
            folder = tmp_path / "hub" / f"iwslt2017-{language}-en" / split
            folder.mkdir(parents=True)
            pq.write_table(
                pa.table({"translation": [{language: "mot " * 80, "en": f"{split} " * 80}]}),
                folder / "0000.parquet",
            )
    iwslt = BENCHMARKS["iwslt"]
    local = dataclasses.replace(iwslt, hub={**iwslt.hub, "path": str(tmp_path / "hub")})
    for split in ("validation", "test"):
        (question,) = load_questions(local, split=split)
        assert question.references[0].split()[0] == split


def test_an_unknown_benchmark_an_absent_file_and_an_empty_range_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known are demo, mt_bench, cnn_dm, dialogsum, iwslt"):
        get_benchmark("mtbench")
    with pytest.raises(ValueError, match="no such file"):
        load_questions(BENCHMARKS["mt_bench"], question_file=tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="no question left"):
        load_questions(
            BENCHMARKS["mt_bench"],
            question_file=write_lines(tmp_path / "q.jsonl", RECORDS["mt_bench"]),
            begin=5,
        )
    with pytest.raises(ValueError, match="mt_bench has no validation split"):
        load_questions(BENCHMARKS["mt_bench"], split="validation")


def test_the_second_prompt_contains_the_first_answer_in_the_models_own_template() -> None:
    turns, answers = ["First question?", "Second question?"], ["MY ANSWER"]
    for template in ("vicuna_v1.1", "llama-2", "zephyr", "plain"):
        first = render(template, turns[:1], [])
        second = render(template, turns, answers)
        assert "MY ANSWER" not in first
        assert (
            second.index("First question?") < second.index("MY ANSWER") < second.index("Second question?")
        ), template
    assert render("vicuna_v1.1", turns, answers).endswith("USER: Second question? ASSISTANT:")
    assert render(PLAIN, turns, answers) == "First question?\n\nMY ANSWER\n\nSecond question?\n\n"
    assert render(PLAIN, turns, [""]) == "First question?\n\nSecond question?\n\n", "an empty answer is none"
    assert render("raw", turns[:1], []) == "First question?"


def test_plain_text_needs_no_fastchat_and_another_template_says_so_before_any_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastchat.conversation", None)
    template_names.cache_clear()
    assert render(choose_template("demo"), ["A question?"], []) == "A question?\n\n"
    assert choose_template("vicuna-7b", override=PLAIN) == PLAIN
    with pytest.raises(ModuleNotFoundError, match="fastchat"):
        choose_template("vicuna-7b")


# What FastChat 0.2.36's get_conversation_template answers for these ids.
FASTCHAT = {
    "lmsys/vicuna-7b-v1.5": "vicuna_v1.1",
    "lmsys/longchat-7b-16k": "vicuna_v1.1",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral",
    "mixtral-8x7b-instruct": "mistral",
    "HuggingFaceH4/zephyr-7b-beta": "zephyr",
    "stabilityai/stablelm-zephyr-3b": "stablelm",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "TinyLlama",
    "Qwen/Qwen2-7B-Instruct": "qwen-7b-chat",
    "01-ai/Yi-34B-Chat": "Yi-34b-chat",
    "tiiuae/falcon-7b-instruct": "falcon",
    "stable-vicuna-13b": "stable-vicuna",
    "microsoft/Orca-2-7b": "orca-2",
    "openchat/openchat_3.5": "openchat_3.5",
    "tatsu-lab/alpaca-7b": "alpaca",
    "upstage/SOLAR-10.7B-Instruct-v1.0": "solar",
    "deepseek-ai/deepseek-llm-7b-chat": "deepseek-chat",
    "allenai/tulu-2-dpo-7b": "tulu",
    "databricks/dolly-v2-3b": "dolly_v2",
    "codellama/CodeLlama-7b-Instruct-hf": "llama-2",
    "mosaicml/mpt-7b-chat": "mpt-7b-chat",
    "THUDM/chatglm3-6b": "chatglm3",
    "baichuan-inc/Baichuan2-7B-Chat": "baichuan2-chat",
}


@pytest.mark.parametrize("model_id", FASTCHAT)
def test_the_template_is_the_one_fastchat_would_choose(model_id: str) -> None:
    assert choose_template(model_id) == FASTCHAT[model_id]
    assert choose_template(f"results/anyprec-{model_id.rsplit('/', 1)[-1]}-4-2") == FASTCHAT[model_id], (
        "a quantized copy's name"
    )
    stops(FASTCHAT[model_id])


def test_a_template_can_be_chosen_and_an_unknown_one_is_refused() -> None:
    class Tokenizer:
        chat_template = None

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"

    assert choose_template("anything", override="vicuna_v1.1") == "vicuna_v1.1"
    with pytest.raises(ValueError, match="known are plain, tokenizer"):
        choose_template("anything", override="vicuna")
    with pytest.raises(ValueError, match="has no chat template"):
        choose_template("anything", Tokenizer(), TOKENIZER)
    assert choose_template("anything", Tokenizer()) == PLAIN
    assert "none is known for the model id anything" in template_note(PLAIN, "anything", None)
    assert "by the model id" in template_note("vicuna_v1.1", "vicuna-7b", None)
    Tokenizer.chat_template = "{{ messages }}"
    for model_id in ("anything", "vicuna-7b", "demo"):
        assert choose_template(model_id, Tokenizer()) == TOKENIZER, "the tokenizer knows its model best"
    assert "own tokenizer" in template_note(TOKENIZER, "vicuna-7b", None)
    assert choose_template("anything", Tokenizer(), "vicuna_v1.1") == "vicuna_v1.1"
    assert render(TOKENIZER, ["a", "b"], ["A"], Tokenizer()) == "<user>a<assistant>A<user>b<assistant>"


def test_an_answer_is_cut_at_the_templates_stop_string() -> None:
    assert stops("one_shot").cut("An answer.### Human: more") == "An answer."
    assert Stops(("###", "END")).cut("a END b ###") == "a "
    assert Stops().cut("a ### b") == "a ### b"


def test_rendering_loads_only_fastchats_templates() -> None:
    code = (
        "import sys; import pmpd; before = set(sys.modules)\n"
        "from pmpd.benchmarks.conversation import render; render('vicuna_v1.1', ['a'], [])\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(name for name in new if name.split('.')[0] in ('fastchat', 'openai', 'torch', 'ray', "
        "'datasets')))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert loaded == "['fastchat', 'fastchat.conversation']"
