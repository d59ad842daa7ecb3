"""The engine against the oracle and against transformers, token by token and precision by precision."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from pmpd import PMPDForCausalLM, Scheduler, gpu
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.loop import DecodeLoop
from pmpd.decode.precision import RowPrecisions
from pmpd.decode.requests import Completion, Fork, Request, TokenEvent
from pmpd.decode.slots import SlotCache, Stretch, TokenPlaces, attend_slots
from pmpd.schedulers.chain import class_steps
from tests.helpers import ARCHITECTURES, write_dense


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Lengths from 1 to `longest`, both included; token 256 (end of sequence) occurs inside prompts."""
    draw = random.Random(seed)
    lengths = ([1, longest] + [draw.randint(1, longest) for _ in range(count)])[:count]
    return [[draw.randrange(257) for _ in range(length)] for length in lengths]


def scheduler_named(name: str, chain) -> Scheduler:
    options = {
        "static": {"high_bit_steps": 5},
        "random": {"seed": 3},
        "confidence": {"threshold": 0.02, "patience": 2},
    }[name]
    return Scheduler.get_scheduler(name, precisions=list(chain), **options)


def run(model, prompts, scheduler, new_tokens, slots=16, **options) -> list[Completion]:
    engine = Engine(model.model, slots=slots, max_length=max(map(len, prompts)) + new_tokens, **options)
    requests = [Request(str(i), prompt, new_tokens) for i, prompt in enumerate(prompts)]
    by_key = {c.key: c for c in engine.run(requests, scheduler, model.precisions[0], model.eos_token_ids)}
    assert len(by_key) == len(prompts)
    return [by_key[str(i)] for i in range(len(prompts))]


def expanded(completion: Completion) -> list[int]:
    return [bits for bits, count in completion.precision_trace for _ in range(count)]


def assert_equals_oracle(model, prompts, scheduler, new_tokens, completions):
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert completion.error is None
        truth = oracle.decode(
            model.model, prompt, new_tokens, model.precisions[0], model.eos_token_ids, scheduler, key=str(i)
        )
        assert completion.tokens == truth.tokens, (
            f"row {i} ({len(prompt)} prompt tokens): the engine's tokens leave the oracle's"
        )
        assert expanded(completion) == truth.bits, f"row {i}: the precision trace differs"


