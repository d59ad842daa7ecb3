"""A model's fingerprint covers every byte of its weights, and is not computed twice for a file that stayed as
it was."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmpd.weights import fingerprint
from pmpd.weights.checkpoint import Checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "pmpd" / "fingerprints"


@pytest.fixture
def hashed(monkeypatch) -> list[torch.Size]:
    """Shapes of the tensors that are hashed, in order."""
    calls: list[torch.Size] = []
    digest = fingerprint._digest

    def count(tensor, pool):
        calls.append(tensor.shape)
        return digest(tensor, pool)

    monkeypatch.setattr(fingerprint, "_digest", count)
    return calls


def test_one_changed_element_changes_it_wherever_it_is(dense_folder, tmp_path, cache):
    folder = shutil.copytree(dense_folder(), tmp_path / "copy")
    file = folder / "model.safetensors"
    first, tensors = Checkpoint(folder).fingerprint(), load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    for index in (1, tensors[name].numel() - 2):
        changed = tensors[name].clone()
        changed.view(-1)[index] += 1
        save_file({**tensors, name: changed}, file, {"format": "pt"})
        assert Checkpoint(folder).fingerprint() != first
    save_file(tensors, file, {"format": "pt"})
    assert Checkpoint(folder).fingerprint() == first, "the same bytes again"


def test_a_file_that_stayed_as_it_was_is_hashed_once(dense_folder, tmp_path, cache, hashed):
    folder = shutil.copytree(dense_folder(), tmp_path / "copy")
    first = Checkpoint(folder).fingerprint()
    assert hashed
    hashed.clear()
    assert Checkpoint(folder).fingerprint() == first
    assert not hashed
    file = folder / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same mtime: ctime gives it away
    assert Checkpoint(folder).fingerprint() != first
    assert hashed


def test_a_file_that_was_just_written_is_not_remembered(dense_folder, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 3600.0)
    folder = shutil.copytree(dense_folder(), tmp_path / "copy")
    Checkpoint(folder).fingerprint()
    assert not list(cache.glob("*")), f"the clock is {time.time()}"


@pytest.mark.parametrize("damage", ["", "[]", '{"tensors": 1}', '{"state": [1], "tensors": {}}'])
def test_a_damaged_cache_and_one_that_can_not_be_written_cost_time_only(
    dense_folder, tmp_path, cache, damage, monkeypatch
):
    folder = shutil.copytree(dense_folder(), tmp_path / "copy")
    first = Checkpoint(folder).fingerprint()
    (entry,) = cache.glob("*")
    entry.write_text(damage)
    assert Checkpoint(folder).fingerprint() == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert Checkpoint(folder).fingerprint() == first
