"""Which kernels multiply on this machine, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pmpd import gpu, plugins
from pmpd.cli.flags.kernels import KernelsJob
from pmpd.kernels import dispatch, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(job: KernelsJob) -> None:
    plugins.load(job.plugins)
    _explain("cpu", *DTYPES)
    print(f"native CPU library: {_say(native.describe)}; torch uses {torch.get_num_threads()} threads")
    if gpu.available():
        _explain("cuda", torch.float16, torch.bfloat16, torch.float32)
    else:
        print("cuda: no device, or a torch without CUDA")
    device = torch.device("cuda" if gpu.available() else "cpu")
    print(f"--kernel can ask for, on this machine's {device}:")
    for name, kernel in dispatch.KERNELS.items():
        print(f"  {name:{max(map(len, dispatch.KERNELS))}}  {_usable(kernel, device)}")


def _usable(kernel: dispatch.Kernel, device: torch.device) -> str:
    """The dtypes that it computes in there, and why not in the others."""
    problems = {str(dtype).removeprefix("torch."): kernel.unavailable(device, dtype) for dtype in DTYPES}
    good = ", ".join(name for name, problem in problems.items() if not problem)
    if not good:
        return f"no: {problems['bfloat16']}"
    reasons = "; ".join(dict.fromkeys(problem for problem in problems.values() if problem))
    return good + f" (else: {reasons})" * bool(reasons)


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
