"""What the model says of a prompt after its prefill: how likely the last tokens were, how sure it is behind
them, and how far a lower precision is from the highest there. Labels and schedulers know prompts by these
numbers.

Legend: n tokens, P probe tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pmpd.decode.decoder import Decoder
from pmpd.decode.forced import GivenTokens, forward_given
from pmpd.decode.precision import token_statistics
from pmpd.schedulers.base import PROMPT_VALUES, PromptState

PROBE_TOKENS = 32
"""Last tokens of the prompt that its state is taken from; a shorter prompt is a shorter probe."""

LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Memory that the distributions of a batch may take, by device."""


def divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(target, other) of distributions given as logits [n, V]: float32 [n], nats."""
    return divergence_from(target_logits.float().log_softmax(-1), logits)


def divergence_from(target: Tensor, logits: Tensor) -> Tensor:
    """The same from the target's log probabilities, float32 [n, V]."""
    return (target.exp() * (target - logits.float().log_softmax(-1))).sum(-1).clamp_min(0)


def probe_offset(prompt_tokens: int) -> int:
    """Position of the first probe token."""
    return max(0, prompt_tokens - PROBE_TOKENS)


def described(
    probes: Sequence[Sequence[int]], logits: Sequence[Tensor], lower: Mapping[int, Sequence[Tensor]]
) -> list[PromptState]:
    """The states of prompts from their probes' tokens and the logits [P, V] after them, at the highest
    precision and at lower ones. One transfer to the host for all."""
    whole = torch.cat(list(logits))
    following = [token for ids in probes for token in (*ids[1:], 0)]
    seen = torch.tensor(following, device=whole.device)
    columns = [
        token_statistics(("entropy", "margin"), whole),
        torch.nn.functional.cross_entropy(whole.float(), seen, reduction="none")[:, None],
        *(divergence(whole, torch.cat(list(low)))[:, None] for low in lower.values()),
    ]
    table = torch.cat(columns, 1).double().cpu().numpy()
    found = []
    for part in np.split(table, np.cumsum([len(ids) for ids in probes])[:-1]):
        entropy, margin, _, *distances = part.mean(0).tolist()
        loss = float(part[:-1, 2].mean()) if len(part) > 1 else 0.0
        values = (loss, entropy, margin, float(part[-1, 0]), float(part[-1, 1]))
        found.append(
            PromptState(
                dict(zip(PROMPT_VALUES, values, strict=True)), dict(zip(lower, distances, strict=True))
            )
        )
    return found


def prompt_states(
    engine: Decoder,
    prompts: Sequence[tuple[int, Sequence[int]]],
    precisions: Sequence[int],
    known: Sequence[Tensor] | None = None,
) -> list[PromptState]:
    """The states of prompts (slot, tokens), whose tokens before the probe are in their slots already.
    `precisions`: the one whose state it is, which the slots hold their prompts at afterwards; then those to
    probe. `known`: the first one's logits after each probe's tokens, where a prefill has told them (and the
    slots then hold the last probe's precision).

    Each precision takes one forward over the probes.
    """
    high, *lower = precisions
    found: list[PromptState] = []
    rows = max(1, most_logits(engine) // (PROBE_TOKENS * len(precisions)))
    for start in range(0, len(prompts), rows):
        probes = []
        for slot, ids in prompts[start : start + rows]:
            offset = probe_offset(len(ids))
            probes.append(GivenTokens(slot, offset, list(ids[offset:]), len(ids) - offset))
        low_logits = {bits: forward_given(engine, probes, bits) for bits in lower}
        # the highest last: it leaves the prompt in the cache as a prefill does
        high_logits = known[start : start + rows] if known else forward_given(engine, probes, high)
        found += described([probe.ids for probe in probes], high_logits, low_logits)
    return found


def most_logits(engine: Decoder) -> int:
    """Tokens whose distributions fit into `LOGIT_BYTES`."""
    return LOGIT_BYTES.get(engine.device.type, LOGIT_BYTES["cpu"]) // (4 * engine.vocabulary)


@torch.inference_mode()
def look_back(
    engine: Decoder,
    prompts: Sequence[tuple[int, Sequence[int]]],
    precisions: Sequence[int],
    known: Sequence[Tensor] | None = None,
) -> list[PromptState]:
    """As `prompt_states`, of prompts that are in their slots as a whole and stay there as they are."""
    if known and len(precisions) == 1:  # no forward, so nothing is overwritten
        return prompt_states(engine, prompts, precisions, known)
    slots = [slot for slot, ids in prompts for _ in ids[probe_offset(len(ids)) :]]
    positions = [at for _, ids in prompts for at in range(probe_offset(len(ids)), len(ids))]
    at_slots, at_positions = (
        torch.tensor(part, dtype=torch.int64, device=engine.device) for part in (slots, positions)
    )
    kept = engine.cache.read_tokens(at_slots, at_positions)
    try:
        return prompt_states(engine, prompts, precisions, known)
    finally:
        engine.cache.write_tokens(at_slots, at_positions, kept)
