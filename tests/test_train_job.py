"""jobs/train.py on a local Ray: what it writes, what it refuses, and that a killed worker or driver costs only an epoch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from jobs.train import TrainJob, main
from pmpd import tables, training
from pmpd.classifier import load_artefact
from pmpd.ray_training import FEATURE_COLUMNS, Fleet, LabelSource, RaggedCollate, fit, read_labels
from pmpd.schedulers import KVCacheScheduler
from pmpd.training import TrainConfig

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
            "pairs": [{"high": h, "low": low, "label": int(k)} for (h, low), k in zip(labels.pairs, labels.labels[i], strict=True)],
            "keys": parts[0][i].numpy(),
            "values": parts[1][i].numpy(),
        }
        for i, key in enumerate(labels.ids)
    ]
    rows.append({"prompt_id": "f" * 16, "error": "NaN logits"})
    schema = tables.labels_schema(DIM)
    for shard in range(3):
        tables.write_shard(tables.to_table(rows[shard::3], schema), tables.join(tables.data_folder(folder), f"{shard}.parquet"))
    models = {"model": "m1", "num_key_value_heads": HEADS}
    tables.write_manifest(folder, schema, {}, table="labels", complete=True, models=models)
    return folder


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_collate_keeps_the_ragged_rows_exactly(dataset):
    labels, features = made_up(120)
    wanted = labels.ids[1::2]
    batch = RaggedCollate(wanted)(tables.read_table(dataset, FEATURE_COLUMNS))
    rows = {f"{bits & (2**64 - 1):016x}": i for i, bits in enumerate(batch["ids"].tolist())}
    assert set(rows) == set(wanted), "the error row or another worker's rows slipped in, or rows were lost"
    ends, own = torch.cumsum(batch["lengths"], 0), torch.cumsum(features.lengths, 0)
    for i, key in enumerate(labels.ids):
        if key in rows:
            row, length = rows[key], features.lengths[i]
            assert batch["lengths"][row] == length
            assert torch.equal(batch["keys"][ends[row] - length : ends[row]], features.keys[own[i] - length : own[i]])


@pytest.mark.parametrize(
    ("fleet", "resources", "reason"),
    [
        (Fleet(1), {"CPU": 1}, "needs 2 CPUs.*has 1; start Ray with --num-cpus=2"),
        (Fleet(4), {"CPU": 4}, "needs 5 CPUs.*has 4; use --num-workers 3"),
        (Fleet(2, gpus_per_worker=1), {"CPU": 8, "GPU": 1}, "needs 2 GPUs.*has 1; use --gpus-per-worker 0"),
        (Fleet(0), {"CPU": 8}, "at least one worker"),
    ],
)
def test_a_cluster_too_small_is_refused_with_the_cure(fleet, resources, reason):
    with pytest.raises(ValueError, match=reason):
        fleet.check_resources(resources)
    Fleet(1).check_resources({"CPU": 2})


def test_a_labels_folder_without_kv_heads_asks_for_them(dataset, tmp_path):
    assert LabelSource.open(dataset) == LabelSource(dataset, "m1", HEADS)
    with pytest.raises(ValueError, match="--num-heads"):
        LabelSource.open(str(tmp_path))
    with pytest.raises(ValueError, match="no Parquet"):
        read_labels(LabelSource.open(str(tmp_path), 2).path)


def test_the_job_writes_an_artefact_that_schedules_and_a_second_run_returns_it(dataset, tmp_path, local_ray):
    job = TrainJob(dataset, str(tmp_path), precisions="4,3,2", training=CONFIG)
    started = time.monotonic()
    metrics = main(job)
    took = time.monotonic() - started
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
        (head, pair, epoch) for pair in ("4-3", "3-2") for head in ("kv_cache", "mean_pooled") for epoch in (1, 2, 3)
    ]
    scheduler = KVCacheScheduler([4, 3, 2], save_dir=tmp_path, dim=DIM, num_heads=HEADS, model_fingerprint="m1")
    labels, features = made_up(120)
    assert scheduler.describe()["labels_fingerprint"] == labels.fingerprint()
    alone = training.train(labels, features, HEADS, CONFIG)
    served = load_artefact(folder, [(4, 3)]).classifiers[0](*features.batch(np.arange(120)))
    torch.testing.assert_close(served, alone.logits["kv_cache/4-3"], rtol=1e-4, atol=1e-5)
    started = time.monotonic()
    assert main(job) == metrics
    assert time.monotonic() - started < took / 3, "a finished training must be returned, not repeated"


def kill_when(path: Path, lines: int, find_pid) -> threading.Thread:
    """SIGKILL the process that `find_pid()` gives as soon as `path` has so many lines."""

    def wait() -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            if path.exists() and len(path.read_text().splitlines()) >= lines:
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
    history = tmp_path / "scheduler" / "metrics.jsonl"
    killer = kill_when(history, 3, train_worker)
    state = fit(dataset, read_labels(dataset), HEADS, config, Fleet(1), str(tmp_path))
    killer.join()
    alone = training.train(labels, features, HEADS, config)
    assert len(history.read_text().splitlines()) == len(alone.history())
    for name, logits in alone.logits.items():
        torch.testing.assert_close(state.logits[name], logits, rtol=1e-3, atol=1e-4)


DRIVER = """
import sys
import ray
from pmpd.ray_training import Fleet, fit, read_labels
from pmpd.training import TrainConfig
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
config = TrainConfig(num_train_epochs=8, learning_rate=0.01, batch_size=16)
fit(sys.argv[1], read_labels(sys.argv[1]), 2, config, Fleet(1), sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_stopped(dataset, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), dataset, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    history = tmp_path / "scheduler" / "metrics.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    kill_when(history, 4, lambda: first.pid).join()
    assert first.wait(60) == -signal.SIGKILL
    done = len(history.read_text().splitlines())
    labels, features = made_up(120)
    total = len(training.train(labels, features, HEADS, TrainConfig(num_train_epochs=8, learning_rate=0.01, batch_size=16)).history())
    assert 4 <= done < total
    first_written = history.read_text().splitlines()[:3]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    lines = history.read_text().splitlines()
    assert len(lines) == total
    assert lines[:3] == first_written, "the epochs before the kill were trained again"


@pytest.mark.slow
def test_tune_searches_and_keeps_the_best_by_validation_loss(dataset, tmp_path, local_ray):
    main(TrainJob(dataset, str(tmp_path), tune=3, training=CONFIG))
    trials = json.loads((tmp_path / "scheduler" / "tune.json").read_text())
    losses = [trial["validation_loss"] for trial in trials]
    assert len(trials) == 3
    assert losses == sorted(losses)
    trained = json.loads((tmp_path / "scheduler" / "config.json").read_text())["training"]
    assert trained["learning_rate"] == trials[0]["learning_rate"]
    assert trained["dropout"] == trials[0]["dropout"]