@pytest.mark.parametrize(
    "chain",
    [(4, 3, 2), *(pytest.param(chain, marks=pytest.mark.slow) for chain in [(4, 3), (4, 2)])],
    ids=str,
)
@pytest.mark.parametrize("name", ["static", "random", "confidence"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_engine_equals_oracle(anyprec_model, name, chain, batch):
    model = anyprec_model("llama")
    prompts = random_prompts(
        20, 500, seed=batch
    )  # more than there are slots: a row begins where another one has been
    scheduler = scheduler_named(name, chain)
    completions = run(model, prompts, scheduler, 24, slots=batch)
    assert_equals_oracle(model, prompts, scheduler, 24, completions)
    assert len({bits for c in completions for bits in expanded(c)}) > 1, (
        "no precision was ever lowered: the test shows nothing"
    )


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_engine_equals_oracle_for_every_architecture(anyprec_model, architecture):
    model = anyprec_model(architecture)
    prompts = random_prompts(5, 60, seed=7)
    scheduler = scheduler_named("random", (4, 3, 2))
    assert_equals_oracle(model, prompts, scheduler, 20, run(model, prompts, scheduler, 20, slots=3))


def test_engine_equals_transformers_generate_at_one_precision(anyprec_model):
    model = anyprec_model("llama")
    prompts = random_prompts(4, 80, seed=5)
    prompts = [[token for token in prompt if token != 256] or [1] for prompt in prompts]
    for completion, prompt in zip(run(model, prompts, None, 20), prompts, strict=True):
        model.model.get_submodule("model.layers.0.self_attn.q_proj").state.set_uniform(4)
        generated = model.model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=257
        )
        assert completion.tokens == generated[0, len(prompt) :].tolist()


def test_row_tokens_do_not_depend_on_batch_mates(anyprec_model):
    model = anyprec_model("llama")
    prompts = random_prompts(12, 90, seed=11)
    scheduler = scheduler_named("random", (4, 3, 2))
    together = run(model, prompts, scheduler, 30, slots=12)
    few_slots = run(model, prompts, scheduler, 30, slots=2)
    late_look = run(model, prompts, scheduler, 30, slots=5, sync_every=7)
    for name, others in (("slots", few_slots), ("sync_every", late_look)):
        for one, other in zip(together, others, strict=True):
            assert one.tokens == other.tokens, f"{name}: a row's tokens depend on who shares its batch"
            assert one.precision_trace == other.precision_trace
            assert one.finish_reason == other.finish_reason


def test_end_of_sequence_counts_as_one_and_ends_its_own_row_only(tmp_path):
    # every row meets some end token soon when many tokens end a sequence
    model = PMPDForCausalLM(write_dense(tmp_path, seed=3)).eval()
    prompts = random_prompts(8, 30, seed=2)
    eos = frozenset(range(0, 258, 7))
    engine = Engine(model.model, slots=8, max_length=100)
    completions = {
        c.key: c for c in engine.run([Request(str(i), p, 40) for i, p in enumerate(prompts)], None, 16, eos)
    }
    assert {c.finish_reason for c in completions.values()} == {"eos"} or any(
        c.finish_reason == "eos" for c in completions.values()
    )
    for i, prompt in enumerate(prompts):
        truth = oracle.decode(model.model, prompt, 40, 16, eos)
        assert completions[str(i)].tokens == truth.tokens
        ends = [token in eos for token in completions[str(i)].tokens]
        assert not any(ends[:-1])
        assert ends[-1] == (completions[str(i)].finish_reason == "eos")


@pytest.mark.parametrize("new_tokens", [1, 2, 17])
def test_max_new_tokens_is_exact(anyprec_model, new_tokens):
    model = anyprec_model("llama")
    for completion in run(
        model, random_prompts(3, 20), scheduler_named("static", (4, 3)), new_tokens, slots=2, sync_every=4
    ):
        assert len(completion.tokens) == new_tokens or completion.finish_reason == "eos"
        assert len(expanded(completion)) == len(completion.tokens)


def test_precision_never_rises_and_each_pair_switches_by_itself(anyprec_model):
    model = anyprec_model("llama")
    completions = run(
        model,
        random_prompts(6, 20),
        Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[3, 8]),
        20,
    )
    long = [c for c in completions if len(c.tokens) == 20]
    assert long
    for completion in long:
        # prefill and forwards 1..3 at 4 bits, 4..8 at 3, 9..19 at 2
        assert completion.precision_trace == [(4, 4), (3, 5), (2, 11)]


@pytest.mark.parametrize(("slots", "sync_every"), [(1, 1), (2, 8), (9, 1), (40, 3)])
def test_forks_equal_the_trajectories_decoded_alone(anyprec_model, slots, sync_every):
    model = anyprec_model("llama")
    new_tokens = 25
    h = class_steps(new_tokens)
    never = new_tokens - 1
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[never, never])
    prompts = random_prompts(5, 40, seed=21)

    def forks(i):
        nested = tuple(Fork(f"{i}/1/{k}", h[k], (0, h[k])) for k in range(3))
        return tuple(Fork(f"{i}/0/{k}", h[k], (h[k], never), nested if k == 0 else ()) for k in range(3))

    requests = [
        Request(f"{i}/high", p, new_tokens, switch_steps=(never, never), forks=forks(i))
        for i, p in enumerate(prompts)
    ]
    eos = frozenset(range(0, 258, 40))  # some rows end early, before some of their forks begin
    engine = Engine(model.model, slots, 80, sync_every)
    completions = {c.key: c for c in engine.run(requests, scheduler, 4, eos)}
    assert len(completions) == 7 * len(prompts)
    assert any(c.finish_reason == "eos" for c in completions.values())
    for i, prompt in enumerate(prompts):
        for name, steps in {"high": (never, never),
        **{f.key.partition("/")[2]: f.switch_steps for f in forks(i)},
                            **{f"1/{k}": (0, h[k]) for k in range(3)}}.items():  # fmt: skip
            truth = oracle.decode(model.model, prompt, new_tokens, 4, eos, scheduler, switch_steps=steps)
            completion = completions[f"{i}/{name}"]
            assert completion.tokens == truth.tokens, f"branch {name} of prompt {i} with {slots} slots"
            assert expanded(completion) == truth.bits


