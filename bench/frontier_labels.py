"""Label sets of the scheduler study, several rules and repetitions in one process, models loaded once.

    python -m bench.frontier_labels --texts study/texts --model-path Q --reference-model-path U \\
        --output study --sets main bfloat16 space --size 4400 --noise-size 512 --part 0/4

Every set is two label datasets as `pmpd label --rule kl` and `--rule agreement` (which stores ROUGE-L too)
write them, below OUTPUT/SET/KIND/; a part writes shards of its own and `--finish` the manifests. Both rules
see the same references. What each step took stands in OUTPUT/costs-NAME.json: of a run alone on its device,
GPU seconds. One set that fails does not end the others.

Sets (`SETS`): main; the same records again with references of another precision, a space before the text,
another cut, half the new tokens.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from pmpd import PMPDForCausalLM, storage
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import label_prompts, reference_prompts
from pmpd.labeling.prompts import Form, PromptConfig, PromptMaker, documents
from pmpd.labeling.rule import RULES
from pmpd.weights.model_spec import Dtype, ModelSpec

KINDS = ("continuations", "instructions")
RULES_MADE = ("kl", "agreement")
SHARD_ROWS = 256


@dataclass(frozen=True)
class LabelSet:
    """How a set differs from `main`."""

    again: bool = True
    """Of the first `noise_size` records only."""
    other_reference: bool = False
    """References by the unquantized model in the other dtype."""
    space: bool = False
    """A space before every text."""
    seed: int = 0
    """Of the cut."""
    tokens_share: float = 1.0
    kinds: tuple[str, ...] = KINDS


SETS: dict[str, LabelSet] = {
    "main": LabelSet(again=False),
    "cost": LabelSet(),
    "bfloat16": LabelSet(other_reference=True),
    "space": LabelSet(space=True),
    "cut": LabelSet(seed=1, kinds=("continuations",)),
    "tokens": LabelSet(tokens_share=0.5),
}
"""By name. `cost` is `main` for few records, to be run alone on a device that is measured."""


@dataclass(frozen=True)
class Config:
    texts: Path
    """Folder of continuations.jsonl and instructions.jsonl (`bench.frontier prompts`)."""
    model_path: str
    reference_model_path: str
    output: Path
    sets: tuple[str, ...] = ("main",)
    size: int = 4400
    """Prompts of `main`, of both kinds together."""
    noise_size: int = 512
    """Prompts of every other set."""
    max_new_tokens: int = 256
    max_prompt_tokens: int = 256
    slots: int = 256
    dtype: Dtype = "auto"
    """Of the quantized model."""
    reference_dtype: Dtype = "float32"
    other_dtype: Dtype = "bfloat16"
    """Of the references of the set `bfloat16`."""
    kernel: str | None = None
    device: str = "cpu"
    part: str = "0/1"
    """Which of how many parts of each set this process makes."""
    name: str = "labels"
    """costs-NAME.json; a part adds its number."""
    finish: bool = False
    """Write the manifests of what all parts made; nothing is labelled."""
    threads: int = 2
    rules: tuple[str, ...] = RULES_MADE


@dataclass
class Models:
    """The models by what they are for, loaded when first asked for."""

    config: Config
    held: dict[str, PMPDForCausalLM] = field(default_factory=dict)

    def get(self, name: str) -> PMPDForCausalLM:
        if name not in self.held:
            config = self.config
            quantized = ModelSpec(config.model_path, dtype=config.dtype, kernel=config.kernel)
            spec = {
                "quantized": quantized,
                "reference": ModelSpec(config.reference_model_path, dtype=config.reference_dtype),
                "other": ModelSpec(config.reference_model_path, dtype=config.other_dtype),
            }[name]
            self.held[name] = PMPDForCausalLM.from_spec(spec, torch.device(config.device)).eval()
        return self.held[name]


def prompts_of(config: Config, made: LabelSet, kind: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The PROMPTS rows of a set that this part makes."""
    part, parts = (int(number) for number in config.part.split("/"))
    size = config.noise_size if made.again else config.size
    form: Form = "chat" if kind == "instructions" else "cut"
    source = PromptConfig(
        str(config.texts / f"{kind}.jsonl"), None, None, 10**9, made.seed, form, config.max_prompt_tokens
    )
    make = PromptMaker(tokenizer, source, config.max_prompt_tokens)
    rows = []
    for index, document in enumerate(documents(source)):
        if index == max(1, size // len(made.kinds)):
            break
        if index % parts == part:
            text = (" " if made.space else "") + document["text"]
            rows.append(make({**document, "text": text}))
    return rows


def write_rows(rows: Iterable[dict[str, Any]], dataset: Path, schema: Any, part: str) -> int:
    """Shards of this part; rows."""
    held: list[dict[str, Any]] = []
    written = 0
    name = part.split("/")[0]

    def flush() -> None:
        path = storage.join(storage.data_folder(str(dataset)), f"part-{name}-{written:05}.parquet")
        storage.write_shard(storage.to_table(held, schema), path)
        held.clear()

    for row in rows:
        held.append(row)
        if len(held) == SHARD_ROWS:
            flush()
            written += SHARD_ROWS
    if held:
        count = len(held)
        flush()
        return written + count
    return written


def make_set(name: str, config: Config, models: Models) -> Iterator[dict[str, Any]]:
    """Labels of one set, kind by kind; a line of costs for every step."""
    made, quantized = SETS[name], models.get("quantized")
    unquantized = models.get("other" if made.other_reference else "reference")
    tokens = int(config.max_new_tokens * made.tokens_share)
    plain = LabelConfig(quantized.precisions, tokens, config.slots)
    schema = storage.labels_schema(quantized.head_dim)
    for kind in made.kinds:
        folder = config.output / name
        prompts = prompts_of(config, made, kind, quantized.tokenizer)
        usable = [row for row in prompts if not row["error"]]
        for rule in config.rules:
            write_rows(prompts, folder / rule / kind / "prompts", storage.PROMPTS, config.part)
        line = {"set": name, "kind": kind, "prompts": len(usable), "part": config.part}

        def timed(step: str, work: Any, line: dict[str, Any] = line) -> tuple[dict[str, Any], Any]:
            started = time.perf_counter()
            found = work()
            if config.device == "cuda":
                torch.cuda.synchronize()
            return {**line, "step": step, "seconds": time.perf_counter() - started}, found

        made_rows = reference_prompts(unquantized, usable, plain)
        cost, references = timed("references", lambda rows=made_rows: list(rows))
        yield cost
        by_id = {row["prompt_id"]: row for row in references}
        for rule in config.rules:
            labelling = replace(plain, rule=RULES[rule])
            rows = label_prompts(quantized, usable, by_id, labelling, unquantized)
            dataset = folder / rule / kind / "labels"
            cost, _ = timed(rule, lambda r=rows, d=dataset: write_rows(r, d, schema, config.part))
            yield cost


def finish(config: Config) -> None:
    """A manifest for each dataset, so that every command reads it."""
    quantized, unquantized = (
        ModelSpec(path).open() for path in (config.model_path, config.reference_model_path)
    )
    reading = PMPDForCausalLM(config.model_path)
    schema = storage.labels_schema(reading.head_dim)
    for name in config.sets:
        made = SETS[name]
        for rule in config.rules:
            for kind in made.kinds:
                about = {
                    "dataset": f"{kind}.jsonl",
                    "prompt_form": "chat" if kind == "instructions" else "cut",
                    "max_prompt_tokens": config.max_prompt_tokens,
                    "seed": made.seed,
                    "max_new_tokens": int(config.max_new_tokens * made.tokens_share),
                    "precisions": list(reading.precisions),
                    "rule": RULES[rule].identity,
                    "model": quantized.fingerprint(),
                    "reference_model": unquantized.fingerprint(),
                    "reference_dtype": config.other_dtype if made.other_reference else config.reference_dtype,
                }
                folder = config.output / name / rule / kind
                for table, columns in (("prompts", storage.PROMPTS), ("labels", schema)):
                    errors = storage.read_table(str(folder / table), ["error"])["error"].to_pylist()
                    models = {"model": quantized.fingerprint(), "num_key_value_heads": reading.kv_heads}
                    storage.write_manifest(
                        str(folder / table),
                        columns,
                        about,
                        table=table,
                        complete=True,
                        models=models if table == "labels" else {},
                        counts={"rows": len(errors), "errors": sum(map(bool, errors))},
                        device=config.device,
                    )


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    if config.finish:
        finish(config)
        return
    models, costs = Models(config), []
    path = config.output / f"costs-{config.name}-{config.part.split('/')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in config.sets:
        try:
            for cost in make_set(name, config, models):
                costs.append(cost)
                print(json.dumps(cost), flush=True)
                path.write_text(json.dumps(costs, indent=1) + "\n")
        except Exception:  # the other sets are worth having
            traceback.print_exc()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
