"""Benchmarks on the farm: the recipe that a worker builds, and the data sets before and after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pmpd import storage
from pmpd.benchmarks import Benchmark, Question
from pmpd.evaluation.answer import Generator, conversation_rows
from pmpd.evaluation.sweep import Run
from pmpd.farm.driver import FarmResult, run
from pmpd.farm.load_model import load_model
from pmpd.farm.options import FarmOptions
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place
from pmpd.storage.lease import Lease
from pmpd.weights.model_spec import Dtype, ModelSpec

CONVERSATIONS_PER_SHARD = 1024


@dataclass(frozen=True)
class GenerateTask(FarmTask):
    """CONVERSATIONS -> GENERATIONS: one row per turn; a conversation's turns are one shard's rows, so they
    stay on one worker."""

    model: ModelSpec
    runs: tuple[Run, ...]
    slots: int | None
    reuse_cache: bool = True
    table = "generations"
    id_column = "conversation_id"
    one_row_per_item = False

    @property
    def most_forwards(self) -> float:
        """Of one turn, which is all that is known of an item before it is read."""
        return float(max(run.max_new_tokens for run in self.runs))

    def build(self, place: Place) -> BuiltTask:
        model, device = load_model(self.model, place)
        generator = Generator(model, self.runs, self.slots, self.reuse_cache, device)

        def answer(items: list[Item]) -> Iterable[dict[str, Any]]:
            return generator.answer(item["conversations"] for item in items)

        return BuiltTask(
            run=answer,
            schema=storage.GENERATIONS,
            models={"model": model.fingerprint},
            device=device,
            tokens=lambda row: row["output_tokens"],
            pulse=model.pulse,
        )


@dataclass(frozen=True)
class Sweep:
    """What is to be generated: some runs of one model over one benchmark's questions."""

    benchmark: Benchmark
    split: str
    questions: Sequence[Question]
    runs: tuple[Run, ...]
    model_id: str
    model_fingerprint: str
    template: str
    choices: int = 1
    static_search: bool = False
    """Whether this is the grid of a static search, which the report leaves out."""
    dtype: Dtype = "auto"
    """What activations are, where that was asked for."""
    head_bits: int = 16

    def unit_rows(self, batch_size: int) -> int:
        """Conversations of a unit of work: at most `batch_size`, and so that units do not straddle runs where
        that can be had."""
        count = len(self.questions) * self.choices
        return -(-count // -(-count // batch_size))

    def identity(self) -> dict[str, Any]:
        """All that defines the rows: a folder of another identity is refused."""
        content = [(question.prompt_id, question.turns, question.references) for question in self.questions]
        return {
            "benchmark": self.benchmark.name,
            "benchmark_version": self.benchmark.version,
            "split": self.split,
            "questions": len(self.questions),
            "questions_hash": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
            "choices": self.choices,
            "static_search": self.static_search,
            "template": self.template,
            "model_id": self.model_id,
            "model": self.model_fingerprint,
            "runs": {run.name: json.loads(run.describe()) for run in self.runs},
            **({} if self.dtype == "auto" else {"dtype": self.dtype}),
            **({} if self.head_bits == 16 else {"head_bits": self.head_bits}),
        }


def check_folder(sweep: Sweep, folder: str) -> None:
    """UserError, before any work, where `folder` holds the answers of another sweep."""
    answers = storage.join(folder, "answers")
    storage.check_config(answers, sweep.identity())
    if storage.list_shards(answers):
        storage.check_config(storage.join(folder, "conversations"), sweep.identity())


def generate(
    sweep: Sweep, model: ModelSpec, folder: str, slots: int | None, reuse_cache: bool, options: FarmOptions
) -> FarmResult:
    """Answers on the cluster that `farm.connect` joined; continues what an earlier call left undone. The rows
    are in `folder`."""
    conversations, identity = storage.join(folder, "conversations"), sweep.identity()
    answers = storage.join(folder, "answers")
    check_folder(sweep, folder)
    with Lease(folder) as lease:
        storage.discard_unused(conversations, identity, [answers])
        write_conversations(sweep, conversations)
        task = GenerateTask(model, sweep.runs, slots, reuse_cache)
        return run(task, {"conversations": conversations}, answers, identity, options, lease)


def write_conversations(sweep: Sweep, dataset: str) -> None:
    """Writes the CONVERSATIONS data set unless it is there already; one that was cut short is written
    again."""
    storage.write_dataset(
        dataset,
        storage.CONVERSATIONS,
        lambda counts: conversation_rows(
            sweep.benchmark,
            sweep.split,
            sweep.questions,
            sweep.runs,
            sweep.model_id,
            sweep.template,
            sweep.choices,
        ),
        sweep.identity(),
        rows_per_shard=CONVERSATIONS_PER_SHARD,
    )
