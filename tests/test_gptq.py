"""GPTQ checkpoints and models whose precisions come from several checkpoints."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pmpd import PMPDForCausalLM, Scheduler
from pmpd.kernels import gptq as codes
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import label_prompts
from pmpd.weights import gptq
from pmpd.weights.base import PrecisionLinear, PrecisionState
from pmpd.weights.mixed import MixedLinear, MultiCheckpoint
from tests.gptq_writer import quantize, write_chain, write_gptq, write_json
from tests.helpers import write_anyprec, write_dense
from tests.test_engine import assert_equals_oracle, expanded, random_prompts, run, scheduler_named

CHAIN = {
    4: {"group_size": 32, "desc_act": True},
    3: {"group_size": 64, "sym": False, "format": "gptq_v2", "storage": "sharded"},
    2: {"group_size": -1, "in_config": True, "g_idx": False},
}


# -- one layer
# ------------------------------------------------------------------------------------------------------------


class Tensors:
    """What a layer reads of a checkpoint, from memory."""

    folder = Path("nowhere")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {f"m.{name}": tensor for name, tensor in tensors.items()}

    def names(self) -> set[str]:
        return set(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def layer_of(tensors: dict, shape: tuple[int, int], **config) -> tuple[gptq.GPTQLinear, list[str]]:
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    return gptq.layer(Tensors(tensors), config, "m", linear, PrecisionState(), torch.float32, "reference")


def bit_by_bit(words: list[int], bits: int, index: int) -> int:
    """Value `index` of little-end-first words, by asking for each of its bits."""
    value = 0
    for i in range(bits):
        position = index * bits + i
        value += ((words[position // 32] >> (position % 32)) & 1) << i
    return value


def slow_weight(tensors: dict, bits: int, format: str, g_idx: list[int]) -> list[list[float]]:
    """weight[n][k] by definition, one value at a time."""
    rows, columns = tensors["scales"].shape[1], len(g_idx)
    qweight = tensors["qweight"].T.tolist()
    qzeros, scales = tensors["qzeros"].tolist(), tensors["scales"].float().tolist()
    weight = []
    for n in range(rows):
        row = []
        for k in range(columns):
            zero = bit_by_bit(qzeros[g_idx[k]], bits, n)
            if format == "gptq":
                zero = (zero + 1) % 2**bits
            row.append(scales[g_idx[k]][n] * (bit_by_bit(qweight[n], bits, k) - zero))
        weight.append(row)
    return weight


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    columns=st.sampled_from([32, 96, 160]),
    rows=st.sampled_from([32, 64]),
    format=st.sampled_from(gptq.FORMATS),
    index=st.sampled_from(["shuffled", "in order", "missing"]),
    seed=st.integers(0, 1000),
)
def test_weights_are_what_a_slow_unpacker_reads(bits, group_size, columns, rows, format, index, seed):
    draw = torch.Generator().manual_seed(seed)
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    g_idx = torch.arange(columns) // size
    if index == "shuffled":
        g_idx = g_idx[torch.randperm(columns, generator=draw)]
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (columns * bits // 32, rows), generator=draw).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, rows * bits // 32), generator=draw).int(),
        "scales": torch.rand(groups, rows, generator=draw).half(),
    }
    if index != "missing":
        tensors["g_idx"] = g_idx.int()
    layer, problems = layer_of(
        tensors, (rows, columns), bits=bits, group_size=group_size, checkpoint_format=format
    )
    assert problems == []
    expected = torch.tensor(slow_weight(tensors, bits, format, g_idx.tolist()))
    assert torch.equal(layer.dequantize(bits), expected)
    x = torch.rand(3, columns, generator=draw)
    torch.testing.assert_close(layer.multiply(x, bits), x @ expected.T)


def test_three_bit_values_that_straddle_words():
    # value 10 = 101b lies in bits 30..32, value 21 = 110b in bits 63..65; also value 0 = 7, value 20 = 1 and
    # value 31 = 4
    words = torch.tensor([0x40000007, 0x10000001, 0x80000003 - 2**32], dtype=torch.int32)
    expected = [0] * 32
    for index, value in {0: 7, 10: 5, 20: 1, 21: 6, 31: 4}.items():
        expected[index] = value
    assert codes.unpack(words[:, None], 3, 32)[:, 0].tolist() == expected
    assert codes.pack(torch.tensor(expected, dtype=torch.uint8)[:, None], 3)[:, 0].tolist() == words.tolist()


ZEROS = [0, 5, 8, 1, 15, 2, 3, 4]


@pytest.mark.parametrize(
    ("word", "config"),
    [
        (0x432F1850, {"checkpoint_format": "gptq_v2"}),  # the zeros themselves, first in the lowest four bits
        (0x321E074F, {"checkpoint_format": "gptq"}),  # each minus 1; 0 becomes 15
        (0x321E074F, {}),
        (
            0x321E073F,
            {"meta": {"quantizer": ["gptqmodel:2.2.0"]}},
        ),  # 0x432F1850 - 0x11111111: the 0 borrowed from its neighbour
    ],
)
def test_zero_points_of_both_formats_and_of_writers_that_subtract_by_word(word, config):
    assert zeros_read([word], 4, {"bits": 4, **config}) == ZEROS


FOURS = [4] * 32  # 100b each; in v2: 0x24924924, 0x49249249, 0x92492492


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ((0x24924924, 0x49249249, 0x92492492), {"checkpoint_format": "gptq_v2"}),
        ((0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D), {}),  # 3 = 011b each
        ((0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D), {"meta": {"quantizer": ["gptqmodel:7.0.0"]}}),
        (
            (0x00000000, 0xB6DB6DB7, 0x49249249),
            {"meta": {"quantizer": ["gptqmodel:6.0.3+cu130"]}},
        ),  # less three constants, whole words
        (
            (0x00000000, 0xB6DB6DB7, 0x49249249),
            {"meta": {"quantizer": ["optimum:1.24.0", "gptqmodel:2.2.0"]}},
        ),
        ((0x00000000, 0xB6DB6DB7, 0x49249249), {"meta": {"quantizer": "autogptq:0.8.0.dev0"}}),
    ],
)
def test_three_bit_zero_points_of_each_writer(words, config):
    assert zeros_read(words, 3, {"bits": 3, **config}) == FOURS


def test_three_bit_zero_points_of_0_that_borrowed_across_values():
    # 1, 0, 0, ...: (1, 0, 0) less (0x24924924, 0x92492492, 0x49249249)
    words, config = (
        (0xDB6DB6DD, 0x6DB6DB6E, 0xB6DB6DB7),
        {"bits": 3, "meta": {"quantizer": ["gptqmodel:4.0.0"]}},
    )
    assert zeros_read(words, 3, config) == [1] + [0] * 31


@pytest.mark.parametrize(
    ("word", "version"),
    [
        (
            0xF2F1F0F0,
            "5.8.0",
        ),  # 0x04030201 - 0x11111111: the 1s of 4 bits, which the checkpoint has, in a module of 8
        (0xF2F1F0F0, "7.3.1"),
        (0x03020100, "7.3.2"),
    ],
)
def test_zero_points_of_a_module_with_bits_of_its_own(word, version):
    config = {"bits": 4, "dynamic": {"m": {"bits": 8}}, "meta": {"quantizer": [f"gptqmodel:{version}"]}}
    assert zeros_read([word], 8, config) == [1, 2, 3, 4]


def zeros_read(words, bits: int, config: dict) -> list[float]:
    """The zero points of one group, as seen in weights of code 0 and scale 1."""
    rows = 32 * len(words) // bits
    tensors = {
        "qweight": torch.zeros(bits, rows, dtype=torch.int32),
        "qzeros": torch.tensor([words]).to(torch.int32),
        "scales": torch.ones(1, rows).half(),
    }
    layer, problems = layer_of(tensors, (rows, 32), group_size=-1, **config)
    assert problems == []
    return (-layer.dequantize(bits)[:, 0]).tolist()


def test_damaged_layers_are_named():
    tensors, _ = write_layer(4)
    del tensors["g_idx"]
    good = {"bits": 4, "group_size": 32}
    assert layer_of(tensors, (32, 96), **good)[1] == []
    assert "m.g_idx is missing" in layer_of(tensors, (32, 96), desc_act=True, **good)[1][0]
    assert any("m.qweight" in problem for problem in layer_of(tensors, (32, 64), **good)[1])
    assert any("m.scales" in problem for problem in layer_of(tensors, (32, 96), bits=4, group_size=64)[1])
    assert any("m.qzeros" in problem for problem in layer_of(tensors, (32, 96), bits=2, group_size=32)[1])
    for group, found in ((7, "groups 7 to 7, not 0 to 2"), (-1, "groups -1 to -1")):
        assert found in layer_of({**tensors, "g_idx": torch.full((96,), group).int()}, (32, 96), **good)[1][0]


def write_layer(bits: int):
    return quantize(torch.randn(32, 96, generator=torch.Generator().manual_seed(1)), bits)


def test_dynamic_settings_of_a_module_win():
    tensors, value = write_layer(8)
    config = {
        "bits": 4,
        "group_size": 128,
        "dynamic": {"-:other": {}, r"+:^m$": {"bits": 8, "group_size": 32}},
    }
    layer, problems = layer_of(tensors, (32, 96), **config)
    assert problems == []
    assert torch.equal(layer.dequantize(4), value)


# -- whole checkpoints
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory, dense_folder) -> Path:
    """The JSON of a 4, 3, 2 chain: act order, asymmetric v2 shards, whole rows without g_idx."""
    return write_chain(tmp_path_factory.mktemp("chain"), dense_folder("llama"), CHAIN)


@pytest.fixture(scope="module")
def model(chain) -> PMPDForCausalLM:
    return PMPDForCausalLM(chain, use_anyprec=False, kernel="reference").eval()


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (2, {"group_size": 64}),
        (3, {"group_size": 128, "desc_act": True, "in_config": True}),
        (3, {"sym": False, "storage": "sharded", "format": "gptq_v2"}),
        (4, {"storage": "bin", "dtype": torch.float16, "g_idx": False}),
        (4, {"storage": "gptq_model-4bit-32g.safetensors", "desc_act": True}),
        (4, {"storage": "gptq_model-4bit-32g.bin"}),
        (8, {"group_size": -1, "desc_act": True, "sym": False}),
    ],
    ids=str,
)
def test_every_kind_of_folder_holds_the_weights_that_were_written(tmp_path, dense_folder, bits, options):
    values = write_gptq(tmp_path / "q", dense_folder("llama"), bits, **options)
    model = PMPDForCausalLM(
        write_json(tmp_path, {str(bits): "q"}, dense_folder("llama")), use_anyprec=False, kernel="reference"
    )
    assert model.precisions == (bits,)
    layers = {
        name: module for name, module in model.model.named_modules() if isinstance(module, PrecisionLinear)
    }
    assert layers.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(layers[name].dequantize(bits), value), name


def test_a_pickle_of_an_old_torch_is_read(tmp_path, dense_folder):
    values = write_gptq(tmp_path / "q", dense_folder("llama"), 4, storage="bin")
    file, name = tmp_path / "q" / "pytorch_model.bin", "model.layers.1.mlp.down_proj"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    model = PMPDForCausalLM(
        write_json(tmp_path, {"4": "q"}, dense_folder("llama")), use_anyprec=False, kernel="reference"
    )
    assert torch.equal(model.model.get_submodule(name).dequantize(4), values[name])


def test_a_pickle_with_code_is_refused(tmp_path, dense_folder):
    write_gptq(tmp_path / "q", dense_folder("llama"), 4, storage="bin")
    torch.save({"a": Path}, tmp_path / "q" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        PMPDForCausalLM(write_json(tmp_path, {"4": "q"}, dense_folder("llama")), use_anyprec=False)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "phi"])
def test_tokens_are_those_of_transformers_with_the_dequantized_weights(tmp_path, dense_folder, architecture):
    folder = dense_folder(architecture)
    values = write_gptq(tmp_path / "q", folder, 4, skip=("layers.1.self_attn.q_proj",))
    truth = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, value in values.items():
        truth.get_submodule(name).weight.data = value
    model = PMPDForCausalLM(write_json(tmp_path, {"4": "q"}, folder), use_anyprec=False).eval()
    prompts = [[token for token in prompt if token != 256] or [1] for prompt in random_prompts(3, 30, seed=1)]
    for completion, prompt in zip(run(model, prompts, None, 15), prompts, strict=True):
        expected = truth.generate(
            torch.tensor([prompt]), max_new_tokens=15, do_sample=False, pad_token_id=257
        )
        assert completion.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["static", "random", "confidence"])
@pytest.mark.parametrize("lean", [True, False])
def test_engine_equals_oracle_on_a_chain_of_checkpoints(model, name, lean):
    prompts, scheduler = random_prompts(7, 90, seed=3), scheduler_named(name, (4, 3, 2))
    completions = run(model, prompts, scheduler, 24, slots=4, lean=lean)
    assert_equals_oracle(model, prompts, scheduler, 24, completions)
    assert len({bits for c in completions for bits in expanded(c)}) > 1, (
        "no precision was ever lowered: the test shows nothing"
    )


@pytest.fixture(scope="module")
def mixed_json(tmp_path_factory, dense_folder) -> Path:
    """16 bits unquantized, 4 and 2 from one Any-Precision checkpoint, 3 from a GPTQ one that leaves some
    layers alone."""
    folder, base = tmp_path_factory.mktemp("mixed"), dense_folder("qwen2")
    write_anyprec(folder / "anyprec", base, architecture="qwen2")
    write_gptq(folder / "gptq", base, 3, skip=("layers.0.mlp.down_proj", "layers.1.self_attn.k_proj"))
    shutil.copytree(base, folder / "dense")
    return write_json(folder, {"16": "dense", "4": "anyprec", "3": "gptq", "2": "anyprec"}, base)


@pytest.mark.parametrize("lean", [True, False])
def test_engine_equals_oracle_when_formats_are_mixed(mixed_json, lean):
    model = PMPDForCausalLM(mixed_json, use_anyprec=False, kernel="reference").eval()
    assert model.precisions == (16, 4, 3, 2)
    prompts, scheduler = random_prompts(6, 60, seed=9), scheduler_named("random", (16, 4, 3, 2))
    completions = run(model, prompts, scheduler, 24, slots=6, lean=lean)
    assert_equals_oracle(model, prompts, scheduler, 24, completions)
    assert {bits for c in completions for bits in expanded(c)} >= {16, 3, 2}


def test_each_precision_of_a_mixed_set_is_that_of_its_own_checkpoint(mixed_json):
    model = PMPDForCausalLM(mixed_json, kernel="reference").eval()
    folder = mixed_json.parent
    alone = {
        16: PMPDForCausalLM(folder / "dense"),
        4: PMPDForCausalLM(folder / "anyprec", [4], kernel="reference"),
        2: PMPDForCausalLM(folder / "anyprec", [2], kernel="reference"),
    }
    ids = torch.tensor([random_prompts(2, 12)[1]])
    state = next(module.state for module in model.model.modules() if isinstance(module, PrecisionLinear))
    for bits, other in alone.items():
        state.set_uniform(bits)
        with torch.inference_mode():
            torch.testing.assert_close(model.model(ids).logits, other.model(ids).logits)


def test_generate_labels_and_the_config_of_the_original_readme_work(model):
    config = model.model.models[str(model.precisions[0])].config
    assert config.hidden_size // config.num_attention_heads == 16
    model.scheduler = Scheduler.get_scheduler("naive", precisions=[3, 2], high_bit_steps=2)
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, prefill_bit=4)
    assert [bits for bits, _ in output.precision_trace[0]] == [4, 3, 2]
    model.scheduler = None
    prompts = [
        {"prompt_id": f"{i:016x}", "prompt_tokens": 8, "prompt_text": "x", "input_ids": [i + 1] * 8}
        for i in range(2)
    ]
    text = model.tokenizer.decode(output.input_ids[0, 3:])
    references = {
        p["prompt_id"]: {"reference_text": text, "reference_ids": [3, 4], "error": None} for p in prompts
    }
    rows = list(label_prompts(model, prompts, references, LabelConfig((4, 3, 2), 13, 4)))
    assert sorted(row["prompt_id"] for row in rows) == sorted(prompt["prompt_id"] for prompt in prompts)
    assert all(row["error"] is None and len(row["pairs"]) == 2 for row in rows)


def test_a_quantized_checkpoint_may_be_the_base_model(tmp_path, dense_folder):
    for bits in (4, 3):
        values = write_gptq(tmp_path / f"q{bits}", dense_folder("llama"), bits, in_config=True)
    for file in dense_folder("llama").glob("*token*"):
        shutil.copy(file, tmp_path / "q3")
    model = PMPDForCausalLM(
        write_json(tmp_path, {"4": "q4", "3": "q3"}, "q3"), use_anyprec=False, kernel="reference"
    ).eval()
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(model.model.get_submodule(name).dequantize(3), values[name])


# -- what exists once
# ----------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_shared_tensors_and_the_packed_layers(chain, dense_folder, monkeypatch):
    # not free_bytes = 0: models of other tests give theirs back when they are collected
    monkeypatch.setattr("pmpd.kernels.reference._BUDGET.take", lambda *_: False)
    model = PMPDForCausalLM(chain, use_anyprec=False, kernel="reference").eval()
    run(
        model,
        [[1, 2, 3]],
        Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=1),
        5,
        lean=False,
    )  # builds all layers
    shared = load_file(dense_folder("llama") / "model.safetensors")
    quantized = {name for name, module in model.model.named_modules() if isinstance(module, MixedLinear)}
    shared_bytes = sum(
        4 * tensor.numel() for name, tensor in shared.items() if name.removesuffix(".weight") not in quantized
    )
    packed_bytes = 0
    for bits in CHAIN:
        for file in (chain.parent / f"gptq-{bits}bit").glob("*.safetensors"):
            parts = (
                tensor for name, tensor in load_file(file).items() if name.rpartition(".")[0] in quantized
            )
            packed_bytes += sum(tensor.nbytes for tensor in parts)
    layers = [module for module in model.model.modules() if isinstance(module, MixedLinear)]
    assert len(layers) == 14
    index_bytes = 4 * sum(layer.in_features for layer in layers)  # of the checkpoint that has no g_idx
    parameters = sum(parameter.nbytes for parameter in model.model.parameters())
    assert parameters == shared_bytes, "something unquantized exists more than once, or less"
    assert sum(layer.packed_bytes() for layer in layers) == packed_bytes + index_bytes
    # nothing beside: all tensors that this model's layers reach
    gc.collect()
    held = {id(t): t for layer in layers for part in layer._unique_parts() for t in part.matrix._packed[:4]}
    assert sum(tensor.nbytes for tensor in held.values()) == packed_bytes + index_bytes
    assert all(part.matrix._dense is None for layer in layers for part in layer._unique_parts())


def test_the_lean_forward_keeps_the_only_dequantized_copy(chain):
    model = PMPDForCausalLM(chain, use_anyprec=False, kernel="reference").eval()
    run(
        model,
        [[1, 2, 3]],
        Scheduler.get_scheduler("static", precisions=[4, 3, 2], high_bit_steps=1),
        5,
        lean=True,
    )
    parts = [
        part
        for layer in model.model.modules()
        if isinstance(layer, MixedLinear)
        for part in layer._unique_parts()
    ]
    assert any(part._matrix is not None for part in parts)
    assert all(part._matrix is None or part._matrix._dense is None for part in parts)
    part = next(part for part in parts if part._matrix is not None)
    part.multiply(torch.rand(1, part.in_features), part.precisions[0])
    assert part._matrix._dense is not None, "the generic path keeps what it multiplies with"


def change(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("base_has_weights", [True, False])
def test_checkpoints_that_disagree_on_a_shared_tensor_are_refused(
    tmp_path, dense_folder, name, base_has_weights
):
    base = tmp_path / "base"
    shutil.copytree(dense_folder("qwen2"), base)
    for bits in (3, 4):
        write_gptq(tmp_path / f"q{bits}", base, bits, skip=("layers.1.mlp.up_proj",))
    file = write_json(tmp_path, {"3": "q3", "4": "q4"}, "base")
    if not base_has_weights:
        (base / "model.safetensors").unlink()
    PMPDForCausalLM(file, use_anyprec=False)
    change(tmp_path / "q3", name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        PMPDForCausalLM(file, use_anyprec=False)
    assert "disagree" in str(error.value)
    assert str(tmp_path / "q3") in str(error.value)


def test_a_shared_tensor_may_be_rounded_to_another_dtype(tmp_path, dense_folder):
    write_gptq(tmp_path / "q4", dense_folder("llama"), 4, dtype=torch.float16)
    write_gptq(tmp_path / "q3", dense_folder("llama"), 3, dtype=torch.bfloat16)
    model = PMPDForCausalLM(
        write_json(tmp_path, {"4": "q4", "3": "q3"}, dense_folder("llama")), use_anyprec=False
    )
    base = load_file(dense_folder("llama") / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.model.model.embed_tokens.weight, base), (
        "the base model's tensor is the one to take"
    )


def test_tied_embeddings_are_one_tensor(tmp_path):
    base = write_dense(tmp_path / "base", seed=5, tie_word_embeddings=True)
    for bits in (3, 2):
        write_gptq(tmp_path / f"q{bits}", base, bits)
    file = write_json(tmp_path, {"3": "q3", "2": "q2"}, "base")
    model = PMPDForCausalLM(file, use_anyprec=False).eval()
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    # a writer may store the head too: it must be the same
    tensors = load_file(tmp_path / "q2" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "q2" / "model.safetensors", metadata={"format": "pt"})
    PMPDForCausalLM(file, use_anyprec=False)
    change(tmp_path / "q2", "lm_head.weight")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        PMPDForCausalLM(file, use_anyprec=False)


def test_a_bias_that_the_model_does_not_have_must_be_zero(tmp_path, dense_folder):
    write_gptq(tmp_path / "q", dense_folder("llama"), 4)
    file, weights = (
        write_json(tmp_path, {"4": "q"}, dense_folder("llama")),
        tmp_path / "q" / "model.safetensors",
    )
    name = "model.layers.0.mlp.up_proj.bias"
    save_file({**load_file(weights), name: torch.zeros(96)}, weights)
    PMPDForCausalLM(file, use_anyprec=False)
    change(tmp_path / "q", name)
    with pytest.raises(ValueError, match=r"up_proj\.bias is not zero"):
        PMPDForCausalLM(file, use_anyprec=False)


def test_the_fingerprint_is_of_the_members_not_of_their_paths(chain, model, tmp_path, dense_folder):
    shutil.copytree(chain.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / chain.name
    assert MultiCheckpoint(moved).fingerprint() == model.fingerprint
    assert len(model.fingerprint) == 16
    change(tmp_path / "moved" / "gptq-4bit", "model.norm.weight")
    assert MultiCheckpoint(moved).fingerprint() != model.fingerprint


# -- what users get wrong
# ------------------------------------------------------------------------------------------------------


def test_checkpoints_of_precisions_that_are_not_used_do_not_matter(tmp_path, chain):
    shutil.copytree(chain.parent, tmp_path / "chain")
    file = tmp_path / "chain" / chain.name
    change(tmp_path / "chain" / "gptq-2bit", "model.norm.weight")
    assert PMPDForCausalLM(file, [4, 3], use_anyprec=False).precisions == (4, 3)
    with pytest.raises(ValueError, match=r"disagree.*model\.norm\.weight"):
        PMPDForCausalLM(file, [4, 2], use_anyprec=False)


def test_errors_of_the_json_say_what_to_do(chain, tmp_path, dense_folder, anyprec_folder):
    base, file = str(dense_folder("llama")), tmp_path / "chain.json"
    with pytest.raises(ValueError, match="holds 4, 3, 2"):
        PMPDForCausalLM(chain, [8, 3], use_anyprec=False)
    with pytest.raises(ValueError, match="one folder for each precision"):
        PMPDForCausalLM(anyprec_folder("llama"), use_anyprec=False)
    four = str(chain.parent / "gptq-4bit")
    for entries, words in [
        ({"model_path": base}, "no precision"),
        ({"4": four}, "model_path"),
        ({"four": four, "model_path": base}, "one folder for each precision"),
        ({"4": four, "model_path": None}, "one folder for each precision"),
        ({"4": 4, "model_path": base}, "one folder for each precision"),
        ({"4": "no-such-folder", "model_path": base}, "no-such-folder: no such folder"),
        ({"3": four, "model_path": base}, "holds 4 bits, and stands for precision"),
        ({"3": base, "model_path": base}, "not quantized"),
        ({"8": str(anyprec_folder("llama")), "model_path": base}, "holds 4, 3, 2"),
        ({"4": four, "model_path": str(dense_folder("opt"))}, "neither qweight nor weight"),
    ]:
        file.write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=words):
            PMPDForCausalLM(file, use_anyprec=False)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"bits": 5}, "bits is 5; allowed"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; allowed"),
        ({"quant_method": "awq"}, "quant_method is 'awq'; allowed"),
        ({"group_size": 0}, "group_size is 0; allowed: -1"),
        ({"group_size": "128"}, "group_size is '128'; allowed: -1"),
        ({"dynamic": {"m": 4}}, "dynamic is {'m': 4}; it must map"),
        ({"dynamic": {"model": {"group_size": -2}}}, "group_size is -2; allowed"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, dense_folder, four_bits, setting, words):
    settings = json.loads((four_bits / "quantize_config.json").read_text())
    shutil.copytree(four_bits, tmp_path / "q")
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps({**settings, **setting}))
    with pytest.raises(ValueError, match=words) as error:
        PMPDForCausalLM(write_json(tmp_path, {"4": "q"}, dense_folder("llama")), use_anyprec=False)
    assert str(tmp_path / "q") in str(error.value)


@pytest.mark.parametrize("config", ["quantize_config.json", "config.json"])
def test_settings_that_are_no_object_are_refused(tmp_path, dense_folder, four_bits, config):
    shutil.copytree(four_bits, tmp_path / "q")
    if config == "config.json":
        (tmp_path / "q" / "quantize_config.json").unlink()
        whole = json.loads((tmp_path / "q" / config).read_text())
        (tmp_path / "q" / config).write_text(json.dumps({**whole, "quantization_config": "gptq"}))
    else:
        (tmp_path / "q" / config).write_text('{"bits": 4,')
    with pytest.raises(
        ValueError, match=config.removesuffix(".json") if config != "config.json" else "quantization_config"
    ):
        PMPDForCausalLM(write_json(tmp_path, {"4": "q"}, dense_folder("llama")), use_anyprec=False)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory, dense_folder) -> Path:
    folder = tmp_path_factory.mktemp("four") / "q"
    write_gptq(folder, dense_folder("llama"), 4)
    return folder


@pytest.mark.gpu
def test_on_a_gpu_the_tokens_come_from_the_same_weights(chain):
    cpu = PMPDForCausalLM(chain, kernel="reference").eval()
    gpu = PMPDForCausalLM(chain, dtype=torch.float32).eval().cuda()
    for (name, one), other in zip(cpu.model.named_modules(), gpu.model.modules(), strict=True):
        if isinstance(one, MixedLinear):
            x = torch.rand(5, one.in_features)
            for bits in CHAIN:
                torch.testing.assert_close(other.dequantize(bits).cpu(), one.dequantize(bits), msg=name)
                torch.testing.assert_close(
                    other.multiply(x.cuda(), bits).cpu(), one.multiply(x, bits), atol=1e-4, rtol=1e-4
                )
