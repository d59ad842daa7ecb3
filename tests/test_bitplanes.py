"""The packed layout is other people's: it is checked against a packer written as loops from the format's
description."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.kernels import bitplanes


def pack_by_the_text(codes: list[list[int]], parent_bits: int) -> list[list[list[int]]]:
    """Plane by plane, row by row, word by word, bit by bit: unsigned words."""
    planes = []
    for plane in range(parent_bits):
        shift = parent_bits - 1 - plane  # plane 0 is the most significant bit
        rows = []
        for row in codes:
            words = []
            for block_start in range(0, len(row), 1024):
                block = row[block_start : block_start + 1024]
                T = len(block) // 32
                for t in range(T):
                    word = 0
                    for j in range(4):
                        byte = 0
                        for c in range(8):
                            bit = (block[j * 8 * T + 8 * t + c] >> shift) & 1
                            byte |= bit << (7 - c)
                        word |= byte << (24 - 8 * j)
                    words.append(word)
            rows.append(words)
        planes.append(rows)
    return planes


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 3), words=st.integers(1, 80), bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_pack_writes_the_described_layout(rows: int, words: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, 32 * words, bits, seed)
    planes = bitplanes.pack(codes, bits)
    assert planes.dtype == torch.int32
    assert (planes.long() & 0xFFFFFFFF).tolist() == pack_by_the_text(codes.tolist(), bits)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    words=st.integers(1, 70),
    parent=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_lower_precision_is_the_top_bits_of_the_parent_code(
    rows: int, words: int, parent: int, seed: int, data: st.DataObject
) -> None:
    bits = data.draw(st.integers(1, parent))
    codes = random_codes(rows, 32 * words, parent, seed)
    assert torch.equal(bitplanes.unpack(bitplanes.pack(codes, parent), bits), codes >> (parent - bits))


@pytest.mark.parametrize("columns", [32, 64, 480, 992, 1024, 1056, 1536, 2048, 4864, 11008, 18944])
def test_round_trip_at_model_sizes(columns: int) -> None:
    codes = random_codes(3, columns, 4)
    planes = bitplanes.pack(codes, 4)
    assert planes.shape == (4, 3, columns // 32)
    assert (planes.long() & 0xFFFFFFFF).tolist() == pack_by_the_text(codes.tolist(), 4)
    assert torch.equal(bitplanes.unpack(planes, 4), codes)


@pytest.mark.parametrize("columns", [32, 480, 1024, 1536])
def test_column_order_names_the_column_of_every_bit(columns: int) -> None:
    codes = random_codes(1, columns, 1)
    order = bitplanes.column_order(columns)
    assert sorted(order.flatten().tolist()) == list(range(columns))
    word_bits = (bitplanes.pack(codes, 1)[0, 0].long().unsqueeze(1) >> torch.arange(31, -1, -1)) & 1
    assert torch.equal(word_bits, codes[0][order].long())


def test_what_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in_features 40 .* multiples of 32"):
        bitplanes.pack(torch.zeros(2, 40, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="code 16 does not fit 4 bits"):
        bitplanes.pack(torch.full((1, 32), 16, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"precision 5 .* 1\.\.4"):
        bitplanes.unpack(torch.zeros(4, 1, 1, dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="uint8"):
        bitplanes.pack(torch.zeros(2, 32, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="int32"):
        bitplanes.unpack(torch.zeros(4, 1, 1, dtype=torch.int64), 2)
