"""What a run costs before its first unit and after its last: the scan of input and output, and the memory of
their ids.

    PYTHONPATH=. python bench/scan.py                         # 10^6 rows in shards of 32
    PYTHONPATH=. python bench/scan.py --rows 10000000 --links # 10^7: a resume, without a first scan

Writes a prompts dataset and an output of 99 % of its rows, and measures, in a process each that has imported
what a driver of `pmpd label` imports: the first scan, which opens every shard; a resume after a run that was
killed, whose finished shards are known from the parts of the index that it wrote; the next resume, which has
one index; and a run of which nothing is done. With `--links` the shards are links to one file: as the index
knows them all, none is opened. The data is removed in the end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
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
from pmpd.farm.ledger import Ledger, ReconcileError
from pmpd.storage.index import Rows

ROWS_PER_PROMPT_SHARD = 1024
LINKS = 10_000
"""To one file: file systems allow some 65,000."""


@dataclass(frozen=True)
class Config:
    rows: int = 1_000_000
    rows_per_shard: int = 32
    """Of the output: the items of a unit."""
    links: bool = False
    """Shards are links to one file, which is quick: there is no first scan then."""
    folder: Path | None = None
    """Where the data is written; default: a temporary folder."""
    output: Path = _record.RESULTS


class _Task:
    table, id_column, one_row_per_item = "references", "prompt_id", True


def lengths_of(keys: np.ndarray) -> np.ndarray:
    return (keys % np.uint64(2000)).astype(np.int32)


def write(dataset: Path, schema: pa.Schema, keys: np.ndarray, per_shard: int, links: bool) -> None:
    """Shards of ids and lengths, straight to disk: how fast they are written is not measured here."""
    (dataset / "data").mkdir(parents=True)
    old = time.time() - 3600
    source = Path()
    for number, first in enumerate(range(0, len(keys), per_shard)):
        path = dataset / "data" / f"part-{first:016x}.parquet"
        if links and number % LINKS:
            os.link(source, path)
            continue
        ids = pa.array([f"{key:016x}" for key in keys[first : first + per_shard].tolist()])
        lengths = pa.array(lengths_of(keys[first : first + per_shard]))
        columns = [
            ids if field.name == "prompt_id"
            else lengths if field.name == "prompt_tokens"
            else pa.nulls(len(ids), field.type)
            for field in schema
        ]  # fmt: skip
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")
        os.utime(path, (old, old))
        source = path


def write_parts(dataset: Path, keys: np.ndarray, per_shard: int) -> None:
    """The index as a run leaves it that wrote these shards and was killed."""
    for path in dataset.glob("_index*"):
        path.unlink()
    journal = storage.Journal(str(dataset), "prompt_id")
    for first in range(0, len(keys), per_shard):
        path = dataset / "data" / f"part-{first:016x}.parquet"
        found = path.stat()
        some = keys[first : first + per_shard]
        rows = Rows(some, np.zeros(len(some), bool), lengths_of(some))
        journal.add(storage.Entry(path.name, found.st_size, found.st_mtime_ns, rows))
    journal.flush()


def megabytes() -> int:
    """The most memory that this process has held: rusage would count that of the one which started it."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def measure(folder: str, output: str) -> dict[str, float]:
    """Seconds and memory of what a run does before its first unit and after its last."""
    for module in ("ray", "torch", "transformers", "pmpd.cli.label"):
        importlib.import_module(module)
    base = megabytes()
    begin, busy = time.monotonic(), time.process_time()
    ledger = Ledger(_Task(), {"prompts": f"{folder}/prompts"}, f"{folder}/{output}", {})  # type: ignore[arg-type]
    ledger.scan_inputs()
    inputs = time.monotonic() - begin
    ledger.repair_output()
    opened = ledger.output.read
    todo = ledger.todo()
    first = next(ledger.units(todo, 32))
    found = {
        "seconds": round(time.monotonic() - begin, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
        "seconds_input": round(inputs, 2),
        "opened": opened,
        "to_do": len(todo),
        "files_of_first_unit": len({path for path, _ in first.rows["prompts"]}),
        "driver_mb": base,
        "peak_mb": megabytes(),
    }
    begin = time.monotonic()
    ledger.reread()
    with contextlib.suppress(ReconcileError):  # it is not complete
        ledger.reconcile()
    return {**found, "seconds_end": round(time.monotonic() - begin, 2), "peak_mb_end": megabytes()}


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        begin = time.monotonic()
        keys = np.random.default_rng(0).integers(0, 2**64, config.rows, np.uint64, endpoint=False)
        done = keys[: -config.rows // 100]
        prompts, output = Path(folder) / "prompts", Path(folder) / "output"
        write(prompts, storage.PROMPTS, keys, ROWS_PER_PROMPT_SHARD, config.links)
        write(output, storage.REFERENCES, done, config.rows_per_shard, config.links)
        for name in ("output", "fresh"):
            storage.write_manifest(
                f"{folder}/{name}", storage.REFERENCES, {}, table="references", complete=False
            )
        print(f"{config.rows} rows written in {time.monotonic() - begin:.0f} s", flush=True)
        results: dict[str, dict] = {}

        def take(name: str, output: str = "output") -> None:
            found = subprocess.run(
                [sys.executable, "-c", "import json, sys, bench.scan as scan; "
                 "print(json.dumps(scan.measure(sys.argv[1], sys.argv[2])))", folder, output],
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            results[name] = json.loads(found.stdout)
            print(f"{name}: {results[name]}", flush=True)

        if not config.links:
            take("first scan")
        write_parts(prompts, keys, ROWS_PER_PROMPT_SHARD)
        write_parts(output, done, config.rows_per_shard)
        take("after a kill")
        take("with one index")
        take("nothing done", "fresh")
        size = sum(path.stat().st_size for path in Path(folder).glob("*/_index*.npz"))
        print(f"index: {size / 1e6:.0f} MB")
    bars = [
        {"bar": "resume within 60 s", "measured": results["after a kill"]["seconds"]},
        {"bar": "driver at most 1,000 MB", "measured": max(r["peak_mb_end"] for r in results.values())},
    ]
    for bar, most in zip(bars, (60, 1000), strict=True):
        bar["met"] = bar["measured"] <= most
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']}")
    record = {"rows": config.rows, "rows_per_shard": config.rows_per_shard, "links": config.links, **results}
    print(_record.write("scan", {**record, "index_mb": size / 1e6, "bars": bars}, "cpu", config.output))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
