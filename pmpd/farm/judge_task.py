"""Judging on the farm: what is to be judged, and the recipe that a worker builds for it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pmpd import storage
from pmpd.errors import UserError
from pmpd.evaluation.judge import judgment
from pmpd.evaluation.judge_endpoint import Endpoint
from pmpd.farm.driver import FarmResult, run
from pmpd.farm.load_model import load_model
from pmpd.farm.options import FarmOptions
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place
from pmpd.storage.lease import Lease
from pmpd.weights.model_spec import ModelSpec


@dataclass(frozen=True)
class EndpointJudgeTask(FarmTask):
    """MATCHES -> JUDGMENTS, by a judge behind an endpoint; `parallel` requests at a time."""

    endpoint: Endpoint
    parallel: int = 8
    table = "judgments"
    id_column = "judgment_id"

    def build(self, place: Place) -> BuiltTask:
        def judge(item: Item) -> dict[str, Any]:
            match = item["matches"]
            begin = time.monotonic()
            try:
                text = self.endpoint.ask(match["system_text"], match["prompt_text"])
            except ValueError as error:  # JudgeError: this row has no judgment, the others may
                row = {**judgment(match, ""), "judgment_text": None, "score": None, "winner": None}
                row["error"] = str(error)
            else:
                row = judgment(match, text)
            return row | {"judge": self.endpoint.model, "seconds": time.monotonic() - begin}

        def judge_all(items: list[Item]) -> Iterator[dict[str, Any]]:
            with ThreadPoolExecutor(self.parallel) as pool:
                yield from pool.map(judge, items)

        return BuiltTask(run=judge_all, schema=storage.JUDGMENTS, models={"judge": self.endpoint.model})


@dataclass(frozen=True)
class ModelJudgeTask(FarmTask):
    """MATCHES -> JUDGMENTS, by a checkpoint that each worker loads, greedily at its highest precision."""

    model: ModelSpec
    name: str
    template: str
    max_new_tokens: int
    slots: int | None
    table = "judgments"
    id_column = "judgment_id"

    def build(self, place: Place) -> BuiltTask:
        from pmpd.benchmarks.conversation import stops
        from pmpd.decode.requests import Request
        from pmpd.evaluation.answer import encode, end_tokens

        model, device = load_model(self.model, place)
        stop = stops(self.template, model.tokenizer)
        ends = model.eos_token_ids | end_tokens(model.tokenizer, stop)

        def judge(items: list[Item]) -> Iterable[dict[str, Any]]:
            matches = {item["matches"]["judgment_id"]: item["matches"] for item in items}
            requests, rows = [], []
            for key, match in matches.items():
                turn = f"{match['system_text']}\n\n{match['prompt_text']}"
                _, ids = encode(model, self.template, [turn], [])
                if len(ids) + self.max_new_tokens > model.max_positions:
                    told = f"the prompt has {len(ids)} tokens: too long for the judge's {model.max_positions}"
                    rows.append({**judgment(match, ""), "judgment_text": None, "error": told})
                    continue
                requests.append(Request(key, ids, self.max_new_tokens))
            for done in model.complete(requests, None, model.precisions[0], self.slots, ends):
                if done.error:
                    rows.append({**judgment(matches[done.key], ""), "error": done.error})
                    continue
                text = stop.cut(model.tokenizer.decode(done.tokens, skip_special_tokens=True)).strip()
                rows.append(judgment(matches[done.key], text) | {"seconds": done.decode_seconds})
            return [{**row, "judge": self.name} for row in rows]

        return BuiltTask(
            run=judge,
            schema=storage.JUDGMENTS,
            models={"judge": model.fingerprint},
            pulse=model.pulse,
            device=device,
        )


def judge(
    task: EndpointJudgeTask | ModelJudgeTask,
    matches: Sequence[Mapping[str, Any]],
    folder: str,
    identity: Mapping[str, Any],
    options: FarmOptions,
) -> FarmResult:
    """Every match judged once, in `folder`; continues what an earlier call left undone. Needs
    `farm.connect`."""
    asked, judgments = storage.join(folder, "matches"), storage.join(folder, "judgments")
    for dataset in (asked, judgments):
        storage.check_config(dataset, identity)  # before any work
    if not matches:
        raise UserError("nothing to judge: no question was answered whole by the runs asked for")
    with Lease(folder) as lease:
        manifest = storage.check_config(asked, identity)
        if manifest is None or not storage.is_whole(asked, manifest, "judgment_id"):
            for path in storage.list_shards(asked):
                storage.remove(path)
            table = storage.to_table(matches, storage.MATCHES)
            storage.write_shard(
                table, storage.join(storage.data_folder(asked), "part-0.parquet"), row_group_rows=64
            )
            storage.write_manifest(
                asked, storage.MATCHES, identity, table="matches", complete=True,
                counts={"rows": len(matches), "errors": 0},
            )  # fmt: skip
        return run(task, {"matches": asked}, judgments, identity, options, lease)
