"""KV features for prompts that have labels already: one prefill each, on the farm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pmpd import storage
from pmpd.farm.load_model import load_model
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place
from pmpd.weights.model_spec import ModelSpec


@dataclass(frozen=True)
class FeatureTask(FarmTask):
    """LABELLED_PROMPTS -> LABELS: the labels as they came, with the features of a prefill at the model's
    highest precision."""

    model: ModelSpec
    slots: int | None
    rule: str
    """What the rows say of the label rule."""
    table = "labels"

    @property
    def most_forwards(self) -> float:
        return 1.0

    def build(self, place: Place) -> BuiltTask:
        from pmpd.decode.requests import Request

        model, device = load_model(self.model, place)

        def features(items: list[Item]) -> Iterable[dict[str, Any]]:
            rows = {item["prompts"]["prompt_id"]: item["prompts"] for item in items}
            requests = [
                Request(key, row["input_ids"], max_new_tokens=1, want_features=True)
                for key, row in rows.items()
            ]
            for done in model.complete(requests, None, model.precisions[0], self.slots):
                row = rows[done.key]
                keys, values = done.features if done.features is not None else (None, None)
                yield {
                    **{name: row[name] for name in ("prompt_id", "prompt_tokens", "prompt_text")},
                    "input_ids": row["input_ids"],
                    "rule": self.rule,
                    "pairs": None if done.error else row["pairs"],
                    "keys": keys,
                    "values": values,
                    "feature_tokens": None if keys is None else len(keys),
                    "seconds": done.prefill_seconds,
                    "error": done.error,
                }

        return BuiltTask(
            run=features,
            schema=storage.labels_schema(model.head_dim),
            models={"model": model.fingerprint, "num_key_value_heads": model.kv_heads},
            device=device,
            tokens=lambda row: 1,
            pulse=model.pulse,
        )
