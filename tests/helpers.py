"""Tiny models for tests: random weights, real architectures, written as the checkpoints that the library
reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pmpd.kernels.bitplanes import pack

_COMMON = {
    "vocab_size": 258,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 768,
}

ARCHITECTURES: dict[str, dict] = {
    "llama": {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2},
    "qwen2": {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2},
    "phi": {**_COMMON, "intermediate_size": 96},
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "mistral": {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "sliding_window": 24},
    "stablelm": {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2},
    "qwen3": {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {**_COMMON, "intermediate_size": 96},
}
LAYERS = {"opt": ("model.decoder", "layers"), "gpt_neox": ("gpt_neox", "layers")}


def byte_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255 in the order of the byte-level alphabet), 256 = end of text, 257 = pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, "<eos>": 256, "<pad>": 257}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>" if eos else None, pad_token="<pad>"
    )


def write_dense(
    folder: Path, architecture: str = "llama", seed: int = 0, eos_token_id: int | None = 256, **overrides
) -> Path:
    """A random unquantized checkpoint. Weights are large enough that greedy tokens vary and do not tie."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture,
    **{**ARCHITECTURES[architecture], "eos_token_id": eos_token_id, "bos_token_id": None,
                                                   "pad_token_id": 257, **overrides})  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.12 if "embed" not in name else 0.5)
    model.generation_config.eos_token_id = eos_token_id
    model.save_pretrained(folder)
    byte_tokenizer(eos_token_id is not None).save_pretrained(folder)
    return folder


def write_anyprec(
    folder: Path, dense: Path, seed_precision: int = 2, parent_precision: int = 4, architecture: str = "llama"
) -> Path:
    """An Any-Precision checkpoint of `dense`: evenly spaced tables, so that precisions differ visibly."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    model_name, layers_name = LAYERS.get(architecture, ("model", "layers"))
    prefix = f"{model_name}.{layers_name}."
    tensors, modules = {}, set()
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_tied(model, name)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefix):
            modules.add(name.removeprefix(prefix).partition(".")[2])
            weight = state.pop(f"{name}.weight")
            tensors |= {
                f"{name}.{key}": value
                for key, value in quantize_evenly(weight, seed_precision, parent_precision).items()
            }
    tensors |= {name: tensor.contiguous() for name, tensor in state.items()}
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["anyprec"] = {
        "seed_precision": seed_precision,
        "parent_precision": parent_precision,
        "group_count": 1,
        "arch_config": {
            "model_name": model_name,
            "layers_name": layers_name,
            "module_names": sorted(modules),
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize_evenly(
    weight: torch.Tensor, seed_precision: int, parent_precision: int
) -> dict[str, torch.Tensor]:
    levels = 2**parent_precision
    low, high = weight.min(1, keepdim=True).values, weight.max(1, keepdim=True).values
    table = low + (high - low) * torch.linspace(0, 1, levels)
    codes = ((weight - low) / (high - low) * (levels - 1)).round().to(torch.uint8)
    result = {"qweight": pack(codes, parent_precision)}
    for bits in range(seed_precision, parent_precision + 1):
        result[f"lut{bits}"] = table.view(len(weight), 2**bits, -1).mean(-1).half()
    return result


def _is_tied(model: nn.Module, name: str) -> bool:
    return name == "lm_head.weight" and model.config.tie_word_embeddings
