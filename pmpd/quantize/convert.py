"""An unquantized checkpoint -> an Any-Precision checkpoint.

Three stages: what the inputs of the layers look like on calibration texts (`moments`), codes and tables layer
by layer (`feedback`), and the tables of all layers tuned together (`tuning`). Everything unfinished lives in
a work folder beside the output, named by a fingerprint of what codes depend on: a run that is started again
goes on behind the last group of texts, the last layer or the last saved tuning step, and one with other
settings of the tuning uses the same layers. The output folder appears at the end, complete, by one rename.

Peak memory: one copy of the model (float32 on a CPU, bfloat16 on a GPU), and beside it, one after the other,
the second moments of a group of layers (`moments_bytes`), or one byte a quantized weight with the activations
of one piece of text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.errors import UserError
from pmpd.evaluation.perplexity import perplexity
from pmpd.kernels import bitplanes
from pmpd.quantize.calibration import calibration_samples
from pmpd.quantize.config import QuantizeConfig
from pmpd.quantize.feedback import RowMetric, damped, quantize_for_output
from pmpd.quantize.kmeans import QuantizedRows, quantize_rows, weighted_error
from pmpd.quantize.layers import LayerPlan, find_layers
from pmpd.quantize.moments import InputMoments, add_input_moments
from pmpd.quantize.tuning import TuningState, better_tables, set_bits, tune_tables, with_tables
from pmpd.quantize.work import WorkFolder, save
from pmpd.weights import dense, formats
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.formats import check_unquantized
from pmpd.weights.mixed import open_checkpoint
from pmpd.weights.naming import NamedTensors
from pmpd.weights.skeleton import build_skeleton, fill

_LAYOUT = 3
"""Raised when what is computed or stored changes, so that an older work folder is not taken up."""

_SAMPLES_PER_SAVE = 8
"""After so many pieces of text the moments are written, so that a killed run loses no more."""

_SECONDS_PER_SAVE = 20.0
"""After so many seconds of tuning its state is written."""

_VALIDATION_SAMPLES = 4
"""Pieces of text, not used for anything else, on which the result is measured at the end."""

Stage = Literal["inputs", "layers", "tuning", "validation"]
Progress = Callable[[Stage, int, int], None]
"""Called with (stage, done, total) after every step."""


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
    reused_layers: int
    """Finished by an earlier run that was interrupted."""


@dataclass(frozen=True)
class _Samples:
    """Pieces of text, int64 [pieces, tokens], for each stage; None where there is no text at all."""

    inputs: Tensor
    tuning: Tensor
    validation: Tensor


def quantize_checkpoint(
    model_path: str | Path,
    output_dir: str | Path,
    config: QuantizeConfig,
    texts: Iterable[str],
    *,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    moments_bytes: int = 4 * 2**30,
    on_progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Quantizes the checkpoint folder `model_path` into the folder `output_dir`, which must not hold anything
    else.

    `texts` are read only if `config.weighted`. `device`: default a GPU if there is one. `dtype` of the model
    runs: default float32 on a CPU, bfloat16 on a GPU. `moments_bytes`: of the layers whose inputs are
    measured in one pass over the samples; at least one layer's.

    UserError: no such checkpoint, one that is quantized, missing or misshapen tensors, nothing to quantize,
    no calibration text, an output folder in use. OSError: the disk is full (what is finished is kept).
    """
    start = time.monotonic()
    device = device or torch.device("cuda" if gpu.available() else "cpu")
    checkpoint, output = open_checkpoint(model_path, trust_remote_code), Path(output_dir).absolute()
    check_unquantized(checkpoint)
    checkpoint.tokenizer()  # without one, what is written could not be loaded
    plan, stored = _checked_plan(checkpoint)
    samples = _samples(checkpoint, config, texts) if config.weighted else None
    layers = _layers_fingerprint(checkpoint, config, None if samples is None else samples.inputs)
    fingerprint = _fingerprint(layers, config, samples)
    if (done := _finished(output, fingerprint)) is not None:
        return done
    run = _Run(
        checkpoint,
        stored,
        plan,
        config,
        samples,
        WorkFolder(output.parent / f".{output.name}.work-{layers}"),
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
        tensors = run.output_tensors(state)
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
            skipped=plan.skipped,
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
            seconds=round(time.monotonic() - start, 1),
            reused_layers=reused,
        )
        _write(checkpoint, plan, config, tensors, summary, run.work.path, output)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"writing failed: {error}; finished layers are kept in {run.work.path}: make room there and run "
            f"the same command again"
        ) from error
    shutil.rmtree(run.work.path)
    return summary


