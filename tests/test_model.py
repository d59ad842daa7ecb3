"""`PMPDForCausalLM`: what `generate` and `stream` promise, and what they refuse."""

from __future__ import annotations

import json
from itertools import zip_longest

import pytest
import torch

from pmpd import PMPDForCausalLM, Scheduler
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from tests.helpers import write_dense
from tests.test_engine import random_prompts

NEW_TOKENS = 12
PROMPT = torch.tensor([[17, 4, 99, 203, 31]])
SCHEDULER = Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=[3, 7])


@pytest.fixture
def model(anyprec_folder):
    """A model of its own, which switches."""
    model = PMPDForCausalLM.from_pretrained(anyprec_folder(), [4, 3, 2], kernel="reference").eval()
    model.scheduler = SCHEDULER
    return model


def truth(model: PMPDForCausalLM, prompt: list[int]) -> oracle.Trajectory:
    return oracle.decode(model.model, prompt, NEW_TOKENS, 4, model.eos_token_ids, SCHEDULER)


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(model, side):
    prompts = random_prompts(4, 30, seed=6)
    longest = max(map(len, prompts))
    rows = [(prompt, [0] * (longest - len(prompt))) for prompt in prompts]  # 0 is a token like any other
    order = (lambda tokens, pad: pad + tokens) if side == "left" else (lambda tokens, pad: tokens + pad)
    input_ids = torch.tensor([order(prompt, pad) for prompt, pad in rows])
    mask = torch.tensor([order([1] * len(prompt), pad) for prompt, pad in rows])
    output = model.generate(input_ids, NEW_TOKENS, attention_mask=mask)
    for i, prompt in enumerate(prompts):
        expected = truth(model, prompt)
        row = output.input_ids[i].tolist()
        assert row[: len(prompt) + len(expected.tokens)] == prompt + expected.tokens
        assert set(row[len(prompt) + len(expected.tokens) :]) <= {model.tokenizer.pad_token_id}
        assert int(output.new_token[i]) == len(expected.tokens)
        assert output.precision_log[i] == expected.bits
        assert [bits for bits, count in output.precision_trace[i] for _ in range(count)] == expected.bits
    assert len(set(output.precision_log[0])) == 3, "no precision was lowered: the test shows nothing"


def test_a_given_cache_is_continued_and_only_the_rest_is_prefilled(model, monkeypatch):
    prompts = torch.tensor(random_prompts(1, 1, seed=1)[0] * 20 + [3, 9]).repeat(2, 1)
    prompts[1, 5] = 77
    first = model.generate(prompts, 6)
    longer = torch.cat([first.input_ids, torch.tensor([[8, 15], [8, 16]])], dim=1)
    forward, sizes = Engine.forward, []

    def counted(self, input_ids, plan, keep):
        sizes.append(len(input_ids))
        return forward(self, input_ids, plan, keep)

    monkeypatch.setattr(Engine, "forward", counted)
    second = model.generate(longer, 6, past_key_values=first.past_key_values)
    assert sizes[0] == 2 * 3, (
        "the last token of the first call, which its cache does not hold, and two new ones, in both rows"
    )
    assert [len(prefix.tokens) for prefix in second.past_key_values] == [longer.shape[1] + 5] * 2
    for (
        other
    ) in first.past_key_values:  # what is given is taken: with other keys and values come other tokens
        for keys, values in other.layers:
            keys.mul_(-1)
            values.mul_(-1)
    third = model.generate(longer, 6, past_key_values=first.past_key_values)
    assert not torch.equal(third.input_ids, second.input_ids), "the given cache was not read"


def test_a_continued_conversation_has_the_tokens_of_one_prefilled_whole(model):
    """At one precision: else the cache holds what lower ones computed."""
    model.scheduler = None
    prompt = torch.tensor([[5, 66, 7, 201]])
    first = model.generate(prompt, 6)
    longer = torch.cat([first.input_ids, torch.tensor([[8, 15, 99]])], dim=1)
    continued = model.generate(longer, 8, past_key_values=first.past_key_values)
    assert torch.equal(continued.input_ids, model.generate(longer, 8).input_ids)


def test_keys_name_the_rows_that_random_schedulers_draw_for(model):
    model.scheduler = Scheduler.get_scheduler("random", precisions=[4, 3, 2])
    prompts = torch.tensor([[5, 6, 7]] * 8)
    same = model.generate(prompts, NEW_TOKENS)
    assert len({str(trace) for trace in same.precision_trace}) == 1, "equal prompts draw alike"
    named = model.generate(prompts, NEW_TOKENS, keys=[f"row {i}" for i in range(8)])
    assert len({str(trace) for trace in named.precision_trace}) > 1


def test_without_an_end_token_every_row_gets_all_its_tokens(tmp_path):
    model = PMPDForCausalLM(write_dense(tmp_path, eos_token_id=None)).eval()
    assert model.tokenizer.eos_token is None
    assert model.eos_token_ids == frozenset()
    output = model.generate(torch.tensor([[1, 2], [3, 256]]), 40)
    assert output.new_token.tolist() == [40, 40]
    assert {completion.finish_reason for completion in output.completions} == {"length"}


