"""The flags of pmpd generate, down to the rows, in this process: what the farm would do is done here,
without Ray."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console

import pmpd.cli.generate
import pmpd.evaluation.answer
from pmpd import PMPDForCausalLM, farm, storage
from pmpd.cli.flags.generate import GenerateJob
from pmpd.cli.flags.report import ReportJob
from pmpd.cli.generate import best_command, main, reference_command
from pmpd.cli.report import main as report
from pmpd.errors import UserError
from pmpd.evaluation.answer import Generator
from pmpd.evaluation.results import read_generations
from pmpd.farm.generate_task import Sweep, write_conversations
from pmpd.weights.byte_head import byte_head_unavailable
from pmpd.weights.model_spec import ModelSpec
from tests.gptq_writer import write_chain


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sweep, ModelSpec]]:
    """What the job hands to the farm, in order."""
    calls: list[tuple[Sweep, ModelSpec]] = []

    def generate(
        sweep: Sweep,
        source: ModelSpec,
        folder: str,
        slots: int,
        reuse_cache: bool,
        options: farm.FarmOptions,
    ) -> None:
        calls.append((sweep, source))
        answers = storage.join(folder, "answers")
        if storage.check_config(answers, sweep.identity()) is not None:
            return
        write_conversations(sweep, storage.join(folder, "conversations"))
        model = PMPDForCausalLM.from_spec(source, torch.device("cpu")).eval()
        asked = storage.read_table(storage.join(folder, "conversations")).to_pylist()
        rows = list(Generator(model, sweep.runs, slots, reuse_cache, "test").answer(asked))
        storage.write_shard(
            storage.to_table(rows, storage.GENERATIONS), storage.join(answers, "data", "part-0.parquet")
        )
        storage.write_manifest(
            answers,
            storage.GENERATIONS,
            sweep.identity(),
            table="generations",
            complete=True,
            counts={"rows": len(rows), "errors": 0},
        )

    monkeypatch.setattr(pmpd.cli.generate, "generate", generate)
    monkeypatch.setattr(farm, "connect", lambda options: None)
    monkeypatch.setattr(
        pmpd.evaluation.answer,
        "measure_forwards",
        lambda model, widths: [
            {"bits": bits, "seconds": 0.001, "repeats": [0.001], "idle": None} for bits in widths
        ],
    )
    return calls


@pytest.fixture
def flags(tmp_path: Path, anyprec_folder, dense_folder) -> dict:
    questions = tmp_path / "q.jsonl"
    records = [
        {"id": f"q{n}", "category": "statements", "turns": [f"Question {n}?", "More?"][: 1 + n % 2]}
        for n in range(3)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "model_path": str(anyprec_folder()), "reference_model_path": str(dense_folder()),
        "question_file": str(questions),
        "max_new_tokens": 7, "schedulers": "fp,uniform", "output_dir": str(tmp_path / "out"),
        "kernel": "reference",
    }  # fmt: skip


def rows_of(folder: str) -> list[dict]:
    return [row for _, _, found in read_generations(folder) for row in found]


def run(flags: dict, **more) -> list[dict]:
    return rows_of(main(GenerateJob(**{**flags, **more}), Console(quiet=True)))


def test_a_folder_of_another_sweep_is_refused_before_any_model_answers(asked, flags: dict) -> None:
    run(flags, schedulers="uniform")
    asked.clear()
    with pytest.raises(
        UserError, match=r"\(runs: without uniform-4, .*, with static-0/0, .*\); choose another"
    ):
        run(flags, schedulers="fp,static")
    assert not asked, "the unquantized model answered, for nothing"


def test_sweep_search_and_best_setting_share_one_output_folder(
    asked, flags: dict, tmp_path: Path, capsys
) -> None:
    sweep = run(flags, schedulers="fp,uniform,static")
    search = GenerateJob(**flags, static_search=True, search_points=2, quality_budget=1.0)
    main(search)
    told = capsys.readouterr().out
    path = f"{flags['output_dir']}/best-static-demo-4-3-2.json"
    found = json.loads(Path(path).read_text())
    assert (found["high_bit_steps"], found["split"], len(found["candidates"])) == ([0, 0], "validation", 3)
    command = best_command(search).replace("TEST_QUESTIONS", flags["question_file"])
    assert best_command(search) in told.replace("\n", "")
    main(
        GenerateJob(**{**flags, "precisions": "4,3"}, static_search=True, search_points=2, quality_budget=1.0)
    )
    folder = main(tyro.cli(GenerateJob, args=shlex.split(command)[2:]))
    best = rows_of(folder)
    assert {row["run"] for row in best} == {"static-best-0/0"}, "a budget of everything takes the cheapest"
    assert (
        f"report next: pmpd report --inputs {flags['output_dir']}\n"
        in capsys.readouterr().out.replace("\n", "") + "\n"
    )
    page = report(ReportJob((flags["output_dir"],), str(tmp_path / "report"), resamples=100))
    scores = storage.read_table(page.parent / "scores").to_pylist()
    assert {row["run"] for row in scores} - {"oracle"} == {row["run"] for row in [*sweep, *best]}, (
        "and the grids are in no report"
    )
    assert (
        run(flags, scheduler="static", high_bit_steps=path, output_dir=str(tmp_path / "elsewhere"))[0]["run"]
        == "static-best-0/0"
    )


def test_the_command_after_a_search_keeps_the_flags_that_are_no_searchs() -> None:
    job = GenerateJob(
        model_path="a b", static_search=True, validation=True, random_prior=(1.0, 2.0, 3.0, 4.0),
        reuse_cache=False, search_points=3,
        quality_budget=0.5, question_begin=2, schedulers="random", max_new_tokens=64, trust_remote_code=True,
        batch_size="auto",
    )  # fmt: skip
    assert tyro.cli(GenerateJob, args=shlex.split(best_command(job))[2:]) == GenerateJob(
        model_path="a b", scheduler="static", high_bit_steps="best", random_prior=(1.0, 2.0, 3.0, 4.0),
        reuse_cache=False,
        max_new_tokens=64, trust_remote_code=True, batch_size="auto",
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"schedulers": "uniform,static"}, {"scheduler": "static"}])
def test_without_unquantized_answers_what_is_suggested_makes_them_and_then_reports(
    asked, flags: dict, options: dict, tmp_path: Path
) -> None:
    job = GenerateJob(**{**flags, **options})
    folder = Path(main(job, console := Console(record=True, width=400)))
    told = console.export_text()
    assert "report next" not in told, "that report would be refused"
    output = ("--output-dir", str(tmp_path / "report"), "--resamples", "100")
    with pytest.raises(ValueError, match="nothing to compare the answers with"):
        report(tyro.cli(ReportJob, args=["--inputs", str(folder), *output]))
    assert not (tmp_path / "report").exists(), "a refused report leaves nothing"
    command = reference_command(job)
    assert command in told
    main(tyro.cli(GenerateJob, args=shlex.split(command)[2:]), console)
    told = console.export_text(clear=False)
    (suggested,) = (line for line in told.splitlines() if line.startswith("report next: "))
    report(tyro.cli(ReportJob, args=[*shlex.split(suggested.partition(": ")[2])[2:], *output]))


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        (
            {},
            ["fp", "uniform-4", "uniform-3", "uniform-2", "uniform-3-prefill-4", "uniform-2-prefill-4"],
        ),
        ({"scheduler": "naive", "high_bit_steps": "1,3"}, ["static-1/3"]),
        ({"scheduler": "naive", "precisions": "4,2", "high_bit_steps": "2"}, ["static-2"]),
        ({"use_fp": True}, ["fp"]),
        ({"use_fp": True, "scheduler": "confidence"}, ["fp", "confidence-0.7x2"]),
        ({"scheduler": "random", "seed": 3}, ["random-3"]),
        ({"scheduler": "random", "scheduler_options": '{"random": {"seed": 4}}'}, ["random-4"]),
    ],
)
def test_flags_choose_the_runs(asked, flags: dict, options: dict, runs: list[str]) -> None:
    assert list(dict.fromkeys(row["run"] for row in run(flags, **options))) == runs


def test_choices_differ_for_the_random_scheduler_only_and_each_has_its_rows(asked, flags: dict) -> None:
    rows = run(flags, schedulers="uniform,random", num_choices=3, max_new_tokens=64)
    assert len(rows) == 6 * 3 * 4, "six runs, three choices, three questions of which one has two turns"
    assert len({row["row_id"] for row in rows}) == len(rows)
    steps = {kind: {} for kind in ("uniform", "uniform_prefill", "random")}
    for row in rows:
        steps[row["kind"]].setdefault((row["run"], row["prompt_id"], row["turn"]), set()).add(
            tuple(row["output_ids"] + row["switch_steps"])
        )
    assert {len(found) for found in steps["uniform"].values()} == {1}
    assert max(len(found) for found in steps["random"].values()) > 1


def test_a_range_of_questions_and_the_validation_split(asked, flags: dict) -> None:
    assert {row["question_id"] for row in run(flags, question_begin=1, question_end=2)} == {"q1"}
    folder = main(GenerateJob(**flags, validation=True), Console(quiet=True))
    rows = rows_of(folder)
    assert {row["split"] for row in rows} == {"validation"}
    assert folder.endswith("demo-validation")


def test_the_prefill_may_have_a_precision_outside_the_chain(asked, flags: dict) -> None:
    rows = run(flags, scheduler="static", precisions="3,2", high_bit_steps="2", prefill_bit=4)
    assert {part["bits"] for row in rows for part in row["precision_trace"][:1]} == {4}
    assert {
        tuple(part["bits"] for part in row["precision_trace"]) for row in rows if row["output_tokens"] == 7
    } == {(4, 3, 2)}
    assert asked[0][1].precisions == (4, 3, 2)


def test_a_set_of_checkpoints_is_answered_as_one_model(
    asked, flags: dict, tmp_path: Path, dense_folder
) -> None:
    file = write_chain(tmp_path / "gptq", dense_folder(), {4: {}, 3: {}})
    rows = run(
        flags,
        model_path=str(file),
        use_multi_model=True,
        precisions="4,3",
        scheduler="static",
        high_bit_steps="3",
    )
    assert not [row["error"] for row in rows if row["error"]]
    assert {part["bits"] for row in rows for part in row["precision_trace"]} == {4, 3}


def test_workers_get_absolute_paths_and_the_rows_identity_does_not_know_them(
    asked, flags: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(flags["model_path"]).parent)
    relative = {**flags, "model_path": Path(flags["model_path"]).name, "scheduler": "uniform"}
    run(relative)
    run({**relative, "model_path": flags["model_path"]})
    assert [source.path for _, source in asked] == [flags["model_path"]] * 2
    assert ModelSpec("owner/name").path == "owner/name"


def test_a_head_of_8_bits_is_part_of_what_the_rows_are_and_the_unquantized_model_keeps_its_own(
    asked, flags: dict
) -> None:
    eight = {**flags, "dtype": "bfloat16", "kernel": None, "head_bits": 8}
    if problem := byte_head_unavailable(torch.bfloat16, torch.device("cpu")):
        pytest.skip(problem)
    run(eight)
    assert [source.head_bits for _, source in asked] == [16, 8]
    assert [sweep.identity().get("head_bits") for sweep, _ in asked] == [None, 8]
    with pytest.raises(ValueError, match=r"made with another configuration \(head_bits"):
        run({**eight, "head_bits": 16})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_choices": 0}, "--num-choices 0: at least 1"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: at least 4"),
        ({"quality_budget": 2.0}, "--quality-budget 2.0: a share"),
        ({"precisions": "4,x"}, "--precisions 4,x: bit widths with commas"),
        ({"precisions": "8,4"}, r"--precisions 8, 4: .* holds 4, 3, 2, not 8"),
        ({"prefill_bit": 8}, r"--prefill-bit 8: .* holds 4, 3, 2, not 8"),
        ({"static_search": True, "high_bit_steps": "3"}, "give one of the two"),
        (
            {"scheduler": "static", "high_bit_steps": "/nowhere/best.json"},
            "no search result at /nowhere/best.json",
        ),
        (
            {"scheduler": "static", "high_bit_steps": "config.json"},
            "config.json is not what a static search writes",
        ),
        ({"scheduler": "kv_cache"}, "dim 16: the classifiers in .* have dim 32"),
        ({"plugins": "no_such_module"}, "--plugins no_such_module: No module named"),
        ({"scheduler_options": "[1]"}, "give JSON of options by scheduler"),
        ({"scheduler": "random", "scheduler_options": '{"random": {"luck": 1}}'}, "option luck: it takes"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_the_farm(
    asked, flags: dict, options: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flags["model_path"])
    with pytest.raises(ValueError, match=said):
        main(GenerateJob(**{**flags, **options}))
    assert not asked
