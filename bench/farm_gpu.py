"""Measures the farm on the GPUs (or, with --cpu, the CPUs) of one host: see `bench/farm_gpu.sh`.

Labels with 1, 2, ... workers must be equal row by row, each row once, also where a worker or the driver was
killed on the way. `after_first` is the workers' rates in rows a second, each from its first shard to its
last, added up: without their start and their first unit, which compiles and captures. Efficiency of n
workers: their rows a second over n times those of one, of whole runs (`efficiency`: starts and the wait for
the last unit with it) and of `after_first` (`efficiency_after_first`). Busy percentages and the driver's
share of a core count from the first shard to the last. References are made once, in a step of their own:
every run of labels starts with a copy of them, and with cold workers. The JSON is written anew after every
step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os.path import relpath
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import tyro

from bench import _random_llama, _record
from bench._farm_host import Head, Job, Watch, driver_of, kill, worker_processes
from bench.same_rows import compare_datasets
from pmpd import demo, storage
from pmpd.storage.summary import read_summary

WHERE = ("dataset", "output")
"""Of a step's entry, what names a folder: the JSON has it as seen from `results`, whatever machine it was."""
LEAST_SECONDS = 20.0
"""A step is not begun with less time than that."""

SHAPES = {"1.1b": _random_llama.LLAMA_1B, "8b": _random_llama.LLAMA_8B}

TAKE_HALF = """
import torch, time
half = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device="cuda")
print("taken", flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True)
class FarmBench:
    """The whole farm on the GPUs of one host."""

    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers to label with."""
    nodes: bool = False
    """Label once more on a Ray of one node a worker, each with its own GPU (or CPU)."""
    checkpoint: tuple[str, ...] = (f"demo={demo.ANYPREC}:{demo.DENSE}",)
    """NAME=QUANTIZED:UNQUANTIZED, one or several. Without `:` UNQUANTIZED alone: `pmpd quantize` is the first
    step."""
    random: tuple[str, ...] = ()
    """Llamas of random weights to make, quantize and label: 1.1b, 8b."""
    dataset: str = "demo"
    """Texts to label, as `pmpd label` takes them."""
    size: int = 256
    max_new_tokens: int = 256
    batch_size: str = "auto"
    rules: tuple[str, ...] = ()
    """Rules to label by as well (`pmpd label --rule`), with the most workers."""
    sweep: tuple[int, ...] = ()
    """Batch sizes to label with as well, by the first number of workers."""
    fit: str = "demo"
    """Texts that `pmpd quantize` calibrates on."""
    tuning_steps: int = 12
    """Of `pmpd quantize`."""
    bench_name: str = "demo"
    """Benchmark to answer; mt_bench needs the hub or `question_file`."""
    question_file: str | None = None
    dtype: str = "auto"
    kernel: str | None = None
    cpu: bool = False
    """No GPU: do the steps work?"""
    only: tuple[str, ...] = ()
    """Steps to do, by a word of their name; default all. The first count of workers always labels, unless its
    rows are in `results` already."""
    peer_batches: tuple[int, ...] = (64, 256)
    """Of transformers' own generation."""
    peer_prompts: int = 512
    """So many of the prompts at most are given to it."""
    step_seconds: float = 300.0
    """No step may take longer; quantizing twice as long."""
    seconds: float = float("inf")
    """All may take; a step that is under way then is given up, those after it are left out."""
    ray_number: int = 0
    """0 to 3: another one for each of several of these scripts that run at the same time."""
    name: str | None = None
    """Of the JSON file; default: farm_cuda or farm_cpu."""
    out: Path = _record.RESULTS
    results: Path = Path("results/farm_gpu")
    """Where the runs' own output goes: a fresh folder, or one of a call with other steps and the same
    settings."""

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"


@dataclass
class Steps:
    """What the steps found; a step that fails is a line of it."""

    config: FarmBench
    found: list[dict[str, Any]] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    @property
    def left_of_all(self) -> float:
        return max(0.0, self.begin + self.config.seconds - time.monotonic())

    @property
    def left(self) -> float:
        """Seconds that a step may take."""
        return min(self.config.step_seconds, self.left_of_all)

    def run(self, name: str, step: Callable[[], dict[str, Any]], always: bool = False) -> dict[str, Any]:
        only = self.config.only
        if only and not always and not any(word in name for word in only):
            return {"failed": "left out"}
        if self.left < LEAST_SECONDS:
            self.found.append({"step": name, "failed": "left out: no time"})
            return self.found[-1]
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        try:
            result = step()
        except Exception as error:  # the other steps are worth their time on the machine
            result = {"failed": f"{type(error).__name__}: {error}"[-1500:]}
        entry = {"step": name, "step_seconds": round(time.monotonic() - begin, 2), **result}
        self.found.append(entry)
        print(entry, flush=True)
        self.write()
        return entry

    def write(self) -> Path:
        config = self.config
        found = [
            entry | {name: relpath(entry[name], config.results) for name in WHERE if name in entry}
            for entry in self.found
        ]
        return _record.write(config.name or f"farm_{config.device}", found, config.device, config.out)


