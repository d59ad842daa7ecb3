from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import tests.ray_sessions  # noqa: F401 - one authentication mode for all of the process
from pmpd import PMPDForCausalLM
from tests.helpers import write_anyprec, write_dense

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module", autouse=True)
def no_ray_stays() -> Iterator[None]:
    """A file that leaves a Ray behind fails itself, not the next one that starts one."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("this file left a Ray connected: end it with ray.shutdown()")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """architecture -> folder of a random unquantized checkpoint (made once)."""
    return cache(
        lambda architecture="llama": write_dense(
            tmp_path_factory.mktemp(f"dense-{architecture}"), architecture
        )
    )


@pytest.fixture(scope="session")
def anyprec_folder(tmp_path_factory, dense_folder):
    """architecture -> folder of its Any-Precision checkpoint, precisions 2 to 4 (made once)."""

    def make(architecture: str = "llama") -> Path:
        folder = tmp_path_factory.mktemp(f"anyprec-{architecture}")
        return write_anyprec(folder, dense_folder(architecture), architecture=architecture)

    return cache(make)


@pytest.fixture(scope="session")
def anyprec_model(anyprec_folder):
    """architecture -> the loaded model, reference kernel (so that engine and oracle multiply alike)."""
    return cache(
        lambda architecture="llama": PMPDForCausalLM(anyprec_folder(architecture), kernel="reference").eval()
    )
