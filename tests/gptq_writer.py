"""A tiny round-to-nearest GPTQ writer for tests: whole checkpoints as AutoGPTQ and GPTQModel lay them out.
Slow on purpose, no tricks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM


def pack_rows(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Each row of values as one long number, little end first, cut into words: int32 [len(rows), len(row) *
    bits / 32]."""
    packed = []
    for row in rows:
        number = sum(value << (i * bits) for i, value in enumerate(row))
        words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(len(row) * bits // 32)]
        packed.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def quantize(
    weight: torch.Tensor,
    bits: int,
    group_size: int = 32,
    desc_act: bool = False,
    sym: bool = True,
    format: str = "gptq",
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`weight` [N, K] -> (qweight, qzeros, scales, g_idx), and the weight [N, K] that they stand for,
    float32."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    order = (
        torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        if desc_act
        else torch.arange(columns)
    )
    g_idx = torch.empty(columns, dtype=torch.int32)
    for position, column in enumerate(order.tolist()):
        g_idx[column] = position // size
    scales, zeros = torch.empty(groups, rows), torch.empty(groups, rows, dtype=torch.int64)
    codes, value = torch.empty(columns, rows, dtype=torch.int64), torch.empty(rows, columns)
    top = 2**bits - 1
    for group in range(groups):
        mine = (g_idx == group).nonzero()[:, 0]
        part = weight[:, mine]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            scale, zero = 2 * torch.maximum(-low, high) / top, torch.full((rows,), (top + 1) // 2)
        else:
            scale = (high - low) / top
            zero = (-low / scale).round().long().clamp(0, top)
        scales[group], zeros[group] = scale.half().float(), zero
        codes[mine] = ((part / scales[group][:, None]).round().long() + zero[:, None]).clamp(0, top).T
        value[:, mine] = scales[group][:, None] * (codes[mine].T - zero[:, None])
    stored = (zeros - 1) % 2**bits if format == "gptq" else zeros
    tensors = {
        "qweight": pack_rows(codes.T.tolist(), bits).T.contiguous(),
        "qzeros": pack_rows(stored.tolist(), bits),
        "scales": scales.half(),
        "g_idx": g_idx,
    }
    return tensors, value


def write_gptq(
    folder: Path,
    dense: Path,
    bits: int,
    *,
    skip: tuple[str, ...] = (),
    storage: str = "safetensors",
    in_config: bool = False,
    g_idx: bool = True,
    dtype: torch.dtype = torch.float32,
    settings: dict | None = None,
    **options,
) -> dict[str, torch.Tensor]:
    """Writes the GPTQ checkpoint of `dense`, whose own weights change with it: returns name -> the weight
    that was quantized.

    `skip`: linears to leave alone, by the end of their name. `storage`: safetensors, sharded, bin, or a file
    name. `in_config`: settings in config.json. `options` of `quantize`.
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    tensors, values = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head" or name.endswith(skip):
            continue
        parts, values[name] = quantize(state.pop(f"{name}.weight"), bits, **options)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if part != "g_idx" or g_idx}
    tensors |= {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}

    folder.mkdir(parents=True, exist_ok=True)
    if storage == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif storage == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif storage == "sharded":
        names = sorted(tensors)
        weight_map = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
        for shard in sorted(set(weight_map.values())):
            save_file(
                {name: tensors[name] for name in names if weight_map[name] == shard},
                folder / shard,
                metadata={"format": "pt"},
            )
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    elif storage.endswith(".bin"):
        torch.save(tensors, folder / storage)
    else:
        save_file(tensors, folder / storage, metadata={"format": "pt"})
    config = {
        "bits": bits,
        "group_size": options.get("group_size", 32),
        "desc_act": options.get("desc_act", False),
        "sym": options.get("sym", True),
        "checkpoint_format": options.get("format", "gptq"),
        "quant_method": "gptq",
        **(settings or {}),
    }
    shutil.copy(dense / "config.json", folder)
    if in_config:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**whole, "quantization_config": config}))
    else:
        (folder / "quantize_config.json").write_text(json.dumps(config))
    return values


def write_chain(folder: Path, dense: Path, members: dict[int, dict]) -> Path:
    """A GPTQ folder for each precision and the JSON that names them: members maps precision -> options of
    `write_gptq`."""
    for bits, options in members.items():
        write_gptq(folder / f"gptq-{bits}bit", dense, bits, **options)
    return write_json(folder, {str(bits): f"gptq-{bits}bit" for bits in members}, dense)


def write_json(folder: Path, entries: dict[str, str], base: Path | str) -> Path:
    file = folder / "chain.json"
    file.write_text(json.dumps({**entries, "model_path": str(base)}))
    return file