@dataclass
class Farm:
    """One checkpoint's steps on one Ray."""

    head: Head
    config: FarmBench
    steps: Steps
    name: str
    quantized: str = ""
    unquantized: str = ""
    alone: dict[str, Any] = field(default_factory=dict)
    """The run with the first number of workers, which all others are compared with."""

    @property
    def most(self) -> int:
        return max(self.config.workers)

    def folder(self, what: str) -> Path:
        return (self.config.results / f"{what}-{self.name}").absolute()

    def all(self) -> None:
        config, run = self.config, self.steps.run
        if not self.quantized:
            run(f"quantize {self.name}", self.quantize, always=True)
            if not self.quantized:
                return
        run(f"references {self.name}", self.references, always=True)
        for count in config.workers:
            entry = run(
                f"label {self.name} with {count}",
                lambda count=count: self.label(f"label-{count}", count),
                always=not self.alone,
            )
            self.alone = self.alone or entry
            self.compare(entry, count)
        self.compare(run(f"label {self.name}, a worker killed", self.worker_killed), self.most)
        self.compare(run(f"label {self.name}, the driver killed", self.driver_killed), self.most)
        self.compare(run(f"label {self.name}, a CUDA error", self.cuda_error), self.most)
        if not config.cpu:
            self.compare(
                run(f"label {self.name}, two workers on a GPU", lambda: self.label("shared", 2, share=0.5)), 1
            )
            self.compare(run(f"label {self.name}, half of the memory taken", self.half_taken), 1)
        run(f"train {self.name}", self.train)
        run(f"generate {self.name}", self.generate)
        run(f"transformers {self.name}", self.transformers)
        for size in config.sweep:
            entry = run(
                f"label {self.name} in batches of {size}",
                lambda size=size: self.label(f"batch-{size}", config.workers[0], batch_size=str(size)),
            )
            self.compare(entry, config.workers[0])
        for rule in config.rules:
            run(f"label {self.name} by {rule}", lambda rule=rule: self.label(rule, self.most, rule=rule))

    def flags(self, workers: int, share: float | None = None) -> list[str]:
        gpus = [] if self.config.cpu else ["--gpus-per-worker", str(share or 1)]
        kernel = ["--kernel", self.config.kernel] if self.config.kernel else []
        return ["--num-workers", str(workers), *gpus, *kernel, "--dtype", self.config.dtype]

    def label_arguments(self, output: Path, batch_size: str | None = None) -> list[str]:
        config = self.config
        return [
            *("label", "--model-path", self.quantized, "--reference-model-path", self.unquantized),
            *("--dataset", config.dataset, "--size", str(config.size)),
            *("--max-new-tokens", str(config.max_new_tokens)),
            *("--batch-size", batch_size or config.batch_size, "--output-dir", str(output)),
        ]

    def small_units(self) -> str:
        """A batch size of which every worker gets several units, so that there is a mid-run to kill in."""
        return str(max(1, self.config.size // (4 * self.most)))

    def label(
        self,
        what: str,
        workers: int,
        share: float | None = None,
        batch_size: str | None = None,
        at_first_shard: Callable[[Path], Any] = lambda output: None,
        module: tuple[str, ...] = ("pmpd",),
        may_fail: bool = False,
        rule: str | None = None,
    ) -> dict[str, Any]:
        output = self.folder(what)
        if is_done(output, "labels"):
            return measured(output)
        self.share_references(output)
        arguments = [*self.label_arguments(output, batch_size), *self.flags(workers, share)]
        arguments += ["--rule", rule] if rule else []
        watch, begin = Watch(output), time.time()
        with watch.beside(lambda: at_first_shard(output)):
            job = self.head.job(*arguments, timeout=self.steps.left, module=module)
        if job.code and may_fail:
            return {"exit": job.code, "output": job.output[-300:]}
        ended(job)
        result = measured(output)
        busy = watch.busy_percent(result["last_shard"])
        return {
            **result,
            "seconds_to_first_shard": round(result["first_shard"] - begin, 1),
            "driver_share_of_a_core": watch.driver_share,
            "busy_percent": busy,
        }

    def references(self) -> dict[str, Any]:
        """Once, so that every run of labels starts alike: with a copy of them, and workers that are cold."""
        output = self.folder("references")
        if not is_done(output, "references"):
            arguments = [*self.label_arguments(output), *self.flags(self.most), "--stage", "references"]
            ended(self.head.job(*arguments, timeout=self.steps.left))
        run = last_run(output / "references")
        return {
            "rows": run["rows"],
            "rows_per_second": round(run["rows"] / run["wall_seconds"], 3),
            "tokens_per_second": round(run["tokens"] / run["wall_seconds"], 1),
        }

    def share_references(self, output: Path) -> None:
        if not output.exists():
            for part in ("prompts", "references"):
                shutil.copytree(self.folder("references") / part, output / part)

    def compare(self, entry: dict[str, Any], workers: int) -> None:
        """Efficiency against the run alone, and how many rows differ from its rows."""
        alone = self.alone
        if entry is alone or "failed" in entry or "failed" in alone:
            return
        for rate, efficiency in (
            ("rows_per_second", "efficiency"),
            ("after_first", "efficiency_after_first"),
        ):
            if entry[rate] and alone[rate]:
                of_one = alone[rate] / self.config.workers[0]
                entry[efficiency] = round(entry[rate] / (workers * of_one), 3)
        count, problems = compare_datasets(Path(alone["dataset"]) / "data", Path(entry["dataset"]) / "data")
        entry["rows_that_differ"] = f"{len(problems)} of {count}"
        columns = Counter(column for problem in problems for column in problem.partition(": ")[2].split(", "))
        entry["columns_that_differ"] = dict(columns.most_common())
        if not entry["once"]:
            entry["failed"] = "some rows are there twice"

    def worker_killed(self) -> dict[str, Any]:
        killed: list[int] = []

        def first_shard(output: Path) -> None:
            killed.extend(worker_processes(self.head)[:1])
            for process in killed:
                kill(process)

        result = self.label("killed", self.most, batch_size=self.small_units(), at_first_shard=first_shard)
        if not killed:
            raise RuntimeError("no worker was killed: the run ended before")
        return {**result, "killed": killed, "batch_size": self.small_units()}

    def driver_killed(self) -> dict[str, Any]:
        """The driver is killed, and the same command goes on as soon as its lease is over."""
        killed: list[int] = []

        def first_shard(output: Path) -> None:
            driver = driver_of(output)
            if driver is not None and not killed:
                killed.append(driver.pid)
                kill(driver.pid)

        size = self.small_units()
        first = self.label("driver", self.most, batch_size=size, at_first_shard=first_shard, may_fail=True)
        if "exit" not in first:
            raise RuntimeError("the driver was not killed: the run ended before")
        before = len(storage.read_table(str(self.folder("driver") / "labels"), ["prompt_id"]))
        begin = time.monotonic()
        while True:
            again = self.label("driver", self.most, batch_size=size, may_fail=True)
            if "exit" not in again:
                again["seconds_to_first_shard"] = None  # that one came before this command was given
                return {**again, "killed": killed, "rows_before": before, "batch_size": size}
            if time.monotonic() - begin > 90:
                raise RuntimeError(f"the same command does not go on: {again['output']}")
            time.sleep(5)

    def cuda_error(self) -> dict[str, Any]:
        marker = self.folder("marker")
        size = self.small_units()
        module = ("bench._farm_faults", str(marker))
        result = self.label("fault", self.most, batch_size=size, module=module)
        return {**result, "worker_that_broke": marker.read_text(), "batch_size": size}

    def half_taken(self) -> dict[str, Any]:
        process = subprocess.Popen([sys.executable, "-c", TAKE_HALF], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("no process could take half of the GPU's memory")
            return self.label("half", 1, batch_size="auto")
        finally:
            process.kill()
            process.wait()

    def quantize(self) -> dict[str, Any]:
        output = self.folder("anyprec")
        job = self.head.job(
            *("quantize", "--model-path", self.unquantized, "--output-dir", str(output)),
            *("--dataset", self.config.fit, "--tuning-steps", str(self.config.tuning_steps)),
            *("--gpus-per-worker", "0" if self.config.cpu else "1"),
            timeout=min(2 * self.config.step_seconds, self.steps.left_of_all),
        )
        ended(job)
        self.quantized = str(output)
        summary = json.loads((output / "manifest.json").read_text())
        names = ("perplexity", "peak_bytes", "model_bytes", "stage_seconds")
        told = {name: summary.get(name) for name in names}
        return {"seconds": round(job.seconds, 1), "output": str(output), **told}

    def train(self) -> dict[str, Any]:
        job = self.head.job(
            *("train", "--data-path", self.alone["dataset"], "--num-train-epochs", "3"),
            *("--gpus-per-worker", "0" if self.config.cpu else "1"),
            *("--output-dir", str(self.folder("train"))),
            timeout=self.steps.left,
        )
        ended(job)
        return {"seconds": round(job.seconds, 1), "told": job.output[-600:]}

    def generate(self) -> dict[str, Any]:
        config, output = self.config, self.folder("generate")
        scheduler, schedulers, learned = self.folder("train") / "scheduler", ["fp", "uniform", "static"], []
        if scheduler.exists():
            schedulers, learned = [*schedulers, "kv_cache"], ["--classifier-path", str(scheduler)]
        file = ["--question-file", config.question_file] if config.question_file else []
        job = self.head.job(
            *("generate", "--model-path", self.quantized, "--reference-model-path", self.unquantized),
            *("--model-id", self.name, "--bench-name", config.bench_name, *file),
            *("--schedulers", ",".join(schedulers), *learned, "--max-new-tokens", str(config.max_new_tokens)),
            *("--output-dir", str(output), *self.flags(self.most)),
            timeout=self.steps.left,
        )
        ended(job)
        datasets = [str(path.parent) for path in sorted(output.glob("*/*/answers/summary.json"))]
        runs = [run for dataset in datasets for run in (read_summary(dataset) or {"runs": []})["runs"]]
        workers = [w for d in datasets for w in storage.read_table(d, ["worker"])["worker"].to_pylist()]
        return {
            "seconds": round(job.seconds, 1),
            "output": str(output),
            "schedulers": schedulers,
            "answers": len(workers),
            "errors": sum(run["errors"] for run in runs),
            "tokens": sum(run["tokens"] for run in runs),
            "worker_seconds": round(sum(run["worker_seconds"] for run in runs), 1),
            "actors": sorted(set(filter(None, workers))),
        }

    def transformers(self) -> dict[str, Any]:
        """The same prompts by transformers' own generation, unquantized, on one GPU."""
        prompts = storage.read_table(self.alone["dataset"], ["input_ids"])["input_ids"].to_pylist()
        path = self.folder("prompts").with_suffix(".json")
        prompts = [ids for ids in prompts if ids][: self.config.peer_prompts]
        path.write_text(json.dumps(prompts))
        batches = [str(min(count, len(prompts))) for count in self.config.peer_batches]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench._transformers_peer", self.unquantized),
                *("--prompts", str(path), "--batch-sizes", *dict.fromkeys(batches)),
                *("--max-new-tokens", str(self.config.max_new_tokens)),
                *("--device", self.config.device),
            ],
            capture_output=True, text=True, timeout=self.steps.left, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        batches_found = json.loads(done.stdout.splitlines()[-1])
        best = max(found["tokens_per_second"] for found in batches_found)
        return {"tokens_per_second": round(best, 1), "batches": batches_found}


def ended(job: Job) -> None:
    if job.code:
        raise RuntimeError(f"{' '.join(job.arguments)}: exit {job.code}\n{job.output[-1200:]}")


def last_run(dataset: Path) -> dict[str, Any]:
    """What the last run wrote of itself."""
    return (read_summary(str(dataset)) or {"runs": [{}]})["runs"][-1]


def is_done(output: Path, stage: str) -> bool:
    """Whether there is a row of every prompt."""

    def rows(part: str) -> int:
        folder = output / part
        return len(storage.read_table(str(folder), ["prompt_id"])) if folder.exists() else 0

    return 0 < rows("prompts") == rows(stage)


def measured(output: Path) -> dict[str, Any]:
    """Rate, workers and errors of a labels data set, from what the run wrote."""
    labels = str(output / "labels")
    run = last_run(output / "labels")
    rows = storage.read_table(labels, ["prompt_id", "worker", "error"]).to_pylist()
    ids = [row["prompt_id"] for row in rows]
    seconds = run.get("wall_seconds") or float("nan")
    done = run.get("rows", len(rows))
    after_first, first, last = after_first_shards(output / "labels" / "data")
    return {
        "dataset": labels,
        "rows": len(rows),
        "once": len(ids) == len(set(ids)),
        "errors": sum(bool(row["error"]) for row in rows),
        "rows_per_second": round(done / seconds, 3),
        "after_first": after_first,
        "first_shard": first,
        "last_shard": last,
        "tokens_per_second": round(run.get("tokens", 0) / seconds, 1),
        "forwards_per_second": round(sum((run.get("forwards") or {}).values()) / seconds, 1),
        "worker_seconds_per_1000": round(1000 * run.get("worker_seconds", float("nan")) / max(1, done), 1),
        "actors": sorted({row["worker"] for row in rows if row["worker"]}),
    }


def after_first_shards(folder: Path) -> tuple[float | None, float, float]:
    """(rows a second of all workers, each from its first shard to its last; times of day of the first shard
    and of the last), by the files' times. None where a worker has one shard only."""
    by_worker: dict[str, list[tuple[float, int]]] = {}
    for path in folder.glob("*.parquet"):
        rows = parquet.read_table(path, columns=["worker"])["worker"].to_pylist()
        by_worker.setdefault(rows[0], []).append((path.stat().st_mtime, len(rows)))
    rates = []
    for shards in map(sorted, by_worker.values()):
        seconds = shards[-1][0] - shards[0][0]
        rates.append(sum(rows for _, rows in shards[1:]) / seconds if seconds > 0 else None)
    times = [moment for shards in by_worker.values() for moment, _ in shards]
    total = None if None in rates else round(sum(filter(None, rates)), 3)
    return total, min(times), max(times)


@contextlib.contextmanager
def ray_of(config: FarmBench, nodes: int = 0) -> Iterator[Head]:
    cpus = os.cpu_count() or 4
    if nodes:
        each = 1 if config.cpu else max(1, cpus // nodes)
        head = Head(0 if config.cpu else nodes, each, nodes, config.ray_number)
    else:
        gpus, cpus = (0, max(config.workers) + 1) if config.cpu else (max(config.workers), max(4, cpus))
        head = Head(gpus, cpus, number=config.ray_number)
    with head:
        yield head


def checkpoints(config: FarmBench) -> Iterator[tuple[str, str, str]]:
    """(name, quantized or "", unquantized), absolute."""
    for given in config.checkpoint:
        name, _, pair = given.partition("=")
        *quantized, unquantized = (str(Path(path).absolute()) for path in pair.split(":", 1))
        yield name, quantized[0] if quantized else "", unquantized
    for name in config.random:
        folder = (config.results / f"random-{name}").absolute()
        if not (folder / "model.safetensors.index.json").exists():
            _random_llama.write(folder, SHAPES[name], None)
        yield name, "", str(folder)


def need_gpus(config: FarmBench) -> None:
    """Ends with a sentence where there are fewer GPUs than workers: jobs would wait for them."""
    _record.need_cuda()
    most, there = max(config.workers), torch.cuda.device_count()
    if most > there:
        sys.exit(f"error: --workers {most}, but {there} GPU(s); each worker has one of its own")


def main(config: FarmBench) -> int:
    if not config.cpu:
        need_gpus(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the Ray that was started ends too
    config.results.mkdir(parents=True, exist_ok=True)
    steps, farms = Steps(config), []
    with ray_of(config) as head:
        for name, quantized, unquantized in checkpoints(config):
            farms.append(Farm(head, config, steps, name, quantized, unquantized))
            farms[-1].all()
    if config.nodes:
        with ray_of(config, max(config.workers)) as head:
            for farm in farms:
                farm.head = head
                count = max(config.workers)
                entry = steps.run(
                    f"label {farm.name} on {count} nodes of one",
                    lambda farm=farm, count=count: farm.label("nodes", count),
                )
                farm.compare(entry, count)
    print(table(steps.found))
    print(f"JSON:    {steps.write()}")
    print(f"Parquet: in {config.results}, a folder a step")
    for farm in farms:
        if "dataset" in farm.alone:
            print(f"look:    pmpd inspect {farm.alone['dataset']}")
    return int(any("failed" in step for step in steps.found))


def table(found: list[dict[str, Any]]) -> str:
    columns = (
        *("rows", "rows_per_second", "after_first", "tokens_per_second", "efficiency"),
        *("efficiency_after_first", "rows_that_differ", "seconds_to_first_shard"),
        *(
            "errors",
            "worker_seconds_per_1000",
            "busy_percent",
            "driver_share_of_a_core",
            "actors",
            "step_seconds",
        ),
    )
    lines = ["| step | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for step in found:
        cells = [str(step.get(column, "")) for column in columns]
        lines.append(
            f"| {step['step']} | " + " | ".join(cells) + " |" + (" failed" if "failed" in step else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(FarmBench, description=__doc__)))
