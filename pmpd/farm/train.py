"""Ray around `pmpd.training`: the Train worker loop, the Tune search, and the check that the cluster is big
enough.

Every worker reads the label Parquet through its Ray Data shard and keeps every `count`-th prompt of the
sorted ids (not whichever rows a streaming split happens to hand it), so that a run with the same settings
sees the same rows on the same worker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.tune.search.optuna import OptunaSearch

from pmpd import plugins, storage
from pmpd.errors import UserError
from pmpd.farm.capacity import autoscaler_present
from pmpd.farm.connection import own_signals
from pmpd.training.config import TrainConfig
from pmpd.training.data import (
    Features,
    Labels,
    check_same_pairs,
    features_from_table,
    join_features,
    labels_from_table,
)
from pmpd.training.fit import DivergedError, TrainState, Workers, train

if TYPE_CHECKING:
    from torch import Tensor

FEATURE_COLUMNS = ["prompt_id", "pairs", "keys", "values", "error"]
LABEL_COLUMNS = ["prompt_id", "pairs", "error"]
MAX_WORKER_FAILURES = 3


@dataclass(frozen=True)
class Fleet:
    """The Ray Train workers."""

    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0

    def check(self) -> None:
        """ValueError, with the cure, where the connected cluster can't run it and has nothing that adds
        nodes."""
        if not autoscaler_present():
            self.check_resources(ray.cluster_resources())

    def check_resources(self, resources: Mapping[str, float]) -> None:
        """ValueError, with the cure, where a cluster of these `resources` can't run it (Ray would wait for
        ever).

        Ray Train needs the workers' CPUs and one more, on which Ray Data reads.
        """
        if self.num_workers < 1 or self.cpus_per_worker < 1:
            raise UserError(
                f"--num-workers {self.num_workers}, {self.cpus_per_worker} CPUs each: at least one worker "
                f"with one CPU"
            )
        if not self.gpus_per_worker >= 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise UserError(
                f"--gpus-per-worker {self.gpus_per_worker}: 0, a fraction like 0.5, or a whole number"
            )
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        need_cpus, need_gpus = (
            self.num_workers * self.cpus_per_worker + 1,
            self.num_workers * self.gpus_per_worker,
        )
        if cpus < need_cpus:
            most = int((cpus - 1) // self.cpus_per_worker)
            cure = (
                f"use --num-workers {most}, or add a node"
                if most >= 1
                else "start Ray with --num-cpus=2 or more, or add a node"
            )
            raise UserError(
                f"--num-workers {self.num_workers} needs {need_cpus:g} CPUs (workers + 1 to read), the "
                f"cluster has {cpus:g}; {cure}"
            )
        if gpus < need_gpus:
            raise UserError(
                f"--num-workers {self.num_workers} with --gpus-per-worker {self.gpus_per_worker:g} needs "
                f"{need_gpus:g} GPUs, "
                f"the cluster has {gpus:g}; use --gpus-per-worker 0 to train on CPUs, or add a node"
            )


@dataclass(frozen=True)
class LabelSource:
    """A labels dataset and what its manifest knows of the labelled model."""

    path: str
    model_fingerprint: str | None
    num_heads: int
    """KV heads of the labelled model."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of the run that made the labels: where its models were, for one."""

    @classmethod
    def open(cls, path: str, num_heads: int | None = None) -> LabelSource:
        """`path`: the dataset, or a folder with `labels/` in it. `num_heads` overrides the manifest's.

        ValueError, with the cure, where there are no labels or it is not known how many kv heads the labelled
        model has.
        """
        nested = storage.join(path, "labels")
        path = path if storage.exists(storage.data_folder(path)) or not storage.exists(nested) else nested
        if not storage.list_shards(path):
            raise UserError(
                f"--data-path {path}: no labels there; make them with `pmpd label`, or give the "
                f"--output-dir it was given"
            )
        manifest = storage.read_manifest(path) or {}
        models = manifest.get("models", {})
        heads = num_heads or models.get("num_key_value_heads")
        if heads is None:
            raise UserError(
                f"--data-path {path}: its manifest.json does not say how many kv heads the labelled model "
                f"has; pass --num-heads"
            )
        return cls(path, models.get("model"), int(heads), manifest.get("run", {}))


def read_labels(*data_paths: str, pairs: Sequence[tuple[int, int]] | None = None) -> Labels:
    """Ids and labels of labels datasets, of one precision chain; small, whatever the size of the features."""
    tables = {path: storage.read_table(path, LABEL_COLUMNS) for path in data_paths}
    if len(tables) > 1:
        check_same_pairs(tables)
    return labels_from_table(pa.concat_tables([tables[path] for path in data_paths]), pairs)


