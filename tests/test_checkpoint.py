"""Checkpoint folders: every way they are stored gives the same model, and what is damaged or can't be right
is refused with a cure."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pmpd import PMPDForCausalLM
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.reference import CacheBudget, ReferenceMatrix
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.hub import local_folder
from tests.helpers import ARCHITECTURES, byte_tokenizer, quantize_evenly, write_dense

LAYER = "model.layers.0.self_attn.q_proj"
PROMPT = torch.tensor([[5, 66, 7, 201]])


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "checkpoint")


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None removes the key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors of `LAYER`; None removes one."""
    tensors = {
        **load_file(folder / "model.safetensors"),
        **{f"{LAYER}.{part}": tensor for part, tensor in changes.items()},
    }
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors"
    )


def shard(folder: Path, suffix: str) -> None:
    """Rewrites the weights as two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {
        name: f"{stem}-0000{1 + index % 2}-of-00002.{suffix}" for index, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "store",
    [as_bin, lambda folder: shard(folder, "safetensors"), lambda folder: shard(folder, "bin")],
    ids=["bin", "sharded", "sharded-bin"],
)
def test_an_anyprec_checkpoint_is_the_same_model_however_it_is_stored(
    anyprec_folder, anyprec_model, tmp_path, store
):
    folder, truth = copied(anyprec_folder(), tmp_path), anyprec_model()
    store(folder)
    model = PMPDForCausalLM(folder, kernel="reference").eval()
    assert model.precisions == (4, 3, 2)
    assert model.fingerprint == truth.fingerprint
    for bits in model.precisions:
        assert torch.equal(
            model.generate(PROMPT, 8, bits).input_ids, truth.generate(PROMPT, 8, bits).input_ids
        )


class _Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_holds_code_is_refused_and_the_code_does_not_run(anyprec_folder, tmp_path):
    folder = copied(anyprec_folder(), tmp_path)
    torch.save(
        {**load_file(folder / "model.safetensors"), "extra": _Code(tmp_path / "ran")},
        folder / "pytorch_model.bin",
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"pytorch_model\.bin can't be read: it holds .*would run its code; save the tensors as "
        r"safetensors",
    ) as caught:
        PMPDForCausalLM(folder)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value), "torch's advice is to trust the file"


@pytest.mark.parametrize("content", [[1, 2], "text"])
def test_a_pickle_that_is_no_dict_of_tensors_is_refused(dense_folder, tmp_path, content):
    folder = copied(dense_folder(), tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin can't be read.*not a dict of tensors"):
        PMPDForCausalLM(folder)


# ------------------------------------------------------------------------------------------------------------


def misplace(folder: Path) -> None:
    """The index names the other shard for one tensor."""
    shard(folder, "safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    edit_json(index, weight_map={**weight_map, "model.norm.weight": other})


def misplace_in_bin(folder: Path) -> None:
    shard(folder, "bin")
    index = folder / "pytorch_model.bin.index.json"
    edit_json(
        index,
        weight_map={
            **json.loads(index.read_text())["weight_map"],
            "extra": "pytorch_model-00001-of-00002.bin",
        },
    )


def without_weight_map(folder: Path) -> None:
    shard(folder, "safetensors")
    edit_json(folder / "model.safetensors.index.json", weight_map=None)


def anyprec_settings(**changes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        settings = {**json.loads((folder / "config.json").read_text())["anyprec"], **changes}
        edit_json(
            folder / "config.json",
            anyprec={key: value for key, value in settings.items() if value is not None},
        )

    return edit


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "config.json").write_text('{"model_type": '), r"file .*config\.json can't be "
                                                                      r"read.*copy it again"),
        (lambda f: (f / "config.json").write_text("[]"), r"file .*config\.json holds a list, not an object"),
        (lambda f: (f / "generation_config.json").write_text("{"), r"file .*generation_config\.json can't "
                                                                   r"be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), r"file .*model\.safetensors can't be "
                                                                   r"read"),
        (without_weight_map, r"file .*model\.safetensors\.index\.json has no weight_map"),
        (misplace, r"-of-00002\.safetensors does not hold model\.norm\.weight, as the index says.*copy "
                   r"index and shards again"),
        (misplace_in_bin, r"-of-00002\.bin does not hold extra, as the index says"),
        (anyprec_settings(seed_precision=None), r"'anyprec' in its config\.json lacks seed_precision; copy "
                                                r"config\.json again"),
        (anyprec_settings(arch_config=None), r"lacks arch_config\.model_name, arch_config\.layers_name, "
                                             r"arch_config\.module_names;"),
        (anyprec_settings(arch_config={"model_name": "model", "module_names": []}),
        r"lacks arch_config\.layers_name;"),
        (anyprec_settings(group_count=2), r"group_count 2 is not supported, only 1"),
        (lambda f: edit_tensors(f, qweight=None), rf"is damaged: {re.escape(LAYER)}\.qweight is missing"),
        (lambda f: edit_tensors(f, lut3=None), rf"is damaged: {re.escape(LAYER)}\.lut3 is missing"),
        (
            lambda f: edit_tensors(f, qweight=torch.zeros(4, 64, 1, dtype=torch.int32)),
            rf"{re.escape(LAYER)}\.qweight is torch\.int32 \[4, 64, 1\], expected torch\.int32 \[4, 64, 2\]",
        ),
        (lambda f: edit_tensors(f, lut2=torch.zeros(64, 8).half()), r"lut2 is torch\.float16 \[64, 8\], "
                                                                    r"expected torch\.float16 \[64, 4\]"),
        (lambda f: edit_tensors(f, lut2=torch.zeros(64, 4)), r"lut2 is torch\.float32 \[64, 4\], expected "
                                                             r"torch\.float16 \[64, 4\]"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_the_name_of_what_is_wrong(anyprec_folder, tmp_path, damage, told):
    folder = copied(anyprec_folder(), tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(folder)


@pytest.mark.parametrize(
    ("precisions", "cure"),
    [
        ([5, 3], "choose from these, or quantize again with --seed-precision 3 --parent-precision 5"),
        ([8, 2], "choose from these, or quantize again with --seed-precision 2 --parent-precision 8"),
        ([16], "choose from these"),
        ([4, 1], "choose from these"),
    ],
)
def test_a_precision_that_is_not_held_is_refused_with_settings_that_would_hold_it(
    anyprec_folder, precisions, cure
):
    with pytest.raises(
        ValueError, match=rf"precisions .*: this checkpoint holds 4, 3, 2 .*; {re.escape(cure)}$"
    ):
        PMPDForCausalLM(anyprec_folder(), precisions)


@pytest.mark.parametrize(
    ("path", "name"), [("/no/such/folder", "--reference-model-path"), ("no.json", "--model-path")]
)
def test_a_missing_folder_is_told_under_the_name_it_was_given_as(path, name):
    with pytest.raises(
        ValueError,
        match=rf"^{name} {re.escape(path)}: no such folder; give a checkpoint folder or a Hugging Face id",
    ):
        local_folder(path, name)


# --------------------------------------------------------------------------------------------------- what con


def test_sequences_end_where_generation_config_says_as_in_transformers(tmp_path):
    folder = write_dense(tmp_path / "dense", seed=3)
    free = PMPDForCausalLM(folder).eval().generate(PROMPT, 20).input_ids[0, 4:].tolist()
    end = free[6]
    edit_json(folder / "generation_config.json", eos_token_id=[256, end])
    model = PMPDForCausalLM(folder).eval()
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(
        PROMPT, max_new_tokens=20, do_sample=False, pad_token_id=257
    )
    assert len(expected[0]) < 24, "transformers does not stop early: the test shows nothing"
    assert model.eos_token_ids == {256, end}
    assert torch.equal(model.generate(PROMPT, 20).input_ids, expected)


def test_the_fingerprint_knows_what_ends_a_sequence(dense_folder, tmp_path):
    folder = copied(dense_folder(), tmp_path)
    same = Checkpoint(folder).fingerprint()
    edit_json(folder / "generation_config.json", temperature=0.5)
    assert Checkpoint(folder).fingerprint() == same, "greedy tokens do not depend on it"
    edit_json(folder / "generation_config.json", eos_token_id=[256, 7])
    assert Checkpoint(folder).fingerprint() != same, "tokens depend on it"
    (folder / "generation_config.json").unlink()
    assert Checkpoint(folder).fingerprint() == same, "config.json says the same"


LONG_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "settings", "told"),
    [
        (
            "llama4_text",
            {
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_local_experts": 2,
                "intermediate_size": 96,
                "intermediate_size_mlp": 96,
            },
            "'llama4_text' are not supported with chunked attention",
        ),
        ("falcon", {}, "'falcon' are not supported with attention of their own"),
        ("mamba", {}, "'mamba' are not supported"),
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"]},
            r"'lfm2' are not supported with layers .* \(conv\)",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'llama' are not supported with rope type 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "with rope type 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG_FACTORS}},
            "with rope type 'longrope'",
        ),
        (
            "gemma3_text",
            {
                "num_key_value_heads": 2,
                "head_dim": 16,
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            "with rope type 'dynamic'",
        ),
    ],
)
def test_a_model_whose_rows_can_not_share_a_forward_is_refused_by_name(
    tmp_path, architecture, settings, told
):
    common = {
        key: value
        for key, value in ARCHITECTURES["opt"].items()
        if key not in ("ffn_dim", "word_embed_proj_dim")
    }
    config = AutoConfig.for_model(
        architecture, **{**common, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257, **settings}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        PMPDForCausalLM(tmp_path)


def test_an_encoder_is_refused_instead_of_being_masked(tmp_path):
    common = {key: value for key, value in ARCHITECTURES["llama"].items() if key != "num_key_value_heads"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **common)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertSelfAttention is not supported: tokens attend to later ones"):
        PMPDForCausalLM(tmp_path).eval().generate(PROMPT, 3)


# ------------------------------------------------------------------------------------------------------------


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_runs_only_where_that_was_asked_for(
    anyprec_folder, anyprec_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = copied(anyprec_folder(), tmp_path)
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n{CODE}"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(folder / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(
        ValueError, match=r"defined by code in the folder; read that code, then pass --trust-remote-code"
    ):
        PMPDForCausalLM(folder)
    assert not (tmp_path / "ran").exists()
    model = PMPDForCausalLM(folder, kernel="reference", trust_remote_code=True).eval()
    assert (tmp_path / "ran").exists()
    assert type(model.model).__name__ == "OwnForCausalLM"
    assert torch.equal(model.generate(PROMPT, 8).input_ids, anyprec_model().generate(PROMPT, 8).input_ids)


# ------------------------------------------------------------------------------------------------------------


def test_the_reference_kernel_keeps_dequantized_matrices_within_its_budget():
    tensors = quantize_evenly(torch.randn(16, 32), 2, 4)
    tables = {bits: tensors[f"lut{bits}"] for bits in (2, 3, 4)}
    size = 16 * 32 * 4
    budget = CacheBudget(2 * size)

    def matrix() -> ReferenceMatrix:
        return ReferenceMatrix(
            PackedWeights(planes=tensors["qweight"], tables=tables, bias=None), torch.float32, budget
        )

    one, other, x = matrix(), matrix(), torch.rand(1, 32)
    assert one.dequantize(4) is not one.dequantize(4), "only multiplications keep"
    for each in (one, other):
        each.multiply(x, 4)
    kept = one.dequantize(4), other.dequantize(4)
    assert one.dequantize(4) is kept[0]
    assert other.dequantize(4) is kept[1]
    assert budget.free_bytes == 0
    one.multiply(x, 2)
    assert one.dequantize(2) is not one.dequantize(2), "past the budget nothing is kept"
    assert torch.equal(one.dequantize(2), one.dequantize(2))
    del other, each
    assert budget.free_bytes == size, "a layer that goes gives back what it kept"
    one.multiply(x, 2)
    assert one.dequantize(2) is one.dequantize(2)
