"""Fit a learned scheduler to labels: `pmpd train` after `pmpd label`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pmpd import farm, plugins, storage
from pmpd.cli.flags.generate import GenerateJob
from pmpd.cli.flags.train import TrainJob
from pmpd.cli.given_labels import labels_of_file
from pmpd.errors import UserError
from pmpd.farm.train import Fleet, LabelSource, fit, read_labels, search
from pmpd.labeling.noise import Agreement, ceilings
from pmpd.labeling.prompts import TORCH_SUFFIX
from pmpd.schedulers.chain import chain_of_pairs, pairs_of, parse_chain
from pmpd.schedulers.regression import WEIGHTS
from pmpd.training.config import TrainConfig
from pmpd.training.data import Labels, in_words
from pmpd.training.fit import loss_scale
from pmpd.training.regression import COLUMNS, Fitted, fit_regression, read_curves
from pmpd.training.result import artefact, check_target


def results_table(metrics: dict[str, Any], split: str = "test") -> Table:
    """One line per pair and policy on the held-out prompts, with 95 % bootstrap intervals."""
    table = Table(
        title=f"held-out prompts ({split} split), 95 % bootstrap intervals",
        caption="learned: this scheduler; mean_pooled: a linear one on the cache's mean; majority: the most "
        "frequent class for all; static_k: class k for all; random: classes as often as in the training "
        "split; oracle: the label itself. Quality loss: share of prompts whose class is below their label.",
        caption_justify="left",
    )
    for column in ("pair", "policy", "rows", "accuracy", "macro-F1", "average bits", "quality loss"):
        table.add_column(column, no_wrap=column == "policy")
    for pair, splits in metrics.items():
        report = splits.get(split, {"rows": 0, "policies": {}})
        for name, policy in report["policies"].items():
            cells = [
                f"{policy[measure]:.3f} [{policy['interval'][measure][0]:.3f}, "
                f"{policy['interval'][measure][1]:.3f}]"
                for measure in ("accuracy", "macro_f1", "average_bits", "quality_loss")
            ]
            table.add_row(pair, name, str(report["rows"]), *cells)
    return table


def budget_line(budget: dict[str, Any]) -> str:
    """Whether the bit budget was reached, in words."""
    grade = "reached" if budget["reached"] else "not reached"
    test = budget["test_bits"]
    there = "" if test is None else f", {test:.2f} on the test prompts"
    return (
        f"{budget['target_bits']:g} bits on average: {grade}, {budget['bits']:.2f} on {budget['prompts']} "
        f"validation prompts{there}; the scheduler `budget` keeps to it"
    )


def gains_table(fitted: Fitted) -> Table:
    """What the regression gains over the best static plans at equal bits, on the test prompts."""
    prompts = fitted.counts["test"]
    table = Table(
        title=f"{prompts} held-out prompts (test split), 95 % bootstrap intervals",
        caption="loss: divergence from the unquantized model, nats a forward; gain: how much less that is "
        "than what the best static plans of as many bits lose.",
        caption_justify="left",
    )
    for column in ("target", "bits", "loss", "static at these bits", "gain, %", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in fitted.judged:
        values = [row[name] for name in ("loss", "static_loss")]
        table.add_row(
            f"{row['target_bits']:g}",
            f"{row['bits']:.3f}",
            *(f"{value:.4f}" for value in values),
            f"{row['gain_percent']:+.1f}",
            f"[{row['low_percent']:+.1f}, {row['high_percent']:+.1f}]",
        )
    return table


def gain_line(fitted: Fitted) -> str | None:
    """Whether the regression pays at its target, in words; None without test prompts, or where the target
    leaves it no choice."""
    if fitted.fixed_plan is not None:
        return None
    target = fitted.calibration.target_bits
    row = next((row for row in fitted.judged if row["target_bits"] == target), None)
    if row is None:
        return None
    gain, low, high = (row[f"{end}_percent"] for end in ("gain", "low", "high"))
    grade = "better" if low > 0 else "worse" if high < 0 else "neither is surely better"
    than = "more" if gain < 0 else "less"
    return (
        f"with a target of {target:g} bits it takes {row['bits']:.2f} on the held-out prompts, and loses "
        f"{abs(gain):.1f} % {than} than the best static plans of as many (gain {gain:+.1f}, 95 % {low:+.1f} "
        f"to {high:+.1f}): {grade}; `pmpd generate --schedulers fp,static,regression` compares answers"
    )


def reached_line(fitted: Fitted) -> str:
    """Whether the target was reached, and how to take another, in words."""
    found, config = fitted.calibration, fitted.config
    grade = "reached" if found.reached else "not reached"
    targets = [each.target_bits for each in config.calibrations]
    others = [target for target in targets if target != found.target_bits] or targets
    near = min(others, key=lambda target: (abs(target - found.target_bits), target))
    other = f'{{"regression": {{"target_bits": {near:g}}}}}'
    kept = f"{grade}, {found.bits:.2f} on {config.prompts} validation prompts"
    if fitted.fixed_plan is not None:
        kept = "kept exactly, every prompt runs at that precision throughout, as under the static plan"
    return (
        f"{found.target_bits:g} bits on average: {kept}; `pmpd generate --scheduler-options '{other}'` takes "
        f"another of its {len(targets)} targets"
    )


def ceiling_line(pair: str, found: Agreement) -> str:
    """What accuracy a classifier can have, in words."""
    return (
        f"pair {pair}: two labels of one prompt agree for {found.agreement:.0%} [{found.low:.0%}, "
        f"{found.high:.0%}] of {found.prompts} prompts, so no accuracy exceeds {found.ceiling:.0%}; always "
        f"saying the most frequent label has {found.majority:.0%}"
    )


ARTEFACT_NAMES = (
    "tune.json",
    "ceiling.json",
    "metrics.json",
    "metrics.jsonl",
    "learning_curves.png",
    WEIGHTS,
)
"""Files of an artefact beside its config.json and its classifiers."""


REGRESSION_ONLY = ("features", "watch")
"""Flags without an effect on classifiers."""

FOR_BOTH = ("split_shares", "seed")
"""Of `TrainConfig`, what the regression takes too."""

CHOOSING = ("objective", "tune", "again_path")
"""Flags of the classifiers that --scheduler auto takes for the wish to train them."""

CLASSIFIERS_ONLY = (
    *CHOOSING,
    "num_workers",
    "gpus_per_worker",
    *(each.name for each in fields(TrainConfig) if each.name not in (*FOR_BOTH, *CHOOSING)),
)
"""Flags without an effect on a regression."""


def wants_regression(job: TrainJob, losses: bool) -> bool:
    """What --scheduler stands for; `losses`: whether the labels say what each plan loses. UserError for flags
    without an effect on it."""
    chosen = job.scheduler
    if chosen == "auto":
        chosen = "regression" if losses and not given_flags(job, CHOOSING) else "kv_cache"
    wanted = chosen == "regression"
    if flags := given_flags(job, CLASSIFIERS_ONLY if wanted else REGRESSION_ONLY):
        by_itself = ", which auto stands for here" if job.scheduler == "auto" else ""
        other = f"give --scheduler {'kv_cache' if wanted else 'regression'}"
        raise UserError(
            f"{' and '.join(flags)}: no effect with --scheduler {chosen}{by_itself}; leave "
            f"{'them' if flags[1:] else 'it'} out, or "
            f"{other if losses else 'label with `pmpd label --rule kl` and train a regression'}"
        )
    return wanted


def given_flags(job: TrainJob, names: Sequence[str]) -> list[str]:
    """Those of these flags that are not at their default."""
    values = [(each, getattr(part, each.name)) for part in (job, job.training) for each in fields(part)]
    return [
        f"--{'no-' * (value is False)}{each.name.replace('_', '-')}"
        for each, value in values
        if each.name in names and value != each.default
    ]


def generate_command(source: LabelSource, chain: Sequence[int], highest: int) -> str:
    """The beginning of the command that answers with the labelled model and this chain, after a prefill at
    the `highest` precision of the labels: its flags are left out where they are the default, and a name
    stands in their place where the manifest does not know them."""
    words = ["pmpd", "generate"]
    known = {
        "model_path": "MODEL-OF-THE-LABELS",
        **source.run,
        "precisions": ",".join(map(str, chain)),
        "prefill_bit": None if highest == chain[0] else str(highest),
    }
    names = ("model_path", "reference_model_path", "use_multi_model", "precisions", "prefill_bit")
    for field in fields(GenerateJob):
        if field.name in names:
            value = known.get(field.name, field.default)
            if value != field.default:
                words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [value])]
    return shlex.join(words)


def budget_schedulers(job: TrainJob) -> str:
    """The flag that lets classifiers answer within their bits; those of a loss serve `budget` only."""
    if job.target_bits is None:
        return ""
    return f" --schedulers fp,uniform,static,{'kv_cache,' * (job.training.objective == 'class')}budget"


def write_folder(output: str, files: Mapping[str, bytes]) -> str:
    """Writes `output`/scheduler, `config.json` last, without the files of an earlier training: a folder that
    lacks it is unfinished."""
    folder = storage.join(output, "scheduler")
    earlier = {storage.base_name(path) for path in storage.list_files(folder)}
    ours = {name for name in earlier if name in ARTEFACT_NAMES or name.startswith("classifier_")}
    for name in ("config.json", *sorted(ours - set(files))):
        storage.remove(storage.join(folder, name))
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    return folder


def train_regression(
    job: TrainJob, sources: Sequence[LabelSource], labels: Labels, output: str, console: Console
) -> dict[str, Any]:
    """Fits, writes and judges the scheduler `regression`; returns its metrics."""
    models = {source.model_fingerprint for source in sources}
    if len(models) > 1:
        raise UserError(f"--data-path {job.data_path}: labels of {len(models)} models; label with one")
    table = pa.concat_tables([storage.read_table(source.path, list(COLUMNS)) for source in sources])
    curves = read_curves(table, parse_chain(job.precisions) if job.precisions else None)
    fitted = fit_regression(
        curves,
        job.training,
        features=job.features,
        watch=job.watch,
        target_bits=job.target_bits,
        model_fingerprint=models.pop(),
        labels_fingerprint=labels.fingerprint("loss"),
    )
    files = fitted.files()
    folder = write_folder(output, files)
    console.print(
        f"{len(curves)} labelled prompts, chain {','.join(map(str, curves.chain))}: a regression with "
        f"--features {job.features}, which decides "
        f"{'at every sixth of the answer' if job.watch else 'once, before the first token'}",
        soft_wrap=True,
    )
    if fitted.judged:
        console.print(gains_table(fitted))
    if line := gain_line(fitted):
        console.print(line, soft_wrap=True)
    console.print(reached_line(fitted), soft_wrap=True)
    console.print(f"scheduler: {folder}", soft_wrap=True)
    console.print(
        f"next: {generate_command(sources[0], curves.chain, curves.chain[0])} --classifier-path {folder}",
        soft_wrap=True,
    )
    return json.loads(files["metrics.json"])


def main(job: TrainJob) -> dict[str, Any]:
    """Trains, writes the artefact, prints the table; returns the metrics. ValueError for anything the user
    can cure."""
    plugins.load(job.plugins)
    if job.tune < 0:
        raise UserError(f"--tune {job.tune}: a number of trials, 0 to train as given")
    if job.num_heads is not None and job.num_heads < 1:
        raise UserError(f"--num-heads {job.num_heads}: how many KV heads the labelled model has, 1 or more")
    if not all(job.data_path.split(",")):
        raise UserError(f"--data-path {job.data_path!r}: a name is empty; give one, or several with commas")
    output = farm.output_folder(job.output_dir)
    console = Console()
    if job.data_path.endswith(TORCH_SUFFIX):
        if wants_regression(job, losses=False):
            raise UserError(
                f"--data-path {job.data_path}: a {TORCH_SUFFIX} file says what class a prompt has, not what "
                f"plans lose; --scheduler regression needs labels of `pmpd label --rule kl`"
            )
        sources = [labels_of_file(job, output, console)]
    else:
        if job.model_path is not None:
            raise UserError(
                f"--model-path {job.model_path}: no effect unless --data-path is a {TORCH_SUFFIX} file; "
                f"leave it out"
            )
        folders = [farm.output_folder(path) for path in job.data_path.split(",")]
        sources = [LabelSource.open(folder, job.num_heads) for folder in folders]
    source = sources[0]
    chain = parse_chain(job.precisions) if job.precisions else None
    labels = read_labels(*(each.path for each in sources))
    if wants_regression(job, labels.losses is not None):
        return train_regression(job, sources, labels, output, console)
    if len(sources) > 1:
        raise UserError(f"--data-path {job.data_path}: classifiers are trained on one labels dataset")
    highest = labels.pairs[0][0]
    if chain is None:
        chain = chain_of_pairs(labels.pairs)
    else:
        labels = labels.within(pairs_of(chain))
    for pair in range(len(labels.pairs)):
        labels.rows(
            pair, job.training
        )  # before Ray starts: whether there is something to train and to validate on
    limits = {}
    if job.again_path is not None:
        limits = ceilings(job.data_path, job.again_path)
    if job.target_bits is not None:
        check_target(labels.pairs, job.target_bits)
    if job.training.objective == "loss":
        loss_scale(labels, 0, job.training)
        if job.target_bits is None:
            raise UserError("--objective loss: give --target-bits, by which the class is chosen")
    farm.connect()
    fleet = Fleet(job.num_workers, gpus_per_worker=job.gpus_per_worker)
    fleet.check()
    config = job.training
    found: dict[str, bytes] = {}
    if job.tune:
        config, trials = search(source.path, labels, source.num_heads, config, job.tune, output)
        found["tune.json"] = json.dumps(trials, indent=1).encode()
        console.print(f"best of {len(trials)} trials: {trials[0]}")
    console.print(
        f"{len(labels.ids)} labelled prompts, pairs {in_words(labels.pairs)}; {fleet.num_workers} worker(s)"
    )
    console.print(
        f"training, at most {config.num_train_epochs} epochs a pair: {storage.join(output, 'runs')} has the "
        f"losses as they come",
        soft_wrap=True,
    )
    state = fit(source.path, labels, source.num_heads, config, fleet, output)
    files, metrics = artefact(
        labels, state, source.num_heads, config, source.model_fingerprint, job.target_bits
    )
    if limits:
        told = {pair: {**asdict(limit), "ceiling": limit.ceiling} for pair, limit in limits.items()}
        found["ceiling.json"] = json.dumps(told, indent=1).encode()
    folder = write_folder(output, {**found, **files})
    console.print(results_table(metrics))
    for of_pair, limit in limits.items():
        console.print(ceiling_line(of_pair, limit), soft_wrap=True)
    if job.target_bits is not None:
        console.print(budget_line(json.loads(files["config.json"])["budget"]), soft_wrap=True)
    console.print(f"scheduler: {folder}", soft_wrap=True)
    command = f"{generate_command(source, chain, highest)}{budget_schedulers(job)}"
    console.print(f"next: {command} --classifier-path {folder}", soft_wrap=True)
    return metrics
