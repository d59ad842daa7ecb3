"""Fit a learned scheduler to labels: `pmpd train` after `pmpd label`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from pmpd.training.config import TrainConfig


@dataclass(frozen=True)
class TrainJob:
    """Fit a learned scheduler to a labels dataset: a regression of what each plan loses, or a classifier
    of the KV cache for each pair of the precision chain."""

    data_path: str = "results/label"
    """Labels dataset, the --output-dir of pmpd label, or a .pt file of labelled prompts, as the published
    second stage is. Several with commas between them train one regression, of all kinds of prompt."""
    output_dir: str = "results/train"
    """Gets `scheduler/` (the artefact) and `runs/` (checkpoints). The same command goes on where it
    stopped; another one replaces the artefact."""
    scheduler: Literal["auto", "regression", "kv_cache"] = "auto"
    """What is trained. auto: the regression where the labels are by divergence (pmpd label --rule kl), unless
    --objective loss, --tune or --again-path ask for classifiers (kv_cache); else the classifiers. A flag
    without an effect on what is trained is refused."""
    features: Literal["none", "no_probe", "one_probe", "probes"] = "no_probe"
    """Regression: what it knows of a prompt. none: nothing; no_probe: its length and the loss, entropy and
    margin of its last 32 tokens, which the prefill tells; one_probe, probes: also how far the lowest
    precision, or every lower one, is from the highest on these tokens, one forward over them each."""
    watch: bool = True
    """Regression: decide at every sixth of the answer whether to switch now, from the entropy and margin
    of the tokens so far too; with --no-watch once, before the first token."""
    precisions: str | None = None
    """Precision chain, e.g. 4,3,2; default: that of the labels. Of labels of 4,3,2 a regression may take 4,2
    or 4,3, classifiers the pairs that are labelled: 4,3 or 3,2."""
    num_workers: int = 1
    """Classifiers: Ray Train workers. Each needs a CPU, and one more is needed to read."""
    gpus_per_worker: float = 0
    """Classifiers: 0 trains on CPUs."""
    tune: int = 0
    """Classifiers: search learning rate, epochs, accumulation, weight decay and dropout with so many trials
    first; 0 = as given."""
    target_bits: float | None = None
    """Bits on average that the scheduler keeps to, calibrated on the validation prompts. Regression: default
    midway between the two highest precisions; at the chain's highest or lowest precision it is the static
    plan of that precision. Classifiers: for the scheduler `budget`; default none."""
    again_path: str | None = None
    """Classifiers: the --output-dir of another `pmpd label` of the same records (another --seed or --dtype, a
    space before the text): how far the two agree says what accuracy a classifier can have at most."""
    num_heads: int | None = None
    """KV heads of the labelled model; default: as the labels' manifest says."""
    model_path: str | None = None
    """Only with a .pt file: the quantized checkpoint that its labels are of, whose prefills give the KV
    features where the file has none."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md). Workers must be able to import them too."""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
