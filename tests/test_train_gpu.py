"""Training and the learned scheduler on a CUDA device (`pytest -m gpu`); what they hold and decide, on a CPU
too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pmpd.schedulers.base import PrefillState
from pmpd.schedulers.kv_cache import KVCacheScheduler
from pmpd.training.fit import TrainState, train

from .test_training import CONFIG, made_up

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
)


def tensors(value) -> list[Tensor]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if isinstance(value, Tensor) else [tensor for part in parts for tensor in tensors(part)]


@on_each_device
def test_a_checkpoint_holds_its_tensors_on_the_cpu_and_goes_on_on_the_device(device):
    labels, features = made_up()
    states = []

    def keep(state, line):
        if (line["head"], line["pair"], line["epoch"]) == ("kv_cache", "4-3", 3):
            states.append(state.to_plain())

    whole = train(labels, features, 2, CONFIG, on_epoch=keep, device=device, heads=["kv_cache"])
    held = tensors(states[0])
    assert len(held) > 20
    assert {tensor.device.type for tensor in held} == {"cpu"}, "a driver without a GPU can't read these"
    state = TrainState.from_plain(states[0])
    resumed = train(labels, features, 2, CONFIG, state=state, device=device, heads=["kv_cache"])
    for name, logits in whole.logits.items():
        torch.testing.assert_close(resumed.logits[name], logits, rtol=1e-2, atol=1e-2)


@on_each_device
def test_the_learned_scheduler_waits_for_the_device_once(device):
    """Deciding must not cost a transfer per row or pair: only the one copy of all scores to the host
    waits."""
    scheduler = KVCacheScheduler([4, 3, 2])
    config = scheduler.artefact.config
    lengths = torch.tensor([5, 40, 17], device=device)
    keys, values = torch.randn(2, 3, 40, config.dim, device=device)
    state = PrefillState(
        [f"{i:016x}" for i in range(3)], [256] * 3, [5, 40, 17], lambda: (keys, values, lengths)
    )
    first = scheduler.begin(state)  # moves the classifiers to the device
    waits = []
    to_host = Tensor.cpu

    def other_waits(are: str) -> None:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(are)

    def copy_of(tensor):
        other_waits("default")
        waits.append(tuple(tensor.shape))
        return to_host(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", copy_of)
        other_waits("error")
        try:
            again = scheduler.begin(state)
        finally:
            other_waits("default")
    assert waits == [(3, 2, 4)]
    assert np.array_equal(first.switch_steps, again.switch_steps)
