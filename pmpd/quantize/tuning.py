"""The tables of all layers tuned together: what the quantized model says against what the unquantized one
says.

Layers quantized one by one know nothing of each other's errors. Here the codes stay, and the values in the
tables, which are few, follow the gradient of the Kullback-Leibler divergence from the unquantized model's
next token distribution (end-to-end tuning of quantization parameters only, as in EfficientQAT's second phase,
Chen et al., 2024, arXiv:2407.11062; distillation after LLM-QAT, Liu et al., 2023, arXiv:2305.17888). Each
precision has tables of its own, so each is tuned on its own; the unquantized model runs once for all of them.

A table is moved in coordinates z with `table = start + basis @ z`, in which every direction costs the layer's
output the same: a step of length 1 is an error as large as the one that quantizing the row made. Adam moves
each coordinate by its step size whatever the gradient's noise; in these coordinates the noise costs a known,
small share of the error there is, at every precision, and the few inputs with massive activations do not make
a small change of a table a large one of the output. (In the tables' own coordinates 8 steps raised the
perplexity of 3 and 4 bits.)

Legend: N out_features, K in_features, C values of a table, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmpd.errors import UserError
from pmpd.quantize.feedback import MAX_METRIC_BITS, RowMetric
from pmpd.quantize.kmeans import QuantizedRows

_TOKENS_PER_PIECE = 256
"""Of the loss: the float32 distributions over the vocabulary of so many tokens are in memory at a time."""

_BETAS = (0.9, 0.98)

_WARM_UP = 0.1
"""Share of a precision's steps in which the step size rises to its highest."""

_RIDGE = 0.05
"""Of a row's mean metric: bounds how far values that few or faint columns use can move."""


def basis(metric: RowMetric, bits: int) -> Tensor:
    """float32 [N, C, C], symmetric: the changes of a row's table that cost its output as much as quantizing
    it did, in all directions."""
    metric_NCC = metric.of(bits)
    diagonal = metric_NCC.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(metric_NCC)
    lengths = (metric.errors[bits].to(values).view(-1, 1, 1) / values.unsqueeze(1)).sqrt()
    return ((vectors * lengths) @ vectors.transpose(1, 2)).float()


