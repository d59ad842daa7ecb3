"""A GGUF file is an unquantized checkpoint: the same model, tokenizer and template as transformers makes of
it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmpd import PMPDForCausalLM
from pmpd.quantize.convert import QuantizeConfig, quantize_checkpoint
from pmpd.weights.model_spec import ModelSpec

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 64, 96, 4, 2


def write_gguf(file: Path, seed: int = 0) -> Path:
    """A random Llama of two layers, 8 bits in blocks of 32, with a byte-level tokenizer."""
    rng = np.random.default_rng(seed)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<eos>", "<pad>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)

    def matrix(name: str, rows: int, columns: int, scale: float = 0.25) -> None:
        values = rng.normal(0, scale, (rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(HIDDEN, np.float32))

    matrix("token_embd.weight", len(tokens), HIDDEN, 0.5)
    matrix("output.weight", len(tokens), HIDDEN)
    ones("output_norm.weight")
    for layer in range(LAYERS):
        name = f"blk.{layer}"
        ones(f"{name}.attn_norm.weight")
        ones(f"{name}.ffn_norm.weight")
        for part, rows in (("attn_q", HIDDEN), ("attn_k", HIDDEN // 2), ("attn_v", HIDDEN // 2)):
            matrix(f"{name}.{part}.weight", rows, HIDDEN)
        matrix(f"{name}.attn_output.weight", HIDDEN, HIDDEN)
        matrix(f"{name}.ffn_gate.weight", INNER, HIDDEN)
        matrix(f"{name}.ffn_up.weight", INNER, HIDDEN)
        matrix(f"{name}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def check_against_transformers(file: Path, text: str, count: int) -> PMPDForCausalLM:
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = PMPDForCausalLM(file).eval()
    assert model.precisions == (16,)
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert model.tokenizer.chat_template == tokenizer.chat_template is not None
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    ends = sorted(model.eos_token_ids)
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    assert torch.equal(model.generate(prompt, count).input_ids, expected)
    assert tokenizer.eos_token_id in ends
    return model


def test_a_gguf_file_and_its_folder_give_the_model_that_transformers_makes_of_it(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    model = check_against_transformers(file, "then", 12)
    assert PMPDForCausalLM(tmp_path).fingerprint == model.fingerprint
    assert ModelSpec(str(file)).open_unquantized().fingerprint() == model.fingerprint
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    assert ModelSpec(str(other)).open().fingerprint() != model.fingerprint
    with pytest.raises(ValueError, match=r"holds other\.gguf, tiny\.gguf; give the path of one"):
        PMPDForCausalLM(tmp_path)


def test_a_gguf_file_is_quantized_into_a_checkpoint_with_its_tokenizer_and_template(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    quantize_checkpoint(file, tmp_path / "anyprec", QuantizeConfig(weighted=False, parent_precision=8), [])
    model, base = PMPDForCausalLM(tmp_path / "anyprec").eval(), PMPDForCausalLM(file).eval()
    assert model.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert model.tokenizer.chat_template == TEMPLATE
    assert model.eos_token_ids == base.eos_token_ids
    prompt = torch.tensor([[5, 66, 7, 201]])
    assert torch.equal(model.generate(prompt, 8, 8).input_ids, base.generate(prompt, 8).input_ids)


def test_a_damaged_gguf_file_is_told_with_its_name(tmp_path):
    file = tmp_path / "half.gguf"
    file.write_bytes(write_gguf(tmp_path / "whole.gguf").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"half\.gguf: transformers can't read this GGUF file"):
        PMPDForCausalLM(file)


@pytest.mark.slow
def test_a_real_gguf_model_gives_the_tokens_of_transformers():
    """PMPD_TEST_GGUF: a file, SmolLM2-135M-Instruct.Q4_1.gguf for one."""
    path = os.environ.get("PMPD_TEST_GGUF")
    if not path:
        pytest.skip("PMPD_TEST_GGUF names no file")
    check_against_transformers(Path(path).absolute(), "Why is the sky blue?", 32)
