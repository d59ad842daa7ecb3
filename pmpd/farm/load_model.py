"""How a worker gets its model: the command's spec, and the place that the worker has."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

from pmpd.farm.task import Place
from pmpd.weights.model_spec import ModelSpec


def load_model(spec: ModelSpec, place: Place) -> tuple[Any, str]:
    """The model on the worker's device, and that device's name. Where Ray gives out GPUs that torch does not
    see, the CPU."""
    import torch

    from pmpd.model import PMPDForCausalLM

    torch.set_num_threads(place.threads)
    device = torch.device("cuda" if place.gpu_ids and torch.cuda.is_available() else "cpu")
    model = PMPDForCausalLM.from_spec(spec, device).eval()
    return model, torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
