"""The stages of a quantization under way, each of which goes on where a stopped run left it.

What is finished lies in a `WorkFolder`: `moments-N` while texts are read, `layer-N` and `metric-N` for each
quantized layer, and the state of the tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.decode.graphs import StepGraphs
from pmpd.errors import UserError
from pmpd.evaluation.perplexity import perplexity
from pmpd.kernels import bitplanes
from pmpd.quantize.config import QuantizeConfig
from pmpd.quantize.feedback import RowMetric, block_steps, damped, quantize_for_output
from pmpd.quantize.kmeans import QuantizedRows, quantize_rows, weighted_error
from pmpd.quantize.layers import Layout
from pmpd.quantize.moments import InputMoments, add_input_moments
from pmpd.quantize.tuning import TuningState, better_tables, set_bits, tune_tables, with_tables
from pmpd.quantize.work import Saves, WorkFolder
from pmpd.weights import dense
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.naming import NamedTensors

_MOMENTS_BYTES = 4 * 2**30
_MOMENTS_SHARE = 3
"""On a GPU the moments of one pass over the texts take one part in so many of the memory that is free beside
the model, or `_MOMENTS_BYTES` where that is more."""

Stage = Literal["inputs", "layers", "tuning", "validation"]
Progress = Callable[[Stage, int, int], None]
"""Called with (stage, done, total) after every step."""


@dataclass(frozen=True)
class Samples:
    """Pieces of text, int64 [pieces, tokens], for each stage; None where there is no text at all."""

    inputs: Tensor
    tuning: Tensor
    validation: Tensor


@dataclass
class Stages:
    """One quantization under way."""

    checkpoint: Checkpoint
    stored: NamedTensors
    """Its tensors by the model's names."""
    layout: Layout
    config: QuantizeConfig
    samples: Samples | None
    work: WorkFolder
    """Of the layers: other settings of the tuning take up the same one."""
    tuning_name: str
    """Of the tuning's file in it."""
    device: torch.device
    dtype: torch.dtype
    moments_bytes: int | None
    """None: by the device."""
    on_progress: Progress
    model: PreTrainedModel | None = None

    def loaded(self) -> PreTrainedModel:
        if self.model is None:
            with self.work.clock.stage("loading"):
                self.model = dense.load(self.checkpoint, self.dtype)
                self.model.to(self.device)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method
        return self.model

    def layer_name(self, layer: int) -> str:
        return f"layer-{layer:05d}"

    def paths(self, layers: Iterable[int]) -> list[str]:
        return [self.layout.path(layer, module) for layer in layers for module in self.layout.module_names]

    # ---- stages one and two ----

    def quantize_layers(self) -> int:
        """Writes a file for each layer that has none; the number of layers that had one."""
        waiting = [layer for layer in range(self.layout.count) if not self.work.has(self.layer_name(layer))]
        done = reused = self.layout.count - len(waiting)
        groups = [group for group in self._groups() if not set(group).isdisjoint(waiting)] if waiting else []
        blocks = block_steps(self.config.precisions, self.device)
        for number, group in enumerate(groups):
            name = f"moments-{group[0]:05d}"
            with self.work.clock.stage("inputs"):
                moments = self._moments(group, name, number, len(groups))
            for layer in sorted(set(group).intersection(waiting)):
                with self.work.clock.stage("layers"):
                    self._quantize_layer(layer, moments, blocks)
                done += 1
                self.on_progress("layers", done, self.layout.count)
            self.work.remove(name)
        return reused

    def _groups(self) -> list[list[int]]:
        """Runs of layers whose moments (float32) fit `moments_bytes`; as if no two linears shared an
        input."""
        groups: list[list[int]] = []
        most, room = self._moments_bytes(), 0
        for layer in range(self.layout.count):
            size = sum(4 * self.stored.tensor(f"{path}.weight").shape[1] ** 2 for path in self.paths([layer]))
            if not groups or size > room:
                groups.append([])
                room = most
            groups[-1].append(layer)
            room -= size
        return groups

    def _moments_bytes(self) -> int:
        if self.moments_bytes is not None:
            return self.moments_bytes
        if self.device.type != "cuda" or self.samples is None:
            return _MOMENTS_BYTES
        self.loaded()
        return max(_MOMENTS_BYTES, gpu.free_bytes(self.device) // _MOMENTS_SHARE)

    def _moments(self, group: list[int], name: str, number: int, groups: int) -> InputMoments | None:
        """Of the group's layers; None for unweighted. Goes on from the file `name`, if it is of the same
        group: how many layers there are in one depends on the memory that is free."""
        if self.samples is None:
            return None
        pieces = self.samples.inputs
        moments = InputMoments()
        if self.work.has(name) and (meta := self.work.meta(name)).get("layers") == group:
            sums = {key: tensor.to(self.device) for key, tensor in self.work.load(name).items()}
            moments = InputMoments(sums, meta["key_of"], meta["samples"])
        saves = Saves(self.work, name)

        def on_sample() -> None:
            meta = {"layers": group, "key_of": moments.key_of, "samples": moments.samples}
            saves.offer(moments.sums, meta)
            self.on_progress("inputs", number * len(pieces) + moments.samples, groups * len(pieces))

        if moments.samples < len(pieces):
            add_input_moments(self.loaded(), self.paths(group), pieces, moments, on_sample)
        return moments

    def _quantize_layer(self, layer: int, moments: InputMoments | None, blocks: StepGraphs) -> None:
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
                    rows, metric = quantize_for_output(weight, moments.sums[key], seed, parent, blocks)
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
        for layer in range(self.layout.count):
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
        with self.work.clock.stage("loading"):
            quantized = self._quantized()
        if self.work.has(self.tuning_name):
            meta = self.work.meta(self.tuning_name)
            divergence = [{int(bits): value for bits, value in step.items()} for step in meta["divergence"]]
            tensors = {
                key: tensor.to(self.device) for key, tensor in self.work.load(self.tuning_name).items()
            }
            state = TuningState(meta["step"], tensors, divergence)
        steps = len(self.samples.tuning)
        saves = Saves(self.work, self.tuning_name)

        def on_step(state: TuningState) -> None:
            write = saves.save if state.step == steps else saves.offer
            write(state.tensors, {"step": state.step, "divergence": state.divergence})
            self.on_progress("tuning", state.step, steps)

        fitted = quantized
        if steps:
            with self.work.clock.stage("tuning"):
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
            with self.work.clock.stage("validation"):
                times = 2 if steps else 1
                found = self._validate(quantized, self.samples.validation, times)
                if steps:
                    before = self._validate(fitted, self.samples.validation, times, done_before=1)
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
        for layer in range(self.layout.count):
            stored = self.work.load(self.layer_name(layer))
            for path in self.paths([layer]):
                result[path] = QuantizedRows(
                    bitplanes.unpack(stored[f"{path}.qweight"].to(self.device), parent),
                    {bits: stored[f"{path}.lut{bits}"].to(self.device) for bits in self.config.precisions},
                )
        return result

    def _metrics(self) -> dict[str, RowMetric]:
        """Beside the result of stage two."""
        result = {}
        for layer in range(self.layout.count):
            stored = self.work.load(f"metric-{layer:05d}")
            for path in self.paths([layer]):
                errors = {bits: stored[f"{path}.error{bits}"] for bits in self.config.precisions}
                result[path] = RowMetric(errors, stored[f"{path}.sums"])
        return result

    def _validate(
        self, quantized: dict[str, QuantizedRows], pieces: Tensor, times: int, done_before: int = 0
    ) -> dict[str, float]:
        """Precision, 16 too -> perplexity on `pieces`. Progress counts all `times` that this is asked for."""
        model = self.loaded()
        found: dict[str, float] = {}
        with with_tables(model, quantized) as linears:
            choices = [None, *reversed(self.config.precisions)]
            for done, bits in enumerate(choices, start=1):
                set_bits(linears, bits)
                value = perplexity(model, pieces.flatten(), pieces.shape[1]).value
                found[str(bits or dense.BITS)] = value
                all_done = done_before * len(choices) + done
                self.on_progress("validation", all_done, times * len(choices))
        return found

    # ---- the output ----

    def output_tensors(self, state: TuningState) -> dict[str, Tensor]:
        """All tensors of the output, memory-mapped from work folder and source; a tensor with two names
        (tied) keeps the first."""
        replaced = {f"{path}.weight" for path in self.paths(range(self.layout.count))}
        tensors: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name in sorted(self.stored.names() - replaced):
            tensor = self.stored.tensor(name)
            if (key := (tensor.data_ptr(), tensor.shape)) not in seen:
                seen.add(key)
                tensors[name] = tensor.contiguous()
        for layer in range(self.layout.count):
            with self.work.open(self.layer_name(layer)) as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
        return tensors | state.tensors
