"""pmpd train on a local Ray: what it writes, what it refuses, and that a killed worker or driver costs
only an epoch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from ray import tune

import pmpd.training.fit
from pmpd import farm, storage
from pmpd.cli.flags.train import TrainJob
from pmpd.cli.train import main
from pmpd.farm import train
from pmpd.farm.train import FEATURE_COLUMNS, Fleet, LabelSource, RaggedCollate, fit, read_labels, search
from pmpd.schedulers.artefact import load_artefact
from pmpd.schedulers.kv_cache import KVCacheScheduler
from pmpd.training.config import TrainConfig
from pmpd.training.data import features_from_table
from pmpd.training.fit import DivergedError, TrainState
from tests import ray_sessions

from .test_training import DIM, made_up

ROOT = Path(__file__).parents[1]
HEADS = 2
CONFIG = TrainConfig(num_train_epochs=3, learning_rate=0.01, batch_size=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A labels dataset of three shards with one error row."""
    folder = str(tmp_path_factory.mktemp("labels"))
    labels, features = made_up(120)
    parts = [tensor.split(features.lengths.tolist()) for tensor in (features.keys, features.values)]
    rows = [
        {
            "prompt_id": key,
            "pairs": [
                {"high": h, "low": low, "label": int(k)}
                for (h, low), k in zip(labels.pairs, labels.labels[i], strict=True)
            ],
            "keys": parts[0][i].numpy(),
            "values": parts[1][i].numpy(),
        }
        for i, key in enumerate(labels.ids)
    ]
    rows.append({"prompt_id": "f" * 16, "error": "NaN logits"})
    schema = storage.labels_schema(DIM)
    for shard in range(3):
        storage.write_shard(
            storage.to_table(rows[shard::3], schema),
            storage.join(storage.data_folder(folder), f"{shard}.parquet"),
        )
    models = {"model": "m1", "num_key_value_heads": HEADS}
    storage.write_manifest(folder, schema, {}, table="labels", complete=True, models=models)
    return folder


@pytest.fixture(scope="module")
def local_ray():
    with ray_sessions.local_ray(2):
        yield


def test_collate_keeps_the_ragged_rows_exactly(dataset):
    labels, features = made_up(120)
    wanted = labels.ids[1::2]
    batch = RaggedCollate(wanted)(storage.read_table(dataset, FEATURE_COLUMNS))
    rows = {f"{bits & (2**64 - 1):016x}": i for i, bits in enumerate(batch["ids"].tolist())}
    assert set(rows) == set(wanted), "the error row or another worker's rows slipped in, or rows were lost"
    ends, own = torch.cumsum(batch["lengths"], 0), torch.cumsum(features.lengths, 0)
    for i, key in enumerate(labels.ids):
        if key in rows:
            row, length = rows[key], features.lengths[i]
            assert batch["lengths"][row] == length
            assert torch.equal(
                batch["keys"][ends[row] - length : ends[row]], features.keys[own[i] - length : own[i]]
            )


@pytest.mark.parametrize(
    ("fleet", "resources", "reason"),
    [
        (Fleet(1), {"CPU": 1}, "needs 2 CPUs.*has 1; start Ray with --num-cpus=2"),
        (Fleet(4), {"CPU": 4}, "needs 5 CPUs.*has 4; use --num-workers 3"),
        (Fleet(2, gpus_per_worker=1), {"CPU": 8, "GPU": 1}, "needs 2 GPUs.*has 1; use --gpus-per-worker 0"),
        (Fleet(0), {"CPU": 8}, "at least one worker"),
        (Fleet(1, gpus_per_worker=-1), {"CPU": 8}, "--gpus-per-worker -1: 0, a fraction"),
        (Fleet(1, gpus_per_worker=1.5), {"CPU": 8, "GPU": 8}, "--gpus-per-worker 1.5: 0, a fraction"),
        (Fleet(1, gpus_per_worker=float("nan")), {"CPU": 8}, "--gpus-per-worker nan"),
    ],
)
def test_a_cluster_too_small_is_refused_with_the_cure(fleet, resources, reason):
    with pytest.raises(ValueError, match=reason):
        fleet.check_resources(resources)
    Fleet(1).check_resources({"CPU": 2})


