"""Sampling: the published rules, the same tokens whatever batch, engine equal to oracle."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Fork, Request, Sampling
from pmpd.decode.sampling import choose, draw, highest
from tests.test_engine import expanded, random_prompts, scheduler_named

SETTINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=1.3, top_k=5, seed=3),
    Sampling(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.4),
    Sampling(repetition_penalty=1.8),
    Sampling(),
]


def requests(prompts, new_tokens=20, **options):
    return [
        Request(f"{i}", prompt, new_tokens, sampling=SETTINGS[i % len(SETTINGS)], **options)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("slots", [5])
@pytest.mark.parametrize("name", ["static", "confidence"])
def test_engine_equals_oracle_when_rows_sample(anyprec_model, name, slots):
    model, scheduler = anyprec_model("llama"), scheduler_named(name, (4, 3, 2))
    prompts = random_prompts(12, 60, seed=4)
    engine = Engine(model.model, slots=slots, max_length=90)
    completions = {c.key: c for c in engine.run(requests(prompts), scheduler, 4, model.eos_token_ids)}
    greedy = 0
    for i, prompt in enumerate(prompts):
        truth = oracle.decode(
            model.model, prompt, 20, 4, model.eos_token_ids, scheduler, key=str(i), sampling=SETTINGS[i % 6]
        )
        assert completions[str(i)].tokens == truth.tokens, f"row {i}, {SETTINGS[i % 6]}"
        assert expanded(completions[str(i)]) == truth.bits
        plain = oracle.decode(model.model, prompt, 20, 4, model.eos_token_ids, scheduler, key=str(i))
        greedy += plain.tokens == truth.tokens
    assert greedy <= 4, "sampling changed next to nothing: the test shows nothing"


def test_a_sampled_row_does_not_depend_on_batch_order_or_slots(anyprec_model):
    model, prompts = anyprec_model("llama"), random_prompts(12, 60, seed=4)
    together = requests(prompts)
    runs = []
    for order, slots, sync_every in ((together, 12, 1), (together[::-1], 3, 7)):
        engine = Engine(model.model, slots=slots, max_length=90, sync_every=sync_every)
        runs.append({c.key: c.tokens for c in engine.run(order, None, 4, model.eos_token_ids)})
    assert runs[0] == runs[1]


def test_forks_draw_as_the_branch_decoded_alone(anyprec_model):
    model, prompt = anyprec_model("llama"), random_prompts(3, 30, seed=8)[2]
    sampling = Sampling(temperature=1.0, seed=5, repetition_penalty=1.5)
    scheduler = scheduler_named("static", (4, 2))
    forks = (Fork("early", 0, (0,)), Fork("late", 9, (9,)))
    request = Request("high", prompt, 20, switch_steps=(19,), draw_key="row", sampling=sampling, forks=forks)
    found = {c.key: c.tokens for c in Engine(model.model, 2, 60).run([request], scheduler, 4, ())}
    for key, steps in {"high": (19,), "early": (0,), "late": (9,)}.items():
        alone = oracle.decode(
            model.model, prompt, 20, 4, (), scheduler, switch_steps=steps, key="row", sampling=sampling
        )
        assert found[key] == alone.tokens, key


def test_the_kept_tokens_and_their_probabilities_are_transformers_own():
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[3, 7, 7, 49]])
    for sampling in SETTINGS[:4]:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(prompt, logits.clone())
        scores = TemperatureLogitsWarper(sampling.temperature)(prompt, scores)
        if sampling.top_k:
            scores = TopKLogitsWarper(sampling.top_k)(prompt, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(prompt, scores)
        p = torch.softmax(scores, -1)[0]
        seen = torch.zeros(1, 50, dtype=torch.bool).index_fill(1, prompt[0], True)
        draws = [(i + 0.5) / 4000 for i in range(4000)]  # every part of [0, 1) alike
        tokens = choose(logits.expand(4000, -1), [sampling] * 4000, draws, seen.expand(4000, -1))
        shares = torch.bincount(tokens, minlength=50) / 4000
        assert set(tokens.tolist()) <= set(torch.nonzero(p)[:, 0].tolist()), sampling
        torch.testing.assert_close(shares, p, atol=2 / 4000, rtol=0)


def test_draws_are_even_and_differ_by_seed_key_and_position():
    numbers = [draw(1, f"row {i}", 3) for i in range(2000)]
    assert all(0 <= number < 1 for number in numbers)
    counts = Counter(math.floor(10 * number) for number in numbers)
    assert min(counts.values()) > 150
    assert len({draw(1, "a", 0), draw(2, "a", 0), draw(1, "b", 0), draw(1, "a", 1)}) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name} .*: "):
        Sampling(**options)


@pytest.mark.parametrize("sync_every", [1, 6])
def test_a_row_ends_where_its_own_stop_says_and_no_other(anyprec_model, sync_every):
    model, prompts = anyprec_model("llama"), random_prompts(4, 30, seed=9)
    plain = [oracle.decode(model.model, prompt, 20, 4, ()).tokens for prompt in prompts]
    ends = plain[1][5]  # row 1's sixth token ends row 1, and is not looked for elsewhere

    def stop(tokens):
        return tokens[-1] == ends

    asked = [Request(str(i), p, 20, stop=stop if i == 1 else None) for i, p in enumerate(prompts)]
    engine = Engine(model.model, 3, 60, sync_every=sync_every)
    found = {c.key: c for c in engine.run(asked, None, 4, ())}
    count = plain[1].index(ends) + 1
    assert found["1"].tokens == plain[1][:count]
    assert found["1"].finish_reason == "stop"
    assert found["1"].tokens == oracle.decode(model.model, prompts[1], 20, 4, (), stop=stop).tokens
    for i in (0, 2, 3):
        assert (found[str(i)].tokens, found[str(i)].finish_reason) == (plain[i], "length")


def test_the_highest_logit_by_parts_is_that_of_the_whole_row():
    logits = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    logits[0] = 3.0  # all alike: the first token
    logits[1, [40, 90]] = 9.0
    logits[2, 50] = float("nan")
    for parts in (1, 2, 32):
        top, tokens = highest(logits, parts)
        assert torch.equal(tokens, logits.argmax(-1)), f"{parts} parts"
        assert torch.equal(top.nan_to_num(-1), logits.amax(-1).nan_to_num(-1))
