"""The roof of `bench/_cuda.py`: a launch that reads all of a matrix."""

import pytest
import torch

pytest.importorskip("triton")
from bench import _read_roof
from tests.test_kernels_triton import interpreter_only_here

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@interpreter_only_here
def test_every_word_is_read_once():
    words = torch.randint(-(2**31), 2**31, (3, _read_roof.WORDS), dtype=torch.int32, device=DEVICE)
    calls, expected = _read_roof.calls([words, words.clone()])
    for call in calls:
        assert torch.equal(call().double(), expected)
    words[1, 77] ^= 1 << 30
    before, after = expected, calls[0]().double()
    assert (before != after).tolist() == [False, True, False]
