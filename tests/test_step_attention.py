"""Rotary embedding, cache write, attention and the join of its parts in one launch, against transformers'
rotation and PyTorch's softmax: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pmpd.kernels.step_attention import MOST_PARTS, StepAttention, part_of
from tests.test_kernels_triton import DEVICE, activations, error, interpreter_only_here

CAPACITY = 320
SLOTS, POSITIONS = (3, 0, 2, 4), (0, 300, 128, 63)
"""Of four rows: nothing cached, the last tile not full, the first token of a part, the last one."""


def inverse_frequencies(dim: int) -> Tensor:
    return 1 / 10000 ** (torch.arange(0, dim, 2, device=DEVICE).float() / dim)


def by_definition(
    qkv: Tensor, keys: Tensor, values: Tensor, slot: int, position: int, heads: int, window: int | None,
    rope_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """float32: the attention [Hq, D] of one row's `qkv`, and its new key and value [H, D]."""
    kv_heads, dim = keys.shape[1], keys.shape[3]
    q, k, v = qkv.float().view(-1, dim).split([heads, kv_heads, kv_heads])
    angle = position * inverse_frequencies(dim).repeat(2)
    cosine, sine = (rope_scale * part(angle)[None] for part in (torch.cos, torch.sin))
    q, k = (part[0] for part in apply_rotary_pos_emb(q[None], k[None], cosine, sine))
    first = 0 if window is None else max(0, position + 1 - window)
    all_keys = torch.cat([keys[slot, :, first:position].float(), k[:, None]], 1)
    all_values = torch.cat([values[slot, :, first:position].float(), v[:, None]], 1)
    all_keys, all_values = (part.repeat_interleave(heads // kv_heads, 0) for part in (all_keys, all_values))
    share = torch.softmax(torch.einsum("hd,htd->ht", q, all_keys) * dim**-0.5, -1)
    return torch.einsum("ht,htd->hd", share, all_values), k, v


def check(
    heads: int, kv_heads: int, dim: int, window: int | None, part: int | None, dtype: torch.dtype,
    positions: tuple[int, ...] = POSITIONS, capacity: int = CAPACITY, rope_scale: float = 1.0,
) -> None:  # fmt: skip
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    keys, values = (activations(5, kv_heads, capacity, dim, dtype=dtype, seed=s) for s in (1, 2))
    qkv = activations(len(positions), (heads + 2 * kv_heads) * dim, dtype=dtype, seed=3)
    for slot, position in zip(SLOTS, positions, strict=True):  # what a row must not see is poison
        keys[slot, :, position:], values[slot, :, position:] = float("nan"), float("nan")
    before = keys.clone(), values.clone()
    attention = StepAttention(inverse_frequencies(dim), heads, kv_heads, dim, rope_scale)
    at = torch.tensor(SLOTS, device=DEVICE), torch.tensor(positions, device=DEVICE)
    for turn in range(2):  # the second time finds the counters as the first has left them
        y = attention(qkv, keys, values, *at, capacity, window, part)
        for row, (slot, position) in enumerate(zip(SLOTS, positions, strict=True)):
            said = f"row {row}, turn {turn}"
            expected, key, value = by_definition(qkv[row], *before, slot, position, heads, window, rope_scale)
            assert error(y[row].view(heads, dim), expected) < bound, said
            assert error(keys[slot, :, position], key) < bound, said
            assert torch.equal(values[slot, :, position].float(), value), said
    for cache, old in ((keys, before[0]), (values, before[1])):
        for slot, position in zip(SLOTS, positions, strict=True):
            cache[slot, :, position] = old[slot, :, position]
        assert torch.equal(cache.nan_to_num(7), old.nan_to_num(7)), "another place of the cache was written"


@interpreter_only_here
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "part", "dtype"),
    [
        (4, 2, 64, None, 64, torch.float16),  # a tile a part
        (3, 1, 128, None, 128, torch.float16),  # a group that is no power of two, several tiles a part
        (4, 4, 32, None, CAPACITY, torch.float32),  # one part: no scratch
        (8, 1, 80, 40, 64, torch.float32),  # a head dim that is no power of two; a window within parts
        (16, 1, 16, 200, 64, torch.float32),  # the widest group; a window over parts
    ],
)
def test_each_row_attends_to_its_new_token_and_those_before_it(heads, kv_heads, dim, window, part, dtype):
    check(heads, kv_heads, dim, window, part, dtype, rope_scale=1.2 if dim == 32 else 1.0)


@interpreter_only_here
def test_counters_for_more_rows_leave_those_that_graphs_hold_in_place():
    attention = StepAttention(inverse_frequencies(16), 1, 1, 16)
    first = attention._counters(3)
    assert attention._counters(len(first) + 1) is not first
    assert attention._arrivals[0] is first


def test_parts_cover_the_longest_row_and_fill_the_gpu():
    for groups, longest, tile in ((8, 1024, 64), (1, 100000, 64), (256, 1024, 64), (5000, 17, 32)):
        part = part_of(groups, longest, tile)
        assert part % tile == 0
        assert -(-longest // part) <= MOST_PARTS
    assert part_of(8, 1024, 64) == 64, "one row of 8 KV heads: a tile a program"
    assert part_of(5000, 1024, 64) == 1024, "rows enough: one part"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pmpd.kernels._triton_attention import rotary_attention as kernel
constants = dict(KV_HEADS=8, GROUP=4, GROUP_PADDED=16, GROUP_JOINED=4, D=128, D_PADDED=128, TOKENS=64,
                 MORE=False, ONE=False, CHUNK=16, HAS_WINDOW=False, PDL=True)
types = dict.fromkeys(("qkv", "keys", "values", "y"), "*fp16") | dict(slots="*i64", positions="*i64",
    arrivals="*i32", scale_log2="fp32", rope_scale="fp32", inverse_frequencies="*fp32")
types |= dict.fromkeys(("parts", "tops", "sums"), "*fp32")
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4)).asm["ptx"])
"""


@pytest.mark.slow
def test_the_machine_code_for_hopper_orders_what_the_last_part_reads(tmp_path):
    """Parts are stored, then a barrier, then an addition that acquires and releases; the join reads after it
    and a barrier, through loads that may not come from the read-only cache. Needs no GPU."""
    pytest.importorskip("triton")
    variables = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=variables | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    pattern = r"(griddepcontrol\.wait|st\.global|ld\.global(?:\.nc)?|atom\.[\w.]+|bar\.sync)"
    found = re.findall(pattern, done.stdout)
    addition = next(i for i, name in enumerate(found) if name.startswith("atom"))
    assert found[addition] == "atom.global.gpu.acq_rel.add.u32"
    assert found.count("griddepcontrol.wait") == 1
    assert "st.global" not in found[: found.index("griddepcontrol.wait")], "written before the wait"
    stores = [i for i, name in enumerate(found[:addition]) if name == "st.global"]
    assert "bar.sync" in found[stores[-1] : addition], "not all threads have stored"
    after = found[addition + 1 :]
    assert after[0] == "bar.sync", "threads go on without the count"
    assert "ld.global" in after
    assert "ld.global.nc" not in after
