"""A model spec says which model, and loads the same one wherever it is taken to."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmpd import PMPDForCausalLM
from pmpd.errors import UserError
from pmpd.farm.load_model import load_model
from pmpd.farm.task import Place
from pmpd.weights.byte_head import byte_head_unavailable
from pmpd.weights.model_spec import ModelSpec, check_held, shared_tokenizer
from tests.helpers import write_dense
from tests.test_checkpoint import copied

PROMPT = torch.tensor([[5, 66, 7, 201]])
PLACE = Place("here", 2)
NO_BYTE_HEAD = byte_head_unavailable(torch.bfloat16, torch.device("cpu"))


def test_a_worker_elsewhere_loads_the_model_that_the_command_opened(anyprec_folder, monkeypatch, tmp_path):
    folder = anyprec_folder()
    monkeypatch.chdir(folder.parent)
    spec = ModelSpec(folder.name, precisions=(4, 2), kernel="reference")
    sent = pickle.dumps(spec)
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(pickle.loads(sent), PLACE)
    assert model.precisions == (4, 2)
    assert model.fingerprint == spec.open().fingerprint()
    expected = PMPDForCausalLM(folder, kernel="reference").eval()
    for bits in (4, 2):
        found = model.generate(PROMPT, 8, bits).input_ids
        assert torch.equal(found, expected.generate(PROMPT, 8, bits).input_ids)


def test_a_spec_is_known_without_torch():
    """A command's flags are parsed before anything heavy is imported."""
    code = "import sys; import pmpd.weights.model_spec; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def test_a_checkpoint_is_opened_without_the_code_of_models(anyprec_folder):
    """A command asks what a checkpoint holds; to import transformers' models is for workers."""
    code = (
        "import sys; from pmpd.weights.model_spec import ModelSpec, check_held;"
        f"spec = ModelSpec({str(anyprec_folder('llama'))!r}, False, (4, 3)); opened = spec.open();"
        "check_held(opened, spec.path, {'--precisions': (4, 3)}); opened.config(); opened.fingerprint();"
        "assert 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_are_what_dtype_says(anyprec_folder, dtype):
    model, _ = load_model(ModelSpec(str(anyprec_folder()), dtype=dtype), PLACE)
    assert next(model.model.parameters()).dtype == getattr(torch, dtype)
    assert len(model.generate(PROMPT, 4, 3).input_ids[0]) == 8


def test_an_unknown_dtype_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"--dtype fp8: choose one of auto, float32, bfloat16, float16"):
        ModelSpec("model", dtype="fp8")  # type: ignore[arg-type]


def test_overflow_of_float16_is_an_error_that_names_the_cure_and_bfloat16_is_one(dense_folder, tmp_path):
    folder = copied(dense_folder(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.down_proj.weight"):
            tensors[name] *= 3e4  # finite as float16, its products are not
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    half, _ = load_model(ModelSpec(str(folder), dtype="float16"), PLACE)
    with pytest.raises(ValueError, match=r"not finite in float16.* as bfloat16 or float32 \(--dtype"):
        half.generate(PROMPT, 4)
    model, _ = load_model(ModelSpec(str(folder), dtype="bfloat16"), PLACE)
    assert len(model.generate(PROMPT, 4).input_ids[0]) == 8


def test_precisions_and_tokenizers_that_do_not_fit_are_refused(anyprec_folder, tmp_path):
    checkpoint = ModelSpec(str(anyprec_folder())).open()
    check_held(checkpoint, "model", {"--precisions": (4, 3), "--prefill-bit": ()})
    with pytest.raises(ValueError, match=r"--prefill-bit 8: model holds 4, 3, 2, not 8"):
        check_held(checkpoint, "model", {"--precisions": (4, 3), "--prefill-bit": (8,)})
    other = write_dense(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model: an unquantized model; .*pmpd quantize --model-path model`"):
        check_held(ModelSpec(str(other)).open(), "model", {"--precisions": (4, 3)})
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<pad>"', '"<filler>"'))
    (other / "tokenizer_config.json").write_text(
        (other / "tokenizer_config.json").read_text().replace('"<pad>"', '"<filler>"')
    )
    with pytest.raises(ValueError, match="have different tokenizers; give two checkpoints of one model"):
        shared_tokenizer([checkpoint, ModelSpec(str(other)).open()])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "--head-bits 8 with --dtype float32: .* add --dtype bfloat16"),
        ({"dtype": "bfloat16", "kernel": "reference"}, "--head-bits 8 with --kernel reference: .* leave"),
        ({"dtype": "bfloat16", "head_bits": 4}, "--head-bits 4: a head has 16 bits or 8"),
    ],
)
def test_a_head_of_8_bits_is_refused_where_it_can_not_be(options, reason):
    with pytest.raises(UserError, match=reason):
        ModelSpec("model", **{"head_bits": 8, **options})


@pytest.mark.parametrize(
    ("dtype", "device", "kernel", "reason"),
    [
        ("auto", "cpu", None, r"this is float32 \(--dtype bfloat16\)"),
        ("float16", "cpu", None, r"this is float16 \(--dtype bfloat16\)"),
        ("bfloat16", "cuda", "cpu", "on cuda it goes with kernel triton, cuda or dense, and kernel cpu"),
    ],
)
def test_a_head_of_8_bits_is_refused_before_a_model_is_loaded_for_its_device(dtype, device, kernel, reason):
    spec = ModelSpec("nowhere", dtype=dtype, kernel=kernel, head_bits=8)
    with pytest.raises(UserError, match=f"--head-bits 8: .*{reason}"):
        PMPDForCausalLM.from_spec(spec, torch.device(device))


@pytest.mark.skipif(bool(NO_BYTE_HEAD), reason=str(NO_BYTE_HEAD))
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_head_of_8_bits_is_near_that_of_16_wherever_the_model_decodes(anyprec_folder, architecture):
    """With the modules' own forward and with the engine's, recognised tree or not."""
    folder = anyprec_folder(architecture)
    models = [PMPDForCausalLM(folder, dtype=torch.bfloat16, head_bits=bits).eval() for bits in (16, 8)]
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        first, second = (model.model(input_ids=ids, use_cache=False).logits.float() for model in models)
    error = float((second - first).norm() / first.norm())
    assert 0 < error < 0.02
    assert int(models[1].generate(PROMPT, 8).new_token[0]) >= 1
    models[1].float()
    with pytest.raises(UserError, match=r"head of 8 bits: .* this is float32"):
        models[1].generate(PROMPT, 8)
