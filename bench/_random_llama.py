"""Llama-shaped checkpoints of random weights, written layer by layer: for measuring models that nobody has to
download."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pmpd import demo


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, under the names of its config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 32000

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module within a layer -> out_features, in_features."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_attention_heads * self.num_key_value_heads
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def step_bytes(self, bits: int) -> int:
        """What a decode step at batch 1 must read: codes (or bfloat16 weights) of all layers, one table per
        row, and the bfloat16 head."""
        total = 2 * self.vocab_size * self.hidden_size
        for rows, columns in self.linears().values():
            total += self.num_hidden_layers * rows * (columns * bits // 8 + (2 * 2**bits if bits < 16 else 0))
        return total


LLAMA_135M = Shape(576, 30, 9, 3, 1536, 49152)
"""SmolLM2's."""
LLAMA_1B = Shape(2048, 22, 32, 4, 5632)
LLAMA_8B = Shape(4096, 32, 32, 8, 14336, 128256)
LLAMA_7B = Shape(4096, 32, 32, 32, 11008)


def write(folder: Path, shape: Shape, precisions: tuple[int, ...] | None, seed: int = 0) -> int:
    """Writes a checkpoint, one safetensors file a layer; returns its bytes. `precisions` None: unquantized
    float16.

    The tokenizer is the demo model's: what the tokens mean does not matter here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.ANYPREC / name, folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        **asdict(shape),
    }  # fmt: skip
    if precisions is not None:
        config["anyprec"] = {
            "seed_precision": min(precisions), "parent_precision": max(precisions), "group_count": 1,
            "arch_config": {"model_name": "model", "layers_name": "layers",
            "module_names": list(shape.linears())},
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.Generator(np.random.SFC64(seed))
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (0.02 * torch.randn(size, generator=generator)).half()

    # one large draw that unquantized matrices take their values from: what they are does not change what a
    # product costs
    largest = max(rows * columns for rows, columns in shape.linears().values())
    pool = normal(largest + (1 << 20)) if precisions is None else None
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ones = torch.ones(shape.hidden_size, dtype=torch.float16)
    ends = {
        f"{name}.weight": normal(shape.vocab_size, shape.hidden_size)
        for name in ("model.embed_tokens", "lm_head")
    }
    save("ends.safetensors", {**ends, "model.norm.weight": ones})
    del ends
    for index in range(shape.num_hidden_layers):
        prefix = f"model.layers.{index}."
        tensors = {
            f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name, (rows, columns) in shape.linears().items():
            if pool is not None:
                start = int(random.integers(len(pool) - rows * columns + 1))
                tensors[f"{prefix}{name}.weight"] = (
                    pool[start : start + rows * columns].view(rows, columns).clone()
                )
            else:
                assert precisions is not None
                planes = np.frombuffer(
                    bytearray(random.bytes(max(precisions) * rows * columns // 8)), dtype=np.int32
                )
                tensors[f"{prefix}{name}.qweight"] = torch.from_numpy(planes).view(
                    max(precisions), rows, columns // 32
                )
                for bits in precisions:
                    tensors[f"{prefix}{name}.lut{bits}"] = normal(rows, 2**bits).sort(1).values
        save(f"layer-{index:02}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(path.stat().st_size for path in folder.iterdir())
