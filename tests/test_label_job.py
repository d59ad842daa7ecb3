"""`pmpd label` in its three settings, and what it says about bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from pmpd import demo, farm, storage
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.label import label_table, main, output_folder, tell_unscored
from pmpd.cli.main import main as run_command
from pmpd.demo.texts import documents_of
from pmpd.demo.train import stream_loss, token_stream
from pmpd.errors import UserError
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import label_prompts, reference_prompts
from pmpd.labeling.rule import RULES
from pmpd.model import PMPDForCausalLM
from pmpd.weights.base import shared_state
from pmpd.weights.byte_head import byte_head_unavailable
from tests.gptq_writer import write_chain
from tests.helpers import write_dense
from tests.ray_sessions import ENVIRONMENT, ROOT, environment, local_ray

NEW_TOKENS = 8
LABELS = storage.labels_schema(16)


@pytest.fixture(scope="module")
def cluster():
    with local_ray(2):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [f"{i}. " + "The quick brown fox jumps over the lazy dog. " * (1 + i) for i in range(9)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "", texts[0]]))
    return path


@pytest.fixture
def job(dense_folder, anyprec_folder, dataset, tmp_path):
    return LabelJob(
        model_path=str(anyprec_folder()),
        reference_model_path=str(dense_folder()),
        dataset=str(dataset),
        size=100,
        max_new_tokens=NEW_TOKENS,
        batch_size=4,
        output_dir=str(tmp_path / "out"),
        kernel="reference",
        rule="agreement",  # a model of random weights writes symbols, which ROUGE-L can't compare
    )


def labels_of(folder: str | Path) -> dict[str, dict]:
    """Everything that defines a row; not who made it and how long it took."""
    rows = storage.read_table(storage.join(folder, "labels")).to_pylist()
    return {
        row["prompt_id"]: {key: value for key, value in row.items() if key not in ("seconds", "worker")}
        for row in rows
    }


def test_labels_equal_those_of_the_pure_functions_with_another_batch_size(cluster, job):
    console = Console(record=True, width=150)
    result = main(dataclasses.replace(job, num_workers=2), console)
    rows = labels_of(job.output_dir)
    assert (result.rows, result.errors, len(rows)) == (10, 1, 10), (
        "nine texts and one that is empty; a duplicate is one row"
    )

    prompts = [
        row
        for row in storage.read_table(storage.join(job.output_dir, "prompts")).to_pylist()
        if not row["error"]
    ]
    config = LabelConfig((4, 3, 2), NEW_TOKENS, 2, RULES["agreement"])
    references = {
        row["prompt_id"]: row
        for row in reference_prompts(PMPDForCausalLM(job.reference_model_path).eval(), prompts, config)
    }
    model = PMPDForCausalLM(job.model_path, (4, 3, 2), kernel="reference").eval()
    for expected in label_prompts(model, prompts, references, config):
        row = rows[expected["prompt_id"]]
        assert row["reference_ids"] == expected["reference_ids"]
        assert [(pair["label"], pair["high_ids"]) for pair in row["pairs"]] == [
            (p["label"], p["high_ids"]) for p in expected["pairs"]
        ]
        np.testing.assert_allclose(
            np.asarray(row["keys"], np.float32), expected["keys"].astype(np.float32), atol=2e-3
        )

    printed = console.export_text()
    assert "4,3" in printed
    assert "3,2" in printed
    assert "per second" in printed
    assert f"{job.output_dir}/labels/data" in printed
    assert "pmpd train" in printed
    assert run_command(["inspect", job.output_dir]) == 0
    manifest = storage.read_manifest(storage.join(job.output_dir, "labels"))
    assert manifest["models"]["num_key_value_heads"] == 2
    assert manifest["config"]["precisions"] == [4, 3, 2]
    assert manifest["device"]

    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        main(dataclasses.replace(job, seed=1), Console(quiet=True))


def test_labels_of_a_chain_of_gptq_checkpoints_equal_those_of_the_pure_functions(
    cluster, job, dense_folder, tmp_path
):
    chain = write_chain(tmp_path / "chain", dense_folder(), {4: {"desc_act": True}, 2: {"group_size": -1}})
    job = dataclasses.replace(
        job, model_path=str(chain), use_multi_model=True, precisions="4,2", size=3, num_workers=1
    )
    result = main(job, Console(quiet=True))
    rows = labels_of(job.output_dir)
    assert (result.rows, result.errors) == (3, 0)
    prompts, references = (
        storage.read_table(storage.join(job.output_dir, name)).to_pylist()
        for name in ("prompts", "references")
    )
    model = PMPDForCausalLM(chain, (4, 2), use_anyprec=False, kernel="reference").eval()
    config = LabelConfig((4, 2), NEW_TOKENS, 3, RULES["agreement"])
    for expected in label_prompts(model, prompts, {row["prompt_id"]: row for row in references}, config):
        row = rows[expected["prompt_id"]]
        assert [(pair["label"], pair["high_ids"]) for pair in row["pairs"]] == [
            (p["label"], p["high_ids"]) for p in expected["pairs"]
        ]
    assert (
        storage.read_manifest(storage.join(job.output_dir, "labels"))["config"]["model"] == model.fingerprint
    )


@pytest.mark.slow
def test_a_head_of_8_bits_is_part_of_what_labels_are_and_not_of_what_references_are(job):
    if problem := byte_head_unavailable(torch.bfloat16, torch.device("cpu")):
        pytest.skip(problem)
    eight = dataclasses.replace(job, num_workers=0, size=3, kernel="auto", dtype="bfloat16", head_bits=8)
    assert main(eight, Console(quiet=True)).errors == 0
    configs = [
        storage.read_manifest(storage.join(job.output_dir, name))["config"]
        for name in ("labels", "references")
    ]
    assert [config.get("head_bits") for config in configs] == [8, None]
    with pytest.raises(ValueError, match=r"made with another configuration \(head_bits"):
        main(dataclasses.replace(eight, head_bits=16), Console(quiet=True))


def test_stages_can_be_run_one_by_one(cluster, job):
    assert main(dataclasses.replace(job, stage="prompts"), Console(quiet=True)) is None
    with pytest.raises(ValueError, match="references lacks 10 of 10 ids"):
        main(dataclasses.replace(job, stage="labels"), Console(quiet=True))
    assert main(dataclasses.replace(job, stage="references"), Console(quiet=True)).new_items == 10
    assert main(dataclasses.replace(job, stage="labels"), Console(quiet=True)).rows == 10


@pytest.mark.slow
def test_rows_do_not_depend_on_batch_size_and_number_of_workers(cluster, job, tmp_path):
    main(dataclasses.replace(job, num_workers=2), Console(quiet=True))
    rows = labels_of(job.output_dir)
    other = dataclasses.replace(job, batch_size=3, num_workers=1, output_dir=str(tmp_path / "other"))
    main(other, Console(quiet=True))
    assert_same_labels(labels_of(other.output_dir), rows)


def assert_same_labels(rows: dict[str, dict], others: dict[str, dict]) -> None:
    assert set(rows) == set(others)
    for key, row in rows.items():
        for features in ("keys", "values"):
            first, second = row.pop(features), others[key].pop(features)
            assert (first is None) == (second is None)
            if first is not None:
                np.testing.assert_allclose(
                    np.asarray(first, np.float32), np.asarray(second, np.float32), atol=2e-3
                )
        assert row == others[key]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_rows_are_those_of_an_undisturbed_one(cluster, job, tmp_path):
    job = dataclasses.replace(job, max_new_tokens=64, batch_size=1, num_workers=1)
    flags = [
        text
        for name in (
            "model_path",
            "reference_model_path",
            "dataset",
            "size",
            "max_new_tokens",
            "batch_size",
            "num_workers",
            "output_dir",
            "rule",
            "kernel",
        )
        for text in (f"--{name.replace('_', '-')}", str(getattr(job, name)))
    ]
    command = [sys.executable, "jobs/label.py", *flags]
    with environment() as env:
        driver = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        labels = storage.join(job.output_dir, "labels")
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and len(storage.list_shards(labels)) < 3:
            assert driver.poll() is None
            time.sleep(0.01)
        driver.kill()
        driver.wait()
    done = len(storage.scan(labels).where())
    assert 3 <= done < 10
    new = main(dataclasses.replace(job, batch_size=4, num_workers=2), Console(quiet=True)).new_items
    assert 0 < new <= 10 - done, "a worker may have outlived its driver by a unit"
    undisturbed = dataclasses.replace(job, batch_size=3, output_dir=str(tmp_path / "undisturbed"))
    main(undisturbed, Console(quiet=True))
    assert_same_labels(labels_of(job.output_dir), labels_of(undisturbed.output_dir))


@pytest.mark.slow
def test_rows_with_an_error_are_kept_until_they_are_asked_for_again(cluster, job):
    main(job, Console(quiet=True))
    good = labels_of(job.output_dir)
    path = storage.list_shards(storage.join(job.output_dir, "labels"))[0]
    rows = storage.read_shard(path).to_pylist()
    storage.write_shard(
        storage.to_table([{**row, "error": "RuntimeError: passing", "pairs": None} for row in rows], LABELS),
        path,
    )
    failed = {row["prompt_id"] for row in rows}
    result = main(job, Console(quiet=True))
    assert (result.new_items, result.errors) == (
        0,
        len({key for key, row in good.items() if row["error"]} | failed),
    )
    result = main(dataclasses.replace(job, retry_errors=True), Console(quiet=True))
    assert len(failed) <= result.new_items <= len(failed) + 1
    assert result.errors == 1, "the empty document stays one"
    assert_same_labels(labels_of(job.output_dir), good)


def run_as_script(monkeypatch, capsys, *arguments: str) -> str:
    """What a failing `jobs/label.py` says at its end, behind lines of progress."""
    monkeypatch.setattr(sys, "argv", ["jobs/label.py", *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "jobs/label.py"), run_name="__main__")
    assert left.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_with_nothing_but_errors_fails(cluster, job, monkeypatch, capsys):
    def run(task, inputs, dataset, config, options, lease):
        assert options.retry_errors
        rows = [
            {"prompt_id": "a", "error": "RuntimeError: x"},
            {"prompt_id": "b", "error": "RuntimeError: y"},
        ]
        storage.write_shard(storage.to_table(rows, LABELS), Path(dataset, "data", "part-0.parquet"))
        return farm.FarmResult(dataset, 2, 2, 2, 1.0, 2.0)

    monkeypatch.setattr(farm, "run", run)
    paths = [
        "--model-path",
        job.model_path,
        "--reference-model-path",
        job.reference_model_path,
        "--dataset",
        job.dataset,
    ]
    told = run_as_script(monkeypatch, capsys, *paths, "--output-dir", job.output_dir, "--retry-errors")
    assert told == "error: every row has an error; the first one: RuntimeError: x"


def test_an_output_that_is_not_complete_fails(cluster, job, monkeypatch, capsys):
    def run(*_, **__):
        raise farm.ReconcileError("1 missing")

    monkeypatch.setattr(farm, "run", run)
    paths = [
        "--model-path",
        job.model_path,
        "--reference-model-path",
        job.reference_model_path,
        "--dataset",
        job.dataset,
    ]
    assert run_as_script(monkeypatch, capsys, *paths, "--output-dir", job.output_dir) == "error: 1 missing"


def test_the_label_table_counts_pairs_over_all_shards(tmp_path):
    def row(key: int, labels: dict[tuple[int, int], int] | None) -> dict:
        pairs = (
            None
            if labels is None
            else [{"high": h, "low": lo, "label": k, "high_text": "t"} for (h, lo), k in labels.items()]
        )
        return {"prompt_id": f"{key:016x}", "pairs": pairs, "error": None if labels else "bad"}

    shards = [
        [row(0, {(4, 3): 0, (3, 2): 3}), row(1, {(4, 3): 1, (3, 2): 3})],
        [row(2, {(4, 3): 0, (3, 2): 1})],
        [row(3, None)],
    ]
    for index, rows in enumerate(shards):
        storage.write_shard(storage.to_table(rows, LABELS), tmp_path / "data" / f"part-{index}.parquet")
    console = Console(record=True, width=150)
    console.print(label_table(str(tmp_path), 256))
    table = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.export_text().splitlines()
        if "│" in line
    ]
    assert table == [
        ["4,3", "2   67%", "1   33%", "0    0%", "0    0%"],
        ["3,2", "0    0%", "1   33%", "0    0%", "2   67%"],
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precisions": "4"}, "two members at least"),
        ({"precisions": "3,4"}, "distinct and descending"),
        ({"precisions": "8,4"}, "holds 4, 3, 2, not 8"),
        ({"precisions": "4,x"}, "--precisions 4,x"),
        ({"model_path": "no/such-folder/here"}, "no such folder"),
        ({"max_new_tokens": 2}, "max_new_tokens 2"),
        ({"max_new_tokens": 768}, "--max-new-tokens"),
        ({"size": 0}, "--size 0"),
        ({"dataset": "nothing.txt"}, "--dataset nothing.txt"),
        ({"num_workers": -1}, "num_workers -1"),
    ],
)
def test_bad_input_is_refused_before_any_work(cluster, job, change, told):
    with pytest.raises(ValueError, match=told):
        main(dataclasses.replace(job, **change), Console(quiet=True))
    assert not Path(job.output_dir, "labels", "data").exists()


def test_two_models_with_different_tokenizers_are_refused(cluster, job, tmp_path):
    other = write_dense(tmp_path / "dense")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<pad>"', '"<other>"'))
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<other>"}))
    with pytest.raises(ValueError, match="different tokenizers"):
        main(dataclasses.replace(job, reference_model_path=str(other)), Console(quiet=True))


def test_a_checkpoint_that_can_not_be_loaded_stops_the_run_with_its_words(cluster, job, tmp_path):
    broken = write_dense(tmp_path / "dense")
    tensors = load_file(broken / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone}, broken / "model.safetensors"
    )
    with pytest.raises(ValueError, match=rf"{re.escape(gone)} is missing"):
        main(dataclasses.replace(job, reference_model_path=str(broken)), Console(quiet=True))


def test_a_submitted_job_does_not_write_into_the_copy_that_ray_deletes(tmp_path, monkeypatch):
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(copy)
    assert output_folder("results/label") == f"{tmp_path}/home/results/label"
    assert output_folder("s3://bucket/x") == "s3://bucket/x"
    assert output_folder("/shared/x") == "/shared/x"
    monkeypatch.chdir(tmp_path)
    assert output_folder("results/label") == f"{tmp_path}/results/label"


# ------------------------------------------------------------------------------------------------------------


def test_quality_of_the_demo_falls_with_its_precision():
    """On a part of the held-out text; the whole is in the README."""
    perplexity = {}
    for path in (demo.DENSE, demo.ANYPREC):
        model = PMPDForCausalLM(path).eval()
        stream = token_stream(model.tokenizer, documents_of("held_out")[:20])[:2048]
        for bits in model.precisions:
            shared_state(model.model).set_uniform(bits)
            perplexity[bits] = stream_loss(model.model, stream, 512)
    assert sorted(perplexity, key=perplexity.__getitem__) == [16, 4, 3, 2]


@pytest.mark.slow
def test_labels_of_the_demo_use_three_classes_at_least(cluster, tmp_path):
    main(LabelJob(size=64, output_dir=str(tmp_path)), Console(quiet=True))
    counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    rows = [row["pairs"] for row in storage.read_table(tmp_path / "labels", ["pairs"]).to_pylist()]
    labeled = [pairs for pairs in rows if pairs is not None]
    assert len(labeled) >= 0.9 * len(rows), "few references of the demo are without a word"
    for pairs in labeled:
        for pair in pairs:
            counts[pair["high"], pair["low"]][pair["label"]] += 1
    assert set(counts) == {(4, 3), (3, 2)}
    for pair, classes in counts.items():
        assert sum(count >= 0.05 * classes.total() for count in classes.values()) >= 3, (pair, classes)


SMALL = ["--size", "4", "--max-new-tokens", "8", "--batch-size", "4"]


@pytest.mark.slow
def test_alone_it_starts_a_ray_of_its_own(tmp_path):
    with environment() as env:
        command = [sys.executable, "jobs/label.py", *SMALL, "--output-dir", str(tmp_path / "out")]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "labels: rows per switch class" in done.stdout
    assert len(labels_of(tmp_path / "out")) == 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 2])
def test_as_a_submitted_job_on_a_small_head(cpus, tmp_path):
    """The working directory is all that travels; one CPU must be enough, and a failing script must fail the
    submission."""
    port, dashboard = free_port(), free_port()
    with environment() as env:
        env = {key: value for key, value in env.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        ports = [
            f"--{name}-port={free_port()}"
            for name in ("dashboard-agent-listen", "dashboard-agent-grpc", "ray-client-server")
        ]
        start = [
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            *ports,
            f"--num-cpus={cpus}",
            "--temp-dir",
            f"/tmp/ray-{os.getpid()}-{cpus}",
        ]
        scripts = Path(sys.executable).parent
        env["PATH"] = f"{scripts}{os.pathsep}{env['PATH']}"  # as where its environment is active
        command = [
            scripts / "ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            *start,
        ]
        with open(tmp_path / "head.log", "w") as log:
            head = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            submit = [
                scripts / "ray",
                "job",
                "submit",
                "--address",
                f"http://127.0.0.1:{dashboard}",
                "--working-dir",
                ".",
                "--",
            ]
            job = ["python", "jobs/label.py", *SMALL, "--output-dir", str(tmp_path / "out")]
            deadline = time.monotonic() + 120
            while True:
                done = subprocess.run(
                    [*submit, *job],
                    cwd=ROOT,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=300,
                    check=False,
                )
                not_yet = ("Failed to connect", "No available agent")  # the head is still starting
                if (
                    not any(text in done.stdout + done.stderr for text in not_yet)
                    or time.monotonic() > deadline
                ):
                    break
                time.sleep(1)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "succeeded" in done.stdout
            assert "rows per switch class" in done.stdout
            assert len(labels_of(tmp_path / "out")) == 4
            if cpus == 1:
                failing = [*submit, "python", "jobs/label.py", "--precisions", "9,8"]
                failed = subprocess.run(
                    failing, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
                )
                assert failed.returncode == 1
                assert "holds 4, 3, 2, not 9, 8" in failed.stdout
        finally:
            head.terminate()
            head.wait(timeout=60)


def test_environment_of_these_tests_reaches_no_other_ray():
    assert ENVIRONMENT["RAY_ADDRESS"] == "local"


def test_a_run_whose_references_can_not_be_scored_says_so_at_its_end(job):
    """Random weights write symbols, which ROUGE-L can't compare: labels of such texts say little."""
    console = Console(record=True, width=200)
    with contextlib.suppress(UserError):  # every row may be one of those
        main(dataclasses.replace(job, rule="rouge_l", num_workers=0, size=9), console)
    errors = storage.read_table(storage.join(job.output_dir, "labels"), ["error"])["error"].to_pylist()
    unscored = sum("nothing to score" in (error or "") for error in errors)
    assert unscored > len(errors) / 10, "this model's references can be scored: the test shows nothing"
    assert f"{unscored} of {len(errors)} references have nothing to score" in console.export_text()


@pytest.mark.parametrize(
    ("unscored", "told"),
    [(0, ""), (1, "expected of a few"), (2, "say little"), (10, "say little")],
)
def test_references_with_nothing_to_score_are_expected_up_to_a_tenth(tmp_path, unscored, told):
    rows = [{"prompt_id": f"{i:016x}", "error": None} for i in range(10)]
    for row in rows[:unscored]:
        row["error"] = "NothingToScoreError: nothing to score: the reference has no word"
    rows[-1]["error"] = rows[-1]["error"] or "ValueError: another fault is not counted"
    storage.write_shard(
        storage.to_table(rows, LABELS), storage.join(storage.data_folder(tmp_path), "a.parquet")
    )
    console = Console(record=True, width=200)
    assert tell_unscored(str(tmp_path), console) == unscored
    printed = console.export_text()
    assert (f"{unscored} of 10 references have nothing to score" in printed) == bool(told)
    assert told in printed
    assert bool(printed) == bool(told)