@pytest.mark.parametrize("own_rule", [False, True])
def test_what_is_not_finite_behind_a_rows_end_is_not_its_own(anyprec_folder, own_rule):
    """A row runs on behind its end until the host looks: here into an end token whose embedding is no
    number."""
    model = PMPDForCausalLM(anyprec_folder("llama"), kernel="reference").eval()
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[30, 30])
    prompts = random_prompts(4, 12, seed=3)

    def found(sync_every: int, eos: int | None) -> dict[str, tuple]:
        ends = {} if eos is None or own_rule else {eos}
        stop = (lambda tokens: tokens[-1] == eos) if own_rule and eos is not None else None
        requests = [
            Request(f"{i}", p, 20, switch_steps=(30, 30), stop=stop,
                    forks=(Fork(f"{i}/f", 2, (2, 30)), Fork(f"{i}/g", 1, (1, 1))))
            for i, p in enumerate(prompts)
        ]  # fmt: skip
        engine = Engine(model.model, 3, 80, sync_every)
        rows = {c.key: (c.tokens, c.finish_reason, c.error) for c in engine.run(requests, scheduler, 4, ends)}
        left = [*engine.cache.keys, *engine.cache.values]
        assert all(torch.isfinite(part).all() for part in left), "for the next rows in these slots"
        return rows

    tokens = found(1, None)["0"][0]
    eos = next(token for place, token in enumerate(tokens) if place >= 4 and token not in tokens[:place])
    embedding = model.model.get_input_embeddings()
    head = model.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    embedding.weight.data[eos] = float("nan")
    truth = found(1, eos)
    assert truth["0"][1] in ("eos", "stop")
    assert all(error is None for _, _, error in truth.values())
    for sync_every in (3, 8):
        assert found(sync_every, eos) == truth


def test_precisions_stay_alike_up_to_the_first_switch_or_decision():
    draw = np.random.default_rng(0)
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[1, 1])
    for deciding in (0, 9):
        scheduler.decision_step = deciding
        for _ in range(100):
            rows = RowPrecisions(scheduler, 4, 6, 40)
            at, step = np.asarray([4, 0, 2]), draw.integers(1, 9, 3)
            for slot in at:
                rows.start(slot, draw.integers(0, 12, 2))
            rows.start(5, [0, 1])  # not of the forward
            if deciding:
                rows.start(0, None)
            alike, first = rows.alike(at, step), rows.bits(at, step)
            later = [rows.bits(at, step + done) for done in range(30)]
            assert all(np.array_equal(bits, first) for bits in later[:alike])
            assert not deciding or step[1] + alike - 1 <= deciding, "it is asked too late"


def test_a_captured_step_is_told_its_rows_only_where_they_change(anyprec_model):
    """One row of nine forwards, the first two at 4 bits and the next three at 3, looked at after every
    fourth."""

    class Told:
        def __init__(self) -> None:
            self.forwards: list[tuple[int, int, int]] = []

        def run(self, engine, at, step, position, count, *rest):
            assert position.tolist() == [4 + step[0] - 1]
            self.forwards.append((engine.state.segments[0].bits, int(step[0]), count))
            return None, None

    engine = Engine(anyprec_model("llama").model, 2, 80, sync_every=4)
    engine.steps = told = Told()
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[2, 5])
    (completion,) = engine.run([Request("a", [5, 6, 7, 8], 10)], scheduler, 4, ())
    assert told.forwards == [(4, 1, 2), (3, 3, 2), (3, 5, 1), (2, 6, 3), (2, 9, 1)]
    assert completion.precision_trace == [(4, 3), (3, 3), (2, 4)]
    assert engine.pulse.by_bits() == {4: 3, 3: 3, 2: 4}


