"""Prompts on the farm: the driver reads the records and gives them ids, workers tokenize and cut them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmpd import storage
from pmpd.farm.driver import run
from pmpd.farm.options import FarmOptions
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place
from pmpd.labeling.prompts import (
    EMPTY,
    ROWS_PER_GROUP,
    ROWS_PER_SHARD,
    PromptConfig,
    PromptMaker,
    check_room,
    documents,
    make_prompts,
)
from pmpd.storage.lease import Lease
from pmpd.weights.model_spec import ModelSpec

FEW = 4096
"""So many are tokenized in the driver in about the time that a worker needs to start."""

UNIT_CHARACTERS = 1 << 25
"""Of a unit's documents, about: a worker holds them all."""


@dataclass(frozen=True)
class PromptTask(FarmTask):
    """DOCUMENTS -> PROMPTS."""

    model: ModelSpec
    """Whose tokenizer."""
    source: PromptConfig
    max_prompt_tokens: int
    """What the model's positions leave."""
    table = "prompts"
    row_group_rows = ROWS_PER_GROUP

    def __post_init__(self) -> None:
        check_room(self.max_prompt_tokens)

    def build(self, place: Place) -> BuiltTask:
        make = PromptMaker(self.model.open().tokenizer(), self.source, self.max_prompt_tokens)

        def prompts(items: list[Item]) -> Iterable[dict[str, Any]]:
            return (make(item["documents"]) for item in items)

        return BuiltTask(run=prompts, schema=storage.PROMPTS)


def write_prompts(
    task: PromptTask,
    dataset: str,
    identity: Mapping[str, Any],
    options: FarmOptions,
    lease: Lease | None = None,
) -> dict[str, int]:
    """Makes the PROMPTS dataset unless it is whole already; its counts (rows, errors, records, duplicates,
    empty, malformed). What an earlier call has made is kept.

    `identity` is what defines the rows. Needs `farm.connect`, and a lease that covers the folder that the
    dataset is in: the documents lie beside it meanwhile. UserError: the folder is of another configuration,
    or as `pmpd.labeling.prompts` says.
    """
    texts = storage.join(storage.parent(dataset), "documents")
    manifest = storage.check_config(dataset, identity)
    if manifest is not None and storage.is_whole(dataset, manifest, task.id_column):
        storage.remove_dataset(texts)
        return manifest["counts"]

    if task.source.kind == "tokens":  # prompts already, or nearly
        tokenizer = task.model.open().tokenizer()
        return storage.write_dataset(
            dataset,
            storage.PROMPTS,
            lambda counts: make_prompts(task.source, tokenizer, task.max_prompt_tokens, counts),
            identity,
            rows_per_shard=ROWS_PER_SHARD,
            row_group_rows=ROWS_PER_GROUP,
        )

    def rows(counts: Counter[str]) -> Iterator[dict[str, Any]]:
        for row in documents(task.source, counts):
            counts["characters"] += len(row["text"])
            yield row

    storage.discard_unused(texts, identity, [])
    counts = storage.write_dataset(
        texts,
        storage.DOCUMENTS,
        rows,
        identity,
        rows_per_shard=ROWS_PER_SHARD,
        row_group_rows=ROWS_PER_GROUP,
        characters_of=lambda row: len(row["text"]),
        characters_per_shard=UNIT_CHARACTERS,
    )
    each = max(1, counts["characters"] // counts["rows"])
    options = replace(
        options,
        num_workers=0 if counts["rows"] <= FEW else options.num_workers,
        gpus_per_worker=0,
        unit_rows=max(1, min(ROWS_PER_SHARD, UNIT_CHARACTERS // each)),
        retry_errors=False,
    )
    task = replace(task, source=replace(task.source))  # without what it has read, on its way to workers
    result = run(task, {"documents": texts}, dataset, identity, options, lease)
    told = {name: counts.get(name, 0) for name in ("records", "duplicates", "malformed")}
    told["empty"] = count_empty(dataset) if result.errors > told["malformed"] else 0
    storage.remove_dataset(texts)
    return storage.add_counts(dataset, told)


def count_empty(dataset: str) -> int:
    columns = (storage.read_shard(path, ["error"])["error"] for path in storage.list_shards(dataset))
    return sum(column.to_pylist().count(EMPTY) for column in columns)
