"""What is quantized is found in the model itself; what the format can't hold is named."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pmpd.quantize.layers import find_layers
from tests.helpers import ARCHITECTURES

EXPECTED = {
    "llama": ("model", "layers",
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "qwen2": ("model", "layers",
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "phi": ("model", "layers",
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    "opt": ("model.decoder", "layers",
    ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]),
    "gpt_neox": ("gpt_neox", "layers",
    ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
}  # fmt: skip


@pytest.mark.parametrize("architecture", EXPECTED)
def test_arch_config_is_found_from_the_model(architecture: str) -> None:
    plan = find_layers(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture]))
    )
    model_name, layers_name, modules = EXPECTED[architecture]
    assert (plan.model_name, plan.layers_name, sorted(plan.module_names)) == (
        model_name,
        layers_name,
        sorted(modules),
    )
    assert plan.count == 2
    assert plan.skipped == {}
    assert plan.arch_config == {
        "model_name": model_name,
        "layers_name": layers_name,
        "module_names": list(plan.module_names),
    }


def test_convolutional_layers_are_refused_by_name() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=258)
    with pytest.raises(ValueError, match=r"transformer\.h\.\*\.attn\.c_attn: Conv1D: convolutional"):
        find_layers(AutoModelForCausalLM.from_config(config))


class Layer(nn.Module):
    def __init__(self, columns: int = 64, extra: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(columns, 64)
        if extra:
            self.extra = nn.Linear(32, 32)


class Model(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)
        self.lm_head = nn.Linear(64, 8)


def test_a_width_that_is_no_multiple_of_32_is_left_unquantized() -> None:
    plan = find_layers(Model([Layer(48), Layer(48)]))
    assert plan.module_names == ("first",)
    assert plan.skipped == {"second": "in_features 48 is no multiple of 32"}


def test_tied_linears_are_left_unquantized() -> None:
    layers = [Layer(), Layer()]
    layers[1].second.weight = layers[0].second.weight
    plan = find_layers(Model(layers))
    assert plan.module_names == ("first",)
    assert (
        "model.layers.0.second.weight, model.layers.1.second.weight are one tensor" in plan.skipped["second"]
    )


def test_a_linear_of_some_layers_only_is_left_unquantized() -> None:
    plan = find_layers(Model([Layer(), Layer(extra=True)]))
    assert plan.module_names == ("first", "second")
    assert plan.skipped == {"extra": "only in 1 of 2 layers"}


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no list of decoder layers"):
        find_layers(nn.Sequential(nn.Linear(32, 32)))
