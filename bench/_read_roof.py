"""What a launch takes that only reads a matrix's codes: the roof of every product of that size, which starts,
waits for the launch in front and ends as they do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench._timing import Call
from pmpd.kernels._triton_kernels import _let_next_start, _wait_for_last
from pmpd.kernels.triton import overlap

WORDS = 8192
"""Of a program: 32 KiB, asked for before the launch in front has ended."""


@triton.jit
def read_words(words, found, WORDS: tl.constexpr, PDL: tl.constexpr):
    """`found` float32 [programs] <- the exclusive or of WORDS words each, rounded."""
    _let_next_start(PDL)
    program = tl.program_id(0)
    value = tl.load(words + program.to(tl.int64) * WORDS + tl.arange(0, WORDS))
    _wait_for_last(PDL)
    tl.store(found + program, tl.xor_sum(value, axis=0).to(tl.float32))


def calls(matrices: list[Tensor]) -> tuple[list[Call], Tensor]:
    """Calls that read one of `matrices` each, int32 of one size and content, and the float64 [programs] that
    each gives; what is no whole program's at their ends stays."""
    words = matrices[0].reshape(-1)
    programs = words.numel() // WORDS
    expected = words[: programs * WORDS].view(programs, WORDS)
    while expected.shape[1] > 1:
        expected = torch.bitwise_xor(*expected.chunk(2, dim=1))

    def call(matrix: Tensor) -> Tensor:
        found = torch.empty(programs, device=matrix.device)  # float32: timing fills it with NaN before
        read_words[(programs,)](matrix, found, WORDS, num_warps=4, **overlap(matrix.device))
        return found

    return [lambda m=matrix: call(m) for matrix in matrices], expected[:, 0].float().double()
