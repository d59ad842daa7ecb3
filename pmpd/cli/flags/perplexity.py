"""Perplexity of a checkpoint on a text, at every precision that it holds.

    pmpd perplexity --model-path anyprec-7b --dataset texts.jsonl

The texts are one stream of tokens, each text followed by the end-of-sequence token, cut into windows."""

from __future__ import annotations

from dataclasses import dataclass

from pmpd import demo
from pmpd.errors import UserError
from pmpd.weights.model_spec import Dtype, HeadBits


@dataclass(frozen=True)
class PerplexityJob:
    """Print the perplexity of a model at each of its precisions."""

    model_path: str = str(demo.ANYPREC)
    """Checkpoint: a folder, a Hugging Face id, or a JSON file that names a checkpoint for each precision."""
    precisions: tuple[int, ...] = ()
    """Precisions to measure; default: all that the checkpoint holds (16 for an unquantized one)."""
    dataset: str = "demo"
    """Texts: demo (its held-out ones), a local .json[.gz]/.jsonl/.parquet/.txt file, a folder of such, or a
    Hugging Face id."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str | None = None
    """Split of the dataset; default: held_out of the demo, train of others."""
    tokens: int = 32768
    """At most that many tokens of the texts, from the beginning."""
    window: int = 2048
    """Tokens that share a forward (fewer where the model has fewer positions). Perplexity depends on it: more
    tokens before a token make it easier to foretell."""
    stride: int | None = None
    """Tokens from one window's beginning to the next one's; only the last `stride` of a window count.
    Default: the window's length, windows lie end to end."""
    batch_size: int = 1
    """Windows that share a forward."""
    dtype: Dtype = "auto"
    """What activations and unquantized weights are; auto: float32 on a CPU, float16 on a GPU."""
    head_bits: HeadBits = 16
    """8: half the bytes of the head. It needs --dtype bfloat16 and AVX2 on a CPU, float16 or bfloat16 on a
    GPU."""
    output: str | None = None
    """Also write the figures to this JSON file."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: the kernels and weight formats that
    they register are known then."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens}: give at least 2")
        if self.window < 2:
            raise UserError(f"--window {self.window}: give at least 2 tokens")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise UserError(f"--stride {self.stride}: give 1..{self.window} (the window)")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give at least 1")