def test_a_labels_folder_without_kv_heads_asks_for_them(dataset, tmp_path):
    assert LabelSource.open(dataset) == LabelSource(dataset, "m1", HEADS)
    shutil.copytree(storage.data_folder(dataset), tmp_path / "data")
    with pytest.raises(ValueError, match="--num-heads"):
        LabelSource.open(str(tmp_path))
    assert LabelSource.open(str(tmp_path), 3) == LabelSource(str(tmp_path), None, 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_path": "nothing"}, r"--data-path .*nothing: no labels there; .*pmpd label"),
        ({"precisions": "4,x"}, r"--precisions 4,x: bit widths"),
        ({"precisions": "3,4"}, r"precisions \[3, 4\]: a precision chain is distinct and descending"),
        ({"precisions": "4,2"}, "no label of the pair 4-2, these are of 4-3, 3-2"),
        ({"features": "none"}, "--features: no effect with --scheduler kv_cache, which auto stands for"),
        ({"scheduler": "kv_cache", "watch": False}, "--no-watch: no effect with --scheduler kv_cache; leave"),
        ({"model_path": "m"}, r"--model-path m: no effect unless --data-path is a \.pt file"),
        ({"data_path": "a.pt", "scheduler": "regression"}, "--scheduler regression needs labels of"),
        ({"scheduler": "regression"}, "these labels do not say what each plan loses"),
        ({"tune": -1}, "--tune -1"),
        ({"num_heads": 0}, "--num-heads 0: how many KV heads"),
        ({"data_path": "here,"}, "--data-path 'here,': a name is empty"),
        (
            {"training": TrainConfig(split_shares=(0.999, 0.001, 0.0))},
            "pair 4-3: .*leave the validation split empty",
        ),
    ],
    ids=str,
)
def test_what_the_user_can_cure_is_told_before_ray_starts(dataset, tmp_path, monkeypatch, changes, reason):
    monkeypatch.setattr(farm, "connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=reason):
        main(replace(TrainJob(dataset, str(tmp_path)), **changes))


def test_the_flags_have_the_seed_s_names():
    flags = (
        "--num-train-epochs 7 --learning-rate 0.5 --weight-decay 0.25 --gradient-accumulation-steps 3 "
        "--precisions 4,3"
    )
    job = tyro.cli(
        TrainJob, args=f"{flags} --data-path here --output-dir there --split-shares 0.6 0.2 0.2".split()
    )
    assert job == TrainJob(
        "here",
        "there",
        precisions="4,3",
        training=TrainConfig(
            num_train_epochs=7,
            learning_rate=0.5,
            weight_decay=0.25,
            gradient_accumulation_steps=3,
            split_shares=(0.6, 0.2, 0.2),
        ),
    )


def test_a_submitted_job_reads_and_writes_below_home(dataset, tmp_path, monkeypatch):
    """Ray deletes the copy of the working directory that a submitted job runs in."""
    deleted, home = tmp_path / "runtime_resources" / "working_dir_files" / "package", tmp_path / "home"
    deleted.mkdir(parents=True)
    shutil.copytree(dataset, home / "in")
    monkeypatch.chdir(deleted)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(farm, "connect", lambda: None)
    monkeypatch.setattr(Fleet, "check", lambda fleet: None)
    given = []

    def fit_alone(data_path, labels, num_heads, config, fleet, output_dir):
        given.append((data_path, output_dir))
        return pmpd.training.fit.train(
            labels, features_from_table(storage.read_table(data_path)), num_heads, config
        )

    monkeypatch.setattr("pmpd.cli.train.fit", fit_alone)
    main(TrainJob("in", "out", training=replace(CONFIG, num_train_epochs=1)))
    assert given == [(str(home / "in"), str(home / "out"))]
    assert (home / "out" / "scheduler" / "config.json").exists()
    assert not any(deleted.iterdir())


def test_an_artefact_is_replaced_as_a_whole(dataset, tmp_path, monkeypatch):
    """Interrupted while it writes over an earlier artefact, the folder is an unfinished one, not weights of
    two trainings."""
    monkeypatch.setattr(farm, "connect", lambda: None)
    monkeypatch.setattr(Fleet, "check", lambda fleet: None)
    monkeypatch.setattr(
        "pmpd.cli.train.fit", lambda data_path, labels, num_heads, config, fleet, output_dir: trained(config)
    )
    job = TrainJob(dataset, str(tmp_path), training=replace(CONFIG, num_train_epochs=1))
    main(job)
    (tmp_path / "scheduler" / "tune.json").write_text("[]")
    write, written = storage.write_bytes, []

    def stop_after_one(path, content):
        if written:
            raise OSError("disk full")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(storage, "write_bytes", stop_after_one)
    with pytest.raises(OSError, match="disk full"):
        main(replace(job, training=replace(job.training, seed=1)))
    left = {path.name for path in (tmp_path / "scheduler").iterdir()}
    assert "classifier_4_3.safetensors" in left
    assert not left & {"config.json", "tune.json"}


def trained(config: TrainConfig) -> TrainState:
    labels, features = made_up(120)
    return pmpd.training.fit.train(labels, features, HEADS, config)


def test_a_checkpoint_of_a_worker_with_a_gpu_is_read_without_one(monkeypatch):
    monkeypatch.setattr(torch.serialization, "_package_registry", list(torch.serialization._package_registry))
    torch.serialization.register_package(
        1, lambda storage: "cuda:0", lambda storage, place: None
    )  # all that is saved says so
    content = io.BytesIO()
    torch.save(TrainState(logits={"kv_cache/4-3": torch.ones(2, 4)}).to_plain(), content)
    with pytest.raises(RuntimeError, match="is_available"):
        torch.load(io.BytesIO(content.getvalue()), weights_only=True)
    assert train._state(content.getvalue()).logits["kv_cache/4-3"].device.type == "cpu"


def test_the_job_writes_an_artefact_that_schedules_and_a_second_run_returns_it(dataset, tmp_path, local_ray):
    job = TrainJob(dataset, str(tmp_path), precisions="4,3,2", training=CONFIG)
    started, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
    metrics = main(job)
    took = time.monotonic() - started
    assert signal.getsignal(signal.SIGINT) is handler, "Ray Train's would start a Ray at the next Ctrl-C"
    folder = tmp_path / "scheduler"
    names = {
        "classifier_4_3.safetensors",
        "classifier_3_2.safetensors",
        "config.json",
        "metrics.json",
        "metrics.jsonl",
        "learning_curves.png",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["head"], line["pair"], line["epoch"]) for line in lines] == [
        (head, pair, epoch)
        for pair in ("4-3", "3-2")
        for head in ("kv_cache", "mean_pooled")
        for epoch in (1, 2, 3)
    ]
    scheduler = KVCacheScheduler(
        [4, 3, 2], save_dir=tmp_path, dim=DIM, num_heads=HEADS, model_fingerprint="m1"
    )
    labels, features = made_up(120)
    assert scheduler.describe()["labels_fingerprint"] == labels.fingerprint()
    alone = pmpd.training.fit.train(labels, features, HEADS, CONFIG)
    served = load_artefact(folder, [(4, 3)]).classifiers[0](*features.batch(np.arange(120)))
    torch.testing.assert_close(served, alone.logits["kv_cache/4-3"], rtol=1e-4, atol=1e-5)
    started = time.monotonic()
    assert main(job) == metrics
    assert time.monotonic() - started < took / 3, "a finished training must be returned, not repeated"


