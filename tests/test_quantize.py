"""A checkpoint goes in, an Any-Precision checkpoint comes out; interrupted anywhere, it goes on."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pmpd.cli.flags.quantize import QuantizeJob
from pmpd.cli.quantize import main
from pmpd.kernels import bitplanes
from pmpd.quantize import convert, stages, work
from pmpd.quantize.calibration import calibration_samples
from pmpd.quantize.config import MAX_BITS, MIN_BITS, QuantizeConfig
from pmpd.quantize.convert import quantize_checkpoint, split_samples
from pmpd.weights import anyprec, formats
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.hub import local_folder
from tests.helpers import byte_tokenizer, write_dense

TEXTS = [f"Text number {i}: the quick brown fox jumps over {i * 7} lazy dogs." for i in range(40)]
SMALL = QuantizeConfig(num_calibration_samples=9, calibration_length=24, tuning_steps=4)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = tensors_of(first), tensors_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 (biases, tied embeddings) in float16 with one float32 norm."""
    folder = write_dense(
        tmp_path_factory.mktemp("half"), "qwen2", num_hidden_layers=3, tie_word_embeddings=True
    )
    tensors = {name: tensor.half() for name, tensor in tensors_of(folder).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def quantized(half_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`half_folder`, quantized without a break."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    quantize_checkpoint(half_folder, folder, SMALL, TEXTS)
    return folder


def test_the_output_is_what_the_format_says(half_folder: Path, quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    settings = config.pop("anyprec")
    assert config == json.loads((half_folder / "config.json").read_text())
    modules = settings["arch_config"].pop("module_names")
    assert settings == {
        "seed_precision": 2, "parent_precision": 4, "group_count": 1,
        "arch_config": {"model_name": "model", "layers_name": "layers"},
    }  # fmt: skip
    assert len(modules) == 7
    source, written = tensors_of(half_folder), tensors_of(quantized)
    for layer in range(3):
        for module in modules:
            path = f"model.layers.{layer}.{module}"
            weight = source.pop(f"{path}.weight")
            rows, columns = weight.shape
            planes = written.pop(f"{path}.qweight")
            assert planes.dtype == torch.int32
            assert planes.shape == (4, rows, columns // 32)
            for bits in (2, 3, 4):
                table = written.pop(f"{path}.lut{bits}")
                assert table.dtype == torch.float16
                assert table.shape == (rows, 2**bits)
                codes = bitplanes.unpack(planes, bits).long()
                spread = weight.float().std()
                assert (weight - table.float().gather(1, codes)).abs().mean() < spread * (2.5 / 2**bits)
    assert source.keys() == written.keys(), "everything else keeps its name"
    assert all(
        torch.equal(source[name], written[name]) and source[name].dtype == written[name].dtype
        for name in source
    )
    assert (quantized / "tokenizer.json").read_bytes() == (half_folder / "tokenizer.json").read_bytes()
    assert not list(quantized.parent.glob(".*")), "the work folder is gone"


def test_more_bits_come_closer_to_the_unquantized_model(half_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(half_folder, tmp_path / "out", QuantizeConfig(parent_precision=8, weighted=False), [])
    model = formats.load(Checkpoint(tmp_path / "out"), range(2, 9), torch.float32, kernel="reference")[0]
    reference = AutoModelForCausalLM.from_pretrained(half_folder, dtype=torch.float32)
    tokens = torch.arange(40).unsqueeze(0)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, anyprec.AnyPrecisionLinear)
    }
    assert len(linears) == 21
    distances = []
    with torch.no_grad():
        expected = reference(tokens).logits
        for bits in (2, 4, 6, 8):
            next(iter(linears.values())).state.set_uniform(bits)
            distances.append(float((model(tokens).logits - expected).abs().mean() / expected.abs().mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.05


def test_calibration_samples_depend_on_the_seed_and_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    first = calibration_samples(iter(TEXTS), tokenizer, 5, 32, seed=1)
    assert torch.equal(first, calibration_samples(TEXTS, tokenizer, 5, 32, seed=1))
    assert not torch.equal(first, calibration_samples(TEXTS, tokenizer, 5, 32, seed=2))
    assert (first == tokenizer.eos_token_id).any(), "texts are told apart"
    short = calibration_samples(["abc"], tokenizer, 5, 32, seed=1)
    assert short.shape == (1, 4), "as many tokens as there are"
    with pytest.raises(ValueError, match="1 calibration texts hold 1 tokens"):
        calibration_samples([""], tokenizer, 5, 32, seed=1)


@pytest.mark.slow
def test_layers_in_groups_give_the_same_result(half_folder: Path, quantized: Path, tmp_path: Path) -> None:
    """Little memory for the moments means more passes over the samples, not another result."""
    steps = []
    quantize_checkpoint(
        half_folder,
        tmp_path / "out",
        SMALL,
        TEXTS,
        moments_bytes=1,
        on_progress=lambda *step: steps.append(step),
    )
    assert same(tmp_path / "out", quantized)
    assert [step for step in steps if step[0] == "inputs"][-1] == ("inputs", 27, 27)
    assert [step for step in steps if step[0] == "layers"][-1] == ("layers", 3, 3)
    assert [step for step in steps if step[0] == "validation"] == [("validation", n, 8) for n in range(1, 9)]


@pytest.mark.slow
def test_a_run_killed_between_layers_goes_on(half_folder: Path, quantized: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pmpd.quantize import work\n"
        "from pmpd.quantize.convert import quantize_checkpoint\n"
        "from tests.test_quantize import SMALL, TEXTS\n"
        "work.SECONDS_PER_SAVE, work.SAVE_SHARE = 0, float('inf')\n"  # reading the texts takes no time here
        "def die(stage, done, total):\n"
        "    if (stage, done) == ('layers', 2): os.kill(os.getpid(), signal.SIGKILL)\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], SMALL, TEXTS, on_progress=die)\n"
    )
    output = tmp_path / "out"
    root = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", program, str(half_folder), str(output)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists(), "no output before all of it is there"
    (folder,) = tmp_path.glob(".out.work-*")
    assert sorted(path.name for path in folder.glob("layer-*")) == [
        "layer-00000.safetensors",
        "layer-00001.safetensors",
    ]
    (folder / "layer-00001.safetensors").write_bytes(b"half a file")  # what a full disk may leave
    spent = json.loads((folder / "stage-seconds.json").read_text())[1]
    steps = []
    summary = quantize_checkpoint(
        half_folder, output, SMALL, TEXTS, on_progress=lambda *step: steps.append(step)
    )
    assert summary.reused_layers == 1
    assert summary.processor_seconds > spent > 0, "what the killed run took counts"
    assert [step[1:] for step in steps if step[0] == "layers"] == [(2, 3), (3, 3)]
    assert not [step for step in steps if step[0] == "inputs"], "they were measured before the stop"
    assert same(output, quantized)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("where", "next_steps"),
    [(("inputs", 8), [("inputs", 9, 9)]), (("tuning", 2), [("tuning", 3, 4), ("tuning", 4, 4)])],
)
def test_a_run_goes_on_behind_the_last_group_of_texts_or_tuning_step(
    half_folder: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[str, int],
    next_steps: list,
) -> None:
    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == where:
            raise Stopped

    monkeypatch.setattr(work, "SECONDS_PER_SAVE", 0.0)
    monkeypatch.setattr(work, "SAVE_SHARE", math.inf)
    with pytest.raises(Stopped):
        quantize_checkpoint(half_folder, tmp_path / "out", SMALL, TEXTS, on_progress=stop)
    steps = []
    quantize_checkpoint(
        half_folder, tmp_path / "out", SMALL, TEXTS, on_progress=lambda *step: steps.append(step)
    )
    assert [step for step in steps if step[0] == where[0]] == next_steps
    assert same(tmp_path / "out", quantized)


def test_seconds_count_once_for_the_innermost_stage_over_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(work.time, "monotonic", lambda: now)
    clock = work.Clock("preparing")
    folder = work.WorkFolder(tmp_path, clock)
    now += 1
    with clock.stage("inputs"):
        now += 2
        with clock.stage("loading"):
            now += 4
        now += 8
    folder.save("a", {"a": torch.ones(2)})
    now += 16  # of a run that is killed: not known
    again = work.Clock("preparing")
    work.WorkFolder(tmp_path, again)
    now += 32
    assert again.read()[0] == {"preparing": 33, "inputs": 10, "loading": 4}
    assert clock.read()[0] == {"preparing": 49, "inputs": 10, "loading": 4}


def test_writing_unfinished_work_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = 0.0, []
    monkeypatch.setattr(work.time, "monotonic", lambda: now)

    class Disk:
        def save(self, name: str, tensors: dict[str, torch.Tensor], meta: object) -> None:
            nonlocal now
            written.append(now)
            now += seconds

    def run(tensors: dict[str, torch.Tensor], until: float) -> list[float]:
        nonlocal now
        saves, begin = work.Saves(Disk(), "moments"), now  # type: ignore[arg-type]
        written.clear()
        while now < begin + until:
            now += 1
            saves.offer(tensors, None)
        return [at - begin for at in written]

    seconds = 0.1
    assert run({"a": torch.ones(2)}, 70) == pytest.approx([20, 40.1, 60.2], abs=1.1), "what is small: often"
    seconds = 6.0
    large = {"a": torch.empty(6 * 10**9, dtype=torch.uint8, device="meta")}
    assert run(large, 140) == pytest.approx([60, 126], abs=1.1)
    seconds = 20.0  # a disk slower than any guess
    assert run(large, 400) == pytest.approx([60, 280], abs=1.1)


def test_a_gpu_measures_as_many_layers_at_once_as_its_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(device: str, free: int, asked: int | None = None) -> int:
        monkeypatch.setattr(stages.gpu, "free_bytes", lambda device: free)
        run = SimpleNamespace(
            moments_bytes=asked, device=torch.device(device), samples=1, loaded=lambda: loaded.append(1)
        )
        return stages.Stages._moments_bytes(run)  # type: ignore[arg-type]

    loaded: list[int] = []
    assert room("cpu", 2**40) == room("cuda", 2**30) == 4 * 2**30
    assert loaded == [1], "what is free beside the model"
    assert room("cuda", 120 * 2**30) == 40 * 2**30
    assert room("cuda", 120 * 2**30, 7) == room("cpu", 2**40, 7) == 7


def test_moments_of_other_groups_of_layers_are_not_taken_up(
    half_folder: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many layers are measured at once depends on what memory is free: not the same in the next run."""

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("inputs", 8):
            raise Stopped

    monkeypatch.setattr(work, "SECONDS_PER_SAVE", 0.0)
    monkeypatch.setattr(work, "SAVE_SHARE", math.inf)
    with pytest.raises(Stopped):
        quantize_checkpoint(half_folder, tmp_path / "out", SMALL, TEXTS, moments_bytes=1, on_progress=stop)
    steps = []
    quantize_checkpoint(
        half_folder, tmp_path / "out", SMALL, TEXTS, on_progress=lambda *step: steps.append(step)
    )
    assert next(step for step in steps if step[0] == "inputs") == ("inputs", 1, 9)
    assert same(tmp_path / "out", quantized)


def test_the_manifest_says_what_each_precision_is_worth(quantized: Path) -> None:
    manifest = json.loads((quantized / "manifest.json").read_text())
    found = manifest["perplexity"]
    assert sorted(found, key=int) == ["2", "3", "4", "16"]
    assert abs(found["4"] / found["16"] - 1) < abs(found["2"] / found["16"] - 1)
    assert {bits: len(steps) for bits, steps in manifest["divergence"].items()} == {"2": 4, "3": 2, "4": 1}
    assert manifest["processor_seconds"] > 0
    seconds = manifest["stage_seconds"]
    assert sorted(seconds) == [
        "inputs", "layers", "loading", "preparing", "tuning", "validation", "writing"
    ]  # fmt: skip
    assert sum(seconds.values()) == pytest.approx(manifest["seconds"], abs=0.5)
    assert manifest["peak_bytes"] > manifest["source_bytes"]
    assert manifest["divergence"]["4"][0] < manifest["divergence"]["3"][0] < manifest["divergence"]["2"][0]
    assert manifest["relative_error"]["4"] < manifest["relative_error"]["3"] < manifest["relative_error"]["2"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_worth_the_same_on_a_gpu(
    half_folder: Path, quantized: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    here = json.loads((quantized / "manifest.json").read_text())
    there = quantize_checkpoint(
        half_folder, tmp_path / "out", SMALL, TEXTS, device=torch.device("cuda"), dtype=dtype
    )
    for bits, error in here["relative_error"].items():
        assert there.relative_error[bits] == pytest.approx(error, rel=0.1)
    for bits, value in here["perplexity"].items():
        assert there.perplexity[bits] == pytest.approx(value, rel=0.1)


def test_texts_of_validation_are_used_for_nothing_else() -> None:
    pieces = torch.arange(20 * 6).view(20, 6)
    parts = split_samples(pieces, 10, 5)
    fitted = {*parts.inputs.flatten().tolist(), *parts.tuning.flatten().tolist()}
    assert len(parts.validation) == 4
    assert not fitted & set(parts.validation.flatten().tolist())
    assert not set(parts.inputs.flatten().tolist()) & set(parts.tuning.flatten().tolist())
    assert (len(parts.inputs), parts.tuning.shape) == (10, (5, 3))
    short = split_samples(pieces[:3], 10, 20)
    assert (len(short.inputs), len(short.tuning), len(short.validation)) == (3, 20, 0)
    assert not len(split_samples(pieces, 10, 0).tuning)


def test_the_light_config_allows_what_the_format_holds() -> None:
    assert (MIN_BITS, MAX_BITS) == (bitplanes.MIN_BITS, bitplanes.MAX_BITS)
    code = "import sys, pmpd.cli.quantize, pmpd.cli.perplexity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def test_other_settings_do_not_take_up_an_unfinished_run(
    half_folder: Path, quantized: Path, tmp_path: Path
) -> None:
    samples = split_samples(torch.zeros(8, 4, dtype=torch.int64), 2, 4)
    others = split_samples(torch.ones(8, 4, dtype=torch.int64), 2, 4)
    config, checkpoint = QuantizeConfig(), Checkpoint(half_folder)
    layers = {
        convert._layers_fingerprint(checkpoint, config, None),
        convert._layers_fingerprint(checkpoint, config, samples.inputs),
        convert._layers_fingerprint(checkpoint, config, others.inputs),
        convert._layers_fingerprint(checkpoint, QuantizeConfig(parent_precision=3), None),
        convert._layers_fingerprint(Checkpoint(quantized), config, None),
    }
    assert len(layers) == 5
    whole = {
        convert._fingerprint("layers", config, None),
        convert._fingerprint("others", config, None),
        convert._fingerprint("layers", config, samples),
        convert._fingerprint("layers", config, others),
        convert._fingerprint("layers", QuantizeConfig(tuning_rate=0.01), samples),
    }
    assert len(whole) == 5


def test_other_tuning_takes_up_the_same_layers(half_folder: Path, quantized: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tuning":
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint(
            half_folder, tmp_path / "out", replace(SMALL, tuning_rate=0.3), TEXTS, on_progress=stop
        )
    seen = []
    quantize_checkpoint(
        half_folder, tmp_path / "out", SMALL, TEXTS, on_progress=lambda stage, *_: seen.append(stage)
    )
    assert not {"inputs", "layers"} & set(seen)
    assert same(tmp_path / "out", quantized)


def test_a_finished_folder_is_returned_and_a_foreign_one_is_left_alone(
    half_folder: Path, quantized: Path, tmp_path: Path
) -> None:
    before = (quantized / "model.safetensors").stat().st_mtime_ns
    assert quantize_checkpoint(half_folder, quantized, SMALL, TEXTS).relative_error
    with pytest.raises(ValueError, match="holds something else"):
        quantize_checkpoint(half_folder, quantized, QuantizeConfig(weighted=False), [])
    assert (quantized / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        quantize_checkpoint(half_folder, tmp_path, SMALL, TEXTS)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_keeps_what_is_finished(
    half_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.save_file

    def full(tensors, path, metadata=None):
        if "layer-00002" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(work, "save_file", full)
    with pytest.raises(
        OSError, match=r"No space left on device.*finished layers are kept in .*run the same command again"
    ):
        quantize_checkpoint(half_folder, tmp_path / "out", QuantizeConfig(weighted=False), [])
    monkeypatch.undo()
    assert (
        quantize_checkpoint(half_folder, tmp_path / "out", QuantizeConfig(weighted=False), []).reused_layers
        == 2
    )


def test_pickled_and_odd_sized_checkpoints(tmp_path: Path) -> None:
    """A `pytorch_model.bin` is read too; linears of a width the format can't hold stay as they are."""
    folder = write_dense(tmp_path / "in", "llama", intermediate_size=80, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    torch.save(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()
    summary = quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig(weighted=False), [])
    assert summary.skipped == {"mlp.down_proj": "in_features 80 is no multiple of 32"}
    written = tensors_of(tmp_path / "out")
    assert torch.equal(
        written["model.layers.1.mlp.down_proj.weight"], tensors["model.layers.1.mlp.down_proj.weight"]
    )
    assert ("lm_head.weight" in written) != ("model.embed_tokens.weight" in written), (
        "a tied tensor is stored once"
    )


def test_bad_input_is_refused_with_a_cure(
    half_folder: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="quantized already"):
        quantize_checkpoint(quantized, tmp_path / "out", SMALL, TEXTS)
    with pytest.raises(ValueError, match="give at most as many"):
        quantize_checkpoint(half_folder, tmp_path / "out", QuantizeConfig(calibration_length=100_000), TEXTS)
    with pytest.raises(ValueError, match="allowed are"):
        QuantizeConfig(parent_precision=9)
    with pytest.raises(ValueError, match="is above parent precision"):
        QuantizeConfig(seed_precision=4, parent_precision=3)
    with pytest.raises(ValueError, match="--num-calibration-samples 0"):
        QuantizeConfig(num_calibration_samples=0)
    with pytest.raises(ValueError, match=r"--model-path \./no/such: no such folder"):
        local_folder("./no/such")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"--model-path no/such: no such folder, and not to be had .*no network"
    ):
        local_folder("no/such")
    damaged = shutil.copytree(half_folder, tmp_path / "damaged")
    tensors = tensors_of(half_folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.mlp\.up_proj\.weight is missing.*layers\.2\.mlp\.up_proj\.weight has shape \[3, "
        r"3\]",
    ):
        quantize_checkpoint(damaged, tmp_path / "out", SMALL, TEXTS)
    tensors = tensors_of(half_folder)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: weights hold NaN"):
        quantize_checkpoint(damaged, tmp_path / "out", QuantizeConfig(weighted=False), [])
    with pytest.raises(ValueError, match="is not finite on a calibration text"):
        quantize_checkpoint(damaged, tmp_path / "out", SMALL, TEXTS)
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_downloaded_with_pickles_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(model_id: str, allow_patterns: list[str], revision: str | None) -> str:
        assert revision is None
        asked.append((model_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("owner/name") == tmp_path
    assert [patterns for _, patterns in asked][1:] == [["pytorch_model*"]]
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    assert local_folder("owner/name") == tmp_path
    assert len(asked) == 1
    assert "*.safetensors" in asked[0][1]


@pytest.mark.slow
def test_the_job_says_what_it_wrote_and_what_comes_next(half_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    output = tmp_path / "out"
    text = io.StringIO()
    config = QuantizeJob(
        model_path=str(half_folder), output_dir=str(output), dataset=str(tmp_path / "texts.txt"),
        num_calibration_samples=9, calibration_length=16, tuning_steps=2,
    )  # fmt: skip
    summary = main(config, Console(file=text, width=200))
    printed = text.getvalue()
    assert all(f"{error:.6f}" in printed for error in summary.relative_error.values())
    assert summary.relative_error["4"] < summary.relative_error["3"] < summary.relative_error["2"] < 0.3
    assert all(f"{value:,.2f}" in printed for value in summary.perplexity.values())
    assert "seconds by stage: preparing " in printed
    assert "layers quantized: 3/3" in printed, "progress where there is no terminal"
    assert "already" not in printed
    assert f"pmpd label --model-path {output} --reference-model-path {config.model_path} " in printed
    assert f"{summary.model_bytes / 1e6:.2f} MB" in printed
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["stage_seconds"]  # as of an older version
    (output / "manifest.json").write_text(json.dumps(manifest))
    text.truncate(0)
    main(config, Console(file=text, width=200))
    assert "wrote" in text.getvalue()
    assert f"{output} is finished already" in text.getvalue()
    assert "by stage" not in text.getvalue()
    with pytest.raises(ValueError, match="no such file or folder"):
        main(QuantizeJob(model_path=str(half_folder), output_dir=str(output), dataset="./missing.txt"))
