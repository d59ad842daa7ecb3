"""Heads of 8 bits on a GPU: bytes times 16-bit tokens against their definition; on the GPU where there is
one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pmpd.kernels.byte_rows import byte_rows
from pmpd.kernels.triton_bytes import TritonByteMatrix, unavailable
from pmpd.weights.byte_head import ByteHead, byte_head_unavailable
from tests.test_kernels_triton import DEVICE, activations, error, interpreter_only_here

ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Of results to their type."""


def check_product(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    weight = 0.3 + activations(rows, columns, dtype=dtype, seed=rows)
    matrix = TritonByteMatrix(byte_rows(weight))
    exact = matrix.rows.dequantize()
    reach = (weight.amax(1) - weight.amin(1)).float()[:, None]
    assert ((exact - weight.float()).abs() <= reach / 500).all()
    x = activations(tokens, columns + 8, dtype=dtype, seed=tokens)[:, 3 : 3 + columns]
    y = matrix.multiply(x)
    assert y.dtype == dtype
    assert error(y, x.double() @ exact.double().T) < ROUNDING[dtype], f"{rows}x{columns}, {tokens} tokens"


@interpreter_only_here
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "dtype"),
    [
        (37, 1056, 1, torch.float16),  # neither rows nor columns fill their tiles
        (32, 512, 2, torch.bfloat16),
        (20, 90, 2, torch.float16),  # columns that are no multiple of four
        (150, 288, 3, torch.float16),
        (64, 128, 17, torch.float16),
        (33, 96, 65, torch.float16),  # many tokens: dequantized
    ],
)
def test_bytes_multiply_as_their_definition(rows, columns, tokens, dtype):
    check_product(rows, columns, tokens, dtype)


@interpreter_only_here
def test_a_leading_shape_is_kept_and_no_tokens_give_no_rows():
    matrix = TritonByteMatrix(byte_rows(activations(24, 64)))
    x = activations(2, 1, 64)
    assert matrix.multiply(x).shape == (2, 1, 24)
    assert matrix.multiply(x[:0]).shape == (0, 1, 24)


def test_a_head_of_bytes_keeps_its_scales_where_the_model_changes_its_type():
    head = ByteHead(activations(24, 64).float())
    before = head.rows().dequantize()
    module = nn.Sequential(head).half().bfloat16()
    assert torch.equal(module[0].rows().dequantize(), before)
    assert not list(module.state_dict()), "a model that is saved has its own head"


@pytest.mark.parametrize(
    ("dtype", "device", "kernel", "reason"),
    [
        (torch.float32, "cuda", None, "float16 or bfloat16, and this is float32"),
        (torch.float16, "cuda", "reference", "on cuda it goes with kernel triton, cuda or dense, and kernel"),
        (torch.bfloat16, "cuda", "cpu", "on cuda .* kernel cpu is asked for"),
        (torch.bfloat16, "cpu", "triton", "on cpu .* kernel triton is asked for"),
        (torch.bfloat16, "mps", None, "the model is on mps"),
    ],
)
def test_a_head_of_bytes_is_refused_by_name_where_it_can_not_be(dtype, device, kernel, reason):
    why = byte_head_unavailable(dtype, torch.device(device), kernel)
    assert why is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why)


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert byte_head_unavailable(torch.float16, torch.device("cuda")) == "there is no CUDA device"


def test_unavailable_says_why():
    assert unavailable(DEVICE, torch.float16) is None
    assert "this is float32" in str(unavailable(DEVICE, torch.float32))
