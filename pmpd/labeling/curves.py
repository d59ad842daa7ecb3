"""Teacher-forced divergence: how far the model is from the unquantized one, forward by forward along the
reference output, at every precision. One forward over the text per precision, no decoding.

For each decode forward t of the reference's tokens and each precision b: the Kullback-Leibler divergence of
the next token's distribution at b from the unquantized model's, in nats. The prompt is prefilled at the
highest precision, as in decoding; forward t at b sees the forwards before it at b too. So a curve is exact
for a decode that is at b throughout, and the loss of a plan is put together from curves (`plan_loss`); the
exact divergence of a plan is one more forward (`exact_divergence`).

Legend: B rows, m = n - 1 decode forwards of n reference tokens, P probe tokens, V vocabulary, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpd.decode.engine import Engine
from pmpd.decode.forced import GivenTokens, forward_given
from pmpd.decode.precision import token_statistics
from pmpd.decode.prompt_state import LOGIT_BYTES, PROBE_TOKENS, divergence, probe_offset, prompt_states
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.base import STATISTICS

BATCH_TOKENS = {"cpu": 4096, "cuda": 2**15}
"""Tokens of one forward, about, by device."""


@dataclass(frozen=True)
class Curve:
    """One precision's way along the reference."""

    bits: int
    divergence: np.ndarray
    """float32 [m], nats: KL(unquantized, this precision) of decode forward 1..m."""
    statistics: Mapping[str, np.ndarray]
    """`schedulers.base.STATISTICS` of this precision's distributions, float32 [m] each."""
    agrees: np.ndarray
    """bool [m]: whether its likeliest token is the reference's."""
    probe_divergence: float | None
    """Mean KL over the probe's tokens of this precision from the highest; None for the highest."""


@dataclass(frozen=True)
class ForcedRow:
    """A prompt and its reference, seen at every precision."""

    key: str
    curves: tuple[Curve, ...]
    state: Mapping[str, float]
    """`PROMPT_VALUES` -> value."""
    features: tuple[np.ndarray, np.ndarray]
    """KV features after the prefill: keys and values float16 [T, D]."""


def plan_loss(curves: Mapping[int, np.ndarray], bits: np.ndarray) -> float:
    """Mean divergence of the decode forwards, nats, that a plan with these `bits` [m] has by the curves
    (precision -> divergence [m])."""
    return float(np.mean([curves[int(b)][t] for t, b in enumerate(bits)]))


def batches(
    rows: Mapping[str, Sequence[int]],
    references: Mapping[str, Sequence[int]],
    vocabulary: int,
    device: str,
) -> Iterator[list[str]]:
    """Keys in batches of like lengths, whose float32 distributions take about `LOGIT_BYTES` and whose tokens
    are about `BATCH_TOKENS` at most."""
    most_bytes, most_tokens = (table.get(device, table["cpu"]) for table in (LOGIT_BYTES, BATCH_TOKENS))
    batch: list[str] = []
    used, tokens = 0, 0
    for key in sorted(rows, key=lambda key: (len(rows[key]) + len(references[key]), key), reverse=True):
        needed = 4 * vocabulary * (len(references[key]) + PROBE_TOKENS)
        length = len(rows[key]) + len(references[key])
        if batch and (used + needed > most_bytes or tokens + length > most_tokens):
            yield batch
            batch, used, tokens = [], 0, 0
        batch.append(key)
        used, tokens = used + needed, tokens + length
    if batch:
        yield batch


@torch.inference_mode()
def forced_rows(
    model: PMPDForCausalLM,
    unquantized: PMPDForCausalLM,
    prompts: Mapping[str, Sequence[int]],
    references: Mapping[str, Sequence[int]],
    precisions: Sequence[int],
) -> Iterator[ForcedRow]:
    """The rows of `prompts` (key -> tokens, one at least), whose references (key -> new tokens) have two
    tokens at least. `precisions`: descending; the first is the prefill's."""
    longest = max((len(prompts[key]) + len(references[key]) for key in prompts), default=1)
    embedding: Any = unquantized.model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    for keys in batches(prompts, references, vocabulary, model.device.type):
        engine, target = (_engine(each, len(keys), longest) for each in (model, unquantized))
        whole = [
            GivenTokens(slot, 0, [*prompts[key], *references[key][:-1]], len(references[key]) - 1)
            for slot, key in enumerate(keys)
        ]
        targets = forward_given(target, whole, unquantized.precisions[0])
        yield from _forced_batch(engine, keys, prompts, references, targets, precisions)


