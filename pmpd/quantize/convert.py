"""An unquantized checkpoint -> an Any-Precision checkpoint.

Three stages: what the inputs of the layers look like on calibration texts (`moments`), codes and tables layer
by layer (`feedback`), and the tables of all layers tuned together (`tuning`). Everything unfinished lives in
a work folder beside the output, named by a fingerprint of what codes depend on: a run that is started again
goes on behind the last group of texts, the last layer or the last saved tuning step, and one with other
settings of the tuning uses the same layers. The output folder appears at the end, complete, by one rename.

Peak memory: one copy of the model (float32 on a CPU, bfloat16 on a GPU), and beside it, one after the other,
the second moments of a group of layers (`moments_bytes`) with what one layer's quantization takes, or one
byte a quantized weight with the activations of one piece of text.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor

from pmpd import gpu, storage
from pmpd.errors import UserError
from pmpd.quantize.calibration import calibration_samples
from pmpd.quantize.config import QuantizeConfig
from pmpd.quantize.layers import Layout, find_layers
from pmpd.quantize.stages import Progress, Samples, Stages
from pmpd.quantize.work import Clock, WorkFolder, save
from pmpd.weights import formats
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.formats import check_unquantized
from pmpd.weights.mixed import open_checkpoint
from pmpd.weights.naming import NamedTensors
from pmpd.weights.skeleton import build_skeleton, fill

_LAYOUT = 3
"""Raised when what is computed or stored changes, so that an older work folder is not taken up."""

_VALIDATION_SAMPLES = 4
"""Pieces of text, not used for anything else, on which the result is measured at the end."""


@dataclass(frozen=True)
class Summary:
    """What was written; also the folder's `manifest.json`."""

    fingerprint: str
    """Of model, calibration tokens and settings."""
    settings: dict[str, Any]
    calibration_tokens: list[int]
    """[samples, tokens each] for moments; [0, 0] where errors are not weighted."""
    quantized_weights: int
    model_bytes: int
    source_bytes: int
    relative_error: dict[str, float]
    """Precision -> Σ ‖(W − Ŵ) X‖² / Σ ‖W X‖² over all quantized linears, before tuning; unweighted: of the
    weights themselves."""
    perplexity: dict[str, float]
    """Precision (16: unquantized) -> perplexity on pieces of the calibration texts that nothing was fitted
    to; {} where there are no such."""
    divergence: dict[str, list[float]]
    """Precision -> divergence from the unquantized model, nats a token, before each of its tuning steps."""
    skipped: dict[str, str]
    """Linears inside the decoder layers that were left as they are, and why."""
    versions: dict[str, str]
    seconds: float
    """Over all runs, of a killed one up to the last file it finished; likewise the next."""
    processor_seconds: float
    peak_bytes: int
    """Of main memory that the last run's process held at most."""
    reused_layers: int
    """Finished by an earlier run that was interrupted."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Parts of `seconds`: preparing (reading the checkpoint's fingerprint and the texts, and all that is not
    below), loading (of the model, and of what was quantized), inputs, layers, tuning, validation, writing."""


