"""Everything that is asked of the CUDA runtime, in one place: a test on a CPU puts a stand-in here
(`monkeypatch.setattr(cuda, ...)`)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache

import torch

from pmpd.errors import UserError


def available() -> bool:
    """Whether there is a device, and a torch that can use it."""
    return torch.cuda.is_available()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, e.g. (9, 0)."""
    return torch.cuda.get_device_capability(device)


def shared_memory(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors, the most shared memory of one block, and that of a multiprocessor, in bytes."""
    found = torch.cuda.get_device_properties(device)
    return (
        found.multi_processor_count,
        found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in the CPU build's stubs
        found.shared_memory_per_multiprocessor,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: free on the device, plus what PyTorch's allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def synchronize() -> None:
    torch.cuda.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def release_memory() -> None:
    """Gives cached memory back, after an out-of-memory or before a plan of the memory."""
    gc.collect()
    if available():
        torch.cuda.empty_cache()


def capture(
    step: Callable[[], None], prepare: Callable[[], None] = lambda: None, warmups: int = 2
) -> Callable[[], None]:
    """A CUDA graph of `step`: runs it `warmups` times (compiles kernels, fills workspaces), records it once,
    returns its replay.

    `prepare` resets before each of these runs what a step moves on; it is not recorded.
    RuntimeError where `step` does something that can't be captured, e.g. waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmups):
            prepare()
            step()
        prepare()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool().pool()):
        step()
    return graph.replay


@lru_cache(maxsize=1)
def _pool() -> torch.cuda.CUDAGraph:
    """A graph that holds the one memory pool of all graphs: they run one after the other, and what a step
    leaves behind is in buffers made outside. PyTorch drops a pool with its last graph, so this one stays."""
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper):
        torch.zeros(1, device="cuda")
    return keeper


def plan_slots(
    free: int, bytes_per_token: int, max_length: int, reserve_bytes: int = 2 << 30, most: int = 256
) -> int:
    """Rows of `max_length` tokens whose caches fit `free` bytes less a reserve for activations: a power of
    two, 1..`most`.

    ValueError: not even one row fits.
    """
    rows = (free - reserve_bytes) // (bytes_per_token * max_length)
    if rows < 1:
        raise UserError(
            f"{free / 2**30:.1f} GiB are free, one row of {max_length} tokens needs "
            f"{bytes_per_token * max_length / 2**30:.2f} GiB "
            f"beside {reserve_bytes / 2**30:.1f} GiB for activations; shorten --max-new-tokens or the "
            f"prompts, or use a larger GPU"
        )
    return min(most, 1 << (int(rows).bit_length() - 1))