def _engine(model: PMPDForCausalLM, slots: int, max_length: int) -> Engine:
    engine = model.engine(slots, max_length)
    engine.pulse = model.pulse
    return engine


def _forced_batch(
    engine: Engine,
    keys: Sequence[str],
    prompts: Mapping[str, Sequence[int]],
    references: Mapping[str, Sequence[int]],
    targets: Sequence[Tensor],
    precisions: Sequence[int],
) -> Iterator[ForcedRow]:
    before = [
        GivenTokens(slot, 0, list(prompts[key])[: probe_offset(len(prompts[key]))])
        for slot, key in enumerate(keys)
        if probe_offset(len(prompts[key]))
    ]
    if before:
        forward_given(engine, before, precisions[0])
    states = prompt_states(engine, [(slot, prompts[key]) for slot, key in enumerate(keys)], precisions)
    features = [engine.cache.mean_features(slot, len(prompts[key])) for slot, key in enumerate(keys)]
    given = [
        GivenTokens(slot, len(prompts[key]), references[key][:-1], len(references[key]) - 1)
        for slot, key in enumerate(keys)
    ]
    curves: list[list[Curve]] = [[] for _ in keys]
    for bits in precisions:
        for row, logits in enumerate(forward_given(engine, given, bits)):
            probe = states[row].probes.get(bits)
            curves[row].append(_curve(bits, targets[row], logits, references[keys[row]][1:], probe))
    for row, key in enumerate(keys):
        halves = tuple(part.half().cpu().numpy() for part in features[row])
        yield ForcedRow(key, tuple(curves[row]), states[row].values, (halves[0], halves[1]))


def _curve(
    bits: int, target: Tensor, logits: Tensor, next_tokens: Sequence[int], probe: float | None
) -> Curve:
    table = token_statistics(STATISTICS, logits).cpu().numpy()
    return Curve(
        bits,
        divergence(target, logits).cpu().numpy(),
        {name: table[:, column] for column, name in enumerate(STATISTICS)},
        logits.argmax(-1).cpu().numpy() == np.asarray(next_tokens),
        probe,
    )


@torch.inference_mode()
def exact_divergence(
    model: PMPDForCausalLM,
    unquantized: PMPDForCausalLM,
    prompt: Sequence[int],
    reference: Sequence[int],
    prefill_bits: int,
    plans: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """Divergence float32 [m] of plans (the bits of decode forwards 1..m each) as a decode would have it: a
    forward at b sees the forwards before it at the precisions that the plan gave them."""
    m, length = len(reference) - 1, len(prompt) + len(reference)
    whole = GivenTokens(0, 0, [*prompt, *reference[:-1]], m)
    (target,) = forward_given(_engine(unquantized, 1, length), [whole], unquantized.precisions[0])
    engine = _engine(model, 1, length)
    forward_given(engine, [GivenTokens(0, 0, list(prompt))], prefill_bits)
    given = GivenTokens(0, len(prompt), reference[:-1], m)
    found = []
    for plan in plans:
        (logits,) = forward_given(engine, [given], [int(bits) for bits in plan])
        found.append(divergence(target, logits).cpu().numpy())
    return found


def plain_divergence(
    model: PMPDForCausalLM,
    unquantized: PMPDForCausalLM,
    prompt: Sequence[int],
    reference: Sequence[int],
    prefill_bits: int,
    plan: Sequence[int],
) -> np.ndarray:
    """The same for one plan, float64 [m], written to be read: two forwards over the whole text without any
    cache, and the sum over the vocabulary in float64. What the tests compare with."""
    from pmpd.weights.base import shared_state

    ids = torch.tensor([[*prompt, *reference[:-1]]], device=model.device)
    distributions = []
    for each, bits in (
        (unquantized, [unquantized.precisions[0]] * ids.shape[1]),
        (model, [prefill_bits] * len(prompt) + [int(b) for b in plan]),
    ):
        shared_state(each.model).set_tokens(bits)
        with torch.no_grad():
            logits = each.model(ids, use_cache=False).logits[0, len(prompt) :].double().cpu()
        distributions.append(logits.log_softmax(-1).numpy())
    target, other = distributions
    return (np.exp(target) * (target - other)).sum(-1)


def curves_columns(row: ForcedRow) -> dict[str, Any]:
    """The columns `prompt_state` and `curves` of LABELS."""
    return {
        "prompt_state": dict(row.state),
        "curves": [
            {
                "bits": curve.bits,
                "divergence": curve.divergence,
                **{name: curve.statistics[name] for name in STATISTICS},
                "agrees": curve.agrees,
                "probe_divergence": curve.probe_divergence,
            }
            for curve in row.curves
        ],
    }
