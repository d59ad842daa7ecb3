"""Talk to a model in the terminal: the answer streams, each token in the colour of its precision, with bits
and tokens per second below.

    pmpd chat --model-path quantized/
    /scheduler static 20        another schedule from the next answer on; /help lists the commands

Works without a terminal too: a line of standard input is a turn, and nothing is coloured."""

from __future__ import annotations

from dataclasses import dataclass

from pmpd import demo
from pmpd.errors import UserError
from pmpd.weights.model_spec import Dtype, HeadBits


@dataclass(frozen=True)
class ChatJob:
    """Talk to a model in the terminal. Without flags: the embedded demo."""

    model_path: str = str(demo.ANYPREC)
    """Quantized or unquantized checkpoint: a folder, or a Hugging Face id."""
    precisions: str | None = None
    """Precision chain, descending, e.g. 4,3,2; default all that the checkpoint holds."""
    scheduler: str | None = None
    """As /scheduler takes it: "static 20", "kv_cache save_dir=FOLDER", "uniform 3". Default: every token at
    the highest precision."""
    max_new_tokens: int = 256
    """New tokens per answer."""
    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1 = all."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 = all."""
    repetition_penalty: float = 1.0
    """1 = none."""
    seed: int = 0
    """Of the sampling."""
    template: str | None = None
    """A FastChat template, "plain" or "tokenizer"; default the tokenizer's own where it has one."""
    kernel: str | None = None
    """Force an implementation of the multiplication: reference, cpu, triton, cuda, dense (dequantized once:
    more memory, for large batches of small models). pmpd kernels says which one is taken without it."""
    dtype: Dtype = "auto"
    """What activations and unquantized weights are; auto: float32 on a CPU, float16 on a GPU."""
    head_bits: HeadBits = 16
    """8: half the bytes of the head. It needs --dtype bfloat16 and AVX2 on a CPU, float16 or bfloat16 on a
    GPU."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md)."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: at least 1")
