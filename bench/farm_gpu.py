"""Measures the farm on the GPUs (or, with --cpu, the CPUs) of one host: see `bench/farm_gpu.sh`.

Labels with 1, 2, ... workers must be equal row by row, each row once, also where a worker was killed on the
way. Efficiency of n workers: their rows a second over n times those of one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from bench import _record
from bench._farm_host import Head, utilisation, worker_processes
from bench.same_rows import compare_datasets
from pmpd import demo, storage


@dataclass(frozen=True)
class FarmBench:
    """The whole farm on the GPUs of one host."""

    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers to label with."""
    checkpoint: tuple[str, ...] = (f"demo={demo.ANYPREC}:{demo.DENSE}",)
    """NAME=QUANTIZED:UNQUANTIZED, one or several."""
    quantize: tuple[str, ...] = ()
    """NAME=UNQUANTIZED: also time `pmpd quantize` of these."""
    dataset: str = "demo"
    """Texts to label, as `pmpd label` takes them."""
    size: int = 256
    max_new_tokens: int = 256
    batch_size: str = "auto"
    bench_name: str = "demo"
    """Benchmark to answer; mt_bench needs the hub or `question_file`."""
    question_file: str | None = None
    dtype: str = "auto"
    cpu: bool = False
    """No GPU: do the steps work?"""
    step_seconds: float = 300.0
    """No step may take longer."""
    out: Path = _record.RESULTS
    results: Path = Path("results/farm_gpu")
    """Where the runs' own output goes."""


