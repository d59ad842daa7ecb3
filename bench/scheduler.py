"""The learned scheduler: what a decision costs, and what it learned on held-out prompts.

    python -m bench.scheduler cost  # decision against the decode of 256 tokens
    python -m bench.scheduler proof --data-path TRAIN --held-out-path A B  # learned against baselines

`proof` fits on the training split of one labels dataset, stops early by its validation split, and compares on
prompts that were never trained on: its test split and all prompts of the other datasets (of the demo:
documents that the language model has not seen either). Some variants see more than the classifier of the
scheduler does; their input is computed here by a prefill of each prompt.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
import tyro
from torch import Tensor
from transformers import DynamicCache

from pmpd import PMPDForCausalLM, demo, storage
from pmpd.decode.requests import Request
from pmpd.farm.load_model import cpu_name
from pmpd.farm.train import FEATURE_COLUMNS
from pmpd.schedulers.base import Decision
from pmpd.schedulers.kv_cache import DEMO_ARTEFACT, KVCacheScheduler
from pmpd.schedulers.static import StaticScheduler
from pmpd.training.config import TrainConfig
from pmpd.training.data import NO_LABEL, Features, Labels, features_from_table, labels_from_table, usable
from pmpd.training.evaluate import compare, policies
from pmpd.training.fit import PairTraining, make_head
from pmpd.weights.base import cache_argument, shared_state

Head = Literal["kv_cache", "mean_pooled"]


def header(threads: int) -> str:
    versions = ", ".join(
        f"{name} {version}"
        for name, version in storage.package_versions().items()
        if name in ("torch", "numpy")
    )
    python, date = platform.python_version(), time.strftime("%Y-%m-%d")
    return (
        f"{cpu_name()}, {threads} thread(s); {versions}; Python {python}; {date}; commit "
        f"{storage.git_commit()}"
    )


# ---- cost
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Time of the decision as a share of the decode of 256 tokens, on the same rows."""

    model_path: str = str(demo.ANYPREC)
    save_dir: str = str(DEMO_ARTEFACT)
    precisions: tuple[int, ...] = (4, 3, 2)
    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 512
    repeats: int = 5
    threads: int = 1

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        model = PMPDForCausalLM(self.model_path, self.precisions).eval()
        dim = model.head_dim
        print(
            f"# decision of the learned scheduler, chain {self.precisions}, {self.prompt_tokens} prompt "
            f"tokens\n{header(self.threads)}\n"
        )
        print("| rows | decision, ms | decode of 256 tokens, ms | share |\n|---|---|---|---|")
        generator = torch.Generator().manual_seed(0)
        for rows in self.batches:
            prompts = torch.randint(
                0, model.model.config.vocab_size, (rows, self.prompt_tokens), generator=generator
            ).tolist()
            engine = model.engine(rows, self.prompt_tokens + 256)
            scheduler = _Timed(self.precisions, save_dir=self.save_dir, dim=dim, num_heads=model.kv_heads)
            decisions, decodes = [], []
            for _ in range(self.repeats):
                requests = [Request(f"{row:016x}", prompt, 256) for row, prompt in enumerate(prompts)]
                scheduler.seconds = 0.0
                list(engine.run(requests, scheduler, self.precisions[0], ()))
                decisions.append(scheduler.seconds)
                lowest = StaticScheduler(
                    self.precisions, [0] * (len(self.precisions) - 1)
                )  # the fastest decode there is
                decodes.append(
                    sum(done.decode_seconds for done in engine.run(requests, lowest, self.precisions[0], ()))
                )
            decision, decode = float(np.median(decisions)), float(np.median(decodes))
            print(f"| {rows} | {1e3 * decision:.2f} | {1e3 * decode:.0f} | {decision / decode:.2%} |")
            print(json.dumps({"rows": rows, "decision_seconds": decision, "decode_seconds": decode}))


class _Timed(KVCacheScheduler):
    """Adds up the seconds of its decisions, features included."""

    seconds = 0.0

    def begin(self, state: Any) -> Decision:
        started = time.perf_counter()
        decision = super().begin(state)
        self.seconds += time.perf_counter() - started
        return decision


# ---- proof
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut(Labels):
    """Labels whose test split has further prompts that are never trained on."""

    held_out: frozenset[str] = frozenset()

    def splits(self, config: TrainConfig) -> np.ndarray:
        return np.where([key in self.held_out for key in self.ids], 2, super().splits(config))


@dataclass(frozen=True)
class Variant:
    """A head, its input and how the training split is rebalanced."""

    name: str
    head: Head
    features: Features
    rebalance: Literal["oversample", "weights", "none"]


