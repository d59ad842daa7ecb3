"""Every architecture that loads gives transformers' own greedy tokens: at 16 bits from the folder that
`save_pretrained` of the real class writes, and at 4, 3 and 2 bits as transformers does with the dequantized
weights in place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pmpd import PMPDForCausalLM
from pmpd.quantize.convert import QuantizeConfig, quantize_checkpoint
from pmpd.weights.base import PrecisionLinear
from tests.helpers import byte_tokenizer

SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi": {},
    "stablelm": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "gemma": {"head_dim": 16},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "starcoder2": {},
    "cohere": {},
    "smollm3": {},
    "phi3": {},
    "glm": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "exaone4": {},
}
FAST = ("llama", "qwen2", "opt", "gpt_neox", "gemma", "phi3")
"""The rest are told apart by the slow suite: a forward that differs, not another way of reading."""
PROMPT = torch.tensor([[72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100] * 2])
NEW = 10


def architecture(name: str, **overrides) -> PreTrainedModel:
    """A random model whose greedy tokens vary and do not tie."""
    torch.manual_seed(3)
    special = {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": 257}
    config = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES.get(name, {}), **special, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    # a tied head finds the last token again where its embedding outweighs what the layers add to it
    embedding = 0.02 if getattr(config, "tie_word_embeddings", False) else 0.5
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, embedding if "embed" in key else 0.25)
    model.generation_config.eos_token_id = None
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def greedy(model: PreTrainedModel) -> list[int]:
    """transformers' own."""
    mask = torch.ones_like(PROMPT)
    ids = model.generate(PROMPT, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=257)
    return ids[0, PROMPT.shape[1] :].tolist()


