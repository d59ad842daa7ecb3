"""The tables of all layers tuned together: what the quantized model says against what the unquantized one
says.

Layers quantized one by one know nothing of each other's errors. Here the codes stay, and the values in the
tables, which are few, follow the gradient of the Kullback-Leibler divergence from the unquantized model's
next token distribution (end-to-end tuning of quantization parameters only, as in EfficientQAT's second phase,
Chen et al., 2024, arXiv:2407.11062; distillation after LLM-QAT, Liu et al., 2023, arXiv:2305.17888). Each
precision has tables of its own, so each is tuned on its own; the unquantized model runs once for all of them.

Legend: N out_features, K in_features, T tokens, V vocabulary.
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
from pmpd.quantize.kmeans import QuantizedRows

_TOKENS_PER_PIECE = 256
"""Of the loss: the float32 distributions over the vocabulary of so many tokens are in memory at a time."""

_BETAS = (0.9, 0.95)


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
        self.scale = linear.weight.detach().float().std(1, keepdim=True).clamp(min=1e-8)  # [N, 1]
        self.start = {bits: table.float().to(device) for bits, table in rows.tables.items()}
        self.shift = {bits: torch.zeros_like(table) for bits, table in self.start.items()}
        """What tuning adds to a table, in standard deviations of the row's weights."""
        self.bits: int | None = None

    def table(self, bits: int) -> Tensor:
        """float32 [N, 2**bits]"""
        return self.start[bits] + self.scale * self.shift[bits]

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return nn.functional.linear(x, self.weight, self.bias)
        codes = self.codes >> (self.parent - self.bits)
        y = _TableProduct.apply(x, self.table(self.bits), codes)
        return y if self.bias is None else y + self.bias


@contextmanager
def with_tables(
    model: PreTrainedModel, quantized: Mapping[str, QuantizedRows]
) -> Iterator[dict[str, TunedLinear]]:
    """Inside, the linears named in `quantized` are `TunedLinear`s (yielded, by name); then the old ones are
    back."""
    old = {name: model.get_submodule(name) for name in quantized}
    tuned = {}
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
    """Where a tuning stands, as tensors that a file can hold: `tensors` shift and Adam's moments by linear
    and precision; `step` pieces of text used."""

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    divergence: list[dict[int, float]] = field(default_factory=list)
    """Per sample: precision that took it -> divergence before that step, nats a token."""


def tune_tables(
    model: PreTrainedModel,
    quantized: Mapping[str, QuantizedRows],
    samples_ST: Tensor,
    rate: float,
    state: TuningState | None = None,
    on_step: Callable[[TuningState], None] = lambda state: None,
) -> tuple[dict[str, QuantizedRows], TuningState]:
    """Linear -> the same codes with tuned tables, by Adam, a step for each of `samples_ST` int64 [S, T].

    The lowest precision takes every sample, each higher one half as many as the one below it (its errors are
    a quarter). The step size falls to 0 along a half cosine, from `rate` at 2 bits and half of it with every
    bit more, as the distances between a table's values do.

    `state`: of a tuning that was stopped; it goes on behind its step. Memory beside the model: one byte a
    quantized weight, three float32 per table value, activations of one sample, its distributions (T · V).
    UserError: a divergence that is not finite.
    """
    state = state or TuningState()
    model.requires_grad_(False)
    with with_tables(model, quantized) as tuned:
        for name, module in tuned.items():
            for bits in module.shift:
                if (stored := state.tensors.get(f"{name}.shift{bits}")) is not None:
                    module.shift[bits].copy_(stored)
        precisions = sorted(next(iter(tuned.values())).shift)
        for index in range(state.step, len(samples_ST)):
            input_ids = samples_ST[index].unsqueeze(0).to(model.device)
            size = rate * 0.5 * (1 + math.cos(math.pi * index / len(samples_ST)))
            set_bits(tuned, None)
            with torch.no_grad():
                target_TV = model(input_ids=input_ids, use_cache=False).logits[0]
            found = {}
            for bits in precisions:
                every = 2 ** (bits - precisions[0])
                if index % every == 0:
                    set_bits(tuned, bits)
                    found[bits] = _step(
                        model,
                        tuned,
                        bits,
                        input_ids,
                        target_TV,
                        size * 4 / 2**bits,
                        index // every + 1,
                        state.tensors,
                    )
            state.divergence.append(found)
            state.step = index + 1
            for name, module in tuned.items():
                for bits, shift in module.shift.items():
                    state.tensors[f"{name}.shift{bits}"] = shift.detach()
            on_step(state)
        result = {
            name: QuantizedRows(
                module.codes, {bits: module.table(bits).detach().half() for bits in sorted(module.start)}
            )
            for name, module in tuned.items()
        }
    return result, state


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
    bits: int,
    input_ids: Tensor,
    target_TV: Tensor,
    rate: float,
    number: int,
    moments: dict[str, Tensor],
) -> float:
    """One step of Adam for the tables of one precision; the divergence before it."""
    for module in tuned.values():
        module.shift[bits].requires_grad_(True)
    logits = model(input_ids=input_ids, use_cache=False).logits[0]
    value, gradient = divergence(logits.detach(), target_TV)
    if not math.isfinite(value):
        raise UserError(
            f"the divergence at {bits} bits is {value} at step {number}: give a lower --tuning-rate"
        )
    logits.backward(gradient)
    for name, module in tuned.items():
        shift = module.shift[bits]
        grad = shift.grad
        shift.requires_grad_(False)
        shift.grad = None
        if grad is None:
            continue
        first = moments.setdefault(f"{name}.first{bits}", torch.zeros_like(shift))
        second = moments.setdefault(f"{name}.second{bits}", torch.zeros_like(shift))
        first.lerp_(grad, 1 - _BETAS[0])
        second.lerp_(grad.square(), 1 - _BETAS[1])
        mean = first / (1 - _BETAS[0] ** number)
        spread = (second / (1 - _BETAS[1] ** number)).sqrt_().add_(1e-12)
        shift.sub_(rate * mean / spread)
    return value


@torch.no_grad()
def divergence(logits_TV: Tensor, target_TV: Tensor) -> tuple[float, Tensor]:
    """(mean over tokens of KL(softmax target ‖ softmax logits) in nats, its gradient by the logits)."""
    tokens = logits_TV.shape[0]
    gradient = torch.empty_like(logits_TV)
    total = 0.0
    for start in range(0, tokens, _TOKENS_PER_PIECE):
        part = slice(start, start + _TOKENS_PER_PIECE)
        ours = logits_TV[part].float().log_softmax(1)
        theirs = target_TV[part].float().log_softmax(1)
        wanted = theirs.exp()
        total += float((wanted * (theirs - ours)).sum(dtype=torch.float64))
        gradient[part] = ((ours.exp_() - wanted) / tokens).to(gradient.dtype)
    return total / tokens, gradient
