"""How a worker gets its model."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.farm.worker import Place


@dataclass(frozen=True)
class ModelSource:
    """How a worker gets its model."""

    path: str
    precisions: tuple[int, ...] | None = None
    kernel: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if os.path.exists(
            self.path
        ):  # a worker's working directory may be another; a Hugging Face id stays as it is
            object.__setattr__(self, "path", os.path.abspath(self.path))

    def load(self, place: Place) -> tuple[Any, str]:
        """The model on the worker's device, and that device's name. Where Ray gives out GPUs that torch does
        not see, the CPU."""
        import torch

        from pmpd.model import PMPDForCausalLM
        from pmpd.quantize.convert import local_folder
        from pmpd.weights.base import compute_dtype

        torch.set_num_threads(place.threads)
        device = torch.device("cuda" if place.gpu_ids and torch.cuda.is_available() else "cpu")
        model = PMPDForCausalLM(
            local_folder(self.path),
            self.precisions,
            dtype=compute_dtype(device),
            kernel=self.kernel,
            trust_remote_code=self.trust_remote_code,
        ).eval()
        return model.to(device), torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
