"""Label prompts with the switch class that keeps their quality: what a learned scheduler is trained on.

    pmpd label                                    # the embedded demo, on this machine
    ray job submit --working-dir . -- pmpd label --model-path … --output-dir s3://bucket/labels

Prompts, references by the unquantized model, and labels each become a Parquet dataset in the output folder. A
run that was stopped, in whatever way, goes on where it stopped when the same command is given again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmpd import demo
from pmpd.weights.model_spec import Dtype, HeadBits


@dataclass(frozen=True)
class LabelJob:
    """Label prompts with the switch class that keeps their quality. Without flags: the embedded demo."""

    model_path: str = str(demo.ANYPREC)
    """Any-Precision checkpoint, seen under this path by every node: a folder, or a Hugging Face id."""
    reference_model_path: str = str(demo.DENSE)
    """Unquantized checkpoint of the same model, likewise."""
    dataset: str | None = None
    """Default: demo. Or a Hugging Face id (allenai/c4), a file of records with a field `text` (.json, .jsonl,
    .csv, each also .gz; .txt, .parquet, .arrow), a folder of such files (shards, a clone of a hub data set,
    what save_to_disk wrote), or a .pt file of token ids, as the published first stage is. A URI too."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset (allenai/c4: en), or a folder of that name."""
    split: str | None = None
    """Split of the dataset; default train, of the demo held_out, of files without a split in their names
    all."""
    size: int = 96
    """Prompts; all there are where the dataset holds fewer."""
    prompt_form: Literal["cut", "whole", "chat"] = "cut"
    """What of a record is the prompt: its beginning, cut at a random length; all of it; or all of it as a
    question in the model's chat template."""
    max_prompt_tokens: int = 2048
    """Prompts have so many tokens at most."""
    precisions: str = "4,3,2"
    """Precision chain, descending; neighbours are the pairs that get a label each."""
    max_new_tokens: int = 256
    """New tokens per trajectory."""
    rule: str | None = None
    """Label rule, part of the labels' identity: rouge_l (default; ROUGE-L of the texts, any script),
    agreement (how many tokens agree with the reference), kl (divergence from the unquantized model along its
    own output; nothing is decoded), published (ROUGE-L over trajectories as the published code decodes
    them)."""
    preset: str | None = None
    """published: the settings of published labels, which are C4's validation split and the rule published
    (docs/guides/published-differences.md); other flags go first."""
    batch_size: int | Literal["auto"] = 32
    """Trajectories that decode together in a worker, and prompts per unit of work (and Parquet file); auto:
    what its memory holds."""
    num_workers: int | None = None
    """Default: one per GPU; without GPUs one per two cores. 0: in this process, as where Ray is not
    installed."""
    gpus_per_worker: float | None = None
    """Default: 1 where the cluster has GPUs, else 0; a fraction shares a GPU."""
    stall_seconds: float | None = None
    """A worker without progress for so long is replaced; default: 20 of the longest steps, 300 at least."""
    price_per_worker_hour: float | None = None
    """Puts the cost of 1,000 rows into summary.json."""
    output_dir: str = "results/label"
    """Local folder, shared storage of the cluster, or a URI (s3://bucket/folder)."""
    seed: int = 0
    """Of the prompts' random lengths."""
    stage: Literal["all", "prompts", "references", "labels"] = "all"
    """Only this one (prompts are always made first), or all."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md). Workers must be able to import them too."""
    use_multi_model: bool = False
    """--model-path is a JSON of one checkpoint per precision (GPTQ), not an Any-Precision checkpoint."""
    retry_errors: bool = False
    """Do rows again that have an error."""
    kernel: str = "auto"
    """How weights are multiplied: reference, cpu, triton, cuda, dense (dequantized once: more memory, for
    large batches). auto: the device's own; on a GPU, where 64 rows or more decode together, dense if its
    copies take a quarter of the free memory at most (which one is told). The labels' rule is the same."""
    dtype: Dtype = "auto"
    """What activations and unquantized weights are; auto: float32 on a CPU, float16 on a GPU. Where float16
    overflows, bfloat16 does not."""
    head_bits: HeadBits = 16
    """8: half the bytes of the head. It needs --dtype bfloat16 and AVX2 on a CPU, float16 or bfloat16 on a
    GPU."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint."""
