"""A torch file of labelled prompts, as the published second stage is -> a labels dataset to train on."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pmpd import farm, storage
from pmpd.cli.flags.train import TrainJob
from pmpd.errors import UserError
from pmpd.farm.feature_task import FeatureTask
from pmpd.farm.train import LabelSource
from pmpd.labeling.prompts import MAX_DOCUMENT_TOKENS
from pmpd.labeling.torch_records import (
    IDS,
    KVFeatures,
    TorchRecords,
    features_of,
    labels_of,
)
from pmpd.labeling.torch_rows import RULE, label_rows, labelled_prompt_rows
from pmpd.schedulers.chain import pairs_of, parse_chain
from pmpd.weights.model_spec import ModelSpec, check_held

Pairs = list[tuple[int, int]] | None

_ROWS_PER_SHARD = 256


def labels_of_file(
    job: TrainJob, output: str, console: Console, options: farm.FarmOptions | None = None
) -> LabelSource:
    """The labels of the .pt file `job.data_path` as a dataset in `output`, made unless it is there. KV
    features are the file's, or those of prefills by `job.model_path`, spread by `options`. UserError, with
    the cure, where the file lacks something."""
    source = TorchRecords.read(job.data_path, "--data-path")
    pairs = pairs_of(parse_chain(job.precisions)) if job.precisions else None
    features = _first_features(source)
    if features is None and job.model_path is None:
        raise UserError(
            f"--data-path {job.data_path}: {source.told}, no KV features; give --model-path of the "
            f"quantized model that the labels are of, which makes them"
        )
    made_from = "its KV features" if features else f"KV features by prefills of {job.model_path}"
    told = f"{job.data_path}: {source.told}; {made_from}"
    unused = source.unused()
    console.print(told + (f"; not used: {', '.join(unused)}" if unused else ""), soft_wrap=True)
    identity = {
        "data_path": source.name,
        "content": source.fingerprint(),
        "precisions": job.precisions,
    }
    dataset = storage.join(output, "labels")
    if features is None:
        options = options or farm.FarmOptions(unit_rows=farm.batch_of("auto")[1])
        return _with_prefills(source, job, pairs, dataset, identity, options)
    heads = job.num_heads or features.heads or _heads_of(job)
    width = features.keys.shape[1]
    counts = storage.write_dataset(
        dataset,
        storage.labels_schema(width),
        lambda counts: label_rows(source, pairs, width),
        identity,
        rows_per_shard=_ROWS_PER_SHARD,
    )
    console.print(f"{counts['rows']} labelled prompts, {counts['errors']} of them unusable, in {dataset}")
    return LabelSource(dataset, None, heads)


def _first_features(source: TorchRecords) -> KVFeatures | None:
    """Of the first record that has usable ones; None where the first records have none."""
    for record in source.records[:100]:
        try:
            found = features_of(record)
        except ValueError:  # that record's own fault: it becomes an error row
            continue
        if found is not None:
            return found
    return None


def _heads_of(job: TrainJob) -> int:
    if job.model_path is None:
        raise UserError(
            f"--data-path {job.data_path}: its KV features are averaged over the kv heads, and it does not "
            f"say how many those were; give --num-heads, or --model-path of the labelled model"
        )
    config = ModelSpec(job.model_path, job.model_path.endswith(".json")).open().config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _with_prefills(
    source: TorchRecords,
    job: TrainJob,
    pairs: Pairs,
    dataset: str,
    identity: dict[str, Any],
    options: farm.FarmOptions,
) -> LabelSource:
    source.require("token ids", IDS, "save the prompts with them")
    assert job.model_path is not None
    highest = max(high for high, _ in pairs or list(labels_of(source.records[0], None)))
    spec = ModelSpec(job.model_path, job.model_path.endswith(".json"), (highest,))
    checkpoint = spec.open()
    check_held(checkpoint, job.model_path, {"--precisions": (highest,)})
    limit = min(MAX_DOCUMENT_TOKENS, getattr(checkpoint.config(), "max_position_embeddings", 2**31))
    tokenizer = checkpoint.tokenizer()
    prompts = f"{dataset}-prompts"
    identity |= {"model": checkpoint.fingerprint(), "prefill_bit": highest}
    storage.write_dataset(
        prompts,
        storage.LABELLED_PROMPTS,
        lambda counts: labelled_prompt_rows(source, tokenizer, limit, pairs),
        identity,
        rows_per_shard=4 * _ROWS_PER_SHARD,
        row_group_rows=64,
    )
    farm.connect(options)
    farm.run(FeatureTask(spec, None, RULE), {"prompts": prompts}, dataset, identity, options)
    return LabelSource.open(dataset, job.num_heads)
