"""Which kernels multiply on this machine, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pmpd import gpu, plugins
from pmpd.cli.flags.kernels import KernelsJob
from pmpd.kernels import dispatch, native


def main(job: KernelsJob) -> None:
    plugins.load(job.plugins)
    _explain("cpu", torch.float32, torch.bfloat16, torch.float16)
    print(f"native CPU library: {_say(native.describe)}; torch uses {torch.get_num_threads()} threads")
    if gpu.available():
        _explain("cuda", torch.float16, torch.bfloat16, torch.float32)
    else:
        print("cuda: no device, or a torch without CUDA")


def _explain(device: str, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        print(
            f"{device:5} {str(dtype).removeprefix('torch.'):9} "
            f"{_say(dispatch.explain, torch.device(device), dtype)}"
        )


def _say(tell: Callable[..., str], *what: Any) -> str:
    """What `tell` says of `what`, or why it can't: this page is for finding out what is wrong with the
    settings."""
    try:
        return tell(*what)
    except ValueError as error:
        return f"error: {error}"
