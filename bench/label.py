"""Prompts labeled per second by one worker, against a straightforward batch-1 implementation of the same
rule, in one run.

    PYTHONPATH=. python bench/label.py

The batch-1 side decodes every trajectory of a prompt from the prompt on, one token at a time, with
transformers' modules and its own cache (`pmpd.oracle`), dequantized weights cached, and scores with
`rouge_score`. Both sides label the same prompts and must agree. Beside them transformers' own batched
generation, of the unquantized model, in tokens a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rouge_score import rouge_scorer

from bench import _record, _transformers_peer
from pmpd import PMPDForCausalLM, demo
from pmpd.decode import oracle
from pmpd.demo.texts import MIN_PROMPT_CHARACTERS, documents_of
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import label_prompts, reference_prompts
from pmpd.labeling.rule import label_of
from pmpd.labeling.scoring import decode_text
from pmpd.schedulers.chain import NUM_CLASSES, class_steps
from pmpd.schedulers.static import StaticScheduler


@dataclass(frozen=True)
class Config:
    prompts: int = 64
    """Prompts that the engine labels."""
    plain_prompts: int = 3
    """The first of them, which the batch-1 side labels too."""
    max_new_tokens: int = 256
    slots: tuple[int, ...] = (32, 64, 128)
    """Batch sizes to try."""
    model_path: str = str(demo.ANYPREC)
    reference_model_path: str = str(demo.DENSE)
    device: str = "cpu"
    kernel: str | None = None
    """Of the engine: as --kernel of the commands."""
    output: Path = _record.RESULTS


def plain_labels(
    model: PMPDForCausalLM, row: dict[str, Any], reference_text: str, config: LabelConfig
) -> list[int]:
    """The label of each pair by the rule, written down without any sharing."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    m, labels = config.max_new_tokens - 1, []
    for pair in range(len(config.precisions) - 1):
        scores = []
        for steps in class_steps(config.max_new_tokens):
            plan = [0] * pair + [steps] + [m] * (len(config.precisions) - pair - 2)
            scheduler = StaticScheduler(config.precisions, plan)
            trajectory = oracle.decode(
                model.model,
                row["input_ids"],
                config.max_new_tokens,
                config.precisions[0],
                model.eos_token_ids,
                scheduler,
            )
            scores.append(
                scorer.score(reference_text, decode_text(model.tokenizer, trajectory.tokens))[
                    "rougeL"
                ].fmeasure
            )
        labels.append(label_of(scores, scores[NUM_CLASSES - 1]))
    return labels


def main(config: Config) -> None:
    labeling = LabelConfig(max_new_tokens=config.max_new_tokens)
    dtype = torch.float32 if config.device == "cpu" else torch.float16
    model = (
        PMPDForCausalLM(config.model_path, labeling.precisions, dtype=dtype, kernel=config.kernel)
        .eval()
        .to(config.device)
    )
    plain_model = (
        PMPDForCausalLM(config.model_path, labeling.precisions, dtype=dtype, kernel="reference")
        .eval()
        .to(config.device)
    )
    reference_model = PMPDForCausalLM(config.reference_model_path, dtype=dtype).eval().to(config.device)
    texts = [
        document.text for document in documents_of("held_out") if len(document.text) >= MIN_PROMPT_CHARACTERS
    ][: config.prompts]
    limit = model.max_positions - config.max_new_tokens
    rows = [
        {
            "prompt_id": f"{index:016x}",
            "prompt_text": text,
            "input_ids": model.tokenizer(text).input_ids[:limit],
        }
        for index, text in enumerate(texts)
    ]
    references = {row["prompt_id"]: row for row in reference_prompts(reference_model, rows, labeling)}

    started = time.perf_counter()
    expected = [
        plain_labels(plain_model, row, references[row["prompt_id"]]["reference_text"], labeling)
        for row in rows[: config.plain_prompts]
    ]
    plain_rate = config.plain_prompts / (time.perf_counter() - started)
    print(f"batch-1 rule: {plain_rate:.3f} prompts/s ({config.plain_prompts} prompts)")

    settings = {
        "prompts": len(rows),
        "plain_prompts": config.plain_prompts,
        "max_new_tokens": config.max_new_tokens,
    }
    results: dict[str, Any] = {**settings, "plain_prompts_per_second": plain_rate, "engine": []}
    for slots in config.slots:
        batched = LabelConfig(labeling.precisions, config.max_new_tokens, slots)
        list(label_prompts(model, rows[:2], references, batched))  # weights are packed at first use
        started = time.perf_counter()
        labels, tokens = {}, 0
        for row in label_prompts(model, rows, references, batched):
            labels[row["prompt_id"]] = [pair["label"] for pair in row["pairs"]]
            tokens += sum(sum(pair["branch_tokens"]) for pair in row["pairs"])
        seconds = time.perf_counter() - started
        rate = len(rows) / seconds
        same = sum(labels[row["prompt_id"]] == wanted for row, wanted in zip(rows, expected, strict=False))
        results["engine"].append(
            {
                "slots": slots,
                "prompts_per_second": rate,
                "tokens_per_second": tokens / seconds,
                "ratio": rate / plain_rate,
                "equal_labels": f"{same}/{len(expected)}",
            }
        )
        print(
            f"engine, {slots} slots: {rate:.2f} prompts/s, {tokens / seconds:.0f} tokens/s of all "
            f"trajectories, {rate / plain_rate:.1f}x; labels equal for {same} of {len(expected)}"
        )
    prompts = [row["input_ids"] for row in rows]
    results["transformers"] = _transformers_peer.measure(
        config.reference_model_path,
        prompts,
        sorted({min(len(rows), slots) for slots in config.slots}),
        config.max_new_tokens,
        config.device,
    )
    for peer in results["transformers"]:
        print(f"transformers, batch {peer['batch']}: {peer['tokens_per_second']:.0f} tokens/s, unquantized")
    best = max(engine["ratio"] for engine in results["engine"])
    results["bars"] = [{"bar": "times the batch-1 rule, at least 15", "measured": best, "met": best >= 15}]
    print(f"{'met   ' if best >= 15 else 'MISSED'} {results['bars'][0]['bar']}: {best:.1f}")
    print(_record.write(f"label_{config.device}", results, config.device, config.output))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