def quantize_checkpoint(
    model_path: str | Path,
    output_dir: str | Path,
    config: QuantizeConfig,
    texts: Iterable[str],
    *,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    moments_bytes: int | None = None,
    work_copy: str | None = None,
    on_progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Quantizes the checkpoint folder `model_path` into the folder `output_dir`, which must not hold anything
    else.

    `texts` are read only if `config.weighted`. `device`: default a GPU if there is one. `dtype` of the model
    runs: default float32 on a CPU, bfloat16 on a GPU. `moments_bytes`: of the layers whose inputs are
    measured in one pass over the samples, at least one layer's; default 4 GiB, on a GPU a third of what is
    free beside the model where that is more. `work_copy`: a URI below which what is
    finished is kept too, so that the same call goes on from there on another machine.

    UserError: no such checkpoint, one that is quantized, missing or misshapen tensors, nothing to quantize,
    no calibration text, an output folder in use. OSError: the disk is full (what is finished is kept).
    """
    clock = Clock("preparing")
    device = device or torch.device("cuda" if gpu.available() else "cpu")
    checkpoint, output = open_checkpoint(model_path, trust_remote_code), Path(output_dir).absolute()
    check_unquantized(checkpoint)
    checkpoint.tokenizer()  # without one, what is written could not be loaded
    layout, stored = _checked_layout(checkpoint)
    samples = _samples(checkpoint, config, texts) if config.weighted else None
    layers = _layers_fingerprint(checkpoint, config, None if samples is None else samples.inputs)
    fingerprint = _fingerprint(layers, config, samples)
    if (done := _finished(output, fingerprint)) is not None:
        return done
    run = Stages(
        checkpoint,
        stored,
        layout,
        config,
        samples,
        WorkFolder(
            output.parent / f".{output.name}.work-{layers}",
            clock,
            work_copy and storage.join(work_copy, f".work-{layers}"),
        ),
        f"tuning-{fingerprint}",
        device,
        dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
        moments_bytes,
        on_progress,
    )
    try:
        reused = run.quantize_layers()
        state, perplexities = run.tune_and_validate()
        errors, weights = run.total_errors()
        with clock.stage("writing"):
            tensors = run.output_tensors(state)
            written = _write(checkpoint, layout, config, tensors, run.work.path)
        stages, processor = clock.read()
        summary = Summary(
            fingerprint=fingerprint,
            settings=asdict(config),
            calibration_tokens=[0, 0] if samples is None else list(samples.inputs.shape),
            quantized_weights=weights,
            model_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            source_bytes=sum(checkpoint.tensor(name).nbytes for name in checkpoint.names()),
            relative_error=errors,
            perplexity=perplexities,
            divergence={
                str(bits): [step[bits] for step in state.divergence if bits in step]
                for bits in config.precisions
            },
            skipped=layout.skipped,
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
            seconds=round(sum(stages.values()), 1),
            processor_seconds=round(processor, 1),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            reused_layers=reused,
            stage_seconds={stage: round(seconds, 1) for stage, seconds in stages.items()},
        )
        (written / "manifest.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
        os.replace(written, output)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"writing failed: {error}; finished layers are kept in {run.work.path}: make room there and run "
            f"the same command again"
        ) from error
    run.work.discard()
    return summary


def _checked_layout(checkpoint: Checkpoint) -> tuple[Layout, NamedTensors]:
    """What will be quantized, and the checkpoint's tensors by the model's names. UserError naming tensors
    that are missing or misshapen: nothing is found out hours later."""
    skeleton = build_skeleton(checkpoint)
    tensors = NamedTensors(checkpoint, skeleton)
    fill(skeleton, tensors, None)
    return find_layers(skeleton), tensors


def _samples(checkpoint: Checkpoint, config: QuantizeConfig, texts: Iterable[str]) -> Samples:
    positions = getattr(checkpoint.config(), "max_position_embeddings", None)
    if positions is not None and config.calibration_length > positions:
        raise UserError(
            f"--calibration-length {config.calibration_length}: the model has {positions} positions; give at "
            f"most as many"
        )
    wanted = config.num_calibration_samples + -(-config.tuning_steps // 2) + _VALIDATION_SAMPLES
    pieces = calibration_samples(
        texts, checkpoint.tokenizer(), wanted, config.calibration_length, config.seed
    )
    return split_samples(pieces, config.num_calibration_samples, config.tuning_steps)


def split_samples(pieces: Tensor, inputs: int, tuning: int) -> Samples:
    """Validation pieces are kept apart where there are at least four pieces; tuning has pieces of its own
    where there are enough, else it uses those of the inputs again."""
    validation = min(_VALIDATION_SAMPLES, len(pieces) // 4)
    fitted, kept = pieces[: len(pieces) - validation], pieces[len(pieces) - validation :]
    first, rest = fitted[:inputs], fitted[inputs:]
    half = max(2, pieces.shape[1] // 2)
    halves = torch.cat([rest, first])[:, : pieces.shape[1] // half * half].reshape(-1, half)
    return Samples(first, halves.repeat(-(-tuning // len(halves)), 1)[:tuning], kept)


def _layers_fingerprint(checkpoint: Checkpoint, config: QuantizeConfig, inputs: Tensor | None) -> str:
    """16 hex digits of what codes and fitted tables depend on."""
    digest = hashlib.sha256(
        f"{_LAYOUT} {checkpoint.fingerprint()} {config.seed_precision} {config.parent_precision}".encode()
    )
    _add(digest, inputs)
    return digest.hexdigest()[:16]


def _fingerprint(layers: str, config: QuantizeConfig, samples: Samples | None) -> str:
    """16 hex digits of all that the result depends on; what has no influence is left out."""
    digest = hashlib.sha256(layers.encode())
    if samples is not None:
        _add(digest, samples.tuning)
        _add(digest, samples.validation)
        digest.update(f" {config.tuning_rate}".encode())
    return digest.hexdigest()[:16]


def _add(digest: Any, pieces: Tensor | None) -> None:
    if pieces is not None:
        digest.update(f" {list(pieces.shape)}".encode() + pieces.contiguous().numpy().tobytes())


def _finished(output: Path, fingerprint: str) -> Summary | None:
    """What an earlier run of the same settings left in `output`. UserError where something else is there."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = output / "manifest.json"
    if manifest.is_file():
        recorded = json.loads(manifest.read_text())
        if recorded.get("fingerprint") == fingerprint:
            return Summary(**recorded)
    raise UserError(
        f"--output-dir {output} holds something else (not this model with these settings): choose another "
        f"folder, or empty it"
    )


def _write(
    checkpoint: Checkpoint,
    layout: Layout,
    config: QuantizeConfig,
    tensors: dict[str, Tensor],
    work: Path,
) -> Path:
    """The output but for its manifest, in a folder of `work`."""
    folder = work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    checkpoint.write_side_files(folder)
    anyprec = {
        "seed_precision": config.seed_precision,
        "parent_precision": config.parent_precision,
        "group_count": 1,
        "arch_config": layout.arch_config,
    }
    (folder / "config.json").write_text(
        json.dumps({**checkpoint.config_json, "anyprec": anyprec}, indent=2) + "\n"
    )
    save(tensors, folder / "model.safetensors", {"format": "pt"})
    # what can't be loaded is not worth keeping
    written = Checkpoint(folder, checkpoint.trust_remote_code)
    formats.load(written, None, torch.float16)
    written.tokenizer()
    return folder
