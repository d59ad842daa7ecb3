"""What a quantization costs and what each precision is worth: seconds, peak memory, perplexities.

    python -m bench.quantize --bars --model-path smollm2 --texts texts.json.gz --name quantize_smollm2_cpu

The first half of the texts' records is for calibration, the second half, never seen by the quantizer, is
scored: windows end to end, each text followed by the end-of-sequence token. Without `--texts`, the demo's own
texts (train and held out) are used. The bars are those of SmolLM2-135M-Instruct on WikiText-2; for other
models they are left out.

`--quantized FOLDER` measures what `pmpd quantize` made before, which can be killed and gone on with; costs
are then those of its manifest, and its calibration texts must have been the first half.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import tyro

from bench import _record
from pmpd import PMPDForCausalLM, demo, gpu
from pmpd.evaluation.perplexity import by_precision, token_stream
from pmpd.labeling.prompts import PromptConfig, records
from pmpd.quantize.config import QuantizeConfig
from pmpd.quantize.convert import quantize_checkpoint
from pmpd.weights.base import compute_dtype, shared_state

BARS = {"4": 35.0, "3": 45.0, "2": 200.0}
"""Perplexity at most, SmolLM2-135M-Instruct."""


@dataclass(frozen=True)
class Config(QuantizeConfig):
    model_path: str = str(demo.DENSE)
    """Unquantized checkpoint folder."""
    texts: str | None = None
    """File or folder of texts; None: the demo's."""
    quantized: str | None = None
    """Folder that `pmpd quantize` made of this model; None: quantize now."""
    test_tokens: int = 20480
    """At most so many tokens are scored."""
    windows: tuple[int, ...] = (2048, 512)
    threads: int = 2
    bars: bool = False
    """Compare with the bars of SmolLM2."""
    name: str | None = None
    """Write bench/results/NAME.json."""


def main(config: Config) -> dict:
    torch.set_num_threads(config.threads)
    if config.texts is None:
        fitted = _texts(PromptConfig("demo", split="train"))
        kept = _texts(PromptConfig("demo", split="held_out"))
    else:
        texts = _texts(PromptConfig(config.texts))
        fitted, kept = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(config.quantized or f"{folder}/anyprec")
        if config.quantized is None:
            settings = {field.name: getattr(config, field.name) for field in fields(QuantizeConfig)}
            start = time.monotonic()
            quantize_checkpoint(
                config.model_path,
                output,
                QuantizeConfig(**settings),
                fitted,
                on_progress=lambda stage, done, total: print(
                    f"{time.monotonic() - start:7.1f} s  {stage} {done}/{total}", flush=True
                ),
            )
        made = json.loads((output / "manifest.json").read_text())
        found = measure(config, [config.model_path, str(output)], kept)
    results = {
        "model": Path(config.model_path).name,
        "settings": made["settings"],
        "seconds": made["seconds"],
        "processor_seconds": made["processor_seconds"],
        "stage_seconds": made.get("stage_seconds"),
        "peak_bytes": made["peak_bytes"],
        "model_bytes": {"unquantized": made["source_bytes"], "quantized": made["model_bytes"]},
        "relative_error": made["relative_error"],
        **found,
    }
    if config.bars:
        value = results["perplexity"][str(config.windows[0])]
        results["bars"] = {bits: {"most": bar, "met": value[bits] <= bar} for bits, bar in BARS.items()}
    print(results)
    if config.name is not None:
        print(_record.write(config.name, results, "cuda" if gpu.available() else "cpu"))
    return results


def _texts(source: PromptConfig) -> list[str]:
    return [text for _, text, problem in records(source) if problem is None]


def measure(config: Config, models: list[str], texts: list[str]) -> dict:
    """Window -> precision -> perplexity of all models, and the number of tokens scored."""
    device = torch.device("cuda" if gpu.available() else "cpu")
    found: dict[str, dict[str, float]] = {str(window): {} for window in config.windows}
    tokens = 0
    for path in models:
        model = PMPDForCausalLM(path, dtype=compute_dtype(device)).eval().to(device)
        stream = token_stream(texts, model.tokenizer, config.test_tokens)
        for window in config.windows:
            values = by_precision(
                model.model,
                model.precisions,
                shared_state(model.model).set_uniform,
                stream,
                min(window, model.max_positions),
            )
            for bits, value in values.items():
                found[str(window)][str(bits)] = value.value
                tokens = value.tokens
            print(f"{path}: windows of {window}: {found[str(window)]}", flush=True)
    return {"perplexity": found, "tokens": tokens}


if __name__ == "__main__":
    main(tyro.cli(Config))
