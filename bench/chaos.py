"""Rounds of random faults on the farm: is every row there, once, and right?

    PYTHONPATH=. python bench/chaos.py --rounds 20

A round is a fresh output folder and one run of a small task on two nodes of Ray's test cluster, with one
fault in its middle. After the fault the run is given again until it ends, as a person would, and the output
is compared with what the task must give. A round fails if a row is lost, doubled, wrong, an error, or in a
shard that can't be read.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import tyro

from pmpd import farm, storage
from pmpd.cli.main import TERMINATED, terminable
from pmpd.decode.pulse import Pulse
from pmpd.errors import UserError
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place

ROWS = 48
SCHEMA = storage.table_schema(
    "chaos",
    [("prompt_id", pa.string()), ("answer", pa.int64()), ("worker", pa.string()), ("error", pa.string())],
)
RUN_SECONDS = 240
COLUMNS = ("runs", "lost", "doubled", "wrong", "errors", "unreadable", "seconds")


@dataclass(frozen=True)
class Config:
    rounds: int = 20
    first: int = 1
    """Number of the first round: 20 rounds can be played in parts."""
    seed: int = 0
    row_seconds: float = 0.15
    """What the task takes for a row."""
    stall_seconds: float = 8.0
    faults: str = ""
    """Only these, comma-separated; default all."""
    drive: str = ""
    """For the benchmark itself: the settings of one run, as JSON."""


@dataclass(frozen=True)
class SumTask(FarmTask):
    """`answer` is the sum of the row's tokens. `limit`: bytes a worker may write to a file, a disk that is
    full."""

    seconds: float
    limit: int = 0
    table = "chaos"

    def build(self, place: Place) -> BuiltTask:
        if self.limit:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        pulse = Pulse()

        def run(items: list[Item]) -> Any:
            for item in items:
                row = item["prompts"]
                time.sleep(self.seconds)
                pulse.step([4])
                yield {"prompt_id": row["prompt_id"], "answer": sum(row["input_ids"])}

        return BuiltTask(run, SCHEMA, {"model": "sum"}, "chaos", pulse=pulse)


def drive(settings: dict[str, Any]) -> None:
    """One run, in a process of its own."""
    options = farm.FarmOptions(
        num_workers=2, unit_rows=4, stall_seconds=settings["stall_seconds"], progress_seconds=5
    )
    farm.connect(options)
    task = SumTask(settings["seconds"], settings["limit"])
    inputs = {"prompts": settings["prompts"]}
    farm.run(task, inputs, settings["output"], {"chaos": 1}, options)


def as_a_command(settings: dict[str, Any]) -> int:
    try:
        with terminable():
            drive(settings)
    except UserError as error:
        print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print("stopped")
        return TERMINATED
    return 0


@dataclass
class Round:
    """A folder, the cluster, and what happens to them."""

    config: Config
    folder: Path
    cluster: Any
    nodes: list[Any]
    draw: random.Random
    runs: int = 0
    children: list[subprocess.Popen[str]] = field(default_factory=list)
    log: str = ""

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self, limit: int = 0) -> subprocess.Popen[str]:
        settings = {
            "prompts": str(self.folder / "prompts"), "output": str(self.output), "limit": limit,
            "seconds": self.config.row_seconds, "stall_seconds": self.config.stall_seconds,
        }  # fmt: skip
        command = [sys.executable, __file__, "--drive", json.dumps(settings)]
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.children.append(child)
        self.runs += 1
        return child

    def end(self, child: subprocess.Popen[str]) -> int:
        try:
            printed, _ = child.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            printed, _ = child.communicate()
            printed += f"\nno end after {RUN_SECONDS} s"
        self.log += printed
        return child.returncode

    def wait_for_shards(self, count: int, child: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while len(storage.list_shards(self.output)) < count and child.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError("no shard in time")
            time.sleep(0.05)

    def in_the_middle(self) -> subprocess.Popen[str]:
        """A run that has written something and has more to do."""
        child = self.start()
        self.wait_for_shards(self.draw.randint(1, 5), child)
        return child

    def worker(self) -> int | None:
        """Process id of a worker that has written a shard and lives; all nodes are on this machine."""
        for path in reversed(storage.list_shards(self.output)):
            pid = int(storage.read_shard(path, ["worker"])["worker"][0].as_py().split("/")[1])
            if Path(f"/proc/{pid}").exists():
                return pid
        return None


def driver_killed(self: Round) -> None:
    child = self.in_the_middle()
    child.kill()
    self.end(child)


def worker_killed(self: Round) -> None:
    child = self.in_the_middle()
    if (pid := self.worker()) is not None:
        os.kill(pid, signal.SIGKILL)
    self.end(child)


def worker_stopped(self: Round) -> None:
    """It hangs, is replaced, and comes back when the run is over."""
    child = self.in_the_middle()
    if (pid := self.worker()) is not None:
        os.kill(pid, signal.SIGSTOP)
    self.end(child)
    if pid is not None and Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGCONT)


def driver_stopped(self: Round) -> None:
    child = self.in_the_middle()
    child.send_signal(signal.SIGSTOP)
    time.sleep(self.config.stall_seconds + 2)
    child.send_signal(signal.SIGCONT)
    self.end(child)


def driver_terminated(self: Round) -> None:
    child = self.in_the_middle()
    child.terminate()
    self.end(child)


def node_lost(self: Round) -> None:
    child = self.in_the_middle()
    lost = self.nodes.pop(self.draw.randrange(len(self.nodes)))
    self.cluster.remove_node(lost, allow_graceful=False)
    self.nodes.append(self.cluster.add_node(num_cpus=1))
    self.end(child)


def shard_damaged(self: Round) -> None:
    self.end(self.start())
    for path in self.draw.sample(storage.list_shards(self.output), 2):
        content = bytearray(Path(path).read_bytes())
        content[self.draw.randrange(len(content))] ^= 0xFF
        Path(path).write_bytes(content[: self.draw.randint(1, len(content))])


def disk_full(self: Round) -> None:
    self.end(self.start(limit=200))


def folder_read_only(self: Round) -> None:
    """As root, whom no mode stops, a file in the place of the data."""
    child = self.in_the_middle()
    child.kill()
    self.end(child)
    self.output.chmod(0o500)
    self.end(self.start())
    self.output.chmod(0o700)


def foreign_lease(self: Round) -> None:
    """Of another machine and another time; nobody renews it."""
    lease = {"token": "f" * 32, "host": "elsewhere", "hostname": "elsewhere", "pid": 1, "started": "1"}
    storage.write_bytes(self.output / "_lease.json", json.dumps(lease | {"beat": 9}).encode())


def two_drivers(self: Round) -> None:
    one = self.in_the_middle()
    other = self.start()
    codes = {self.end(other), self.end(one)}
    if codes != {0, 1}:
        raise AssertionError(f"one of two drivers must be refused, they ended with {codes}")


FAULTS: dict[str, Callable[[Round], None]] = {
    "driver SIGKILL": driver_killed,
    "worker SIGKILL": worker_killed,
    "worker SIGSTOP": worker_stopped,
    "driver SIGSTOP": driver_stopped,
    "driver SIGTERM": driver_terminated,
    "node lost": node_lost,
    "shards damaged": shard_damaged,
    "disk full": disk_full,
    "folder read-only": folder_read_only,
    "foreign lease": foreign_lease,
    "two drivers": two_drivers,
}


def make_prompts(folder: Path) -> dict[str, int]:
    """Id -> right answer."""
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": f"{7919 * (i + 1):016x}",
            "source": str(i),
            "prompt_tokens": 1 + i % 7,
            "prompt_text": str(i),
            "input_ids": [*range(i % 7 + 1), i],
            "error": None,
        }
        for i in range(ROWS)
    ]
    storage.write_shard(storage.to_table(rows, storage.PROMPTS), folder / "data" / "part-0.parquet", 16)
    return {row["prompt_id"]: sum(row["input_ids"]) for row in rows}


def check(output: Path, expected: dict[str, int]) -> dict[str, int]:
    scan = storage.scan(output)
    rows = [row for shard in scan.shards for row in storage.read_shard(shard.path).to_pylist()]
    ids = [row["prompt_id"] for row in rows]
    return {
        "lost": len(set(expected) - set(ids)),
        "doubled": len(ids) - len(set(ids)),
        "wrong": sum(row["answer"] != expected.get(row["prompt_id"]) for row in rows if not row["error"]),
        "errors": sum(bool(row["error"]) for row in rows),
        "unreadable": len(scan.unreadable),
    }


def play(config: Config, number: int, name: str, cluster: Any, nodes: list[Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        expected = make_prompts(Path(folder) / "prompts")
        this = Round(config, Path(folder), cluster, nodes, random.Random(f"{config.seed}/{number}"))
        begin, problem = time.monotonic(), ""
        try:
            FAULTS[name](this)
            for _ in range(3):
                if this.end(this.start()) == 0:
                    break
            else:
                problem = "does not end"
        except (AssertionError, TimeoutError) as error:
            problem = str(error)
        finally:
            for child in this.children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        found: dict[str, Any] = {"fault": name, **check(this.output, expected), "runs": this.runs}
        found["seconds"] = round(time.monotonic() - begin, 1)
        found["holds"] = not problem and not any(
            found[key] for key in ("lost", "doubled", "wrong", "errors", "unreadable")
        )
        if not found["holds"]:
            print(f"round {number}, {name}: {problem}\n{this.log}", file=sys.stderr)
        return found


def main(config: Config) -> int:
    if config.drive:
        return as_a_command(json.loads(config.drive))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    os.environ.update(token | {"RAY_USAGE_STATS_ENABLED": "0"})
    import ray
    from ray.cluster_utils import Cluster

    names = [name.strip() for name in config.faults.split(",")] if config.faults else list(FAULTS)
    draw = random.Random(config.seed)
    last = config.first - 1 + config.rounds
    order = [name for _ in range(-(-last // len(names))) for name in draw.sample(names, len(names))]
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    print(f"| round | fault | {' | '.join(COLUMNS)} | |")
    print(f"|--:|---|{'--:|' * len(COLUMNS)}---|")
    rounds = []
    try:
        for number, name in enumerate(order[config.first - 1 : last], start=config.first):
            found = play(config, number, name, cluster, nodes)
            rounds.append(found)
            cells = [found[key] for key in COLUMNS]
            verdict = "holds" if found["holds"] else "FAILS"
            print(f"| {number} | {name} | {' | '.join(map(str, cells))} | {verdict} |", flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    held = sum(found["holds"] for found in rounds)
    seconds = sum(found["seconds"] for found in rounds)
    print(f"\n{held} of {len(rounds)} rounds hold, {ROWS} rows each, in {seconds:.0f} s")
    return 0 if held == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
