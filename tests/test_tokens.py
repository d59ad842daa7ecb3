"""Where prompts begin and end, whatever tokenizer and template add, and which text each token brought."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pmpd.benchmarks.conversation import render, stops
from pmpd.benchmarks.tokens import encode_document, encode_prompt, special_tokens, token_pieces
from tests.helpers import byte_tokenizer

BOS, EOS = 258, 256


def tokenizer(bos: bool, eos: bool, template_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; adds begin and end of sequence to every text if asked to."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab={**alphabet, "</s>": EOS, "<pad>": 257, "<s>": BOS}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )
    shape = "<s> " * bos + "$A" + " </s>" * eos
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=shape, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    made.chat_template = ("{{ bos_token }}" if template_bos else "") + (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


@pytest.mark.parametrize(("bos", "eos", "template_bos"), list(itertools.product([False, True], repeat=3)))
def test_begin_of_sequence_is_there_once_and_no_end_at_the_end(bos, eos, template_bos):
    made = tokenizer(bos, eos, template_bos)
    text = render("tokenizer", ["one", "two"], ["ONE"], made)
    ids = encode_prompt(made, text, ["one", "ONE", "two"])
    assert ids.count(BOS) == (bos or template_bos)
    assert ids[0] == BOS or not (bos or template_bos)
    assert ids[-1] != EOS
    assert ids.count(EOS) == 3, "those between the turns stay"
    document = encode_document(made, "a text")
    assert document.count(BOS) == bos
    assert made.decode(document, skip_special_tokens=True) == "a text"
    assert EOS not in document


def test_special_tokens_that_a_text_spells_are_text():
    made = tokenizer(True, True, True)
    said = ["what is </s> and <s>?", "it </s> ends"]
    text = render("tokenizer", [said[0], "two"], [said[1]], made)
    ids = encode_prompt(made, text, [said[0], said[1], "two"])
    assert (ids.count(BOS), ids.count(EOS)) == (1, 3)
    assert made.decode(ids) == text
    document = "a page about </s> and <s>"
    ids = encode_document(made, document)
    assert set(ids) & {BOS, EOS} == {BOS}
    assert made.decode(ids[1:]) == document


def test_numeric_stops_of_a_template_count_only_where_they_are_special_here():
    assert stops("stablelm").token_ids >= {0, 1}
    assert not stops("stablelm", byte_tokenizer()).token_ids, "0 and 1 are characters to this tokenizer"
    special = byte_tokenizer()
    special.add_special_tokens({"additional_special_tokens": [special.convert_ids_to_tokens(0)]})
    assert stops("stablelm", special).token_ids == {0}
    assert set(special_tokens(byte_tokenizer())) == {256, 257}


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "naïve café ☕ — 漢字 🙂!",
        "🙂" * 40,
        "x" * 15 + "🙂" * 9 + "é",
        "👨\u200d👩\u200d👧 ok",
        "a\ufffdb",
        "",
    ],
)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    """Each character of these is up to four tokens, so every offset of a cut is met."""
    made = byte_tokenizer()
    for lead in range(6):
        whole = "y" * lead + text
        ids = made(whole)["input_ids"]
        pieces = token_pieces(made, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == whole
        assert sum(map(len, pieces)) == len(whole)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
