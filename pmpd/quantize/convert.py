"""An unquantized checkpoint -> an Any-Precision checkpoint, layer by layer.

Everything unfinished lives in a work folder beside the output, named by a fingerprint of model, calibration
tokens and settings: the importance of layers that are waiting, and the finished layers. A run that is started
again finds it and goes on; the output folder appears at the end, complete, by one rename. At most one copy of
the model is in memory, beside the importance of a group of layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.kernels import bitplanes
from pmpd.quantize.importance import calibration_samples, squared_gradients
from pmpd.quantize.kmeans import check_precisions, quantize_rows, weighted_error
from pmpd.quantize.layers import LayerPlan, find_layers
from pmpd.weights import dense
from pmpd.weights.checkpoint import Checkpoint, build_skeleton

_LAYOUT = 1
"""Raised when what is computed or stored changes, so that an older work folder is not taken up."""

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"})

Progress = Callable[[Literal["gradients", "layers"], int, int], None]
"""Called with (stage, done, total) after every step."""


@dataclass(frozen=True)
class QuantizeConfig:
    """How one model is quantized."""

    seed_precision: int = 2
    """Lowest precision, in bits (2..8): the weights of each row are clustered at it."""
    parent_precision: int = 4
    """Highest precision, in bits (2..8): each bit from the seed on splits every cluster in two."""
    weighted: bool = True
    """Weight errors by squared gradients of the loss on calibration texts; off: all weights of a row alike
    (no model run needed)."""
    num_calibration_samples: int = 100
    """Pieces of text whose gradients are taken."""
    calibration_length: int = 512
    """Tokens of each piece."""
    seed: int = 0
    """Of the order of the calibration texts."""

    def __post_init__(self) -> None:
        check_precisions(self.seed_precision, self.parent_precision)
        if self.num_calibration_samples < 1:
            raise UserError(f"--num-calibration-samples {self.num_calibration_samples}: give at least 1")
        if self.calibration_length < 2:
            raise UserError(f"--calibration-length {self.calibration_length}: give at least 2 tokens")

    @property
    def precisions(self) -> range:
        return range(self.seed_precision, self.parent_precision + 1)


@dataclass(frozen=True)
class Summary:
    """What was written; also the folder's `manifest.json`."""

    fingerprint: str
    """Of model, calibration tokens and settings."""
    settings: dict[str, Any]
    calibration_tokens: list[int]
    """[samples, tokens each]; [0, 0] where errors are not weighted."""
    quantized_weights: int
    model_bytes: int
    source_bytes: int
    relative_error: dict[str, float]
    """Precision -> Σ importance · (weight − quantized)² / Σ importance · weight² over all quantized
    linears."""
    skipped: dict[str, str]
    """Linears inside the decoder layers that were left as they are, and why."""
    versions: dict[str, str]
    seconds: float
    reused_layers: int
    """Finished by an earlier run that was interrupted."""