def test_the_tokenizer_says_what_ends_a_sequence_where_no_config_does(tmp_path):
    folder = write_dense(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(
            json.dumps({**json.loads((folder / name).read_text()), "eos_token_id": None})
        )
    assert PMPDForCausalLM(folder).eos_token_ids == {256}


# ------------------------------------------------------------------------------------------------------------


def pairs_of(trajectory: oracle.Trajectory) -> list[tuple[int, int]]:
    return list(zip(trajectory.tokens, trajectory.bits, strict=True))


def test_a_stream_yields_tokens_with_the_precision_of_the_forward_that_made_them(model):
    for prompt in random_prompts(3, 20, seed=4):
        expected = truth(model, prompt)
        assert list(model.stream(torch.tensor([prompt]), NEW_TOKENS)) == pairs_of(expected)
    assert set(expected.bits) == {4, 3, 2}


def test_streams_and_calls_that_take_turns_do_not_touch_each_other(model):
    one, other, third = [
        [token % 256 for token in prompt] for prompt in (range(40, 60), range(150, 170), range(95, 115))
    ]
    for prompt in (one, other, third):
        assert len(truth(model, prompt).tokens) == NEW_TOKENS, "a row that ends at once can't be disturbed"
    model.engine(1, 64)  # long enough for all: a longer one would be a new one anyway
    taken: tuple[list, list] = ([], [])
    for items in zip_longest(
        model.stream(torch.tensor([one]), NEW_TOKENS), model.stream(torch.tensor([other]), NEW_TOKENS)
    ):
        for place, item in zip(taken, items, strict=True):
            place += [item] if item is not None else []
    assert taken[0] == pairs_of(truth(model, one))
    assert taken[1] == pairs_of(truth(model, other))

    between = []
    for item in model.stream(torch.tensor([one]), NEW_TOKENS):
        between.append(item)
        output = model.generate(torch.tensor([third]), NEW_TOKENS)
        assert output.completions[0].tokens == truth(model, third).tokens
    assert between == pairs_of(truth(model, one))

    requests = [Request(str(i), prompt, NEW_TOKENS) for i, prompt in enumerate((one, other, third))]
    for completion in model.complete(requests, SCHEDULER, 4, slots=1):
        assert completion.tokens == truth(model, requests[int(completion.key)].input_ids).tokens
        list(model.stream(torch.tensor([other]), 3))


def test_a_cast_between_two_calls_is_followed(tmp_path, anyprec_folder):
    for folder, bits in ((write_dense(tmp_path), 16), (anyprec_folder(), 4)):
        model, prompt = PMPDForCausalLM(folder).eval(), torch.tensor([[5, 66, 7, 201]])
        model.generate(prompt, NEW_TOKENS, bits)
        found = model.to(torch.bfloat16).generate(prompt, NEW_TOKENS, bits)
        assert found.past_key_values[0].layers[0][0].dtype == torch.bfloat16
        untouched = PMPDForCausalLM(folder).eval().to(torch.bfloat16)
        assert torch.equal(found.input_ids, untouched.generate(prompt, NEW_TOKENS, bits).input_ids)


def test_calls_one_after_the_other_share_an_engine(model):
    def stream(count: int) -> Engine | None:
        tokens = model.stream(torch.tensor([[1, 2, 3]]), NEW_TOKENS)
        for _ in range(count):
            next(tokens)
        tokens.close()
        return model._engine

    kept = stream(NEW_TOKENS)
    assert kept is not None
    assert stream(2) is kept, "a stream that is not read to its end keeps the engine"
    model.generate(torch.tensor([[4, 5, 6]]), NEW_TOKENS)
    assert model._engine is kept


# ------------------------------------------------------------------------------------------------------------


def test_a_hugging_face_id_is_downloaded(anyprec_folder, anyprec_model, monkeypatch):
    asked = []

    def download(model_id: str, allow_patterns: list[str], revision: str | None) -> str:
        assert revision is None
        asked.append(model_id)
        return str(anyprec_folder())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for load in (PMPDForCausalLM.from_pretrained, PMPDForCausalLM):
        assert load("owner/name", [4, 2]).fingerprint == anyprec_model().fingerprint
    assert asked == ["owner/name"] * 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"precisions": []}, r"^precisions \[\]: give a list like \[4, 3, 2\]"),
        ({"precisions": 4}, r"^precisions 4: give a list"),
        ({"precisions": [3.5]}, r"^precisions \[3\.5\]: give a list"),
        (
            {"model_path": "/no/such"},
            r"^model_path /no/such: no such folder; give a checkpoint folder or a Hugging Face id",
        ),
        (
            {"model_path": "/no.json", "use_anyprec": False},
            r"^/no\.json: FileNotFoundError.*is a JSON file like",
        ),
    ],
)
def test_what_can_not_be_loaded_is_refused(anyprec_folder, settings, told):
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(**{"model_path": anyprec_folder(), **settings})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.generate(torch.tensor([[1]]), 0), r"^max_new_tokens 0: one new token at least"),
        (lambda m: list(m.stream(torch.tensor([[1]]), 0)), r"^max_new_tokens 0: one new token at least"),
        (lambda m: m.generate(torch.tensor([[1]]), 800), r"^a prompt of 1 tokens with 800 new ones needs "
                                                         r"800 positions; there are 768"),
        (lambda m: m.generate(torch.tensor([1, 2])), r"^input_ids has shape \[2\]; allowed: \[batch, "
                                                     r"length\]"),
        (lambda m: m.generate(torch.tensor([[1, 2]]), 3, attention_mask=torch.ones(1, 3)),
        r"^attention_mask has shape \[1, 3\]"),
        (lambda m: m.generate(torch.tensor([[1, 2]]), 3, past_key_values=[]), r"^past_key_values has 0 "
                                                                              r"rows, input_ids 1"),
        (lambda m: m.generate(torch.tensor([[1], [2]]), 3, keys=["one"]), r"^keys names 1 rows, input_ids "
                                                                          r"has 2"),
        (lambda m: m.generate(torch.tensor([[1, 258]]), 3), r"^the prompt has tokens outside 0\.\.257"),
        (lambda m: m.generate(torch.tensor([[-1, 2]]), 3), r"^the prompt has tokens outside 0\.\.257"),
        (lambda m: m.generate(torch.tensor([[1, 2]]), 3, prefill_bit=8), r"^precision 8 .* is not loaded; "
                                                                         r"loaded are 4, 3, 2"),
        (lambda m: list(m.stream(torch.tensor([[1], [2]]), 3)), r"^stream takes one prompt, got 2; use "
                                                                r"generate"),
    ],
)  # fmt: skip
def test_what_can_not_be_decoded_is_refused_and_named_once(model, call, told):
    with pytest.raises(ValueError, match=told):
        call(model)