@pytest.mark.slow
def test_a_training_that_diverges_ends_with_the_cure(dataset, tmp_path, local_ray):
    with pytest.raises(DivergedError, match=r"pair 4-3, epoch 1: .*lower --learning-rate, it is 1e\+30"):
        main(TrainJob(dataset, str(tmp_path), training=replace(CONFIG, learning_rate=1e30)))
    assert not (tmp_path / "scheduler").exists()


def history(output: Path) -> list[str]:
    """Lines of the one run's growing history."""
    return [line for path in (output / "runs").glob("*.jsonl") for line in path.read_text().splitlines()]


def kill_when(output: Path, lines: int, find_pid) -> threading.Thread:
    """SIGKILL the process that `find_pid()` gives as soon as the run's history has so many lines."""

    def wait() -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            if len(history(output)) >= lines:
                os.kill(find_pid(), signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def train_worker() -> int:
    """Process id of the Ray Train worker among this process's own descendants."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    found = [pid for pid, name in names.items() if "RayTrainWorker" in name and ours(pid)]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.slow
def test_a_killed_worker_resumes_and_ends_as_an_undisturbed_run(dataset, tmp_path, local_ray):
    labels, features = made_up(120)
    config = TrainConfig(num_train_epochs=8, learning_rate=0.01, batch_size=16)
    killer = kill_when(tmp_path, 3, train_worker)
    state = fit(dataset, read_labels(dataset), HEADS, config, Fleet(1), str(tmp_path))
    killer.join()
    alone = pmpd.training.fit.train(labels, features, HEADS, config)
    assert len(history(tmp_path)) == len(alone.history())
    for name, logits in alone.logits.items():
        torch.testing.assert_close(state.logits[name], logits, rtol=1e-3, atol=1e-4)


DRIVER = """
import sys
import ray
from pmpd.farm.train import Fleet, fit, read_labels
from pmpd.training.config import TrainConfig
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
config = TrainConfig(num_train_epochs=8, learning_rate=0.01, batch_size=16)
fit(sys.argv[1], read_labels(sys.argv[1]), 2, config, Fleet(1), sys.argv[2])
"""


@pytest.mark.soak
def test_a_killed_driver_goes_on_where_it_stopped(dataset, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), dataset, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    kill_when(tmp_path, 4, lambda: first.pid).join()
    assert first.wait(60) == -signal.SIGKILL
    done = len(history(tmp_path))
    labels, features = made_up(120)
    total = len(
        pmpd.training.fit.train(
            labels, features, HEADS, TrainConfig(num_train_epochs=8, learning_rate=0.01, batch_size=16)
        ).history()
    )
    assert 4 <= done < total
    first_written = history(tmp_path)[:3]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    lines = history(tmp_path)
    assert len(lines) == total
    assert lines[:3] == first_written, "the epochs before the kill were trained again"


@pytest.mark.soak
def test_tune_searches_and_keeps_the_best_by_validation_loss(dataset, tmp_path, local_ray, monkeypatch):
    monkeypatch.setitem(train.SPACE, "num_train_epochs", tune.randint(1, 4))
    main(TrainJob(dataset, str(tmp_path), tune=3, training=CONFIG))
    trials = json.loads((tmp_path / "scheduler" / "tune.json").read_text())
    losses = [trial["validation_loss"] for trial in trials]
    assert len(trials) == 3
    assert losses == sorted(losses)
    trained = json.loads((tmp_path / "scheduler" / "config.json").read_text())["training"]
    assert trained["learning_rate"] == trials[0]["learning_rate"]
    assert trained["dropout"] == trials[0]["dropout"]
    labels = read_labels(dataset)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "Tuner", lambda *_, **options: pytest.fail("the same search was done again"))
        assert search(dataset, labels, HEADS, CONFIG, 3, str(tmp_path))[1] == trials
    (written,) = (tmp_path / "runs").glob("tune-*.json")
    written.write_text(
        json.dumps({"complete": False, "trials": trials[:2]})
    )  # as a driver leaves it that was killed in the search
    resumed = search(dataset, labels, HEADS, CONFIG, 3, str(tmp_path))[1]
    assert len(resumed) == 3
    assert all(trial in resumed for trial in trials[:2])
    assert len([path for path in written.with_suffix("").glob("_trial*") if path.is_dir()]) == 4, (
        "one trial was left to do"
    )


@pytest.mark.soak
def test_two_workers_of_ray_fit_what_one_process_does(dataset, tmp_path, local_ray):
    config = replace(CONFIG, dropout=0.0)
    state = fit(dataset, read_labels(dataset), HEADS, config, Fleet(2, cpus_per_worker=0.5), str(tmp_path))
    alone = trained(config)
    assert [line["epoch"] for line in state.history()] == [line["epoch"] for line in alone.history()]
    for name, logits in alone.logits.items():
        torch.testing.assert_close(state.logits[name], logits, rtol=1e-3, atol=1e-3)