class _TableProduct(torch.autograd.Function):
    """y = x Ŵᵀ with Ŵ[n, k] = table[n, codes[n, k]]. Keeps the codes (one byte a weight), never Ŵ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, codes)
        return x @ _look_up(table, codes).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, table, codes = ctx.saved_tensors
        grad_x = grad @ _look_up(table, codes).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_table = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            grad_table = torch.zeros_like(table).scatter_add_(1, codes.long(), grad_weight.to(table.dtype))
        return grad_x, grad_table, None


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    return table.gather(1, codes.long())


class TunedLinear(nn.Module):
    """A linear layer that has its unquantized weights and its tables; `bits` None: the former."""

    def __init__(self, linear: nn.Linear, rows: QuantizedRows) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.codes = rows.codes.to(device)
        self.parent = max(rows.tables)
        self.tables = {
            bits: table.to(device, torch.float32, copy=True) for bits, table in rows.tables.items()
        }
        self.bits: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return nn.functional.linear(x, self.weight, self.bias)
        codes = self.codes >> (self.parent - self.bits)
        y = _TableProduct.apply(x, self.tables[self.bits], codes)
        return y if self.bias is None else y + self.bias


@contextmanager
def with_tables(
    model: PreTrainedModel, quantized: Mapping[str, QuantizedRows]
) -> Iterator[dict[str, TunedLinear]]:
    """Inside, the linears named in `quantized` are `TunedLinear`s (yielded, by name); then the old ones are
    back."""
    old = {name: model.get_submodule(name) for name in quantized}
    tuned: dict[str, TunedLinear] = {}
    for name, linear in old.items():
        assert isinstance(linear, nn.Linear)
        tuned[name] = TunedLinear(linear, quantized[name])
    try:
        for name, module in tuned.items():
            _put(model, name, module)
        yield tuned
    finally:
        for name, linear in old.items():
            _put(model, name, linear)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


@dataclass
class TuningState:
    """Where a tuning stands, as tensors that a file can hold: `tensors` table, and Adam's moments, by linear
    and precision; `step` pieces of text used."""

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    divergence: list[dict[int, float]] = field(default_factory=list)
    """Per sample: precision that took it -> divergence before that step, nats a token."""


def tune_tables(
    model: PreTrainedModel,
    quantized: Mapping[str, QuantizedRows],
    metrics: Mapping[str, RowMetric],
    samples_ST: Tensor,
    rate: float,
    state: TuningState | None = None,
    on_step: Callable[[TuningState], None] = lambda state: None,
) -> tuple[dict[str, QuantizedRows], TuningState]:
    """Linear -> the same codes with tuned tables, by Adam, a step for each of `samples_ST` int64 [S, T].

    The lowest precision takes every sample, each higher one half as many as the one below it (its errors are
    a quarter); precisions above `MAX_METRIC_BITS` take none. A step of a row's table, all its directions
    together, is at most about `rate` of the error that quantizing the row made: that share rises over the
    first tenth of the steps, then falls to 0 along a half cosine.

    `state`: of a tuning that was stopped; it goes on behind its step. Memory beside the model: one byte a
    quantized weight, three float32 per table value and 2**bits more of its basis, activations of one sample,
    its distributions (T · V). UserError: a divergence that is not finite.
    """
    state = state or TuningState()
    model.requires_grad_(False)
    with with_tables(model, quantized) as tuned:
        precisions = [bits for bits in sorted(next(iter(tuned.values())).tables) if bits <= MAX_METRIC_BITS]
        bases = {
            (name, bits): basis(metrics[name].to(model.device), bits) for name in tuned for bits in precisions
        }
        for name, module in tuned.items():
            for bits in precisions:
                if (stored := state.tensors.get(f"{name}.table{bits}")) is not None:
                    module.tables[bits] = stored
        for index in range(state.step, len(samples_ST)):
            input_ids = samples_ST[index].unsqueeze(0).to(model.device)
            set_bits(tuned, None)
            with torch.no_grad():
                target_TV = model(input_ids=input_ids, use_cache=False).logits[0].float().log_softmax(1)
            found = {}
            for bits in precisions:
                every = 2 ** (bits - precisions[0])
                if index % every == 0:
                    set_bits(tuned, bits)
                    number, steps = index // every, -(-len(samples_ST) // every)
                    found[bits] = _step(
                        model, tuned, bases, bits, input_ids, target_TV,
                        rate / 2 ** (bits / 2) * _pace(number, steps), number + 1, state.tensors,
                    )  # fmt: skip
            state.divergence.append(found)
            state.step = index + 1
            on_step(state)
        result = {
            name: QuantizedRows(module.codes, {bits: table.half() for bits, table in module.tables.items()})
            for name, module in tuned.items()
        }
    return result, state


def _pace(step: int, steps: int) -> float:
    """0..1, the share of the highest step size at `step` of `steps`."""
    rising = max(1.0, _WARM_UP * steps)
    if step + 1 <= rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising)))


def better_tables(
    fitted: Mapping[str, QuantizedRows],
    fitted_perplexity: Mapping[str, float],
    tuned: Mapping[str, QuantizedRows],
    tuned_perplexity: Mapping[str, float],
) -> tuple[dict[str, QuantizedRows], dict[str, float]]:
    """For each precision the tables of all layers whose perplexity is the lower one, and that perplexity.

    Few steps on few texts help 2 bits much and may harm 4, whose tables were right before. Both perplexities
    are of texts that neither was made from.
    """
    lower = {bits: min(value, fitted_perplexity[bits]) for bits, value in tuned_perplexity.items()}
    result = {
        name: QuantizedRows(
            rows.codes,
            {
                bits: table
                if tuned_perplexity[str(bits)] <= fitted_perplexity[str(bits)]
                else fitted[name].tables[bits]
                for bits, table in rows.tables.items()
            },
        )
        for name, rows in tuned.items()
    }
    return result, lower


def set_bits(tuned: Mapping[str, TunedLinear], bits: int | None) -> None:
    for module in tuned.values():
        module.bits = bits


def _step(
    model: PreTrainedModel,
    tuned: Mapping[str, TunedLinear],
    bases: Mapping[tuple[str, int], Tensor],
    bits: int,
    input_ids: Tensor,
    target_TV: Tensor,
    rate: float,
    number: int,
    kept: dict[str, Tensor],
) -> float:
    """One step of Adam for the tables of one precision; the divergence before it."""
    for module in tuned.values():
        module.tables[bits].requires_grad_(True)
    logits = model(input_ids=input_ids, use_cache=False).logits[0]
    value, gradient = divergence(logits.detach(), target_TV)
    if not math.isfinite(value):
        raise UserError(
            f"the divergence at {bits} bits is {value} at step {number}: give a lower --tuning-rate"
        )
    logits.backward(gradient)
    for name, module in tuned.items():
        table, basis_NCC = module.tables[bits], bases[name, bits]
        table_grad = table.grad
        table.requires_grad_(False)
        table.grad = None
        kept[f"{name}.table{bits}"] = table
        if table_grad is None:
            continue
        grad = (basis_NCC @ table_grad.unsqueeze(2))[..., 0]
        first = kept.setdefault(f"{name}.first{bits}", torch.zeros_like(table))
        second = kept.setdefault(f"{name}.second{bits}", torch.zeros_like(table))
        first.lerp_(grad, 1 - _BETAS[0])
        second.lerp_(grad.square(), 1 - _BETAS[1])
        mean = first / (1 - _BETAS[0] ** number)
        spread = (second / (1 - _BETAS[1] ** number)).sqrt_().add_(1e-20)
        table.sub_((basis_NCC @ (rate * mean / spread).unsqueeze(2))[..., 0])
    return value


@torch.no_grad()
def divergence(logits_TV: Tensor, target_TV: Tensor) -> tuple[float, Tensor]:
    """(mean over tokens of KL(exp target ‖ softmax logits) in nats, its gradient by the logits); `target_TV`
    float32, the logarithms of probabilities."""
    tokens = logits_TV.shape[0]
    gradient = torch.empty_like(logits_TV)
    total = 0.0
    for start in range(0, tokens, _TOKENS_PER_PIECE):
        part = slice(start, start + _TOKENS_PER_PIECE)
        ours, theirs = logits_TV[part].float().log_softmax(1), target_TV[part]
        wanted = theirs.exp()
        total += float((wanted * (theirs - ours)).sum(dtype=torch.float64))
        gradient[part] = ours.exp_().sub_(wanted).div_(tokens).to(gradient.dtype)
    return total / tokens, gradient
