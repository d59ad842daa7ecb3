"""Labeling on the farm: the recipes that a worker builds for references and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pmpd import storage
from pmpd.farm.load_model import load_model
from pmpd.farm.task import BuiltTask, FarmTask, Item, LateRow, Place
from pmpd.labeling.rule import RULES, LabelRule
from pmpd.schedulers.chain import class_steps, sixths_plans
from pmpd.weights.model_spec import ModelSpec


@dataclass(frozen=True)
class ReferenceTask(FarmTask):
    """PROMPTS -> REFERENCES: the unquantized model's continuations."""

    model: ModelSpec
    max_new_tokens: int
    slots: int | None
    table = "references"

    @property
    def most_forwards(self) -> float:
        return float(self.max_new_tokens)

    def build(self, place: Place) -> BuiltTask:
        from pmpd.labeling.config import LabelConfig
        from pmpd.labeling.label import reference_prompts

        model, device = load_model(self.model, place)
        config = LabelConfig(max_new_tokens=self.max_new_tokens, slots=self.slots)
        return BuiltTask(
            run=lambda items: reference_prompts(model, [item["prompts"] for item in items], config),
            schema=storage.REFERENCES,
            models={"reference_model": model.fingerprint},
            device=device,
            tokens=lambda row: len(row["reference_ids"]),
            pulse=model.pulse,
        )


@dataclass(frozen=True)
class LabelTask(FarmTask):
    """PROMPTS and REFERENCES -> LABELS: the label of every pair and the KV features."""

    model: ModelSpec
    precisions: tuple[int, ...]
    max_new_tokens: int
    slots: int | None
    rule: LabelRule = RULES["rouge_l"]
    reference_model: ModelSpec | None = None
    """The unquantized model, which a teacher-forced rule needs beside the quantized one."""
    prefer_dense: bool = False
    """On a GPU, weights are dequantized once where many rows decode together and memory allows."""
    table = "labels"

    @property
    def most_forwards(self) -> float:
        """Trajectories share what they have in common: of each pair, the branches from their forks on. A
        teacher-forced rule takes a forward a plan, the prefill's, and the probe's at each precision."""
        if self.rule.branches == "teacher_forced":
            return float(len(sixths_plans(len(self.precisions) - 1)) + 1 + len(self.precisions))
        steps, most = class_steps(self.max_new_tokens), float(self.max_new_tokens)
        return most + (len(self.precisions) - 1) * sum(most - step for step in steps[:-1])

    @property
    def recorded(self) -> dict[str, Any]:
        """Where the models were, by which `pmpd train` says what comes next."""
        found: dict[str, Any] = {"model_path": self.model.path}
        if self.model.multi_model:
            found["use_multi_model"] = True
        if self.reference_model is not None:
            found["reference_model_path"] = self.reference_model.path
        return found

    def build(self, place: Place) -> BuiltTask:
        from pmpd.labeling.config import LabelConfig
        from pmpd.labeling.label import Labeler
        from pmpd.weights.batch_kernel import prefer_dense

        model, device = load_model(self.model, place)
        forced = self.rule.branches == "teacher_forced"
        together = None if forced else self.slots  # a forced row's tokens are all multiplied together
        note = prefer_dense(model, model.device, together) if self.prefer_dense else ""
        assert not forced or self.reference_model is not None
        unquantized = load_model(self.reference_model, place)[0] if forced and self.reference_model else None
        config = LabelConfig(self.precisions, self.max_new_tokens, self.slots, self.rule)

        ask: list[Callable[[], list[Item]]] = []

        def offered() -> dict[str, Any]:
            return {item["prompts"]["prompt_id"]: item["prompts"] for of in ask for item in of()}

        on_gpu = model.device.type == "cuda"
        labeler = Labeler(model, config, unquantized, offered, own_process=on_gpu and not forced)

        def label(items: list[Item]) -> Iterable[LateRow]:
            references = {item["references"]["prompt_id"]: item["references"] for item in items}
            for key, row in labeler([item["prompts"] for item in items], references):
                yield LateRow(key, row.result)

        def tokens(row: dict[str, Any]) -> int:  # none is decoded by a teacher-forced rule
            return sum(count or 0 for pair in row["pairs"] for count in pair["branch_tokens"])

        return BuiltTask(
            run=label,
            schema=storage.labels_schema(model.head_dim),
            offers=ask.append,
            models={"model": model.fingerprint, "num_key_value_heads": model.kv_heads},
            device=device,
            note=note,
            tokens=tokens,
            pulse=model.pulse,
        )
