"""`jobs/label.py` in its three settings, and what it says about bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from jobs.label import LabelJob, main, output_folder
from pmpd import tables
from pmpd.labeling import LabelConfig, label_prompts, reference_prompts
from pmpd.model import PMPDForCausalLM
from tests.helpers import write_dense
from tests.ray_sessions import ENVIRONMENT, ROOT, environment, local_ray

NEW_TOKENS = 8


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
    )


def labels_of(folder: str | Path) -> dict[str, dict]:
    """Everything that defines a row; not who made it and how long it took."""
    rows = tables.read_table(tables.join(folder, "labels")).to_pylist()
    return {row["prompt_id"]: {key: value for key, value in row.items() if key not in ("seconds", "worker")} for row in rows}


def test_labels_equal_those_of_the_pure_functions_with_another_batch_size(cluster, job):
    console = Console(record=True, width=150)
    result = main(dataclasses.replace(job, num_workers=2), console)
    rows = labels_of(job.output_dir)
    assert (result.rows, result.errors, len(rows)) == (10, 1, 10), "nine texts and one that is empty; a duplicate is one row"

    prompts = [row for row in tables.read_table(tables.join(job.output_dir, "prompts")).to_pylist() if not row["error"]]
    config = LabelConfig((4, 3, 2), NEW_TOKENS, 2)
    references = {row["prompt_id"]: row for row in reference_prompts(PMPDForCausalLM(job.reference_model_path).eval(), prompts, config)}
    model = PMPDForCausalLM(job.model_path, (4, 3, 2), kernel="reference").eval()
    for expected in label_prompts(model, prompts, references, config):
        row = rows[expected["prompt_id"]]
        assert row["reference_ids"] == expected["reference_ids"]
        assert [(pair["label"], pair["high_ids"]) for pair in row["pairs"]] == [(p["label"], p["high_ids"]) for p in expected["pairs"]]
        np.testing.assert_allclose(np.asarray(row["keys"], np.float32), expected["keys"].astype(np.float32), atol=2e-3)

    printed = console.export_text()
    assert "4,3" in printed
    assert "3,2" in printed
    assert "per second" in printed
    assert f"{job.output_dir}/labels/data" in printed
    assert "python jobs/train.py" in printed
    assert tables.main([job.output_dir]) == 0
    manifest = tables.read_manifest(tables.join(job.output_dir, "labels"))
    assert manifest["models"]["num_key_value_heads"] == 2
    assert manifest["config"]["precisions"] == [4, 3, 2]
    assert manifest["device"]

    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        main(dataclasses.replace(job, seed=1), Console(quiet=True))


@pytest.mark.slow
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
    for key, row in labels_of(other.output_dir).items():
        for features in ("keys", "values"):
            first, second = row.pop(features), rows[key].pop(features)
            assert (first is None) == (second is None)
            if first is not None:
                np.testing.assert_allclose(np.asarray(first, np.float32), np.asarray(second, np.float32), atol=2e-3)
        assert row == rows[key]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precisions": "4"}, "two members at least"),
        ({"precisions": "3,4"}, "distinct and descending"),
        ({"precisions": "8,4"}, "holds 4, 3, 2, not 8"),
        ({"precisions": "4,x"}, "--precisions 4,x"),
        ({"model_path": "no/such-folder/here"}, "no such folder"),
        ({"max_new_tokens": 2}, "--max-new-tokens 2"),
        ({"max_new_tokens": 768}, "--max-new-tokens"),
        ({"size": 0}, "--size 0"),
        ({"dataset": "nothing.txt"}, "--dataset nothing.txt"),
        ({"num_workers": 0}, "--num-workers 0"),
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
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, broken / "model.safetensors")
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


# ------------------------------------------------------------------------------------------------------ as commands, on the real demo

SMALL = ["--size", "4", "--max-new-tokens", "8", "--batch-size", "4"]


@pytest.mark.slow
def test_alone_it_starts_a_ray_of_its_own(tmp_path):
    with environment() as env:
        command = [sys.executable, "jobs/label.py", *SMALL, "--output-dir", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "labels: rows per switch class" in done.stdout
    assert len(labels_of(tmp_path / "out")) == 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("cpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_as_a_submitted_job_on_a_small_head(cpus, tmp_path):
    """The working directory is all that travels; one CPU must be enough, and a failing script must fail the submission."""
    port, dashboard = free_port(), free_port()
    with environment() as env:
        env = {key: value for key, value in env.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        ports = [f"--{name}-port={free_port()}" for name in ("dashboard-agent-listen", "dashboard-agent-grpc", "ray-client-server")]
        start = [
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            *ports,
            f"--num-cpus={cpus}",
            "--temp-dir",
            f"/tmp/ray-{os.getpid()}-{cpus}",
        ]
        scripts = Path(sys.executable).parent
        command = [scripts / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", *start]
        with open(tmp_path / "head.log", "w") as log:
            head = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            submit = [scripts / "ray", "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", ".", "--"]
            job = ["python", "jobs/label.py", *SMALL, "--output-dir", str(tmp_path / "out")]
            deadline = time.monotonic() + 120
            while True:
                done = subprocess.run([*submit, *job], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
                not_yet = ("Failed to connect", "No available agent")  # the head is still starting
                if not any(text in done.stdout + done.stderr for text in not_yet) or time.monotonic() > deadline:
                    break
                time.sleep(1)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "succeeded" in done.stdout
            assert "rows per switch class" in done.stdout
            assert len(labels_of(tmp_path / "out")) == 4
            if cpus == 1:
                failing = [*submit, "python", "jobs/label.py", "--precisions", "9,8"]
                failed = subprocess.run(failing, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
                assert failed.returncode == 1
                assert "holds 4, 3, 2, not 8, 9" in failed.stdout
        finally:
            head.terminate()
            head.wait(timeout=60)


def test_environment_of_these_tests_reaches_no_other_ray():
    assert ENVIRONMENT["RAY_ADDRESS"] == "local"