@dataclass(frozen=True)
class Proof:
    """Learned against majority, static classes, random with the prior and oracle, on held-out prompts."""

    data_path: str = "results/label/labels"
    """Labels to fit on; its test split is held out."""
    held_out_path: tuple[str, ...] = ()
    """Labels that are held out altogether."""
    model_path: str = str(demo.ANYPREC)
    num_heads: int = 2
    """KV heads of the labelled model."""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)
    threads: int = 1

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        columns = [*FEATURE_COLUMNS, "input_ids"]
        unseen = [storage.read_table(path, columns) for path in self.held_out_path]
        table = usable(pa.concat_tables([storage.read_table(self.data_path, columns), *unseen])).sort_by(
            "prompt_id"
        )
        held_out = frozenset(key for part in unseen for key in part["prompt_id"].to_pylist())
        labels = HeldOut(**vars(labels_from_table(table)), held_out=held_out)
        kv = features_from_table(table)
        shares = {
            f"{pair[0]}-{pair[1]}": np.bincount(labels.labels[:, j], minlength=4).tolist()
            for j, pair in enumerate(labels.pairs)
        }
        print(
            f"# {len(labels.ids)} prompts, labels per class {shares}, labels fingerprint "
            f"{labels.fingerprint()}"
        )
        print(f"{header(self.threads)}\n{self.training}\n")
        every, scalars = self.prefill(table["input_ids"].to_pylist(), labels)
        wide, plus, only = (
            append(kv.ids, kv.lengths, parts)
            for parts in ((every.keys, every.values), (kv.keys, kv.values, scalars), (None, None, scalars))
        )
        variants = [
            Variant("kv_cache, oversampled (the default)", "kv_cache", kv, "oversample"),
            Variant("kv_cache, not rebalanced", "kv_cache", kv, "none"),
            Variant("mean-pooled linear, not rebalanced", "mean_pooled", kv, "none"),
            Variant("kv_cache, all layers", "kv_cache", wide, "none"),
            Variant(
                "kv_cache + length, confidence, prompt loss, low-bit divergence", "kv_cache", plus, "none"
            ),
            Variant("linear on these scalars alone", "mean_pooled", only, "none"),
        ]
        self.report(labels, variants)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], labels: Labels) -> tuple[Features, Tensor]:
        """KV features of all layers side by side, and standardised scalars [N, C] of each prompt."""
        bits = sorted({b for pair in labels.pairs for b in pair}, reverse=True)
        model = PMPDForCausalLM(self.model_path, bits).eval().model
        state = shared_state(model)
        keys, values, scalars = [], [], []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            cache = DynamicCache(config=model.config)
            state.set_uniform(bits[0])
            logits = (
                model(ids, use_cache=True, **{cache_argument(model): cache}).logits[0].float().log_softmax(-1)
            )
            keys.append(torch.cat([layer.keys[0].mean(0) for layer in cache.layers], dim=-1).half())
            values.append(torch.cat([layer.values[0].mean(0) for layer in cache.layers], dim=-1).half())
            last, loss = (
                logits[-1],
                -logits[:-1].gather(1, ids[0, 1:, None]).mean() if len(prompt) > 1 else torch.tensor(0.0),
            )
            row = [
                np.log(len(prompt)),
                float(last.max().exp()),
                float(-(last.exp() * last).sum()),
                float(loss),
            ]
            for low in bits[1:]:
                state.set_uniform(low)
                other = model(ids).logits[0].float().log_softmax(-1)
                divergence = (logits.exp() * (logits - other)).sum(-1)
                row += [
                    float(divergence.mean()),
                    float(divergence[-1]),
                    float((logits.argmax(-1) == other.argmax(-1)).float().mean()),
                ]
            scalars.append(row)
        table = torch.tensor(np.asarray(scalars), dtype=torch.float32)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return Features(labels.ids, torch.cat(keys), torch.cat(values), lengths), (
            table - table.mean(0)
        ) / table.std(0).clamp_min(1e-6)

    def report(self, labels: Labels, variants: Sequence[Variant]) -> None:
        splits = labels.splits(self.training)
        for j, pair in enumerate(labels.pairs):
            column = labels.labels[:, j]
            train_rows, rows = (np.nonzero((splits == s) & (column != NO_LABEL))[0] for s in (0, 2))
            chosen, fits = {}, {}
            for variant in variants:
                started = time.perf_counter()
                config = dataclasses.replace(self.training, rebalance=variant.rebalance)
                model = make_head(
                    variant.head, variant.features.dim, self.num_heads, config.dropout, config.seed, j
                )
                fit = PairTraining(model, labels, j, variant.features, config)
                while not fit.state.done:
                    fit.epoch()
                chosen[variant.name] = fit.best_logits()[rows].argmax(-1).numpy()
                fits[variant.name] = {
                    "epochs": fit.state.epoch,
                    "loss": fit.state.best_loss,
                    "seconds": time.perf_counter() - started,
                }
            report = compare(column[rows], policies(column[train_rows], column[rows], chosen), pair)
            print(
                f"## pair {pair[0]} → {pair[1]}: {len(train_rows)} training, {len(rows)} held-out prompts "
                f"{report['label_counts']}\n"
            )
            print(
                "| policy | accuracy | − majority | macro-F1 | average bits | quality loss "
                "|\n|---|---|---|---|---|---|"
            )
            for name, policy in report["policies"].items():
                cells = [
                    _cell(policy[m], policy["interval"][m])
                    for m in ("accuracy", "macro_f1", "average_bits", "quality_loss")
                ]
                cells.insert(
                    1, _cell(policy["accuracy_minus_majority"], policy["accuracy_minus_majority_interval"])
                )
                print(f"| {name} | {' | '.join(cells)} |")
            print(f"\n{json.dumps({'pair': pair, 'fits': fits})}\n", flush=True)


def append(ids: tuple[str, ...], lengths: Tensor, parts: Sequence[Tensor | None]) -> Features:
    """Keys and values, either of them absent, with the row's scalars (if any) as further channels of every
    token."""
    keys, values, *scalars = parts
    extra = [torch.repeat_interleave(part, lengths, dim=0).half() for part in scalars if part is not None]
    return Features(
        ids,
        torch.cat([part for part in (keys, *extra) if part is not None], dim=-1),
        torch.cat([part for part in (values, *extra) if part is not None], dim=-1),
        lengths,
    )


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    tyro.cli(
        Annotated[Cost, tyro.conf.subcommand("cost")] | Annotated[Proof, tyro.conf.subcommand("proof")],
        # type: ignore[arg-type]
        description=__doc__,
    ).run()