def test_logits_that_are_not_finite_are_an_error_of_generate_and_stream(model):
    with torch.no_grad():
        model.model.model.embed_tokens.weight[9] = float("nan")
    for call in (lambda ids: model.generate(ids, 4), lambda ids: list(model.stream(ids, 4))):
        with pytest.raises(ValueError, match="logits are not finite"):
            call(torch.tensor([[1, 9]]))


@pytest.mark.parametrize("where", ["generation_config", "config", "tokenizer"])
def test_an_answer_ends_at_the_end_token_of_any_of_the_three(tmp_path, where):
    """A chat model's turn often ends with a token that only its tokenizer names."""
    folder = write_dense(tmp_path)
    plain = PMPDForCausalLM(folder).eval()
    free = plain.generate(PROMPT, 12).input_ids[0, PROMPT.shape[1] :].tolist()
    end = next(token for token in free[2:] if token not in free[:2] and token != 256)
    if where == "tokenizer":
        tokenizer = plain.tokenizer
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.save_pretrained(folder)
    else:
        name = f"{where}.json"
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "eos_token_id": [256, end]}))
    model = PMPDForCausalLM(folder).eval()
    assert {256, end} <= model.eos_token_ids
    (completion,) = model.generate(PROMPT, 12).completions
    assert completion.tokens == free[: free.index(end) + 1]
    assert completion.finish_reason == "eos"


def test_a_batch_needs_no_pad_token_of_the_tokenizer(tmp_path):
    folder = write_dense(tmp_path)
    tokenizer = PMPDForCausalLM(folder).tokenizer
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = PMPDForCausalLM(folder).eval()
    texts = ["one", "a longer text", "x"]
    batch = model.tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8)
    for text, completion in zip(texts, together.completions, strict=True):
        alone = model.generate(model.tokenizer(text, return_tensors="pt")["input_ids"], 8)
        assert completion.tokens == alone.completions[0].tokens


def test_sampling_and_stop_strings_reach_the_rows(anyprec_model):
    model = anyprec_model("llama")
    rows = PROMPT.expand(3, -1)
    options = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}
    first = model.generate(rows, 16, keys=["a", "b", "a"], seed=3, **options)
    tokens = [completion.tokens for completion in first.completions]
    assert tokens[0] == tokens[2]
    assert tokens[0] != tokens[1], "rows of two names draw alike"
    again = model.generate(PROMPT, 16, keys=["b"], seed=3, **options)
    assert again.completions[0].tokens == tokens[1]
    assert model.generate(PROMPT, 16, keys=["b"], seed=4, **options).completions[0].tokens != tokens[1]
    text = model.tokenizer.decode(tokens[1])
    stop = next(text[i : i + 2] for i in range(2, len(text) - 1) if text[i : i + 2].isascii())
    stopped = model.generate(PROMPT, 16, keys=["b"], seed=3, stop=[stop], **options).completions[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == tokens[1][: len(stopped.tokens)]
    assert stop in model.tokenizer.decode(stopped.tokens)
    assert stop not in model.tokenizer.decode(stopped.tokens[:-1])