def test_a_prefill_waits_for_nothing_that_the_device_still_does(anyprec_model, monkeypatch):
    """Neither for the steps before it nor for itself: its tokens, features and seconds are asked for at the
    next look."""
    waited: list[str] = []
    within: list[bool] = []
    transfers: list[int] = []
    prefill, to_host = DecodeLoop._prefill, gpu.to_host

    def watched(loop, batch):
        within.append(True)
        transfers.append(0)
        prefill(loop, batch)
        within.pop()

    def sent(values):
        arrived = to_host(values)
        if within:
            transfers[-1] += 1
        return lambda: waited.append("in a prefill" if within else "at a look") or arrived()

    monkeypatch.setattr(DecodeLoop, "_prefill", watched)
    monkeypatch.setattr(gpu, "to_host", sent)
    model = anyprec_model("llama")
    scheduler = scheduler_named("static", (4, 3, 2))
    requests = [
        Request(str(i), prompt, 3 + 2 * i, want_features=True)
        for i, prompt in enumerate(random_prompts(7, 9))
    ]
    for sync_every in (4, 1):
        waited.clear()
        completions = list(Engine(model.model, 3, 40, sync_every).run(requests, scheduler, 4, ()))
        assert all(len(c.features[0]) == len(requests[int(c.key)].input_ids) for c in completions)
        assert all(c.prefill_seconds > 0 for c in completions)
        assert "at a look" in waited
        assert set(transfers) == {2}, "tokens and features, of however many prompts"
        assert ("in a prefill" in waited) == (sync_every == 1)


def test_prompts_are_prefilled_together_up_to_a_number_of_tokens(anyprec_model, monkeypatch):
    prefill, prefills = DecodeLoop._prefill, []
    monkeypatch.setattr(
        DecodeLoop,
        "_prefill",
        lambda loop, batch: (
            prefills.append([len(r.request.input_ids) for r in batch]) or prefill(loop, batch)
        ),
    )
    engine = Engine(anyprec_model("llama").model, 6, 60)
    engine.prefill_tokens = 20
    lengths = (9, 11, 1, 25, 20, 3)
    requests = [Request(str(i), [5] * length, 2) for i, length in enumerate(lengths)]
    assert len(list(engine.run(requests, None, 4, ()))) == 6
    assert prefills == [[9, 11], [1], [25], [20], [3]]


def test_rows_that_end_at_one_look_are_cleared_together_and_full_ones_not_at_all(anyprec_model, monkeypatch):
    model, prompt = anyprec_model("llama"), random_prompts(1, 5)[0]
    cleared: list[int] = []
    monkeypatch.setattr(SlotCache, "clear_tokens", lambda cache, slots, at: cleared.append(len(slots)))
    requests = [Request(str(i), prompt, 12) for i in range(6)]

    def tokens(ends: set[int]) -> list[int]:
        engine = Engine(model.model, 6, 80, sync_every=4)
        return next(iter(engine.run(requests, None, 4, ends))).tokens

    whole = tokens(set())
    assert not cleared, "a full row runs on to nothing"
    assert 1 < len(tokens({whole[2]})) < 8
    assert len(cleared) == 1
    assert cleared[0] % 6 == 0


