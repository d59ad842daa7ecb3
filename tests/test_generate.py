"""Generation: turns, caches, prompts that are too long, failures, sweeps; and the same through the farm,
twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pmpd import PMPDForCausalLM, storage
from pmpd.benchmarks import BENCHMARKS, Question
from pmpd.benchmarks.conversation import Stops
from pmpd.benchmarks.tokens import token_pieces
from pmpd.cli.main import main as run_command
from pmpd.decode.oracle import decode
from pmpd.demo import ANYPREC
from pmpd.evaluation.answer import Generator, conversation_rows, cut_left
from pmpd.evaluation.compare import compare
from pmpd.evaluation.fastchat_export import answer_files, export
from pmpd.evaluation.results import read_generations
from pmpd.evaluation.score import ScoreConfig
from pmpd.evaluation.static_search import best_path, choose, read_best, write_best
from pmpd.evaluation.sweep import Run, SweepConfig, grid_plans, sweep_runs
from pmpd.schedulers.base import Scheduler
from pmpd.schedulers.chain import class_plans, class_steps
from tests.generation_rows import generation_rows
from tests.helpers import byte_tokenizer
from tests.ray_sessions import local_ray

LENGTH = 12


def question(number: int, *turns: str, template: str | None = None) -> Question:
    return Question(f"{number:016x}", f"q{number}", "statements", turns, (None,) * len(turns), template)


QUESTIONS = [
    question(1, "What is a list?", "And a tuple?"),
    question(2, "Name a number."),
    question(3, "Why? " * 20, "How? " * 9, "When?"),
    question(4, "x"),
    question(5, "What does the with statement do?", "Which methods?"),
]


def runs(*names: str, **options) -> list[Run]:
    return sweep_runs(SweepConfig(schedulers=names, max_new_tokens=LENGTH, **options))


def answer(
    model, chosen: list[Run], questions=QUESTIONS, slots: int = 8, reuse_cache: bool = True
) -> list[dict]:
    generator = Generator(model, chosen, slots, reuse_cache, "test")
    return list(
        generator.answer(conversation_rows(BENCHMARKS["demo"], "test", questions, chosen, "demo", "plain"))
    )


def by_turn(rows: list[dict]) -> dict[tuple, list[int]]:
    return {(row["run"], row["prompt_id"], row["turn"]): row["output_ids"] for row in rows}


@pytest.fixture(scope="module")
def model(anyprec_model):
    return anyprec_model()


@pytest.fixture(scope="module")
def rows(model) -> list[dict]:
    return answer(model, runs("uniform", "static", "random", "confidence"))


def test_every_turn_of_every_run_is_there_once_and_fits_its_table(rows: list[dict]) -> None:
    names = {row["run"] for row in rows}
    assert len(rows) == len(names) * 9
    assert len({row["row_id"] for row in rows}) == len(rows)
    assert not [row["error"] for row in rows if row["error"]]
    assert len(storage.to_table(rows, storage.GENERATIONS)) == len(rows)
    for row in rows:
        assert (
            sum(part["count"] for part in row["precision_trace"])
            == row["output_tokens"]
            == len(row["output_ids"])
        )


def test_the_second_turn_sees_the_first_answer(rows: list[dict]) -> None:
    first, second = (
        next(r for r in rows if r["run"] == "uniform-4" and r["question_id"] == "q1" and r["turn"] == n)
        for n in (1, 2)
    )
    assert (
        second["prompt_text"] == f"What is a list?\n\n{first['output_text']}\n\nAnd a tuple?\n\n"
        if first["output_text"]
        else True
    )
    assert first["output_text"] in second["prompt_text"]
    other = next(r for r in rows if r["run"] == "uniform-2" and r["question_id"] == "q1" and r["turn"] == 2)
    assert other["prompt_text"] != second["prompt_text"], "each run sees its own answer"


def test_reusing_the_cache_of_the_turn_before_changes_no_token(model, rows: list[dict]) -> None:
    chosen = runs("uniform", "static", "random", "confidence")
    without = answer(model, chosen, reuse_cache=False)
    assert by_turn(without) == by_turn(rows)
    assert {row["reused_tokens"] for row in without} == {0}
    later = [row for row in rows if row["turn"] > 1]
    assert all(row["reused_tokens"] > 0 for row in later)
    assert all(row["reused_tokens"] < row["prompt_tokens"] for row in later)


def test_an_answer_does_not_depend_on_who_is_answered_beside_it(model, rows: list[dict]) -> None:
    chosen = runs("random", "static")
    alone = [row for one in QUESTIONS for row in answer(model, chosen, [one], slots=1)]
    assert by_turn(alone).items() <= by_turn(rows).items()


def test_tokens_and_precisions_are_the_oracles(model, rows: list[dict]) -> None:
    for row in rows:
        if row["run"] not in ("uniform-3", "static-3/7", "random-0"):
            continue
        steps = row["switch_steps"] or None
        chain = (
            Scheduler.get_scheduler("static", precisions=(4, 3, 2), high_bit_steps=[0, 0]) if steps else None
        )
        bits = 3 if row["run"] == "uniform-3" else 4
        truth = decode(model.model, row["input_ids"], LENGTH, bits, model.eos_token_ids, chain, steps)
        assert row["output_ids"] == truth.tokens
        assert [part["bits"] for part in row["precision_trace"] for _ in range(part["count"])] == truth.bits


def test_a_prompt_that_is_too_long_loses_its_left_side_and_says_so(model) -> None:
    long = question(9, "word " * 300 + "END")
    (row,) = answer(model, runs("uniform")[:1], [long])
    assert row["prompt_tokens"] == model.max_positions - LENGTH
    assert row["dropped_tokens"] == 5 * 300 + len("END\n\n") - row["prompt_tokens"]
    assert model.tokenizer.decode(row["input_ids"]).endswith("END\n\n")
    assert row["error"] is None
    assert cut_left([1, 5, 6, 7, 8], 3, bos_token_id=1) == ([1, 7, 8], 2), "a begin-of-sequence token stays"
    assert cut_left([1, 5], 3, bos_token_id=1) == ([1, 5], 0)


def test_no_room_for_a_prompt_is_an_error_before_anything_runs(model) -> None:
    with pytest.raises(ValueError, match=r"--max-new-tokens 768: this model has 768 positions"):
        Generator(model, sweep_runs(SweepConfig(schedulers=("uniform",), max_new_tokens=768)))


def test_a_failure_is_a_column_of_its_own_rows_and_of_no_other(model, rows: list[dict]) -> None:
    broken = question(8, "first", "second", template="no such template")
    found = answer(model, runs("uniform")[:1], [*QUESTIONS, broken])
    bad = [row for row in found if row["error"]]
    assert [(row["question_id"], row["turn"]) for row in bad] == [("q8", 1), ("q8", 2)]
    assert "turn 1 failed" in bad[1]["error"]
    assert all("output_text" not in row for row in bad), "a failure is never text"
    assert by_turn([row for row in found if not row["error"]]).items() <= by_turn(rows).items()


def test_a_stop_string_that_is_a_special_token_ends_the_answer(
    model, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = next(
        row for row in rows if row["run"] == "uniform-4" and row["question_id"] == "q1" and row["turn"] == 1
    )
    stop = next(
        token
        for token in before["output_ids"][1:]
        if token not in before["input_ids"] and token not in before["output_ids"][:1]
    )
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(stop)]})
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    monkeypatch.setattr(
        "pmpd.evaluation.answer.stops", lambda *_: Stops((tokenizer.convert_ids_to_tokens(stop), "###"))
    )
    (row,) = answer(model, runs("uniform")[:1], [question(1, "What is a list?")])
    assert row["output_ids"] == before["output_ids"][: before["output_ids"].index(stop) + 1]
    assert row["finish_reason"] == "eos"
    assert row["output_text"] == tokenizer.decode(row["output_ids"][:-1]).strip()


def test_the_pieces_of_a_text_join_to_the_text(model) -> None:
    for text in ("plain words", "naïve café ☕ — 漢字 🙂!", "🙂" * 30, ""):
        ids = model.tokenizer(text)["input_ids"]
        pieces = token_pieces(model.tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text


def test_the_workers_own_speed_is_on_every_row(rows: list[dict]) -> None:
    assert {part["bits"] for part in rows[0]["forward_seconds"]} == {4, 3, 2}
    assert all(part["seconds"] > 0 for part in rows[0]["forward_seconds"])


def test_a_learned_scheduler_of_another_model_is_refused_before_anything_runs(model) -> None:
    with pytest.raises(ValueError, match="dim"):
        Generator(model, runs("kv_cache"))


def test_the_demos_learned_scheduler_decides_with_scores_for_every_turn() -> None:
    chosen = sweep_runs(SweepConfig(schedulers=("kv_cache",), max_new_tokens=LENGTH))
    found = answer(PMPDForCausalLM(ANYPREC, kernel="reference").eval(), chosen)
    assert len(found) == 9
    for row in found:
        assert row["error"] is None
        assert np.asarray(row["decision_scores"]).shape == (2, 4)
        assert row["switch_steps"] == [class_steps(LENGTH)[k] for k in row["classes"]]


def test_a_sweep_names_its_runs_and_has_no_doubles() -> None:
    names = [
        run.name
        for run in sweep_runs(
            SweepConfig(
                schedulers=("fp", "uniform", "static", "naive", "random"),
                precisions=(4, 3),
                options={"random": {"seed": 7}},
            )
        )
    ]
    uniform = ["uniform-4", "uniform-3", "uniform-3-prefill-4"]
    assert names == ["fp", *uniform, "static-0", "static-85", "static-170", "random-7"]
    assert [run.name for run in sweep_runs(SweepConfig(schedulers=("naive",), high_bit_steps=((10,),)))] == [
        "static-10/20"
    ]
    assert len(class_plans(2, 256)) == 9
    assert (255, 255) not in class_plans(2, 256), "never switching is the uniform run"
    assert grid_plans(1, 101, 5) == [(0,), (25,), (50,), (75,), (100,)]
    assert len(grid_plans(2, 101, 5)) == 15


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedulers": ("statik",)}, "known are fp, uniform, static"),
        ({"schedulers": ()}, "known are"),
        ({"precisions": (4,)}, "two members"),
        ({"max_new_tokens": 3}, "four at least"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SweepConfig(**options)


def test_bad_options_of_a_scheduler_are_an_error_before_any_worker_starts() -> None:
    with pytest.raises(ValueError, match="1 pair"):
        sweep_runs(SweepConfig(schedulers=("static",), precisions=(4, 3), high_bit_steps=((1, 2),)))
    with pytest.raises(ValueError, match="threshold"):
        sweep_runs(SweepConfig(schedulers=("confidence",), options={"confidence": {"threshold": 1.5}}))


def test_the_best_setting_is_carried_over_to_other_lengths_and_refused_for_other_models(
    tmp_path: Path,
) -> None:
    path = best_path(str(tmp_path), "demo", (4, 3, 2))
    with pytest.raises(ValueError, match="--static-search first"):
        read_best(path, (4, 3, 2), "abc", 128)
    write_best(
        path,
        {
            "precisions": [4, 3, 2],
            "model_fingerprint": "abc",
            "max_new_tokens": 101,
            "high_bit_steps": [25, 100],
        },
    )
    assert read_best(path, (4, 3, 2), "abc", 101) == (25, 100)
    assert read_best(path, (4, 3, 2), "abc", 201) == (50, 200)
    with pytest.raises(ValueError, match="searched with model_fingerprint abc"):
        read_best(path, (4, 3, 2), "xyz", 101)
    assert best_path(str(tmp_path), "demo", (4, 3)) != path


def test_the_static_search_keeps_its_choice_and_what_it_chose_from(tmp_path: Path) -> None:
    (comparison,) = compare(generation_rows(max_new_tokens=40))
    best = choose(comparison, "rouge_l", "reference_output", 0.5, 40, ScoreConfig(resamples=200))
    static = {run.name for run in comparison.runs.values() if run.kind == "static"}
    assert {candidate["run"] for candidate in best["candidates"]} == static
    assert best["best"]["value"] >= 0.5 * (best["best"]["value"] - best["best"]["difference"])
    cheaper = [c for c in best["candidates"] if c["average_bits"] < best["best"]["average_bits"]]
    assert all(c["value"] < 0.5 * (c["value"] - c["difference"]) for c in cheaper), (
        "every cheaper one is over the budget"
    )
    path = best_path(str(tmp_path), "demo", (4, 3, 2))
    write_best(path, best)
    assert list(read_best(path, (4, 3, 2), "quant0", 40)) == best["high_bit_steps"]


# ------------------------------------------------------------------------------------------------------------


def test_a_failed_turn_is_never_exported_as_an_answer(tmp_path: Path) -> None:
    rows = generation_rows(questions=2, two_turns=2)
    rows[3] = {**rows[3], "error": "RuntimeError: boom", "output_text": None}
    with pytest.raises(ValueError, match="1 turns failed"):
        answer_files(rows, 0.0)
    folder = write_answers(tmp_path / "in", rows)
    assert [path.name for path in export(str(folder), str(tmp_path / "out"), runs="fp")] == ["demo-fp.jsonl"]
    with pytest.raises(ValueError, match="--runs nothing"):
        export(str(folder), str(tmp_path / "out"), runs="nothing")
    assert run_command(["export-fastchat", str(folder), str(tmp_path / "out2"), "--runs", "fp"]) == 0
    assert run_command(["export-fastchat", str(tmp_path / "absent"), str(tmp_path / "out2")]) == 1


def test_an_export_is_of_one_split_and_has_no_turn_twice(tmp_path: Path) -> None:
    rows = generation_rows(questions=2, two_turns=2)
    write_answers(tmp_path / "in" / "a", rows)
    write_answers(tmp_path / "in" / "b", [{**row, "split": "validation"} for row in rows])
    with pytest.raises(ValueError, match=r"more than one split \(test, validation\)"):
        export(str(tmp_path / "in"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="question q0, turn 1 is there twice"):
        answer_files([*rows, rows[0]], 0.0)
    assert not (tmp_path / "out").exists()


def write_answers(folder: Path, rows: list[dict]) -> Path:
    storage.write_shard(storage.to_table(rows, storage.GENERATIONS), folder / "data" / "part-0.parquet")
    storage.write_manifest(
        folder, storage.GENERATIONS, {"a": 1}, table="generations", complete=True, counts={"rows": len(rows)}
    )
    return folder


# ------------------------------------------------------------------------------------------------------------


def test_the_job_generates_resumes_and_refuses_another_configuration(
    tmp_path: Path, anyprec_folder, dense_folder, capsys
) -> None:
    from pmpd.cli.flags.generate import GenerateJob
    from pmpd.cli.flags.report import ReportJob
    from pmpd.cli.generate import main
    from pmpd.cli.report import main as report

    questions = tmp_path / "q.jsonl"
    records = [
        {"id": f"q{n}", "category": "statements", "turns": [f"Question {n}?", "More?"][: 1 + n % 2]}
        for n in range(6)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = {
        "model_path": str(anyprec_folder()), "reference_model_path": str(dense_folder()),
        "question_file": str(questions),
        "max_new_tokens": 8, "schedulers": "fp,uniform,static", "output_dir": str(tmp_path / "out"),
        "kernel": "reference",
        "num_workers": 2, "batch_size": 2, "high_bit_steps": "2,4",
    }  # fmt: skip
    with local_ray(2):
        folder = main(GenerateJob(**job))
        before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("data/*.parquet")}
        victim = next(path for path in before if "/quantized/answers/" in str(path))
        victim.write_bytes(victim.read_bytes()[:-40])
        main(GenerateJob(**job))  # the damaged shard is done again, the others are left alone
        after = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("data/*.parquet")}
        assert {path for path in before if after.get(path) != before[path]} == {victim}
        with pytest.raises(ValueError, match=r"questions: 6 -> 3"):
            main(GenerateJob(**{**job, "question_end": 3}))
    rows = [row for _, _, found in read_generations(folder) for row in found]
    assert len(rows) == 7 * 9, (
        "fp, three widths, two prefilled at 4, one static; 3 questions of one turn, 3 of two"
    )
    workers = {(row["run"], row["conversation_id"], row["worker"]) for row in rows}
    assert len(workers) == 7 * 6, "a conversation stays on its worker"
    page = report(ReportJob((folder,), str(tmp_path / "report"), resamples=200))
    assert page.exists()
    scores = storage.read_table(tmp_path / "report" / "scores").to_pylist()
    uniform = {"uniform-4", "uniform-3", "uniform-2", "uniform-3-prefill-4", "uniform-2-prefill-4"}
    assert {row["run"] for row in scores} == {"fp", *uniform, "static-2/4"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bench_name": "mtbench"}, "known are demo, mt_bench"),
        ({"schedulers": "fp,statik"}, "known are fp, uniform"),
        ({"high_bit_steps": "some"}, "one number, one per pair"),
        ({"high_bit_steps": "best"}, "--static-search first"),
        ({"template": "vicuna"}, "known are plain"),
        ({"question_begin": 500}, "no question left"),
        ({"model_path": "/nowhere"}, "no such folder"),
    ],
)
def test_bad_input_is_refused_before_a_worker_starts(
    tmp_path: Path, anyprec_folder, dense_folder, options: dict, said: str
) -> None:
    from pmpd.cli.flags.generate import GenerateJob
    from pmpd.cli.generate import main

    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": "1", "category": "c", "turns": ["a"]}\n')
    job = {"model_path": str(anyprec_folder()), "reference_model_path": str(dense_folder()),
    "output_dir": str(tmp_path / "out"),
           "question_file": str(questions), "schedulers": "uniform,static"}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        main(GenerateJob(**{**job, **options}))
