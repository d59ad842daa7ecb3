"""Quantize a causal language model into an Any-Precision checkpoint: one folder that holds several
precisions.

    pmpd quantize --model-path meta-llama/Llama-2-7b-chat-hf --dataset allenai/c4 --output-dir anyprec-7b
    ray job submit --working-dir . -- python jobs/quantize.py --gpus-per-worker 1 --model-path /shared/llama …

An interrupted run goes on where it stopped when the same command is given again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmpd import demo
from pmpd.quantize.config import QuantizeConfig


@dataclass(frozen=True)
class QuantizeJob(QuantizeConfig):
    """Quantize a model to several precisions at once (Any-Precision format)."""

    model_path: str = str(demo.DENSE)
    """Unquantized checkpoint: a folder, or a Hugging Face id."""
    output_dir: str | None = None
    """Folder to write, or a URI (s3://bucket/folder); default: anyprec-NAME-PARENT-SEED in the current
    folder."""
    dataset: str = "demo"
    """Calibration texts: demo, a local .json[.gz]/.jsonl/.parquet/.txt file, a folder of such, or a Hugging
    Face id (allenai/c4)."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str | None = None
    """Split of the dataset; default: train."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the model runs are computed in; default: float32 on a CPU, bfloat16 on a GPU."""
    gpus_per_worker: float | None = None
    """Quantize on a worker of the cluster, with so much of a GPU (1; 0: on its CPU). Model, texts and output
    must be on storage that it sees. Default: in this process."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md). Workers must be able to import them too."""
    stall_seconds: float | None = None
    """A worker without progress for so long is replaced, and another goes on; default 3600."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
