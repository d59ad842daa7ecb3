"""Launches instances of `bits.cu` through the CUDA driver, on PyTorch's current stream: so in graphs too."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.kernels.cuda import compiler
from pmpd.kernels.cuda.cut import Cut, Gpu

TYPES = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
POINTERS = ("planes", "coefficients", "coefficients1", "bias", "x", "delta", "weight", "residual", "y")
STRIDES = ("plane_stride", "x_stride", "delta_stride", "residual_stride", "y_stride")


class Arguments(ctypes.Structure):
    """`Arguments` of bits.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES),
        ("epsilon", ctypes.c_float),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("row_blocks", ctypes.c_int32),
    )


class Norm(NamedTuple):
    """RMS norm in front of a product."""

    weight: Tensor
    """[K]."""
    epsilon: float
    delta: Tensor | None
    """[M, K] that is added to x before."""
    residual: Tensor
    """[M, K] <- x + delta; another buffer than x."""


def product(
    cut: Cut, planes: Tensor, coefficients: list[Tensor], x: Tensor, y: Tensor, rows: int,
    bias: Tensor | None = None, norm: Norm | None = None, gated: bool = False, reverse: bool = False,
) -> None:  # fmt: skip
    """`y` [M, N] <- x W' + bias, M the number of the cut's tokens; `rows` N, `coefficients` one for each
    precision among the tokens, the first token's first. `x` [M, K] 16-byte aligned, its stride a multiple
    of 8. `gated`: the first half of W is gate, the second up, and y [M, N / 2] <- silu(gate) * up.
    `reverse`: row 0 of x and y is the cut's last token."""
    device = x.device
    instance = cut.template(TYPES[x.dtype], "NORM" if norm else "PLAIN", "GATED" if gated else "STORE")
    row_blocks = planes.shape[1] // (2 if gated else 1)
    arguments = arguments_of(planes, coefficients, x, y, rows, row_blocks, bias, norm, reverse)
    run(instance, cut, arguments, cut.grid(row_blocks, gpu_of(device)), device)


def arguments_of(
    planes: Tensor, coefficients: list[Tensor], x: Tensor, y: Tensor, rows: int, row_blocks: int,
    bias: Tensor | None, norm: Norm | None, reverse: bool,
) -> Arguments:  # fmt: skip
    """What the kernel is handed; the tensors must live until it has run."""
    made = Arguments(
        planes=planes.data_ptr(), plane_stride=planes.stride(0) // 4,
        coefficients=coefficients[0].data_ptr(), coefficients1=coefficients[-1].data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=rows, columns=x.shape[1], row_blocks=row_blocks,
    )  # fmt: skip

    def put(name: str, tensor: Tensor) -> None:  # [M, …]
        start = tensor[-1] if reverse else tensor
        setattr(made, name, start.data_ptr())
        setattr(made, f"{name}_stride", -tensor.stride(0) if reverse else tensor.stride(0))

    put("x", x)
    put("y", y)
    if norm:
        made.weight, made.epsilon = norm.weight.data_ptr(), norm.epsilon
        put("residual", norm.residual)
        if norm.delta is not None:
            put("delta", norm.delta)
    return made


def run(instance: str, cut: Cut, arguments: Arguments, grid: int, device: torch.device) -> None:
    """One launch on PyTorch's current stream of the device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    kernel = function(instance, cut.shared_bytes, index)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        make_current(index)
        launch(kernel, arguments, grid, 32 * cut.warps, cut.shared_bytes, stream, overlaps(device))


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one in front of it has ended."""
    return gpu.capability(device) >= (9, 0)


@functools.lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    return Gpu(*gpu.shared_memory(device))


@functools.cache
def function(instance: str, shared_bytes: int, device: int, source: str = compiler.SOURCE) -> Any:
    """The kernel, loaded on a device, allowed that much dynamic shared memory."""
    driver = compiler.bindings("driver")
    binary = compiler.compiled(instance, gpu.capability(torch.device("cuda", device)), source)
    with torch.cuda.device(device):
        make_current(device)
        module = checked(driver.cuModuleLoadData(binary.code))
        found = checked(driver.cuModuleGetFunction(module, binary.symbol.encode()))
        attribute = driver.CUfunction_attribute
        checked(
            driver.cuFuncSetAttribute(
                found, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )
        )
        checked(
            driver.cuFuncSetAttribute(
                found, attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100
            )
        )
    return found


def launch(
    found: Any, arguments: ctypes.Structure, grid: int, threads: int, shared_bytes: int, stream: int,
    overlap: bool, cluster: int = 0,
) -> None:  # fmt: skip
    """One launch of a loaded kernel on `stream` (its handle). The driver copies the arguments."""
    driver = compiler.bindings("driver")
    config = config_of(grid, threads, shared_bytes, stream, overlap, cluster)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    checked(driver.cuLaunchKernelEx(config, found, ctypes.addressof(parameters), 0))


def config_of(
    grid: int, threads: int, shared_bytes: int, stream: int, overlap: bool, cluster: int = 0
) -> Any:
    """A launch as the driver wants it; `cluster` blocks (0: each for itself) run at once and reach each
    other's shared memory."""
    driver = compiler.bindings("driver")
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    attributes = []
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if cluster:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def make_current(device: int) -> None:
    """PyTorch's context of a device, in a thread that may not have used it yet."""
    driver = compiler.bindings("driver")
    if int(checked(driver.cuCtxGetCurrent())) == 0:
        checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(device))))


def checked(answer: tuple) -> Any:
    """The value in an answer of the driver. RuntimeError: it is an error, with its name."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"the CUDA driver answers with {code!r}")
    return values[0] if values else None


def aligned(x: Tensor) -> Tensor:
    """`x` [M, K] as the kernel can read it: 16-byte aligned rows."""
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x