class RaggedCollate(ArrowBatchCollateFn):
    """Arrow batch → tensors of the ragged rows whose id is in `ids`, end to end."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = pa.array(ids, pa.string())

    def __call__(self, batch: pa.Table) -> dict[str, Tensor]:  # type: ignore[override]  # Ray's result type is a bare type variable
        """{ids int64 [rows] (the 16 hex digits' bits), lengths int64 [rows], keys and values float16 [sum T,
        D]}."""
        features = features_from_table(batch.filter(pc.is_in(batch["prompt_id"], self.ids)))
        bits = np.asarray([int(key, 16) for key in features.ids], dtype=np.uint64).view(np.int64)
        return {
            "ids": torch.from_numpy(bits),
            "lengths": features.lengths,
            "keys": features.keys,
            "values": features.values,
        }


def _features_of(batch: Mapping[str, Tensor]) -> Features:
    ids = tuple(f"{bits:016x}" for bits in batch["ids"].numpy().view(np.uint64).tolist())
    return Features(ids, batch["keys"], batch["values"], batch["lengths"])


def _all_reduce(device: torch.device) -> Any:
    def add(tensor: Tensor) -> None:
        moved = tensor.to(device)
        torch.distributed.all_reduce(moved)
        tensor.copy_(moved)

    return add


def _worker(loop: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    plugins.load(loop["plugins"])
    storage.connect(loop["connections"])
    context = ray.train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    labels: Labels = loop["labels"]
    device = ray.train.torch.get_device()
    shard = ray.train.get_dataset_shard("labels")
    batches = shard.iter_torch_batches(
        batch_size=64, collate_fn=RaggedCollate(labels.ids[rank::count]), device="cpu"
    )
    features = join_features([_features_of(batch) for batch in batches])
    state = None
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = _state((Path(folder) / "state.pt").read_bytes())

    def report(state: TrainState, line: dict[str, Any]) -> None:
        if rank != 0:
            ray.train.report(line)
            return
        write_history(loop["history_path"], state)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state.to_plain(), Path(folder) / "state.pt")
            ray.train.report(line, checkpoint=ray.train.Checkpoint.from_directory(folder))

    workers = Workers(rank, count, _all_reduce(device)) if count > 1 else Workers()
    state = state or TrainState()
    try:
        train(
            labels,
            features,
            loop["num_heads"],
            loop["config"],
            state=state,
            on_epoch=report,
            workers=workers,
            device=device,
        )
    except DivergedError as error:  # told as a result: an exception would be tried again, to the same end
        report(state, {"diverged": str(error)})
    else:
        report(state, {"done": True})


def _state(content: bytes) -> TrainState:
    """What a checkpoint holds, on the CPU wherever it was written."""
    return TrainState.from_plain(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def _name(kind: str, *settings: Any) -> str:
    """Name of the run with these settings: the same command finds what an earlier one left."""
    return f"{kind}-" + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def write_history(path: str, state: TrainState) -> None:
    """All epochs so far, one JSON line each; written whole, so a resumed run leaves no line twice."""
    storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in state.history()).encode())


def fit(
    data_path: str, labels: Labels, num_heads: int, config: TrainConfig, fleet: Fleet, output_dir: str
) -> TrainState:
    """Train on the connected cluster. Checkpoints and the growing history (`{run}.jsonl`) go to
    `output_dir`/runs.

    The same settings on the same labels go on where an earlier run stopped (worker or driver killed), or
    return its result. DivergedError where a validation loss is not finite.
    """
    name = _name("train", dataclasses.asdict(config), labels.fingerprint(config.objective), num_heads)
    finished = storage.join(output_dir, "runs", f"{name}.pt")
    content = storage.read_bytes(finished)
    if content is not None:
        return _state(content)
    file_system, _ = storage.resolve(data_path)
    storage.check_tables(storage.list_shards(data_path))  # Ray Data registers types that run code
    shards = [storage.resolve(path)[1] for path in storage.list_shards(data_path)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it tells what it estimates of Parquet files
    context.use_datasource_v2 = (
        False  # one task a file in place of two stages: the read of a small dataset took 8 s instead of 20
    )
    dataset = ray.data.read_parquet(shards, filesystem=file_system).select_columns(FEATURE_COLUMNS)
    output_fs, output = storage.resolve(output_dir)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "labels": labels,
            "num_heads": num_heads,
            "config": config,
            "connections": storage.connections(),
            "plugins": plugins.loaded(),
            "history_path": storage.join(storage.absolute(output_dir), "runs", f"{name}.jsonl"),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=fleet.num_workers,
            use_gpu=fleet.gpus_per_worker > 0,
            resources_per_worker={"CPU": fleet.cpus_per_worker}
            | ({"GPU": fleet.gpus_per_worker} if fleet.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.join(output, "runs"),
            storage_filesystem=output_fs,
            failure_config=ray.train.FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
        datasets={"labels": dataset},
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    # The controller passes on a checkpoint when it looks at the workers; at Ray's 2 s an epoch of a small
    # dataset waits for that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with own_signals():
        result = trainer.fit()
    assert result.checkpoint is not None
    assert result.metrics is not None
    if "diverged" in result.metrics:
        raise DivergedError(result.metrics["diverged"])
    with result.checkpoint.as_directory() as folder:
        content = (Path(folder) / "state.pt").read_bytes()
    storage.write_bytes(finished, content)
    return _state(content)


SPACE = {
    "learning_rate": tune.loguniform(1e-4, 1e-2),
    "num_train_epochs": tune.randint(5, 41),
    "gradient_accumulation_steps": tune.choice([1, 2, 4, 8]),
    "weight_decay": tune.loguniform(1e-4, 0.5),
    "dropout": tune.uniform(0.0, 0.5),
}
"""What `search` tries."""


def _trial(
    space: dict[str, Any],
    data_path: str,
    labels: Labels,
    num_heads: int,
    config: TrainConfig,
    connections: dict[str, tuple[str, str]],
    modules: tuple[str, ...],
) -> None:
    plugins.load(modules)
    storage.connect(connections)
    torch.set_num_threads(1)
    features = join_features([features_from_table(storage.read_table(data_path, FEATURE_COLUMNS))])
    state = train(labels, features, num_heads, dataclasses.replace(config, **space), heads=["kv_cache"])
    tune.report({"validation_loss": float(np.mean([fit.best_loss for fit in state.fits.values()]))})


@dataclass
class _Found(tune.Callback):
    """The trials of a search that have ended, written down one by one: a killed driver loses only those that
    were running.

    Ray's own state of a search does not do: killed while that is written, it goes on with a single trial.
    """

    path: str
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Settings and validation loss of each."""
    complete: bool = False

    @classmethod
    def read(cls, path: str) -> _Found:
        content = storage.read_bytes(path)
        return cls(path) if content is None else cls(path, **json.loads(content))

    def write(self) -> None:
        storage.write_bytes(
            self.path, json.dumps({"complete": self.complete, "trials": self.trials}, indent=1).encode()
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials.append({**trial.config, "validation_loss": trial.last_result["validation_loss"]})
        self.write()


def search(
    data_path: str, labels: Labels, num_heads: int, config: TrainConfig, trials: int, output_dir: str
) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """The best of `trials` settings by validation loss (mean over the pairs), and all of them, best first.

    A plain function trainable: a Ray Train run inside each trial costs many times the training of so small a
    model. The same search on the same labels goes on where an earlier one stopped, or returns its result,
    from `output_dir`/runs.
    """
    name = _name("tune", dataclasses.asdict(config), labels.fingerprint(config.objective), num_heads, trials)
    found = _Found.read(storage.join(output_dir, "runs", f"{name}.json"))
    if not found.complete and len(found.trials) < trials:
        known = [{setting: trial[setting] for setting in SPACE} for trial in found.trials]
        algorithm = OptunaSearch(
            points_to_evaluate=known or None,
            evaluated_rewards=[trial["validation_loss"] for trial in found.trials] or None,
            seed=config.seed + len(known),  # the same numbers again would try the same settings again
        )
        trainable = tune.with_parameters(
            _trial,
            data_path=storage.absolute(data_path),
            labels=labels,
            num_heads=num_heads,
            config=config,
            connections=storage.connections(),
            modules=plugins.loaded(),
        )
        file_system, output = storage.resolve(output_dir)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=SPACE,
            tune_config=tune.TuneConfig(
                metric="validation_loss",
                mode="min",
                num_samples=trials - len(known),
                search_alg=algorithm,
                max_concurrent_trials=4,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=storage.join(output, "runs"),
                storage_filesystem=file_system,
                verbose=0,
                callbacks=[found],
            ),
        )
        with own_signals():
            results = tuner.fit()
        if not found.trials:
            raise UserError(f"--tune {trials}: every trial failed; the first says: {results.errors[0]}")
    found.complete = True
    found.write()
    lines = sorted(found.trials, key=lambda trial: trial["validation_loss"])
    return dataclasses.replace(config, **{setting: lines[0][setting] for setting in SPACE}), lines
