"""What a resumed run costs before its first unit: the scan of input and output, and the memory of their ids.

    PYTHONPATH=. python bench/scan.py        # 10^6 rows in shards of 32
    PYTHONPATH=. python bench/scan.py --rows 10000000 --rows-per-shard 1024

Writes a prompts dataset and an output of 99 % of its rows, and measures, in a process each:
the first scan, which opens every shard, and the next one, which has the index. The data is then removed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from bench import _record
from pmpd import storage
from pmpd.farm.ledger import Ledger

ROWS_PER_PROMPT_SHARD = 1024


@dataclass(frozen=True)
class Config:
    rows: int = 1_000_000
    rows_per_shard: int = 32
    """Of the output: the items of a unit."""
    folder: Path | None = None
    """Where the data is written; default: a temporary folder."""
    output: Path = _record.RESULTS


class _Task:
    table, id_column, one_row_per_item = "references", "prompt_id", True


def write(folder: Path, schema: pa.Schema, keys: np.ndarray, per_shard: int) -> None:
    """Shards of ids and lengths, straight to disk: how fast they are written is not measured here."""
    (folder / "data").mkdir(parents=True)
    lengths = (keys % 2000).astype(np.int32)
    old = time.time() - 3600
    for first in range(0, len(keys), per_shard):
        ids = pa.array([f"{key:016x}" for key in keys[first : first + per_shard].tolist()])
        columns = [
            ids if field.name == "prompt_id"
            else pa.array(lengths[first : first + per_shard]) if field.name == "prompt_tokens"
            else pa.nulls(len(ids), field.type)
            for field in schema
        ]  # fmt: skip
        path = folder / "data" / f"part-{first:010}.parquet"
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")
        _touch(path, old)


def _touch(path: Path, when: float) -> None:
    import os

    os.utime(path, (when, when))


def measure(folder: str) -> dict[str, float]:
    """Seconds and memory of what a run does before its first unit."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begin, busy = time.monotonic(), time.process_time()
    ledger = Ledger(_Task(), {"prompts": f"{folder}/prompts"}, f"{folder}/output", {})  # type: ignore[arg-type]
    ledger.scan_inputs()
    inputs = time.monotonic() - begin
    ledger.repair_output()
    todo = ledger.todo()
    first = next(ledger.units(todo, 32))
    return {
        "seconds": round(time.monotonic() - begin, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
        "seconds_input": round(inputs, 2),
        "to_do": len(todo),
        "files_of_first_unit": len({path for path, _ in first.rows["prompts"]}),
        "base_mb": round(base),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        begin = time.monotonic()
        keys = np.random.default_rng(0).integers(0, 2**64, config.rows, np.uint64, endpoint=False)
        write(Path(folder) / "prompts", storage.PROMPTS, keys, ROWS_PER_PROMPT_SHARD)
        write(Path(folder) / "output", storage.REFERENCES, keys[: -config.rows // 100], config.rows_per_shard)
        storage.write_manifest(f"{folder}/output", storage.REFERENCES, {}, table="references", complete=False)
        print(f"{config.rows} rows written in {time.monotonic() - begin:.0f} s")
        results = {}
        for name in ("first scan", "with the index"):
            found = subprocess.run(
                [sys.executable, "-c",
                 f"import json, bench.scan as scan; print(json.dumps(scan.measure({folder!r})))"],
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            results[name] = json.loads(found.stdout)
            print(f"{name}: {results[name]}")
        sizes = [path.stat().st_size for path in Path(folder).glob("*/_index.parquet")]
        print(f"index: {sum(sizes) / 1e6:.0f} MB")
    record = {
        "rows": config.rows,
        "rows_per_shard": config.rows_per_shard,
        **results,
        "index_mb": sum(sizes) / 1e6,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
