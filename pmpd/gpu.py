"""Everything that is asked of the CUDA runtime, in one place: a test on a CPU puts a stand-in here
(`monkeypatch.setattr(gpu, ...)`)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
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


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of `values` there, on a GPU without waiting for what it has still to do."""
    buffer = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device)
    copy_in(buffer, values)
    return buffer


def copy_in(buffer: torch.Tensor, values: np.ndarray) -> None:
    """`values` into `buffer`, on a GPU without waiting for what it has still to do: from pinned memory, which
    PyTorch gives to nobody else before it is read."""
    source = torch.from_numpy(values)
    if buffer.device.type == "cuda":
        buffer.copy_(source.pin_memory(), non_blocking=True)
    else:
        buffer.copy_(source)


def to_host(values: torch.Tensor) -> Callable[[], np.ndarray]:
    """Sends for `values`; what is returned waits for them, and not for what the GPU is given later."""
    if values.device.type != "cuda":
        return values.numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record()

    def arrived() -> np.ndarray:
        sent.synchronize()
        return host.numpy()

    return arrived


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Inside, a CUDA device rounds the factors of float32 matrix products to TF32 (11 significant bits; what
    came from 16 bits stays as it is) and adds up in float32: several times as fast."""
    settings = torch.backends.cuda.matmul
    old = not hasattr(settings, "fp32_precision")  # torch 2.8; later ones take one of the two names, always
    name, value = ("allow_tf32", True) if old else ("fp32_precision", "tf32")
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


class Stopwatch:
    """Seconds of work on a device, without what it had still to do at the beginning."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in "ab"] if device.type == "cuda" else []
        self._begin = time.perf_counter()
        for event in self._events[:1]:
            event.record()

    def stop(self) -> Callable[[], float]:
        """What says how long the work given since the beginning took, and waits for it when asked."""
        if not self._events:
            seconds = time.perf_counter() - self._begin
            return lambda: seconds
        begin, end = self._events
        end.record()

        def took() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return took


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def release_memory() -> None:
    """Gives cached memory back, after an out-of-memory or before a plan of the memory."""
    gc.collect()
    if available():
        torch.cuda.empty_cache()


def capture(step: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """A CUDA graph of `step`: runs it once (compiles kernels, fills workspaces), records it, returns its
    replay. The host waits for nothing, and no cached memory is given back (`torch.cuda.graph` does both).

    `prepare` resets what that one run has moved on; it is not recorded.
    RuntimeError where `step` does something that can't be captured, e.g. waits for the device.
    """
    keeper, side = _capturing()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        prepare()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=keeper.pool(), capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


@lru_cache(maxsize=1)
def _capturing() -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
    """A graph that holds the one memory pool of all graphs, and the stream that they are recorded on.

    They run one after the other, and what a step leaves behind is in buffers made outside. PyTorch drops a
    pool with its last graph, so this one stays; a stream has workspaces of its own, so there is one."""
    keeper, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        keeper.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        keeper.capture_end()
    return keeper, side


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