@dataclass
class Steps:
    """What the steps found; a step that fails is a line of it."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            result = step()
        except Exception as error:  # the other steps are worth their time on the machine
            result = {"failed": f"{type(error).__name__}: {error}"[-1500:]}
        entry = {"step": name, "step_seconds": round(time.monotonic() - begin, 2), **result}
        self.found.append(entry)
        print({key: value for key, value in entry.items() if key != "rows"}, flush=True)
        return entry


def main(config: FarmBench) -> int:
    gpus = 0 if config.cpu else max(config.workers)
    config.results.mkdir(parents=True, exist_ok=True)
    steps = Steps()
    with Head(gpus, max(4, (os.cpu_count() or 4)) if gpus else max(config.workers) + 1) as head:
        for given in config.quantize:
            name, _, path = given.partition("=")
            steps.run(f"quantize {name}", lambda name=name, path=path: quantize(head, config, name, path))
        for given in config.checkpoint:
            name, _, pair = given.partition("=")
            paths = pair.split(":", 1)
            alone: dict[str, Any] = {}
            for count in config.workers:
                work = lambda n=name, p=paths, c=count: label(head, config, n, p, c, gpus)  # noqa: E731
                entry = steps.run(f"label {name} with {count}", work)
                alone = alone or entry
                compare(entry, alone, count)
            killed = steps.run(
                f"label {name}, a worker killed",
                lambda n=name, p=paths: killed_worker(head, config, n, p),
            )
            compare(killed, alone, max(config.workers))
            if gpus:
                shared = steps.run(
                    f"label {name}, two workers on a GPU",
                    lambda n=name, p=paths: label(head, config, n, p, 2, 1, share=0.5),
                )
                compare(shared, alone, 1)
            steps.run(f"train {name}", lambda n=name: train(head, config, n, gpus))
            steps.run(f"generate {name}", lambda n=name, p=paths: generate(head, config, n, p))
    path = _record.write(
        "farm_" + ("cpu" if config.cpu else "cuda"), steps.found, "cpu" if config.cpu else "cuda", config.out
    )
    print(table(steps.found))
    print(f"JSON: {path}")
    return int(any("failed" in step for step in steps.found))


def flags(config: FarmBench, workers: int, share: float | None) -> list[str]:
    gpus = [] if config.cpu else ["--gpus-per-worker", str(share or 1)]
    return ["--num-workers", str(workers), *gpus, "--dtype", config.dtype]


def ended(job: Any) -> None:
    if job.code:
        raise RuntimeError(f"pmpd {' '.join(job.arguments)}: exit {job.code}\n{job.output[-1200:]}")


def quantize(head: Head, config: FarmBench, name: str, path: str) -> dict[str, Any]:
    output = config.results / f"anyprec-{name}"
    job = head.job("quantize", "--model-path", path, "--output-dir", str(output), timeout=config.step_seconds)
    ended(job)
    return {"seconds": round(job.seconds, 1), "output": str(output)}


def label_arguments(config: FarmBench, paths: list[str], output: Path) -> list[str]:
    return [
        *("label", "--model-path", paths[0], "--reference-model-path", paths[1], "--dataset", config.dataset),
        *("--size", str(config.size), "--max-new-tokens", str(config.max_new_tokens)),
        *("--batch-size", config.batch_size, "--output-dir", str(output.absolute())),
    ]


def label(
    head: Head,
    config: FarmBench,
    name: str,
    paths: list[str],
    workers: int,
    gpus: int,
    share: float | None = None,
) -> dict[str, Any]:
    output = config.results / f"label-{name}-{workers}{'-shared' * bool(share)}"
    with utilisation(range(gpus)) as busy:
        result = label_into(head, config, paths, output, workers, share)
    return {**result, "busy_percent": {k: round(statistics.mean(v), 1) for k, v in busy.items() if v}}


def measured(output: Path) -> dict[str, Any]:
    """Rate, workers and errors of a labels data set, from what the run wrote."""
    labels = str(output / "labels")
    run = (storage.read_summary(labels) or {"runs": [{}]})["runs"][-1]
    rows = storage.read_table(labels, ["prompt_id", "worker", "error"]).to_pylist()
    ids = [row["prompt_id"] for row in rows]
    seconds = run.get("wall_seconds") or float("nan")
    return {
        "dataset": labels,
        "rows": len(rows),
        "once": len(ids) == len(set(ids)),
        "errors": sum(bool(row["error"]) for row in rows),
        "rows_per_second": round(len(rows) / seconds, 3),
        "tokens_per_second": round(run.get("tokens", 0) / seconds, 1),
        "worker_seconds_per_1000": round(
            1000 * run.get("worker_seconds", float("nan")) / max(1, len(rows)), 1
        ),
        "actors": sorted({row["worker"] for row in rows if row["worker"]}),
    }


def compare(entry: dict[str, Any], alone: dict[str, Any], workers: int) -> None:
    """Efficiency against one worker, and how many rows differ from its rows."""
    if entry is alone or "failed" in entry or "failed" in alone:
        return
    entry["efficiency"] = round(entry["rows_per_second"] / (workers * alone["rows_per_second"]), 3)
    count, problems = compare_datasets(Path(alone["dataset"]) / "data", Path(entry["dataset"]) / "data")
    entry["rows_that_differ"] = f"{len(problems)} of {count}"


@contextlib.contextmanager
def kill_one(head: Head, dataset: Path) -> Iterator[list[int]]:
    """SIGKILL to one worker as soon as the data set has a shard; the ids that were killed."""
    killed: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            if any(dataset.glob("data/*.parquet")):
                for process in worker_processes(head)[:1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join(timeout=10)


def killed_worker(head: Head, config: FarmBench, name: str, paths: list[str]) -> dict[str, Any]:
    output = config.results / f"label-{name}-killed"
    workers = max(config.workers)
    with kill_one(head, output / "labels") as killed:
        result = label_into(head, config, paths, output, workers)
    if not killed:
        raise RuntimeError("no worker was killed: the run ended before its second shard")
    return {**result, "killed": len(killed)}


def label_into(
    head: Head, config: FarmBench, paths: list[str], output: Path, workers: int, share: float | None = None
) -> dict[str, Any]:
    job = head.job(
        *label_arguments(config, paths, output), *flags(config, workers, share), timeout=config.step_seconds
    )
    ended(job)
    return measured(output)


def train(head: Head, config: FarmBench, name: str, gpus: int) -> dict[str, Any]:
    data = config.results / f"label-{name}-{config.workers[0]}" / "labels"
    job = head.job(
        *(
            "train",
            "--data-path",
            str(data),
            "--num-train-epochs",
            "3",
            "--gpus-per-worker",
            "1" if gpus else "0",
        ),
        *("--output-dir", str((config.results / f"train-{name}").absolute())),
        timeout=config.step_seconds,
    )
    ended(job)
    return {"seconds": round(job.seconds, 1)}


def generate(head: Head, config: FarmBench, name: str, paths: list[str]) -> dict[str, Any]:
    output = config.results / f"generate-{name}"
    file = ["--question-file", config.question_file] if config.question_file else []
    job = head.job(
        *("generate", "--model-path", paths[0], "--reference-model-path", paths[1], "--model-id", name),
        *("--bench-name", config.bench_name, *file, "--schedulers", "fp,uniform,static"),
        *("--max-new-tokens", str(config.max_new_tokens), "--output-dir", str(output.absolute())),
        *flags(config, max(config.workers), None),
        timeout=config.step_seconds,
    )
    ended(job)
    return {"seconds": round(job.seconds, 1), "output": str(output)}


def table(found: list[dict[str, Any]]) -> str:
    columns = (
        "rows_per_second",
        "tokens_per_second",
        "efficiency",
        "rows_that_differ",
        "errors",
        "step_seconds",
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
