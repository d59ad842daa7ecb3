"""A farm task without a model, quick to start and able to misbehave; and a driver around it that tests can
kill.

python tests/farm_fakes.py OUTPUT PROMPTS '{"seconds": 0.05, …}'
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pmpd import farm, storage
from pmpd.cli.main import TERMINATED, Terminated, terminable
from pmpd.decode.pulse import Pulse
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place

SCHEMA = storage.table_schema(
    "fakes",
    [
        ("prompt_id", pa.string()),
        ("prompt_text", pa.string()),
        ("answer", pa.int64()),
        ("place", pa.string()),
        ("worker", pa.string()),
        ("error", pa.string()),
    ],
)


@dataclass(frozen=True)
class FakeTask(FarmTask):
    """`answer` is a function of the row alone. Rows of `kills` end their process, rows of `raises` raise."""

    seconds: float = 0.0
    kills: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()
    poisons: tuple[str, ...] = ()
    hangs: tuple[str, ...] = ()
    """Rows after which nothing moves for `hang_seconds`."""
    hang_seconds: float = 3600.0
    once: str = ""
    """Folder in which rows of `kills` and `hangs` leave a mark, and then do it no more."""
    too_large: tuple[str, ...] = ()
    """Rows whose answer no column can hold."""
    start_error: str = ""
    start_seconds: float = 0.0
    start_marks: str = ""
    """Folder in which a worker leaves its node's id when it begins to start."""
    bad_nodes: tuple[str, ...] = ()
    """Ids of nodes: on these workers hang, or raise `start_error`, which they then do only there."""
    fingerprint: str = "f"
    file_size_limit: int = 0
    """Bytes a worker may write per file: a disk that is full."""
    table = "fakes"

    def build(self, place: Place) -> BuiltTask:
        if self.bad_nodes or self.start_marks:
            import ray

        node = ray.get_runtime_context().get_node_id() if self.bad_nodes or self.start_marks else ""
        bad = not self.bad_nodes or node in self.bad_nodes
        if self.start_marks:
            (Path(self.start_marks) / node).touch()
        if self.start_error == "crash" and bad:
            os._exit(3)
        if self.start_error and bad:
            raise ValueError(self.start_error)
        time.sleep(3600 if self.bad_nodes and bad else self.start_seconds)
        if self.file_size_limit:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size_limit, self.file_size_limit))
        self_place = json.dumps(
            {
                "gpus": place.gpu_ids,
                "threads": place.threads,
                "omp": os.environ.get("OMP_NUM_THREADS"),
                "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            }
        )

        pulse = Pulse()

        def run(items: list[Item]) -> Any:
            for item in items:
                row = item["prompts"]
                key = row["prompt_id"]
                for bits in (4, 3):
                    time.sleep(self.seconds / 2)
                    pulse.step([bits] * 5)
                if key in self.hangs and self._first_time(key):
                    time.sleep(self.hang_seconds)
                if key in self.kills and self._first_time(key):
                    os.kill(os.getpid(), signal.SIGKILL)
                if key in self.raises:
                    raise RuntimeError(f"row {key} is bad")
                if key in self.poisons:
                    raise RuntimeError("CUDA error: device-side assert triggered")
                answer = 2**70 if key in self.too_large else sum(row["input_ids"])
                yield {
                    "prompt_id": key,
                    "prompt_text": row["prompt_text"],
                    "answer": answer,
                    "place": self_place,
                }

        return BuiltTask(run, SCHEMA, {"model": self.fingerprint}, "a fake", lambda row: 10, pulse)

    def _first_time(self, key: str) -> bool:
        if not self.once:
            return True
        mark = Path(self.once) / key
        if mark.exists():
            return False
        mark.touch()
        return True


def write_prompts(dataset: Path, count: int, errors: tuple[int, ...] = ()) -> list[str]:
    """A PROMPTS dataset of `count` rows in shards of 50; the ids."""
    ids = [f"{7919 * (i + 1):016x}" for i in range(count)]
    for start in range(0, count, 50):
        rows = [
            {
                "prompt_id": ids[i],
                "source": f"row {i}",
                "prompt_tokens": 1 + i % 7,
                "prompt_text": f"text {i}",
                "input_ids": [*list(range(i % 7 + 1)), i],
                "error": "the document tokenizes to nothing" if i in errors else None,
            }
            for i in range(start, min(start + 50, count))
        ]
        storage.write_shard(
            storage.to_table(rows, storage.PROMPTS), dataset / "data" / f"part-{start:05}.parquet", 16
        )
    return ids


def rows_of(folder: Path) -> dict[str, dict]:
    rows = storage.read_table(folder).to_pylist()
    assert len({row["prompt_id"] for row in rows}) == len(rows), "an id is there twice"
    return {row["prompt_id"]: row for row in rows}


def expected(prompts: Path) -> dict[str, int]:
    return {row["prompt_id"]: sum(row["input_ids"]) for row in storage.read_table(prompts).to_pylist()}


def answers(rows: dict[str, dict]) -> dict[str, int]:
    return {key: row["answer"] for key, row in rows.items()}


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


def main() -> None:
    output, prompts, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    options = settings.pop("options", {})
    fields = {field.name for field in dataclasses.fields(FakeTask)}
    task = FakeTask(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings.items()
            if key in fields
        }
    )
    farm_options = farm.FarmOptions(**options)
    try:
        with terminable():
            farm.connect(farm_options)
            result = farm.run(task, {"prompts": prompts}, output, {"task": "fake"}, farm_options)
    except Terminated:
        sys.exit(TERMINATED)
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
