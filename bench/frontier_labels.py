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

import contextlib
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
from pmpd.labeling import curves
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
    folder: str = ""
    """Whose rows these are; the set's own name by default."""


SETS: dict[str, LabelSet] = {
    "main": LabelSet(again=False),
    "more": LabelSet(again=False, folder="main"),
    "cost": LabelSet(),
    "bfloat16": LabelSet(other_reference=True),
    "space": LabelSet(space=True),
    "cut": LabelSet(seed=1, kinds=("continuations",)),
    "tokens": LabelSet(tokens_share=0.5),
}
"""By name. `more` goes on behind the prompts of `main`; `cost` is `main` for few records, to be run alone
on a device that is measured."""


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
    more_size: int = 0
    """Where `more` ends: prompts of both together."""
    noise_size: int = 512
    """Prompts of every other set."""
    wait_seconds: float = 0
    """So long the quantized model may be on its way; the references are made meanwhile."""
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
    logit_bytes: int = 2**31
    """Memory of a GPU that the distributions of a batch may take."""
    threads: int = 2
    rules: tuple[str, ...] = RULES_MADE


def main_folders(study: Path) -> list[str]:
    """What `pmpd label --rule kl` would have written of the set `main`: a folder for each kind there is."""
    folders = [str(study / "main" / "kl" / kind) for kind in KINDS]
    return [folder for folder in folders if storage.list_shards(storage.join(folder, "labels"))]


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
    size = config.noise_size if made.again else config.more_size if made.folder else config.size
    first = config.size // len(made.kinds) if made.folder else 0
    form: Form = "chat" if kind == "instructions" else "cut"
    source = PromptConfig(
        str(config.texts / f"{kind}.jsonl"), None, None, 10**9, made.seed, form, config.max_prompt_tokens
    )
    make = PromptMaker(tokenizer, source, config.max_prompt_tokens)
    rows = []
    for index, document in enumerate(documents(source)):
        if index == max(1, size // len(made.kinds)):
            break
        if index >= first and index % parts == part:
            text = (" " if made.space else "") + document["text"]
            rows.append(make({**document, "text": text}))
    return rows


def write_rows(rows: Iterable[dict[str, Any]], dataset: Path, schema: Any, name: str) -> int:
    """Shards of a part by this name; rows."""
    held: list[dict[str, Any]] = []
    written = 0

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


@dataclass(frozen=True)
class Referenced:
    """Prompts of a set and kind, with their references."""

    name: str
    kind: str
    prompts: list[dict[str, Any]]
    references: dict[str, dict[str, Any]]
    plain: LabelConfig


class Costs:
    """What steps took, written as they end."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.output / f"costs-{config.name}-{config.part.split('/')[0]}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[dict[str, Any]] = []

    def timed(self, step: str, name: str, kind: str, prompts: int, work: Any) -> Any:
        started = time.perf_counter()
        found = work()
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        line = {"set": name, "kind": kind, "prompts": prompts, "part": self.config.part, "step": step}
        self.lines.append({**line, "seconds": seconds})
        print(json.dumps(self.lines[-1]), flush=True)
        self.path.write_text(json.dumps(self.lines, indent=1) + "\n")
        return found


def referenced(name: str, config: Config, models: Models, costs: Costs) -> Iterator[Referenced]:
    """The references of one set, kind by kind."""
    made = SETS[name]
    unquantized = models.get("other" if made.other_reference else "reference")
    plain = LabelConfig(max_new_tokens=int(config.max_new_tokens * made.tokens_share), slots=config.slots)
    for kind in made.kinds:
        prompts = prompts_of(config, made, kind, unquantized.tokenizer)
        usable = [row for row in prompts if not row["error"]]
        rows = costs.timed(
            "references",
            name,
            kind,
            len(usable),
            lambda u=usable: list(reference_prompts(unquantized, u, plain)),
        )
        yield Referenced(name, kind, prompts, {row["prompt_id"]: row for row in rows}, plain)


def label_set(made: Referenced, rule: str, config: Config, models: Models, costs: Costs) -> None:
    """Labels of one set and kind by one rule."""
    quantized = models.get("quantized")
    unquantized = models.get("other" if SETS[made.name].other_reference else "reference")
    schema = storage.labels_schema(quantized.head_dim)
    usable = [row for row in made.prompts if not row["error"]]
    shards = f"{made.name}-{config.part.split('/')[0]}"
    folder = config.output / (SETS[made.name].folder or made.name) / rule / made.kind
    write_rows(made.prompts, folder / "prompts", storage.PROMPTS, shards)
    labelling = replace(made.plain, precisions=quantized.precisions, rule=RULES[rule])
    rows = label_prompts(quantized, usable, made.references, labelling, unquantized)
    costs.timed(
        rule, made.name, made.kind, len(usable), lambda: write_rows(rows, folder / "labels", schema, shards)
    )


def finish(config: Config) -> None:
    """A manifest for each dataset, so that every command reads it."""
    quantized, unquantized = (
        ModelSpec(path).open() for path in (config.model_path, config.reference_model_path)
    )
    reading = PMPDForCausalLM(config.model_path)
    schema = storage.labels_schema(reading.head_dim)
    for name in config.sets:
        made = SETS[name]
        if made.folder:
            continue
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
                    if not storage.list_shards(str(folder / table)):
                        print(f"{folder / table}: nothing there")
                        continue
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
    models, costs = Models(config), Costs(config)
    curves.LOGIT_BYTES["cuda"] = config.logit_bytes
    quantized, deadline = Path(config.model_path) / "config.json", time.monotonic() + config.wait_seconds
    if quantized.is_file():  # set by set: who runs out of time has the first ones whole
        turns = [[name] for name in config.sets]
    else:
        behind = [name for name in config.sets if SETS[name].folder]
        turns = [[name for name in config.sets if name not in behind], behind]
    for names in turns:
        every: list[Referenced] = []
        for name in names:
            with others_go_on():
                every += referenced(name, config, models, costs)
        while not quantized.is_file() and time.monotonic() < deadline:
            time.sleep(1)
        for rule in config.rules:
            for made in every:
                with others_go_on():
                    label_set(made, rule, config, models, costs)


@contextlib.contextmanager
def others_go_on() -> Iterator[None]:
    """A set that fails is told; the others are worth having."""
    try:
        yield
    except Exception:
        traceback.print_exc()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
