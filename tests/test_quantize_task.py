"""`pmpd quantize` as a farm task: what another worker finds finished, it does not do again."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pmpd.cli.flags.quantize import QuantizeJob
from pmpd.cli.quantize import main
from pmpd.errors import UserError
from pmpd.farm import FarmOptions
from pmpd.farm.quantize_task import QuantizeTask, quantize_on_farm
from pmpd.labeling.prompts import PromptConfig
from pmpd.quantize import stages
from pmpd.quantize.config import QuantizeConfig
from pmpd.quantize.work import Clock, WorkFolder
from tests.ray_sessions import local_ray

SETTINGS = QuantizeConfig(2, 3, num_calibration_samples=2, calibration_length=16, tuning_steps=0)
TEXTS = PromptConfig("demo", split="train")


@pytest.fixture
def task(dense_folder, tmp_path):
    return QuantizeTask(str(dense_folder()), str(tmp_path / "farm" / "anyprec"), SETTINGS, TEXTS)


def test_the_farm_writes_what_one_process_does_and_goes_on_after_an_error(
    task, dense_folder, tmp_path, monkeypatch
):
    real = stages.Stages._quantize_layer

    def fail(self, layer, *given):
        if layer == 1:
            raise UserError("this layer is bad\nand a page about it")
        real(self, layer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "_quantize_layer", fail)
        with pytest.raises(UserError, match=r"this layer is bad$"):
            quantize_on_farm(task, FarmOptions(0, retry_errors=True))
    summary = quantize_on_farm(task, FarmOptions(0, retry_errors=True))
    assert summary.reused_layers == 1
    assert [path.name for path in Path(task.output).parent.iterdir()] == ["anyprec"], "nothing is left"
    plain = QuantizeTask(task.model_path, str(tmp_path / "plain"), SETTINGS, TEXTS).quantize(
        "cpu", lambda *_: None
    )
    assert plain.fingerprint == summary.fingerprint
    one, other = (
        load_file(Path(folder) / "model.safetensors") for folder in (task.output, tmp_path / "plain")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_work_folder_is_found_on_another_machine(tmp_path):
    copy = f"file://{tmp_path}/store"
    first = WorkFolder(tmp_path / "one", Clock("preparing"), copy)
    first.save("layer", {"a": torch.ones(2)}, {"step": 1})
    first.save("gone", {"a": torch.ones(2)})
    first.remove("gone")
    second = WorkFolder(tmp_path / "two", Clock("preparing"), copy)
    assert second.meta("layer") == {"step": 1}
    assert not second.has("gone")
    second.discard()
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "store").exists()


def workers() -> list[int]:
    """Processes of the farm's workers in a Ray that this process started."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = stat.read_text().split(" (", 1)
            names[int(pid)], _, fields = rest.rpartition(") ")
            parents[int(pid)] = int(fields.split()[1])

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith("ray::Worker") and ours(pid)]


@pytest.mark.slow
def test_another_worker_goes_on_where_one_was_killed(task, dense_folder, tmp_path):
    job = QuantizeJob(
        seed_precision=2, parent_precision=4, num_calibration_samples=8, calibration_length=64,
        tuning_steps=6, gpus_per_worker=0, model_path=task.model_path, output_dir=str(tmp_path / "anyprec"),
    )  # fmt: skip
    killed: list[int] = []

    def kill() -> None:
        while not list(tmp_path.glob(".anyprec.work-*/layer-*.safetensors")):
            time.sleep(0.01)
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    with local_ray(num_cpus=2):
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        summary = main(job, Console(quiet=True))
        thread.join()
    assert len(killed) == 1
    assert summary.reused_layers >= 1
    assert summary.perplexity
    assert [path.name for path in tmp_path.glob(".anyprec*")] == []