def quantize_checkpoint(
    model_path: str | Path,
    output_dir: str | Path,
    config: QuantizeConfig,
    texts: Iterable[str],
    *,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    importance_bytes: int = 4 * 2**30,
    on_progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Quantizes the checkpoint folder `model_path` into the folder `output_dir`, which must not hold anything
    else.

    `texts` are read only if `config.weighted`. `device`: default a GPU if there is one. `importance_bytes`:
    of the layers whose gradients are taken in one pass over the samples; at least one layer's.

    ValueError: no such checkpoint, one that is quantized, missing or misshapen tensors, nothing to quantize,
    no calibration text, an output folder in use. OSError: the disk is full (what is finished is kept).
    """
    start = time.monotonic()
    device = device or torch.device("cuda" if gpu.available() else "cpu")
    checkpoint, output = Checkpoint(model_path, trust_remote_code), Path(output_dir).absolute()
    dense.check(checkpoint)
    plan = _checked_plan(checkpoint)
    samples = _samples(checkpoint, config, texts) if config.weighted else None
    fingerprint = _fingerprint(checkpoint, config, samples)
    if (done := _finished(output, fingerprint)) is not None:
        return done
    work = output.parent / f".{output.name}.work-{fingerprint}"
    work.mkdir(parents=True, exist_ok=True)
    waiting = [layer for layer in range(plan.count) if not _is_readable(_layer_file(work, layer))]
    try:
        for layer, importance in _importance(
            checkpoint, plan, waiting, samples, work, device, importance_bytes, on_progress
        ):
            _quantize_layer(checkpoint, plan, layer, importance, config, work, device)
            on_progress("layers", plan.count - len(waiting) + waiting.index(layer) + 1, plan.count)
        errors, weights = _total_errors(plan, work)
        tensors = _tensors(checkpoint, plan, work)
        summary = Summary(
            fingerprint=fingerprint,
            settings=asdict(config),
            calibration_tokens=[0, 0] if samples is None else list(samples.shape),
            quantized_weights=weights,
            model_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            source_bytes=sum(checkpoint.tensor(name).nbytes for name in checkpoint.names()),
            relative_error=errors,
            skipped=plan.skipped,
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
            seconds=round(time.monotonic() - start, 1),
            reused_layers=plan.count - len(waiting),
        )
        _write(checkpoint, plan, config, tensors, summary, work, output)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"writing failed: {error}; finished layers are kept in {work}: make room there and run the same "
            f"command again"
        ) from error
    shutil.rmtree(work)
    return summary


def _checked_plan(checkpoint: Checkpoint) -> LayerPlan:
    """What will be quantized, its tensors checked. ValueError naming those that are missing or misshapen."""
    skeleton = build_skeleton(checkpoint)
    skeleton.tie_weights()
    plan, names, problems = find_layers(skeleton), checkpoint.names(), []
    for layer in range(plan.count):
        for module in plan.module_names:
            path = plan.path(layer, module)
            linear = skeleton.get_submodule(path)
            for name, parameter in linear.named_parameters():
                if f"{path}.{name}" not in names:
                    problems.append(f"{path}.{name} is missing")
                elif (shape := checkpoint.tensor(f"{path}.{name}").shape) != parameter.shape:
                    problems.append(
                        f"{path}.{name} has shape {list(shape)}, the config asks for {list(parameter.shape)}"
                    )
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"checkpoint {checkpoint.folder} does not fit its own config.json: "
            f"{'; '.join(problems[:8])}{more}"
        )
    return plan


def _samples(checkpoint: Checkpoint, config: QuantizeConfig, texts: Iterable[str]) -> Tensor:
    positions = getattr(checkpoint.config(), "max_position_embeddings", None)
    if positions is not None and config.calibration_length > positions:
        raise UserError(
            f"--calibration-length {config.calibration_length}: the model has {positions} positions; give at "
            f"most as many"
        )
    return calibration_samples(
        texts, checkpoint.tokenizer(), config.num_calibration_samples, config.calibration_length, config.seed
    )


def _fingerprint(checkpoint: Checkpoint, config: QuantizeConfig, samples: Tensor | None) -> str:
    """16 hex digits; what has no influence on the result is left out."""
    digest = hashlib.sha256(
        f"{_LAYOUT} {checkpoint.fingerprint()} {config.seed_precision} {config.parent_precision}".encode()
    )
    if samples is not None:
        digest.update(f" {list(samples.shape)}".encode() + samples.numpy().tobytes())
    return digest.hexdigest()[:16]


def _finished(output: Path, fingerprint: str) -> Summary | None:
    """What an earlier run of the same settings left in `output`. ValueError where something else is there."""
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


def _importance(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    waiting: list[int],
    samples: Tensor | None,
    work: Path,
    device: torch.device,
    importance_bytes: int,
    on_progress: Progress,
) -> Iterator[tuple[int, dict[str, Tensor] | None]]:
    """(layer, module -> importance float32 [N, K]) of every waiting layer; None for unweighted."""
    if samples is None or not waiting:
        yield from ((layer, None) for layer in waiting)
        return
    missing = [layer for layer in waiting if not _is_readable(_importance_file(work, layer))]
    groups = _groups(checkpoint, plan, missing, importance_bytes)
    steps = len(groups) * len(samples)
    model, step = None, 0
    for layer in waiting:
        if groups and layer == groups[0][0]:
            if model is None:
                model = dense.load(checkpoint, torch.float32 if device.type == "cpu" else torch.bfloat16)
                model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` hides that it is a method
            group = groups.pop(0)

            def on_sample() -> None:
                nonlocal step
                step += 1
                on_progress("gradients", step, steps)

            names = [f"{plan.path(layer, module)}.weight" for layer in group for module in plan.module_names]
            found = squared_gradients(model, names, samples, on_sample)
            for member in group:
                tensors = {
                    module: found.pop(f"{plan.path(member, module)}.weight").cpu()
                    for module in plan.module_names
                }
                _save(tensors, _importance_file(work, member))
            if not groups:
                model = None  # from here on weights come from the files, one at a time
        yield layer, load_file(_importance_file(work, layer))


def _groups(
    checkpoint: Checkpoint, plan: LayerPlan, layers: list[int], importance_bytes: int
) -> list[list[int]]:
    """Runs of layers whose importance (float32) fits `importance_bytes`."""
    groups: list[list[int]] = []
    room = 0
    for layer in layers:
        size = sum(
            4 * checkpoint.tensor(f"{plan.path(layer, module)}.weight").numel()
            for module in plan.module_names
        )
        if not groups or size > room:
            groups.append([])
            room = importance_bytes
        groups[-1].append(layer)
        room -= size
    return groups


def _quantize_layer(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    layer: int,
    importance: dict[str, Tensor] | None,
    config: QuantizeConfig,
    work: Path,
    device: torch.device,
) -> None:
    """Writes the layer's tensors, with the errors of each precision as metadata."""
    tensors: dict[str, Tensor] = {}
    errors = {bits: [0.0, 0.0] for bits in config.precisions}
    for module in plan.module_names:
        path = plan.path(layer, module)
        weight = checkpoint.tensor(f"{path}.weight").to(device)
        matters = None if importance is None else importance[module].to(device)
        try:
            rows = quantize_rows(weight, matters, config.seed_precision, config.parent_precision)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        for bits in config.precisions:
            for index, value in enumerate(weighted_error(weight, matters, rows, bits)):
                errors[bits][index] += value
            tensors[f"{path}.lut{bits}"] = rows.tables[bits].cpu()
        tensors[f"{path}.qweight"] = bitplanes.pack(rows.codes, config.parent_precision).cpu()
    _save(tensors, _layer_file(work, layer), {"errors": json.dumps(errors)})
    _importance_file(work, layer).unlink(missing_ok=True)


def _total_errors(plan: LayerPlan, work: Path) -> tuple[dict[str, float], int]:
    """(precision -> relative weighted error over all layers, number of quantized weights)."""
    sums: dict[str, list[float]] = {}
    weights = 0
    for layer in range(plan.count):
        with safe_open(_layer_file(work, layer), framework="pt") as file:
            for bits, (error, total) in json.loads(file.metadata()["errors"]).items():
                entry = sums.setdefault(bits, [0.0, 0.0])
                entry[0] += error
                entry[1] += total
            for module in plan.module_names:
                _, rows, words = file.get_slice(f"{plan.path(layer, module)}.qweight").get_shape()
                weights += rows * words * bitplanes.COLUMNS_PER_WORD
    return {bits: error / total if total else 0.0 for bits, (error, total) in sums.items()}, weights


def _tensors(checkpoint: Checkpoint, plan: LayerPlan, work: Path) -> dict[str, Tensor]:
    """All tensors of the output, memory-mapped from work folder and source; a tensor with two names (tied)
    keeps the first."""
    replaced = {
        f"{plan.path(layer, module)}.weight" for layer in range(plan.count) for module in plan.module_names
    }
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name in sorted(checkpoint.names() - replaced):
        tensor = checkpoint.tensor(name)
        if (key := (tensor.data_ptr(), tensor.shape)) not in seen:
            seen.add(key)
            tensors[name] = tensor.contiguous()
    for layer in range(plan.count):
        with safe_open(_layer_file(work, layer), framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
    return tensors


def _write(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    config: QuantizeConfig,
    tensors: dict[str, Tensor],
    summary: Summary,
    work: Path,
    output: Path,
) -> None:
    folder = work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    anyprec = {
        "seed_precision": config.seed_precision,
        "parent_precision": config.parent_precision,
        "group_count": 1,
        "arch_config": plan.arch_config,
    }
    (folder / "config.json").write_text(
        json.dumps({**checkpoint.config_json, "anyprec": anyprec}, indent=2) + "\n"
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    _save(tensors, folder / "model.safetensors", {"format": "pt"})
    os.replace(folder, output)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Under `path` is either the whole file or none."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file(tensors, partial, metadata)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(path)


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, safetensors.SafetensorError):
        return False


def _layer_file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:05d}.safetensors"


def _importance_file(work: Path, layer: int) -> Path:
    return work / f"importance-{layer:05d}.safetensors"
