"""Rotary embedding, cache write, attention and the join of its parts in one launch, against transformers'
rotation and PyTorch's softmax: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
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
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pmpd.kernels import step_attention
from pmpd.kernels._triton_attention import rotary_attention as kernel
types = dict.fromkeys(("qkv", "keys", "values", "y"), "*fp16") | dict(slots="*i64", positions="*i64",
    arrivals="*i32", scale_log2="fp32", rope_scale="fp32", inverse_frequencies="*fp32")
types |= dict.fromkeys(("parts", "tops", "sums"), "*fp32")
whole = {"window", "part_tokens", "part_count"}
found = []
for heads, kv_heads, dim, has_window in json.loads(sys.argv[1]):
    tile = step_attention.tile_of(dim, 2)
    constants = step_attention.form(heads, kv_heads, dim, tile, tile, 32, has_window) | dict(PDL=True)
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    # pointers and strides are multiples of 16, as on a GPU
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, of) in enumerate(signature.items())
        if of[0] == "*" or (of == "i32" and name not in whole)
    }
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, multiples)
    options = dict(num_warps=step_attention.WARPS, num_stages=1)
    found.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
print(json.dumps(found))
"""
FORMS = [(32, 8, 128, False), (32, 4, 64, False), (15, 5, 64, False), (16, 1, 128, True), (8, 1, 80, True)]
"""Query heads, KV heads, head dim, whether there is a window: those of the GPU tests."""


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """Form -> its machine code for sm_90 as PTX. Needs no GPU."""
    pytest.importorskip("triton")
    root, cache = Path(__file__).parents[1], str(tmp_path_factory.mktemp("triton"))
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(FORMS)], cwd=root, env=os.environ | variables,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(FORMS, json.loads(done.stdout), strict=True))


@pytest.mark.slow
def test_the_machine_code_for_hopper_orders_what_the_last_part_reads(hopper):
    """Parts are stored, then a barrier, then an addition that acquires and releases; the join reads after it
    and a barrier, through loads that may not come from the read-only cache."""
    pattern = r"(griddepcontrol\.wait|st\.global|ld\.global(?:\.nc)?|atom\.[\w.]+|bar\.sync)"
    found = re.findall(pattern, hopper[FORMS[0]])
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


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_lanes_that_hold_the_same_sum_hold_the_same_bits(hopper, form):
    """They all store it to one place of shared memory. A product that is fused into the addition of what a
    neighbour sent is not rounded as the neighbour's own was, so each lane had bits of its own."""
    sent, sums, fused = set(), 0, []
    for line in hopper[form].splitlines():
        made = re.match(r"\s*(?:@!?%p\d+ )?([a-z][\w.]*)\s+(%\w+)(?:\|%p\d+)?,(.*);", line)
        if made is None:
            continue
        instruction, target, operands = made[1], made[2], set(re.findall(r"%\w+", made[3]))
        if instruction.startswith("shfl.sync.bfly"):
            sent.add(target)
        elif instruction.startswith("add.") and operands & sent:
            sums += 1
        elif instruction.startswith("fma.") and operands & sent:
            fused.append(line.strip())
    assert sums, "nothing is added up over lanes"
    assert not fused