def ours(model: PMPDForCausalLM, bits: int | None = None) -> list[int]:
    model.eos_token_ids = frozenset()
    return model.generate(PROMPT, NEW, bits).input_ids[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_tokens_are_those_of_transformers_at_every_precision(name, tmp_path):
    folder = saved(architecture(name), tmp_path / "dense")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = greedy(reference)
    assert len(set(expected)) > 2, "the tokens do not vary: the test shows little"
    assert ours(PMPDForCausalLM(folder).eval()) == expected
    quantize_checkpoint(folder, tmp_path / "anyprec", QuantizeConfig(weighted=False), [])
    model = PMPDForCausalLM(tmp_path / "anyprec", kernel="reference").eval()
    layers = {k: m for k, m in model.model.named_modules() if isinstance(m, PrecisionLinear)}
    assert layers
    for bits in (4, 3, 2):
        with torch.no_grad():
            for key, layer in layers.items():
                reference.get_submodule(key).weight.copy_(layer.dequantize(bits))
        assert ours(model, bits) == greedy(reference), f"{bits} bits"


# -- how files differ from the class that reads them
# ------------------------------------------------------------------------------------------------------------


def same_as_transformers(folder: Path) -> PMPDForCausalLM:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    model = PMPDForCausalLM(folder).eval()
    assert ours(model) == greedy(reference)
    return model


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def test_a_model_that_was_saved_without_its_head_is_read_by_the_names_it_has(tmp_path):
    model = architecture("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors"), "the prefix is there"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_model_may_store_either_name(tmp_path, kept):
    folder = saved(architecture("llama", tie_word_embeddings=True), tmp_path)

    def change(tensors):
        embedding = tensors.pop("model.embed_tokens.weight")
        tensors.pop("lm_head.weight", None)
        return {**tensors, kept: embedding}

    rewrite(folder, change)
    model = same_as_transformers(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight, "held twice"


@pytest.mark.parametrize("differs", [True, False])
def test_a_stored_head_that_differs_from_the_embedding_is_kept(tmp_path, differs):
    model = architecture("llama", tie_word_embeddings=False)
    if not differs:
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone())
    model.config.tie_word_embeddings = False
    folder = saved(model, tmp_path)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    loaded = same_as_transformers(folder).model
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is not differs


def test_a_single_file_comes_before_an_index_that_was_left_beside_it(tmp_path):
    folder = saved(architecture("llama"), tmp_path)
    stale = '{"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(stale)
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model-00001-of-00001.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    same_as_transformers(folder)


# -- what is refused, by name
# ------------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def foreign(tensors: dict) -> dict:
    return {k: (v * 8).to(torch.float8_e4m3fn) if "_proj" in k else v for k, v in tensors.items()}


def scaled(tensors: dict) -> dict:
    """Quantized values stored as floating point numbers: only the names tell."""
    return tensors | {f"{k}_scale": torch.ones(1) for k in tensors if "_proj" in k}


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (scaled, None, r"q_proj\.weight has .*q_proj\.weight_scale beside it: another tool quantized it"),
        (None, {"load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        (None, {"load_in_8bit": True}, "quant_method is 'bitsandbytes'"),
    ],
)
def test_what_does_not_say_who_quantized_it_is_refused_too(tmp_path, change, settings, told):
    folder = saved(architecture("llama"), tmp_path)
    if change is not None:
        rewrite(folder, change)
    if settings is not None:
        edit(folder, quantization_config=settings)
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(folder)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "awq", "bitsandbytes", None])
def test_what_another_tool_quantized_is_refused_by_name(tmp_path, method):
    folder = saved(architecture("llama"), tmp_path)
    rewrite(folder, foreign)
    if method:
        edit(folder, quantization_config={"quant_method": method})
    told = method or "q_proj.weight is float8_e4m3fn: another tool quantized it"
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(folder)
    with pytest.raises(ValueError, match=told):
        quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig(weighted=False), [])
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_not_quantized(tmp_path):
    """What was written could not be loaded."""
    architecture("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        quantize_checkpoint(tmp_path, tmp_path / "out", QuantizeConfig(weighted=False), [])


@pytest.mark.parametrize("tensor", [True, False], ids=["tensors", "settings"])
def test_sparse_outliers_are_refused_instead_of_being_dropped(anyprec_folder, tmp_path, tensor):
    import json
    import shutil

    folder = shutil.copytree(anyprec_folder(), tmp_path / "copy")
    if tensor:
        layer = "model.layers.0.self_attn.q_proj"
        parts = {f"{layer}.{part}": torch.zeros(2) for part in ("rows", "cols", "vals")}
        rewrite(folder, lambda tensors: {**tensors, **parts})
    else:
        settings = json.loads((folder / "config.json").read_text())["anyprec"]
        edit(folder, anyprec={**settings, "sparse_numvals": {"0": 12}})
    with pytest.raises(ValueError, match="sparse outliers"):
        PMPDForCausalLM(folder)


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("mixtral", {"num_local_experts": 2}, "a mixture of experts"),
        ("t5", {}, "an encoder beside the decoder"),
        ("llava", {}, "inputs other than text"),
        ("gemma2", {}, "soft-capped attention"),
    ],
)
def test_models_of_other_kinds_are_refused_by_name(tmp_path, name, overrides, told):
    AutoConfig.for_model(name, **overrides).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(tmp_path)
    with pytest.raises(ValueError, match=told):
        quantize_checkpoint(tmp_path, tmp_path / "out", QuantizeConfig(weighted=False), [])


def nested(folder: Path) -> None:
    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"BPE9"'))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: edit(f, pad_token_id=258), r"config\.json .*; correct it, or copy it again"),
        (lambda f: edit(f, rope_scaling={"type": "su", "factor": 2.0}), r"config\.json .*; correct it"),
        (lambda f: edit(f, hidden_size=64.0), r"config\.json .*; correct it"),
        (other_tokenizer, "no usable tokenizer in it .*; copy the base model's tokenizer files"),
        (nested, r"pytorch_model\.bin can't be read: it holds 'state_dict'.*save the model's state_dict\(\)"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter .*; merge it into them"),
    ],
)
def test_a_broken_file_is_told_with_its_cure(tmp_path, damage, told):
    folder = saved(architecture("llama"), tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(folder)
