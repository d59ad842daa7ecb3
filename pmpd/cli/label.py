"""Label prompts with the switch class that keeps their quality: what a learned scheduler is trained on."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from pmpd import farm, plugins, storage
from pmpd.cli.flags.label import LabelJob
from pmpd.errors import UserError
from pmpd.evaluation.presets import get_preset
from pmpd.farm.connection import output_folder
from pmpd.farm.label_task import LabelTask, ReferenceTask
from pmpd.farm.prompt_task import PromptTask, write_prompts
from pmpd.farm.task import FarmTask
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.prompts import PromptConfig
from pmpd.labeling.rule import LabelRule, NothingToScoreError, get_rule
from pmpd.schedulers.chain import NUM_CLASSES, class_steps, parse_chain
from pmpd.weights.model_spec import ModelSpec, check_held, shared_tokenizer

AUTO = "auto"


def main(job: LabelJob, console: Console | None = None) -> farm.FarmResult | None:
    """Runs the stages and prints the table; the result of the last one. ValueError for anything the user can
    cure."""
    console = console or Console()
    plugins.load(job.plugins)
    slots, unit_rows = farm.batch_of(job.batch_size)
    source, rule = what_is_labelled(job)
    chain = LabelConfig(parse_chain(job.precisions), job.max_new_tokens, slots).precisions
    options = farm.FarmOptions(
        job.num_workers,
        job.gpus_per_worker,
        unit_rows,
        job.retry_errors,
        job.stall_seconds,
        job.price_per_worker_hour,
    )
    model = ModelSpec(
        job.model_path,
        job.use_multi_model,
        chain,
        None if job.kernel == AUTO else job.kernel,
        job.dtype,
        job.trust_remote_code,
        head_bits=job.head_bits,
    )
    reference_model = ModelSpec(
        job.reference_model_path,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
        flag="--reference-model-path",
    )
    quantized, reference = model.open(), reference_model.open_unquantized()
    check_held(quantized, job.model_path, {"--precisions": chain})
    positions = min(
        getattr(checkpoint.config(), "max_position_embeddings", 2**31)
        for checkpoint in (quantized, reference)
    )
    shared_tokenizer([reference, quantized])

    files = (
        source.source if source.kind == "local" else None
    )  # refused before any work where a split is missing
    if files is not None and files.skipped:
        console.print(
            f"{len(files.files)} files read, {files.skipped} of other splits or configurations left out"
        )
    if source.kind == "tokens":
        console.print(f"{source.dataset}: {source.torch_records.told}", soft_wrap=True)
    output = output_folder(job.output_dir)
    prompts, references, labels = (storage.join(output, name) for name in ("prompts", "references", "labels"))
    identity = {
        "dataset": source.name,
        "dataset_config": source.resolved_config,
        "split": source.resolved_split,
        "size": job.size,
        **source.unusual,
    }
    identity |= {
        "seed": job.seed,
        "max_new_tokens": job.max_new_tokens,
        "reference_model": reference.fingerprint(),
    }
    if job.dtype != "auto":
        identity["dtype"] = job.dtype
    label_identity = {**identity, "precisions": list(chain), "model": quantized.fingerprint()}
    label_identity["rule"] = rule.identity
    if job.head_bits != 16:
        label_identity["head_bits"] = job.head_bits
    for folder, config in ((references, identity), (labels, label_identity), (prompts, identity)):
        # before any work; prompts of which nothing was made yet are made again
        if folder != prompts or job.stage == "prompts" or storage.list_shards(references):
            storage.check_config(folder, config)

    result = None
    farm.connect(options)
    with storage.Lease(output) as lease, farm.keep_workers(options):
        if job.stage != "prompts" and storage.discard_unused(prompts, identity, [references, labels]):
            console.print("the prompts of another configuration, of which nothing was made yet, are replaced")
        making = PromptTask(reference_model, source, positions - job.max_new_tokens)
        counts = write_prompts(making, prompts, identity, options, lease)
        told = ", ".join(
            f"{counts[what]} {what}" for what in ("duplicates", "empty", "malformed") if counts.get(what)
        )
        console.print(
            f"{counts['rows']} prompts"
            + (f" ({told})" if told else "")
            + f" in {storage.data_folder(prompts)}"
        )
        if counts.get("errors"):
            console.print(
                f"the first one that is unusable: {first_error(prompts, ('source', 'error'))}", soft_wrap=True
            )
        if job.stage in ("all", "references"):
            task: FarmTask = ReferenceTask(reference_model, job.max_new_tokens, slots)
            result = farm.run(task, {"prompts": prompts}, references, identity, options, lease)
        if job.stage in ("all", "labels"):
            task = LabelTask(
                model, chain, job.max_new_tokens, slots, rule, reference_model, job.kernel == AUTO
            )
            result = farm.run(
                task, {"prompts": prompts, "references": references}, labels, label_identity, options, lease
            )
    if result is not None:
        unscored = 0
        if result.dataset == labels:
            console.print(label_table(labels, job.max_new_tokens))
            unscored = tell_unscored(labels, console)
        rate = (
            f", {result.new_items} of them new, {result.rows_per_second:.2f} per second"
            if result.new_items
            else ""
        )
        console.print(
            f"{result.rows} rows{rate}; {result.errors} with an error"
            + ("; --retry-errors does them again" * (result.errors > unscored))
        )
        console.print(f"Parquet:    {storage.data_folder(result.dataset)}", soft_wrap=True)
        console.print(f"look:       pmpd inspect {result.dataset}", soft_wrap=True)
        if result.dataset == labels:
            console.print(
                f"train next: pmpd train --data-path {labels} --precisions {job.precisions}",
                soft_wrap=True,
            )
        if result.errors == result.rows:
            raise UserError(f"every row has an error; the first one: {first_error(result.dataset)}")
    return result


def what_is_labelled(job: LabelJob) -> tuple[PromptConfig, LabelRule]:
    """The prompts and the label rule: the flags, then the preset, then the defaults. A preset's configuration
    and split are those of its own data set."""
    preset = get_preset(job.preset).labels if job.preset else {}
    dataset = job.dataset or preset.get("dataset", "demo")
    config, split = job.dataset_config, job.split
    if dataset == preset.get("dataset"):
        config, split = config or preset["dataset_config"], split or preset["split"]
    source = PromptConfig(dataset, config, split, job.size, job.seed, job.prompt_form, job.max_prompt_tokens)
    return source, get_rule(job.rule or preset.get("rule", "rouge_l"))


def tell_unscored(dataset: str, console: Console) -> int:
    """How many references had nothing to score. Says that it is expected where they are few, and in bold that
    it is not where they are more than a tenth."""
    errors = storage.read_table(dataset, ["error"])["error"].to_pylist()
    unscored = [error for error in errors if error and error.startswith(NothingToScoreError.__name__)]
    if not unscored:
        return 0
    many = len(unscored) > len(errors) / 10
    console.print(
        f"{len(unscored)} of {len(errors)} references have nothing to score"
        + (
            ", so these labels say little of this text"
            if many
            else ": expected of a few; their rows hold an error, and pmpd train leaves them out"
        )
        + f"; the first: {unscored[0].splitlines()[0]}",
        style="bold" if many else None,
        soft_wrap=True,
    )
    return len(unscored)


def label_table(dataset: str, max_new_tokens: int) -> Table:
    """Rows and share of each class, per pair."""
    counts: Counter[tuple[str, int]] = Counter()
    names = ("high", "low", "label")
    for path in storage.list_shards(
        dataset
    ):  # these leaves only: texts, ids and features of all rows would not fit
        pairs = (
            storage.read_shard(path, [f"pairs.list.element.{name}" for name in names])["pairs"]
            .combine_chunks()
            .flatten()
        )
        high, low, label = (pairs.field(name).to_pylist() for name in names)
        counts.update((f"{h},{lo}", k) for h, lo, k in zip(high, low, label, strict=True))
    table = Table(title="labels: rows per switch class (high-precision steps)")
    for column in ("pair", *(f"{k} ({steps})" for k, steps in enumerate(class_steps(max_new_tokens)))):
        table.add_column(column, justify="right")
    for name in sorted({name for name, _ in counts}, reverse=True):
        total = sum(counts[name, k] for k in range(NUM_CLASSES))
        table.add_row(
            name, *(f"{counts[name, k]}  {counts[name, k] / total:4.0%}" for k in range(NUM_CLASSES))
        )
    return table


def first_error(dataset: str, columns: tuple[str, ...] = ("error",)) -> str:
    """The first error of a table, with what else these columns say of its row."""
    rows = storage.read_table(dataset, columns).to_pylist()
    return next(": ".join(row[name] for name in columns) for row in rows if row["error"])
