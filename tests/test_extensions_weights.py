"""A weight format comes from outside: a class and one entry, no edit of the loaders."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pmpd import PMPDForCausalLM
from pmpd.weights.base import PrecisionLinear
from pmpd.weights.formats import FORMATS, WeightFormat
from tests.helpers import write_dense

PROMPT = torch.tensor([[5, 66, 7, 201]])


class RowScaleLinear(PrecisionLinear):
    """int8 codes and a scale per row; 4 bits are the codes without their low nibble."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, precisions, state) -> None:
        super().__init__(codes.shape[1], codes.shape[0], precisions, state)
        self.codes, self.scale, self.row_bias = codes, scale, bias

    def dequantize(self, bits: int) -> Tensor:
        codes = self.codes if bits == 8 else (self.codes >> 4) << 4
        return codes.float() * self.scale[:, None]

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        return nn.functional.linear(x, self.dequantize(bits), self.row_bias)

    def bias_vector(self) -> Tensor | None:
        return self.row_bias

    def packed_bytes(self) -> int:
        return self.codes.nbytes


class RowScale(WeightFormat):
    def precisions(self, checkpoint):
        return (8, 4) if checkpoint.config_json.get("row_scale") else None

    def holds(self, names, layer):
        return f"{layer}.codes" in names

    def layer(self, tensors, name, linear, precisions, state, dtype, kernel):
        codes, scale = tensors.tensor(f"{name}.codes"), tensors.tensor(f"{name}.scale")
        bias = tensors.tensor(f"{name}.bias") if linear.bias is not None else None
        wrong = [] if len(codes) == linear.out_features else [f"{name}.codes has {len(codes)} rows"]
        return RowScaleLinear(codes, scale, bias, precisions, state), wrong


def write_row_scale(folder, dense):
    shutil.copytree(dense, folder)
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1) / 127
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.codes"] = (tensor / scale[:, None]).round().to(torch.int8)
            tensors[f"{layer}.scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "row_scale": True}))
    return folder


def test_a_format_from_outside_is_found_loaded_and_decoded_beside_others(
    anyprec_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(FORMATS, "row_scale", RowScale())
    dense = write_dense(tmp_path / "dense")
    folder = write_row_scale(tmp_path / "row_scale", dense)
    model = PMPDForCausalLM(folder).eval()
    assert model.precisions == (8, 4)
    unquantized = PMPDForCausalLM(dense).eval().generate(PROMPT, 12).input_ids
    assert torch.equal(model.generate(PROMPT, 12, 8).input_ids, unquantized), "8 bits are nearly exact here"
    assert not torch.equal(model.generate(PROMPT, 12, 4).input_ids, unquantized), "4 bits are the same"
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"8": "row_scale", "3": str(anyprec_folder()), "model_path": "dense"}))
    mixed = PMPDForCausalLM(both, use_anyprec=False, kernel="reference").eval()
    assert torch.equal(mixed.generate(PROMPT, 12, 8).input_ids, unquantized)
    alone = PMPDForCausalLM(anyprec_folder(), kernel="reference").eval()
    found = mixed.generate(PROMPT, 12, 3).input_ids
    assert torch.equal(found, alone.generate(PROMPT, 12, 3).input_ids)
