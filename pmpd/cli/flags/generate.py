"""Answer a benchmark under several precision schedulers: what the report compares.

    pmpd generate                                  # the embedded demo: every scheduler, on this machine
    ray job submit --working-dir . -- python jobs/generate.py --model-path … --bench-name mt_bench

The unquantized model and the quantized one are separate data sets in the output folder, one row per turn. A
run that was stopped, in whatever way, goes on where it stopped when the same command is given again. A static
search and what `--high-bit-steps best` then answers have folders of their own beside the sweep's: one output
folder serves all three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pmpd import demo
from pmpd.errors import UserError
from pmpd.weights.model_spec import Dtype, HeadBits


@dataclass(frozen=True)
class GenerateJob:
    """Answer a benchmark under several precision schedulers. Without flags: the embedded demo, every
    scheduler."""

    model_path: str = str(demo.ANYPREC)
    """Quantized checkpoint, seen under this path by every node: a folder, or a Hugging Face id."""
    reference_model_path: str = str(demo.DENSE)
    """Unquantized checkpoint of the same model, likewise; only used for the scheduler fp."""
    model_id: str = "demo"
    """Name of the model in the results; chooses FastChat's template where the tokenizer has none of its
    own."""
    bench_name: str = "demo"
    """demo, mt_bench, cnn_dm, dialogsum, iwslt, gsm8k, passkey or humaneval."""
    question_file: str | None = None
    """File or folder in the benchmark's published schema, local or a URI, instead of the Hugging Face hub."""
    validation: bool = False
    """The validation split instead of the test split."""
    question_begin: int | None = None
    """First question, from 0."""
    question_end: int | None = None
    """Question to stop before."""
    num_choices: int = 1
    """Answers per question (they differ where tokens are sampled, and for the random scheduler)."""
    schedulers: str = "fp,uniform,static,confidence,random,kv_cache"
    """The sweep, comma-separated: fp (unquantized), uniform (each precision), or a scheduler; also
    regression, budget, online (docs/guides/schedulers.md), or what a module of --plugins registers."""
    scheduler: str | None = None
    """Only this one instead of the sweep (naive = static)."""
    use_fp: bool = False
    """The unquantized model: fp alone, or beside what --scheduler names."""
    scheduler_options: str = "{}"
    """Further options of schedulers, as JSON: '{"kv_cache": {"published_steps": true}}'."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md). Workers must be able to import them too."""
    precisions: str = "4,3,2"
    """Precision chain, descending."""
    high_bit_steps: str | None = None
    """static: decode forwards at high precision, one number or one per pair ("42,84"); "best": the result of
    --static-search with this --output-dir; or the path of such a result (best-static-….json). Default: all
    plans of the four switch classes."""
    prefill_bit: int | None = None
    """Precision of the prefill; default the highest of the chain."""
    classifier_path: str | None = None
    """kv_cache, budget, regression: folder written by pmpd train; default the embedded demo's. Of a
    regression, the default sweep has `regression` in the place of `kv_cache`."""
    confidence_threshold: float = 0.7
    """confidence: top probability that counts as sure."""
    confidence_patience: int = 2
    """confidence: sure forwards in a row before the precision drops."""
    random_prior: tuple[float, float, float, float] | None = None
    """random: weights of the four switch classes; default equal."""
    seed: int = 0
    """Of the scheduler random, and of sampled tokens."""
    temperature: float | Literal["category"] = 0.0
    """Of sampling; 0 is greedy; category: MT-Bench's temperature of each question's category."""
    top_p: float = 1.0
    """Sampling: only the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sampling: only so many of the likeliest tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there before; 1 is none."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    preset: str | None = None
    """published: the settings of published results (docs/guides/published-differences.md); other flags go
    first."""
    max_new_tokens: int | None = None
    """New tokens per answer; default the benchmark's own."""
    template: str | None = None
    """Conversation template: "tokenizer" (the model's own), "plain", or one of FastChat's. Default: the
    tokenizer's own where it has one, else FastChat's for --model-id, else plain."""
    static_search: Annotated[bool, tyro.conf.arg(aliases=["--search"])] = False
    """Try a grid of high-bit steps on the validation split, keep the cheapest within the budget for
    --high-bit-steps best."""
    quality_budget: float = 0.02
    """Static search: share of the uniform highest precision's score that may be lost."""
    search_points: int = 5
    """Static search: grid points per pair, from never to always high."""
    use_multi_model: bool = False
    """--model-path is a JSON of one checkpoint per precision (GPTQ), not an Any-Precision checkpoint."""
    batch_size: int | Literal["auto"] = 64
    """Conversations that decode together in a worker, and per unit of work (and Parquet file); auto: what its
    memory holds."""
    reuse_cache: bool = True
    """Later turns start from the cache of the prompt before."""
    num_workers: int | None = None
    """Default: one per GPU; without GPUs one per two cores. 0: in this process, as where Ray is not
    installed."""
    gpus_per_worker: float | None = None
    """Default: 1 where the cluster has GPUs, else 0; a fraction shares a GPU."""
    stall_seconds: float | None = None
    """A worker without progress for so long is replaced; default: 20 of the longest steps, 300 at least."""
    price_per_worker_hour: float | None = None
    """Puts the cost of 1,000 rows into summary.json."""
    output_dir: str = "results/generate"
    """Local folder, shared storage of the cluster, or a URI (s3://bucket/folder)."""
    retry_errors: bool = False
    """Do conversations again that have an error."""
    revision: str | None = None
    """Branch, tag or commit of the Hugging Face ids given as models."""
    kernel: str | None = None
    """Force an implementation of the multiplication: reference, cpu, triton, cuda, dense (dequantized once:
    more memory, for large batches of small models). pmpd kernels says which one is taken without it."""
    dtype: Dtype = "auto"
    """What activations and unquantized weights are; auto: float32 on a CPU, float16 on a GPU. Where float16
    overflows, bfloat16 does not."""
    head_bits: HeadBits = 16
    """8: half the bytes of the head. It needs --dtype bfloat16 and AVX2 on a CPU, float16 or bfloat16 on a
    GPU."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint."""

    def __post_init__(self) -> None:
        for name, least in (("num_choices", 1), ("max_new_tokens", 4), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least {least}")
        if not 0 <= self.quality_budget <= 1:
            raise UserError(
                f"--quality-budget {self.quality_budget}: a share, from 0 (nothing may be lost) to 1"
            )
        if self.static_search and self.high_bit_steps is not None:
            raise UserError(
                f"--high-bit-steps {self.high_bit_steps}: --static-search looks for them; give one of the two"
            )

    @property
    def searched(self) -> bool:
        """Whether the static setting is a search's choice."""
        return self.high_bit_steps is not None and (
            self.high_bit_steps == "best" or self.high_bit_steps.endswith(".json")
        )
