"""Teacher-forced divergence: how far the model is from the unquantized one, forward by forward along the
reference output, at every precision. One forward over the text per precision, no decoding.

For each decode forward t of the reference's tokens and each plan: the Kullback-Leibler divergence of the next
token's distribution under the plan from the unquantized model's, in nats. The prompt is prefilled at the
highest precision, as in decoding. All of it is exact: a forward reads what the forwards before it wrote at
the precisions that the plan gave them. Since the tokens are given, a plan that has switched at s differs from
its parent, which has not, in the forwards behind s alone: it costs a forward over these, against a cache
whose first s tokens are the parent's (`plan_forwards`).

Legend: B rows, m = n - 1 decode forwards of n reference tokens, P probe tokens, V vocabulary, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpd import gpu
from pmpd.decode.engine import Engine
from pmpd.decode.forced import GivenTokens, forward_flat, forward_given
from pmpd.decode.precision import token_statistics
from pmpd.decode.prompt_state import (
    LOGIT_BYTES,
    PROBE_TOKENS,
    divergence,
    divergence_from,
    probe_offset,
    prompt_states,
)
from pmpd.decode.slots import within
from pmpd.model import PMPDForCausalLM
from pmpd.schedulers.base import STATISTICS
from pmpd.schedulers.chain import SIXTHS, plan_points, sixths_plans

BATCH_TOKENS = {"cpu": 4096, "cuda": 2**15}
"""Tokens of one forward, about, by device."""
TOGETHER = 1024
"""Distributions that are compared at a time."""


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
    """A prompt and its reference, seen at every precision and under every plan."""

    key: str
    curves: tuple[Curve, ...]
    """Of the plans of one precision throughout."""
    plans: Mapping[tuple[int, ...], np.ndarray]
    """Plan of `chain.sixths_plans` -> divergence float32 [m]."""
    steps: Mapping[tuple[int, ...], tuple[int, ...]]
    """Plan -> `switch_steps` [J]."""
    state: Mapping[str, float]
    """`PROMPT_VALUES` -> value."""
    features: tuple[np.ndarray, np.ndarray]
    """KV features after the prefill: keys and values float16 [T, D]."""


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
    max_new_tokens: int,
) -> Iterator[ForcedRow]:
    """The rows of `prompts` (key -> tokens, one at least), whose references (key -> new tokens) have two
    tokens at least. `precisions`: descending; the first is the prefill's. `max_new_tokens`: of the answers,
    whose `plan_points` plans switch at."""
    points = plan_points(max_new_tokens)
    longest = max((len(prompts[key]) + len(references[key]) for key in prompts), default=1)
    embedding: Any = unquantized.model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    for keys in batches(prompts, references, vocabulary, model.device.type):
        engine, target = (_engine(each, len(keys), longest) for each in (model, unquantized))
        whole = [
            GivenTokens(slot, 0, [*prompts[key], *references[key][:-1]], len(references[key]) - 1)
            for slot, key in enumerate(keys)
        ]
        logits = forward_flat(target, whole, unquantized.precisions[0])
        wanted = torch.empty(logits.shape, device=logits.device)
        for own, some in zip(wanted.split(TOGETHER), logits.split(TOGETHER), strict=True):
            own.copy_(some.float().log_softmax(-1))
        del logits
        yield from _forced_batch(engine, keys, prompts, references, wanted, precisions, points)


def _engine(model: PMPDForCausalLM, slots: int, max_length: int) -> Engine:
    engine = model.engine(slots, max_length)
    engine.pulse = model.pulse
    return engine


def _forced_batch(
    engine: Engine,
    keys: Sequence[str],
    prompts: Mapping[str, Sequence[int]],
    references: Mapping[str, Sequence[int]],
    wanted: Tensor,
    precisions: Sequence[int],
    points: Sequence[int],
) -> Iterator[ForcedRow]:
    """`wanted` float32 [sum of m, V]: the unquantized model's log probabilities, rows end to end. The GPU is
    given all forwards before the host looks at what came of the first."""
    before = [
        GivenTokens(slot, 0, list(prompts[key])[: probe_offset(len(prompts[key]))])
        for slot, key in enumerate(keys)
        if probe_offset(len(prompts[key]))
    ]
    if before:
        forward_given(engine, before, precisions[0])
    states = prompt_states(engine, [(slot, prompts[key]) for slot, key in enumerate(keys)], precisions)
    lengths = [len(prompts[key]) for key in keys]
    features = engine.cache.send_features(range(len(keys)), lengths, engine.device)
    given = [
        GivenTokens(slot, len(prompts[key]), references[key][:-1], len(references[key]) - 1)
        for slot, key in enumerate(keys)
    ]
    forwards = np.asarray([len(row.ids) for row in given])
    begins = forwards.cumsum() - forwards
    sent = []
    for plan, parent, start, logits in plan_forwards(engine, given, precisions, points):
        counts = np.maximum(forwards - start, 0)
        at = gpu.to_device(np.repeat(begins + start, counts) + within(counts), engine.device)
        of_one = not any(plan[: switches(plan)])
        table = compared(wanted, at, logits, of_one)
        sent.append((plan, parent, start, counts, of_one, gpu.to_host(table)))
    curves: list[list[Curve]] = [[] for _ in keys]
    plans: list[dict[tuple[int, ...], np.ndarray]] = [{} for _ in keys]
    for plan, parent, start, counts, of_one, arrived in sent:
        for row, behind in enumerate(np.split(arrived(), counts.cumsum()[:-1])):
            kept = plans[row][parent][:start] if start else np.zeros(0, np.float32)
            found = plans[row][plan] = np.concatenate([kept, behind[:, 0]])
            if of_one:
                bits = precisions[switches(plan)]
                probe = states[row].probes.get(bits)
                curves[row].append(_curve(bits, found, behind, references[keys[row]][1:], probe))
    steps = {
        tuple(plan): tuple(points[at] for at in plan) for plan in sixths_plans(len(precisions) - 1).tolist()
    }
    for row, key in enumerate(keys):
        yield ForcedRow(key, tuple(curves[row]), plans[row], steps, states[row].values, features[row]())


def switches(plan: Sequence[int]) -> int:
    """How many switches of a plan of `chain.sixths_plans` come at all."""
    return sum(at < SIXTHS for at in plan)


def compared(wanted: Tensor, at: Tensor, logits: Tensor, all_numbers: bool) -> Tensor:
    """What forwards' logits [n, V] say: the divergence from the distributions `at` int64 [n] of `wanted`, and
    with `all_numbers` the `STATISTICS` and the likeliest token: float32 [n, 1 or 2 + statistics]. Some at a
    time, so that memory holds few distributions."""
    rows = [wanted.new_zeros(0, 2 + len(STATISTICS) if all_numbers else 1)]
    for index, some in zip(at.split(TOGETHER), logits.split(TOGETHER), strict=True):
        columns = [divergence_from(wanted[index], some)[:, None]]
        if all_numbers:
            columns += [token_statistics(STATISTICS, some), some.argmax(-1, keepdim=True).float()]
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def plan_forwards(
    engine: Engine,
    given: Sequence[GivenTokens],
    chain: Sequence[int],
    points: Sequence[int],
    plan: tuple[int, ...] = (),
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int, Tensor]]:
    """Every plan of `chain.sixths_plans`, its parent (the plan without its last switch), the step `start` at
    which they part, and the logits [n, V] of the forwards behind `start` of the rows of `given` (their decode
    forwards), end to end: m - start of each, none of a shorter one. A plan comes after its parent.

    In place: children switch late ones first, so that what a forward overwrites in the cache is behind all
    that is read later.
    """
    never = (SIXTHS,) * (len(chain) - 1)
    start = points[plan[-1]] if plan else 0
    tails = [
        replace(row, offset=row.offset + start, ids=row.ids[start:], keep=len(row.ids) - start)
        for row in given
        if len(row.ids) > start
    ]
    nothing = torch.zeros(0, engine.vocabulary, device=engine.device)
    yield (
        (*plan, *never[len(plan) :]),
        (*plan[:-1], *never[max(0, len(plan) - 1) :]),
        start,
        forward_flat(engine, tails, chain[len(plan)]) if tails else nothing,
    )
    if len(plan) < len(never):
        for at in reversed(range(plan[-1] if plan else 0, SIXTHS)):
            yield from plan_forwards(engine, given, chain, points, (*plan, at))


def _curve(
    bits: int, found: np.ndarray, numbers: np.ndarray, next_tokens: Sequence[int], probe: float | None
) -> Curve:
    """`numbers`: of `compared`, all of them."""
    statistics = {name: numbers[:, 1 + column] for column, name in enumerate(STATISTICS)}
    return Curve(bits, found, statistics, numbers[:, -1] == np.asarray(next_tokens), probe)


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
    """The columns of LABELS that teacher-forced rules fill."""
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
        "plans": [
            {"steps": row.steps[plan], "divergence": float(row.plans[plan].mean())} for plan in row.steps
        ],
    }