def test_an_out_of_memory_halves_the_slots_and_loses_nothing(anyprec_folder, monkeypatch, caplog):
    """The memory holds 3 rows; some rows have ended, and forks have started, when a fourth and fifth want
    in."""
    model = PMPDForCausalLM(anyprec_folder("llama"), kernel="reference").eval()
    h, never = class_steps(13), 12
    scheduler = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[never, never])
    requests = [
        Request(
            f"{i}/high",
            p,
            13,
            (never, never),
            forks=tuple(Fork(f"{i}/{k}", h[k], (h[k], never)) for k in range(3)),
        )
        for i, p in enumerate(random_prompts(6, 20, seed=2))
    ]
    expected = {c.key: c.tokens for c in model.complete(requests, scheduler, 4, 3)}
    forward, sizes = Engine.forward, []

    def limited(self, input_ids, plan, keep):
        rows = len(plan.stretches) or len(input_ids)
        if rows > 3:
            sizes.append(self.slots)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, plan, keep)

    monkeypatch.setattr(Engine, "forward", limited)
    completions = list(model.complete(requests, scheduler, 4, 14))
    assert {c.key: c.tokens for c in completions} == expected
    assert len(completions) == len(expected), "a row that was done again came twice"
    assert sizes == [14, 7]
    assert "going on with 3" in caplog.text
    assert model.engine(14, 20).slots == 3, "the next unit must not run out of memory again"
    monkeypatch.setattr(Engine, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        list(model.complete(requests, scheduler, 4, 2))


def test_streaming_yields_what_generate_returns(anyprec_model):
    model = anyprec_model("llama")
    prompts = random_prompts(3, 20, seed=4)
    scheduler = scheduler_named("confidence", (4, 3, 2))
    engine = Engine(model.model, 2, 60)
    events = list(
        engine.stream(
            [Request(str(i), p, 15) for i, p in enumerate(prompts)], scheduler, 4, model.eos_token_ids
        )
    )
    for completion in (event for event in events if isinstance(event, Completion)):
        own = [event for event in events if isinstance(event, TokenEvent) and event.key == completion.key]
        assert [event.token for event in own] == completion.tokens
        assert [event.bits for event in own] == expanded(completion)


def test_a_prompt_that_does_not_fit_is_an_error_row_and_the_others_decode(anyprec_model):
    model = anyprec_model("llama")
    engine = Engine(model.model, 2, 30)
    completions = {
        c.key: c
        for c in engine.run(
            [Request("long", [1] * 40, 5), Request("empty", [], 5), Request("fine", [1, 2], 5)], None, 4, ()
        )
    }
    assert "30" in completions["long"].error
    assert "no tokens" in completions["empty"].error
    assert completions["fine"].error is None
    assert len(completions["fine"].tokens) == 5


def test_logits_that_are_not_finite_make_an_error_row(tmp_path):
    model = PMPDForCausalLM(write_dense(tmp_path)).eval()
    with torch.no_grad():
        model.model.model.embed_tokens.weight[9] = float("nan")
    completions = run(model, [[1, 2, 3], [4, 9, 5]], None, 6)
    assert completions[0].error is None
    assert "finite" in completions[1].error


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("lean", [True, False])
def test_a_row_that_is_not_finite_leaves_nothing_to_the_next_one_in_its_slot(
    tmp_path, monkeypatch, kernel, lean
):
    """A short row after it, beside a long one: masked keys that are NaN would still reach the short row's
    sums."""
    monkeypatch.setenv("PMPD_KERNEL", kernel)
    model = PMPDForCausalLM(write_dense(tmp_path)).eval()
    with torch.no_grad():
        model.model.model.embed_tokens.weight[9] = float("nan")
    prompts = [[1] * 30, [9] * 20, [4, 5]]
    completions = run(model, prompts, None, 12, slots=2, lean=lean)
    assert "finite" in completions[1].error
    for row in (0, 2):
        assert completions[row].error is None, f"row {row}: poisoned by the row before it in its slot"
        assert (
            completions[row].tokens
            == oracle.decode(model.model, prompts[row], 12, 16, model.eos_token_ids).tokens
        )


def test_kv_features_are_the_mean_over_heads_of_the_last_layer(anyprec_model):
    """Of each prompt's own tokens, where several are prefilled together."""
    model = anyprec_model("llama")
    prompts = [ids * times for ids, times in zip(random_prompts(3, 4, seed=5), (9, 2, 3), strict=True)]
    requests = [Request(str(i), ids, 3, want_features=i != 1) for i, ids in enumerate(prompts)]
    found = {c.key: c.features for c in Engine(model.model, 3, 40).run(requests, None, 4, ())}
    assert found["1"] is None
    for i in (0, 2):
        with torch.inference_mode():
            last = model.model(torch.tensor([prompts[i]]), use_cache=True).past_key_values.layers[-1]
        for got, expected in zip(found[str(i)], (last.keys, last.values), strict=True):
            assert got.shape == (len(prompts[i]), 16)
            torch.testing.assert_close(
                torch.from_numpy(got).float(), expected[0].mean(0), atol=2e-3, rtol=2e-3
            )


def test_copied_slots_hold_the_beginning_of_their_sources_in_every_layer():
    """Layers that are alike lie in one block, another shape in one of its own; nobody else's slot changes."""
    cache = SlotCache(slots=5, length=7, layers_together=3)
    for layer, heads in enumerate((2, 2, 1)):
        cache.allocate(layer, torch.zeros(1, heads, 4), torch.zeros(1, heads, 4))
    everything = [*cache.keys, *cache.values]
    for tensor in everything:
        tensor.copy_(torch.randn_like(tensor))
    before = [tensor.clone() for tensor in everything]
    cache.copy_slots(torch.tensor([3, 3, 0]), torch.tensor([1, 4, 2]), torch.tensor([5, 3, 4]), 5)
    for tensor, old in zip(everything, before, strict=True):
        for source, target, length in ((3, 1, 5), (3, 4, 3), (0, 2, 4)):
            assert torch.equal(tensor[target, :, :length], old[source, :, :length])
            assert not tensor[target, :, length:5].any(), "of what the source ran on to"
            assert torch.equal(tensor[target, :, 5:], old[target, :, 5:])
        assert torch.equal(tensor[[0, 3]], old[[0, 3]])


@pytest.mark.parametrize("offsets", [(0, 0, 0), (2, 0, 6)])
@pytest.mark.parametrize("window", [None, 64, 4])
def test_stretches_attend_together_as_they_do_one_by_one(window, offsets, monkeypatch):
    """Whole prompts and parts of them, in slots that hold what others have left."""
    draw = torch.Generator().manual_seed(0)
    lengths, slots = (5, 9, 7), (3, 0, 2)
    keys, values = (torch.randn(4, 2, 16, 8, generator=draw) for _ in range(2))
    query = torch.randn(sum(lengths), 4, 8, generator=draw)
    stops = list(itertools.accumulate(lengths))
    stretches = [
        Stretch(stop - n, stop, slot, offset)
        for n, stop, slot, offset in zip(lengths, stops, slots, offsets, strict=True)
    ]
    at = torch.repeat_interleave(torch.tensor(slots), torch.tensor(lengths))
    positions = torch.cat([offset + torch.arange(n) for n, offset in zip(lengths, offsets, strict=True)])
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *some, **more: calls.append(1) or attention(*some, **more),
    )
    alone, together = (
        attend_slots(
            TokenPlaces(at, positions, 13, 4, stretches, together=together), query, keys, values, None, window
        )
        for together in (False, True)
    )
    torch.testing.assert_close(together, alone)
    assert len(calls) == 3 + 1
    for slot, n, offset in zip(slots, lengths, offsets, strict=True):
        for left in (keys, values):
            left[slot, :, n + offset :] = float("nan")
    careful = TokenPlaces(at, positions, 13, 4, stretches, together=True, leftovers=True)
    torch.testing.assert_close(attend_slots(careful, query, keys, values, None, window), alone)
    padding = [Stretch(0, 1, 0, 0), Stretch(1, 2, 1, 0), Stretch(2, 18, 2, 0)]
    assert TokenPlaces(at, positions, 16, 4, padding, together=True).padded is None, (
        "more padding than tokens"
    )