def _checked_plan(checkpoint: Checkpoint) -> tuple[LayerPlan, NamedTensors]:
    """What will be quantized, and the checkpoint's tensors by the model's names. UserError naming tensors
    that are missing or misshapen: nothing is found out hours later."""
    skeleton = build_skeleton(checkpoint)
    tensors = NamedTensors(checkpoint, skeleton)
    fill(skeleton, tensors, None)
    return find_layers(skeleton), tensors


def _samples(checkpoint: Checkpoint, config: QuantizeConfig, texts: Iterable[str]) -> _Samples:
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


def split_samples(pieces: Tensor, inputs: int, tuning: int) -> _Samples:
    """Validation pieces are kept apart where there are at least four pieces; tuning has pieces of its own
    where there are enough, else it uses those of the inputs again."""
    validation = min(_VALIDATION_SAMPLES, len(pieces) // 4)
    fitted, kept = pieces[: len(pieces) - validation], pieces[len(pieces) - validation :]
    first, rest = fitted[:inputs], fitted[inputs:]
    half = max(2, pieces.shape[1] // 2)
    halves = torch.cat([rest, first])[:, : pieces.shape[1] // half * half].reshape(-1, half)
    return _Samples(first, halves.repeat(-(-tuning // len(halves)), 1)[:tuning], kept)


def _layers_fingerprint(checkpoint: Checkpoint, config: QuantizeConfig, inputs: Tensor | None) -> str:
    """16 hex digits of what codes and fitted tables depend on."""
    digest = hashlib.sha256(
        f"{_LAYOUT} {checkpoint.fingerprint()} {config.seed_precision} {config.parent_precision}".encode()
    )
    _add(digest, inputs)
    return digest.hexdigest()[:16]


def _fingerprint(layers: str, config: QuantizeConfig, samples: _Samples | None) -> str:
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


@dataclass
class _Run:
    """One quantization under way."""

    checkpoint: Checkpoint
    stored: NamedTensors
    """Its tensors by the model's names."""
    plan: LayerPlan
    config: QuantizeConfig
    samples: _Samples | None
    work: WorkFolder
    """Of the layers: other settings of the tuning take up the same one."""
    tuning_name: str
    """Of the tuning's file in it."""
    device: torch.device
    dtype: torch.dtype
    moments_bytes: int
    on_progress: Progress
    model: PreTrainedModel | None = None

    def loaded(self) -> PreTrainedModel:
        if self.model is None:
            self.model = dense.load(self.checkpoint, self.dtype)
            self.model.to(self.device)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method
        return self.model

    def layer_name(self, layer: int) -> str:
        return f"layer-{layer:05d}"

    def paths(self, layers: Iterable[int]) -> list[str]:
        return [self.plan.path(layer, module) for layer in layers for module in self.plan.module_names]

    # ---- stages one and two ----

    def quantize_layers(self) -> int:
        """Writes a file for each layer that has none; the number of layers that had one."""
        waiting = [layer for layer in range(self.plan.count) if not self.work.has(self.layer_name(layer))]
        groups = [group for group in self._groups() if not set(group).isdisjoint(waiting)]
        done = reused = self.plan.count - len(waiting)
        for number, group in enumerate(groups):
            name = f"moments-{group[0]:05d}"
            moments = self._moments(group, name, number, len(groups))
            for layer in sorted(set(group).intersection(waiting)):
                self._quantize_layer(layer, moments)
                done += 1
                self.on_progress("layers", done, self.plan.count)
            self.work.remove(name)
        return reused

    def _groups(self) -> list[list[int]]:
        """Runs of layers whose moments (float32) fit `moments_bytes`; as if no two linears shared an
        input."""
        groups: list[list[int]] = []
        room = 0
        for layer in range(self.plan.count):
            size = sum(4 * self.stored.tensor(f"{path}.weight").shape[1] ** 2 for path in self.paths([layer]))
            if not groups or size > room:
                groups.append([])
                room = self.moments_bytes
            groups[-1].append(layer)
            room -= size
        return groups

    def _moments(self, group: list[int], name: str, number: int, groups: int) -> InputMoments | None:
        """Of the group's layers; None for unweighted. Goes on from the file `name`."""
        if self.samples is None:
            return None
        pieces = self.samples.inputs
        moments = InputMoments()
        if self.work.has(name):
            meta = self.work.meta(name)
            sums = {key: tensor.to(self.device) for key, tensor in self.work.load(name).items()}
            moments = InputMoments(sums, meta["key_of"], meta["samples"])

        def on_sample() -> None:
            if moments.samples % _SAMPLES_PER_SAVE == 0 or moments.samples == len(pieces):
                self.work.save(name, moments.sums, {"key_of": moments.key_of, "samples": moments.samples})
            self.on_progress("inputs", number * len(pieces) + moments.samples, groups * len(pieces))

        if moments.samples < len(pieces):
            add_input_moments(self.loaded(), self.paths(group), pieces, moments, on_sample)
        return moments

    def _quantize_layer(self, layer: int, moments: InputMoments | None) -> None:
        """Writes the layer's tensors, with the errors of each precision beside them."""
        tensors: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        errors = {bits: [0.0, 0.0] for bits in self.config.precisions}
        shared: dict[str, list[str]] = {}  # linears of one input are one matrix
        for path in self.paths([layer]):
            shared.setdefault(path if moments is None else moments.key_of[path], []).append(path)
        for key, paths in shared.items():
            parts = [self.stored.tensor(f"{path}.weight").to(self.device).float() for path in paths]
            weight = torch.cat(parts)
            seed, parent = self.config.seed_precision, self.config.parent_precision
            try:
                if moments is None:
                    rows = quantize_rows(weight, None, seed, parent)
                    found = [weighted_error(weight, None, rows, bits) for bits in self.config.precisions]
                else:
                    rows, metric = quantize_for_output(weight, moments.sums[key], seed, parent)
                    total = float(((weight @ damped(moments.sums[key]).float()) * weight).sum())
                    found = [(float(metric.errors[bits].sum()), total) for bits in self.config.precisions]
            except ValueError as error:
                raise UserError(f"{', '.join(paths)}: {error}") from error
            for bits, pair in zip(self.config.precisions, found, strict=True):
                for index, value in enumerate(pair):
                    errors[bits][index] += value
            start = 0
            for path, part in zip(paths, parts, strict=True):
                span = slice(start, start + len(part))
                start += len(part)
                for bits, table in rows.tables.items():
                    tensors[f"{path}.lut{bits}"] = table[span].cpu()
                if moments is not None:
                    metrics[f"{path}.sums"] = metric.sums[span].cpu()
                    metrics |= {f"{path}.error{b}": error[span].cpu() for b, error in metric.errors.items()}
                tensors[f"{path}.qweight"] = bitplanes.pack(rows.codes[span].contiguous(), parent).cpu()
        if metrics:
            self.work.save(f"metric-{layer:05d}", metrics)
        self.work.save(self.layer_name(layer), tensors, errors)

    def total_errors(self) -> tuple[dict[str, float], int]:
        """(precision -> relative error over all layers, number of quantized weights)."""
        sums: dict[str, list[float]] = {}
        weights = 0
        for layer in range(self.plan.count):
            for bits, (error, total) in self.work.meta(self.layer_name(layer)).items():
                entry = sums.setdefault(bits, [0.0, 0.0])
                entry[0] += error
                entry[1] += total
            with self.work.open(self.layer_name(layer)) as file:
                for path in self.paths([layer]):
                    _, rows, words = file.get_slice(f"{path}.qweight").get_shape()
                    weights += rows * words * bitplanes.COLUMNS_PER_WORD
        return {bits: error / total if total else 0.0 for bits, (error, total) in sums.items()}, weights

    # ---- stage three ----

    def tune_and_validate(self) -> tuple[TuningState, dict[str, float]]:
        """The tuned tables are in the state's tensors as `PATH.lutB`. Both empty where there is no text."""
        state = TuningState()
        found: dict[str, float] = {}
        if self.samples is None or not len(self.samples.tuning) + len(self.samples.validation):
            return state, found
        quantized = self._quantized()
        if self.work.has(self.tuning_name):
            meta = self.work.meta(self.tuning_name)
            divergence = [{int(bits): value for bits, value in step.items()} for step in meta["divergence"]]
            tensors = {
                key: tensor.to(self.device) for key, tensor in self.work.load(self.tuning_name).items()
            }
            state = TuningState(meta["step"], tensors, divergence)
        steps = len(self.samples.tuning)
        saved = time.monotonic()

        def on_step(state: TuningState) -> None:
            nonlocal saved
            if time.monotonic() - saved >= _SECONDS_PER_SAVE or state.step == steps:
                self.work.save(
                    self.tuning_name, state.tensors, {"step": state.step, "divergence": state.divergence}
                )
                saved = time.monotonic()
            self.on_progress("tuning", state.step, steps)

        fitted = quantized
        if steps:
            quantized, state = tune_tables(
                self.loaded(),
                quantized,
                self._metrics(),
                self.samples.tuning,
                self.config.tuning_rate,
                state,
                on_step,
            )
        if len(self.samples.validation):
            found = self._validate(quantized, self.samples.validation)
            if steps:
                before = self._validate(fitted, self.samples.validation)
                quantized, found = better_tables(fitted, before, quantized, found)
        tables = {
            f"{path}.lut{bits}": table.cpu()
            for path, rows in quantized.items()
            for bits, table in rows.tables.items()
        }
        return TuningState(state.step, tables, state.divergence), found

    def _quantized(self) -> dict[str, QuantizedRows]:
        """The result of stage two, in memory."""
        parent, result = self.config.parent_precision, {}
        for layer in range(self.plan.count):
            stored = self.work.load(self.layer_name(layer))
            for path in self.paths([layer]):
                result[path] = QuantizedRows(
                    bitplanes.unpack(stored[f"{path}.qweight"], parent).to(self.device),
                    {bits: stored[f"{path}.lut{bits}"].to(self.device) for bits in self.config.precisions},
                )
        return result

    def _metrics(self) -> dict[str, RowMetric]:
        """Beside the result of stage two."""
        result = {}
        for layer in range(self.plan.count):
            stored = self.work.load(f"metric-{layer:05d}")
            for path in self.paths([layer]):
                errors = {bits: stored[f"{path}.error{bits}"] for bits in self.config.precisions}
                result[path] = RowMetric(errors, stored[f"{path}.sums"])
        return result

    def _validate(self, quantized: dict[str, QuantizedRows], pieces: Tensor) -> dict[str, float]:
        """Precision, 16 too -> perplexity on `pieces`."""
        model = self.loaded()
        found: dict[str, float] = {}
        with with_tables(model, quantized) as linears:
            choices = [None, *reversed(self.config.precisions)]
            for done, bits in enumerate(choices, start=1):
                set_bits(linears, bits)
                value = perplexity(model, pieces.flatten(), pieces.shape[1]).value
                found[str(bits or dense.BITS)] = value
                self.on_progress("validation", done, len(choices))
        return found

    # ---- the output ----

    def output_tensors(self, state: TuningState) -> dict[str, Tensor]:
        """All tensors of the output, memory-mapped from work folder and source; a tensor with two names
        (tied) keeps the first."""
        replaced = {f"{path}.weight" for path in self.paths(range(self.plan.count))}
        tensors: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name in sorted(self.stored.names() - replaced):
            tensor = self.stored.tensor(name)
            if (key := (tensor.data_ptr(), tensor.shape)) not in seen:
                seen.add(key)
                tensors[name] = tensor.contiguous()
        for layer in range(self.plan.count):
            with self.work.open(self.layer_name(layer)) as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
        return tensors | state.tensors


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
    checkpoint.write_side_files(folder)
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
    save(tensors, folder / "model.safetensors", {"format": "pt"})
    # what can't be loaded is not worth keeping
    written = Checkpoint(folder, checkpoint.trust_remote_code)
    formats.load(written, None, torch.float16)
    written.tokenizer()
    os.replace(folder, output)
