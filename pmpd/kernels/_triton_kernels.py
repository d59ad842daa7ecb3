"""The Triton kernels behind `pmpd.kernels.triton` (which says what each must do, its layout, and its bytes
and operations).

Legend: M tokens, N out_features, K in_features, b bits; a *tile* is 16 rows x 256 columns of one matrix; lane
= 4 g + t, as the tensor cores number the threads of a warp (g = 0..7, t = 0..3). The loops over tiles stay
loops, since unrolled kernels of 22 KB were no faster; a tile is loaded while the one before it is worked on.

`EMULATE` replaces the few PTX instructions by plain Triton that computes the same: Triton's interpreter knows
no PTX.

`PDL` (programmatic dependent launch, Hopper and later): a kernel starts while the one before it still runs,
asks for its weights, and waits only then. So every such kernel lets its successor start at once
(`_let_next_start`), and reads nothing that an earlier kernel wrote, and writes nothing at all, before
`_wait_for_last`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# -- one instruction each
# ------------------------------------------------------------------------------------------------------


@triton.jit
def _let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait_for_last(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def _load16(pointer, EMULATE: tl.constexpr, STREAM: tl.constexpr):
    """Four consecutive 32-bit words per thread, 16-byte aligned; STREAM: read once, so keep them out of the
    first-level cache."""
    if EMULATE:
        return (
            tl.load(pointer).to(tl.uint32, bitcast=True),
            tl.load(pointer + 1).to(tl.uint32, bitcast=True),
            tl.load(pointer + 2).to(tl.uint32, bitcast=True),
            tl.load(pointer + 3).to(tl.uint32, bitcast=True),
        )
    elif STREAM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0,$1,$2,$3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,  # stays on its side of `_wait_for_last`
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0,$1,$2,$3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,  # stays on its side of `_wait_for_last`
            pack=1,
        )


@triton.jit
def _store16(pointer, words, where, EMULATE: tl.constexpr):
    """Four consecutive 32-bit words per thread, 16-byte aligned."""
    if EMULATE:
        for i in tl.static_range(4):
            tl.store(pointer + i, words[i].to(tl.int32, bitcast=True), mask=where)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $6, 0;\n"
            "@p st.global.v4.b32 [$1], {$2,$3,$4,$5}; mov.u32 $0, $6; }",
            "=r,l,r,r,r,r,r",
            [pointer.to(tl.int64), words[0], words[1], words[2], words[3], where.to(tl.uint32)],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _prmt(low, high, selector, EMULATE: tl.constexpr):
    """Four byte look-ups: byte i of the result is byte `nibble i of selector` of the 8-byte table high:low.

    A nibble >= 8 gives the sign of byte `nibble - 8`, repeated: 0 for the table bytes of `digits`, which are
    all below 128.
    """
    if EMULATE:
        found = (low & 0) | (selector & 0)
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (tl.where((nibble & 4) == 0, low, high) >> ((nibble & 3) * 8)) & 0xFF
            found = found | (tl.where(nibble < 8, byte, (byte >> 7) * 255) << (8 * i))
        return found
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _pick(a, b, mask, EMULATE: tl.constexpr):
    """Bits of `a` where `mask` is set, else of `b`: one instruction (LLVM narrows the masks and then needs
    two or three)."""
    if EMULATE:
        return (a & mask) | (b & (mask ^ 0xFFFFFFFF))
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xE4;", "=r,r,r,r", [a, b, mask], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def _lookup(top_low, top_high, bottom_low, bottom_high, top, bottom, EMULATE: tl.constexpr):
    """An operand of `_accumulate`: the digits of the eight nibbles of the top and of the bottom row."""
    return (
        _prmt(top_low, top_high, top, EMULATE),
        _prmt(bottom_low, bottom_high, bottom, EMULATE),
        _prmt(top_low, top_high, top >> 16, EMULATE),
        _prmt(bottom_low, bottom_high, bottom >> 16, EMULATE),
    )


@triton.jit
def _accumulate(a, b0, b1, c, EMULATE: tl.constexpr, WARPS: tl.constexpr):
    """D = A B + C on the tensor cores: A 16 x 32 unsigned bytes, B 32 x 8 signed bytes, C and D int32
    (exact)."""
    if EMULATE:
        place = tl.arange(0, 4).to(tl.uint32)[None, None, None, :] * 8
        words = tl.join(tl.join(a[0], a[1]), tl.join(a[2], a[3]))  # [threads, row, half]
        a_bytes = ((words[:, :, :, None] >> place) & 0xFF).to(tl.int32)
        b_bytes = ((tl.join(b0, b1)[:, None, :, None] >> place) & 0xFF).to(tl.int32)
        b_bytes -= 256 * (b_bytes >> 7)
        a_bytes = tl.reshape(a_bytes, [WARPS, 8, 1, 4, 2, 8])  # [warp, g, n, t, row, half and byte]
        b_bytes = tl.reshape(b_bytes, [WARPS, 1, 8, 4, 1, 8])
        product = tl.sum(tl.sum(a_bytes * b_bytes, axis=5), axis=3)  # [warp, g, n, row]
        top, bottom = tl.split(tl.reshape(product, [WARPS * 32, 2, 2]))
        d0, d1 = tl.split(top)
        d2, d3 = tl.split(bottom)
        return (c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3)
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
            "{$10,$11,$12,$13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


# -- digits: table look-ups in registers, products on the int8 tensor cores
# ----------------------------------------------------


@triton.jit
def _store_digits(values, column, token, digits, scales, sums, digits_stride):
    """One token's `values` float32 [BLOCK] (zeros past K) as `split_digits` stores them: of 128 columns, 32 s
    + 8 t + i lies at 32 t + 8 s + i, so that a thread t of `digits_matmul` finds its columns together."""
    # The divisor is below 127 * (65536 + 256 + 1), so that rounding never carries into a fourth byte.
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-30) / 8355000.0
    whole = tl.floor(values / scale + 0.5).to(tl.int32)
    tl.store(scales + token, scale)
    tl.store(sums + token, tl.sum(whole.to(tl.float32), axis=0) * scale)
    d2 = ((whole + 128) & 255) - 128
    rest = (whole - d2) >> 8
    d1 = ((rest + 128) & 255) - 128
    place = (column // 128) * 128 + (column // 8 % 4) * 32 + (column // 32 % 4) * 8 + column % 8
    row = digits + token.to(tl.int64) * 4 * digits_stride + place
    inside = column < digits_stride
    tl.store(row, ((rest - d1) >> 8).to(tl.int8), mask=inside)
    tl.store(row + digits_stride, d1.to(tl.int8), mask=inside)
    tl.store(row + 2 * digits_stride, d2.to(tl.int8), mask=inside)
    tl.store(row + 3 * digits_stride, (d2 * 0).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["M"])
def split_digits(
    x, digits, scales, sums, M, K, x_stride, digits_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """x [M, K] -> three signed bytes a value: x = scale (65536 d0 + 256 d1 + d2), one scale a token.

    `digits` int8 [4 * tokens, digits_stride]: rows 4 m + (0, 1, 2) hold d0, d1, d2, row 4 m + 3 and
    everything past K zeros. `scales`, `sums` float32 [tokens]: the scale and the sum of the represented
    values. One program a token; tokens >= M get zeros.
    """
    _let_next_start(PDL)
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    _wait_for_last(PDL)
    values = tl.load(
        x + token.to(tl.int64) * x_stride + column, mask=(column < K) & (token < M), other=0.0
    ).to(tl.float32)
    _store_digits(values, column, token, digits, scales, sums, digits_stride)


@triton.jit
def _rotate(word, COUNT: tl.constexpr):
    if COUNT % 32 == 0:
        return word
    else:
        return (word << (COUNT % 32)) | (word >> (32 - COUNT % 32))


@triton.jit
def _nibbles(p0, p1, p2, p3, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """Words of up to four planes -> four words of eight codes each, a code a nibble: word s, nibble i is bit
    8 s + i of a word."""
    if BITS == 4:
        even_high = _pick(p0, p1, 0xAAAAAAAA, EMULATE)
        even_low = _pick(p2, p3, 0xAAAAAAAA, EMULATE)
        odd_high = _pick(p1, p0, 0xAAAAAAAA, EMULATE)
        odd_low = _pick(p3, p2, 0xAAAAAAAA, EMULATE)
        return (
            _pick(even_high, even_low, 0xCCCCCCCC, EMULATE),
            _rotate(_pick(odd_high, odd_low, 0x66666666, EMULATE), 1),
            _rotate(_pick(even_low, even_high, 0xCCCCCCCC, EMULATE), 2),
            _rotate(_pick(odd_low, odd_high, 0x66666666, EMULATE), 3),
        )
    elif BITS == 3:
        even_high = (p0 & 0xAAAAAAAA) | (p1 & 0x55555555)
        odd_high = (p0 & 0x55555555) | (p1 & 0xAAAAAAAA)
        return (
            _rotate((even_high & 0xCCCCCCCC) | (p2 & 0x22222222), 31),
            (odd_high & 0x66666666) | (p2 & 0x11111111),
            _rotate((even_high & 0x33333333) | (p2 & 0x88888888), 1),
            _rotate((odd_high & 0x99999999) | (p2 & 0x44444444), 2),
        )
    else:
        even = (p0 & 0xAAAAAAAA) | (p1 & 0x55555555)
        odd = (p0 & 0x55555555) | (p1 & 0xAAAAAAAA)
        return (
            _rotate(even & 0xCCCCCCCC, 30),
            _rotate(odd & 0x66666666, 31),
            even & 0x33333333,
            _rotate(odd & 0x99999999, 1),
        )


@triton.jit
def _plane(base, TURN: tl.constexpr, EMULATE: tl.constexpr):
    """The tile's words of a plane, turned left."""
    a, b, c, d = _load16(base, EMULATE, True)
    return (_rotate(a, TURN), _rotate(b, TURN), _rotate(c, TURN), _rotate(d, TURN))


@triton.jit
def _planes(base, plane_stride, BITS: tl.constexpr, PLAIN: tl.constexpr, EMULATE: tl.constexpr):
    """The tile's words of the first BITS planes, 4 a plane (half h, row part r: word 2 h + r). PLAIN: in
    memory every plane has a column at the same bit. Of bytes (`triton.tile_bytes`) the eight parts."""
    words = ()
    for p in tl.static_range(BITS):
        words = words + _plane(base + p * plane_stride, (32 - p % 4) % 32 if PLAIN else 0, EMULATE)
    return words


@triton.jit
def _tile_nibbles(words, AT: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """`_nibbles` of one half and row part of a tile: word AT = 2 h + r of each plane in `words`, four words a
    plane."""
    if BITS == 2:
        return _nibbles(words[AT], words[AT + 4], words[AT], words[AT], 2, EMULATE)
    elif BITS == 3:
        return _nibbles(words[AT], words[AT + 4], words[AT + 8], words[AT], 3, EMULATE)
    else:
        return _nibbles(words[AT], words[AT + 4], words[AT + 8], words[AT + 12], 4, EMULATE)


@triton.jit
def _low_nibbles(words, AT: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """As `_tile_nibbles`, of the planes behind the fourth: the first of them is the highest bit of a nibble,
    absent ones are zeros."""
    p4 = words[AT + 16]
    none = p4 & 0
    if BITS == 5:
        return _nibbles(p4, none, none, none, 4, EMULATE)
    elif BITS == 6:
        return _nibbles(p4, words[AT + 20], none, none, 4, EMULATE)
    elif BITS == 7:
        return _nibbles(p4, words[AT + 20], words[AT + 24], none, 4, EMULATE)
    else:
        return _nibbles(p4, words[AT + 20], words[AT + 24], words[AT + 28], 4, EMULATE)


@triton.jit
def _own_tables(table, BITS: tl.constexpr, WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """Copies of a row block's tables in shared memory, one a lane, that lies in the lane's own bank: look-ups
    of a warp never wait for each other. A word holds the values of a code in rows g and g + 8.

    `table`: of row g, `tables` as of `halves_matmul`. Returns what `_look_up` takes for the two rows: the
    addresses of their values of code 0.
    """
    if EMULATE:
        return table, table + (8 << BITS)
    else:
        thread = tl.arange(0, 32 * WARPS)
        own = tl.inline_asm_elementwise(
            "{ .shared .align 128 .b8 own_tables[32768]; mov.u32 $0, own_tables; }",
            "=r,r",
            [thread],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        own += thread % 32 * 4
        EIGHTS: tl.constexpr = (1 << BITS) // 8
        words = table.to(tl.pointer_type(tl.int32), bitcast=True)
        for i in tl.static_range((EIGHTS + WARPS - 1) // WARPS):
            eight = tl.minimum(thread // 32 + i * WARPS, EIGHTS - 1)  # of the codes
            a = _load16(words + eight * 4, EMULATE, False)
            b = _load16(words + (4 << BITS) + eight * 4, EMULATE, False)
            tl.inline_asm_elementwise(
                "{ .reg .b32 w<8>;\n"
                "prmt.b32 w0, $2, $6, 0x5410; prmt.b32 w1, $2, $6, 0x7632;\n"
                "prmt.b32 w2, $3, $7, 0x5410; prmt.b32 w3, $3, $7, 0x7632;\n"
                "prmt.b32 w4, $4, $8, 0x5410; prmt.b32 w5, $4, $8, 0x7632;\n"
                "prmt.b32 w6, $5, $9, 0x5410; prmt.b32 w7, $5, $9, 0x7632;\n"
                "st.shared.b32 [$1], w0; st.shared.b32 [$1+128], w1;\n"
                "st.shared.b32 [$1+256], w2; st.shared.b32 [$1+384], w3;\n"
                "st.shared.b32 [$1+512], w4; st.shared.b32 [$1+640], w5;\n"
                "st.shared.b32 [$1+768], w6; st.shared.b32 [$1+896], w7;\n"
                "mov.b32 $0, w0; }",
                "=r,r,r,r,r,r,r,r,r,r",
                [own + eight * 1024, a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]],
                dtype=tl.uint32,
                is_pure=False,
                pack=1,
            )
        tl.debug_barrier()
        return own, own + 2


@triton.jit
def _look_up(table, codes, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The 16-bit table value of the code in BITS bits of `codes` from SHIFT on, as uint32; `table`: pointers
    to a row's values."""
    code = ((codes >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    return tl.load(table + code).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _look_up_own(table, codes, BYTE: tl.constexpr, BITS: tl.constexpr):
    """As `_look_up`, of byte BYTE of `codes`, whose highest BITS bits are the code and the others zeros;
    `table` of `_own_tables`."""
    byte = _prmt(codes, codes & 0, (codes & 0) + (0x4440 + BYTE), False).to(tl.int32)
    return tl.inline_asm_elementwise(
        "ld.shared.u16 $0, [$1];",
        "=r,r",
        [table + byte * (128 >> (8 - BITS))],
        dtype=tl.uint32,
        is_pure=False,  # stays behind the barrier
        pack=1,
    )


@triton.jit
def _looked_up(table, high, low, PART: tl.constexpr, BITS: tl.constexpr, OWN: tl.constexpr):
    """Table values of codes 4 PART .. 4 PART + 3 of two words of nibbles (of up to 4 bits all of them are in
    `high`): two words of two 16-bit floats. OWN: `table` is of `_own_tables`."""
    even = high
    odd = high >> 4
    AT: tl.constexpr = 16 * PART + (8 - BITS if BITS > 4 else 0)
    if BITS > 4:
        even = ((high & 0x0F0F0F0F) << 4) | (low & 0x0F0F0F0F)  # codes 0, 2, 4, 6, a byte each
        odd = (high & 0xF0F0F0F0) | ((low >> 4) & 0x0F0F0F0F)
    if OWN:
        v0 = _look_up_own(table, even, 2 * PART, BITS)
        v1 = _look_up_own(table, odd, 2 * PART, BITS)
        v2 = _look_up_own(table, even, 2 * PART + 1, BITS)
        v3 = _look_up_own(table, odd, 2 * PART + 1, BITS)
    else:
        v0 = _look_up(table, even, AT, BITS)
        v1 = _look_up(table, odd, AT, BITS)
        v2 = _look_up(table, even, AT + 8, BITS)
        v3 = _look_up(table, odd, AT + 8, BITS)
    return v0 | (v1 << 16), v2 | (v3 << 16)


@triton.jit
def _table(base, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """The row's table as bytes: 2 bits (high digits, low digits); 3 bits (high 0-3, 4-7, low 0-3, 4-7); 4
    bits: codes 0-7, then 8-15."""
    if BITS == 2:
        a = tl.load(base).to(tl.uint32, bitcast=True)
        b = tl.load(base + 1).to(tl.uint32, bitcast=True)
        return (a, b)
    elif BITS == 3:
        return _load16(base, EMULATE, False)
    else:
        return _load16(base, EMULATE, False) + _load16(base + 4, EMULATE, False)


@triton.jit
def _either(a, b):
    return (a[0] | b[0], a[1] | b[1], a[2] | b[2], a[3] | b[3])


@triton.jit
def _digit_words(digits, stride, block, g, t, M, H: tl.constexpr, PAIRS: tl.constexpr, EMULATE: tl.constexpr):
    """The digits of a thread's 32 columns of half H of tile `block`: eight words a pair of tokens."""
    words = ()
    for n in tl.static_range(PAIRS):
        # threads without a token of their own read what others read
        x_row = tl.minimum(n * 8 + g, 4 * M - 1)
        # the fourth column has no digit: its product is not used
        x_row -= (x_row % 4 == 3).to(tl.int32)
        base = digits + x_row.to(tl.int64) * (stride // 4) + block * 64 + H * 32 + t * 8
        words = words + _load16(base, EMULATE, False) + _load16(base + 4, EMULATE, False)
    return words


@triton.jit
def _add_digits(
    acc, top, bottom, n_top, n_bottom, x_words,
    S: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr, MERGE: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """`acc` (eight a pair of tokens) and the products of the codes of part S, `n_top` and `n_bottom`."""
    if BITS == 2:
        high = _lookup(top[0], top[1], bottom[0], bottom[1], n_top, n_bottom, EMULATE)
        low = _lookup(top[1], top[0], bottom[1], bottom[0], n_top, n_bottom, EMULATE)
    else:
        high = _lookup(top[0], top[1], bottom[0], bottom[1], n_top, n_bottom, EMULATE)
        low = _lookup(top[2], top[3], bottom[2], bottom[3], n_top, n_bottom, EMULATE)
    other_high = high
    other_low = low
    if BITS == 4:
        other_top = n_top ^ 0x88888888
        other_bottom = n_bottom ^ 0x88888888
        other_high = _lookup(top[4], top[5], bottom[4], bottom[5], other_top, other_bottom, EMULATE)
        other_low = _lookup(top[6], top[7], bottom[6], bottom[7], other_top, other_bottom, EMULATE)
        if MERGE:
            high = _either(high, other_high)
            low = _either(low, other_low)
    updated = ()
    for n in tl.static_range(PAIRS):
        b0 = x_words[8 * n + 2 * S]
        b1 = x_words[8 * n + 2 * S + 1]
        c_high = (acc[8 * n], acc[8 * n + 1], acc[8 * n + 2], acc[8 * n + 3])
        c_low = (acc[8 * n + 4], acc[8 * n + 5], acc[8 * n + 6], acc[8 * n + 7])
        c_high = _accumulate(high, b0, b1, c_high, EMULATE, WARPS)
        c_low = _accumulate(low, b0, b1, c_low, EMULATE, WARPS)
        if BITS == 4 and not MERGE:
            c_high = _accumulate(other_high, b0, b1, c_high, EMULATE, WARPS)
            c_low = _accumulate(other_low, b0, b1, c_low, EMULATE, WARPS)
        updated = updated + c_high + c_low
    return updated


# -- halves: table values of 16 bits put together in registers, products on the float16 / bfloat16 tensor
# cores -----------------


@triton.jit
def _halves(values, EMULATED_BFLOAT16: tl.constexpr):
    """The two 16-bit floats of each word (the lower half first), as float32."""
    if EMULATED_BFLOAT16:
        return (values << 16).to(tl.float32, bitcast=True), (values & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (values & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (values >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _half_product(row, column, BFLOAT16: tl.constexpr, WARPS: tl.constexpr):
    """Emulation: sum over t of the products of two words of halves, [warp, g of the row, n] from threads (g,
    t) and (n, t)."""
    row_low, row_high = _halves(row, BFLOAT16)
    column_low, column_high = _halves(column, BFLOAT16)
    low = tl.reshape(row_low, [WARPS, 8, 1, 4]) * tl.reshape(column_low, [WARPS, 1, 8, 4])
    high = tl.reshape(row_high, [WARPS, 8, 1, 4]) * tl.reshape(column_high, [WARPS, 1, 8, 4])
    return tl.sum(low + high, axis=3)


@triton.jit
def _accumulate_halves(a, b0, b1, c, BFLOAT16: tl.constexpr, EMULATE: tl.constexpr, WARPS: tl.constexpr):
    """D = A B + C on the tensor cores: A 16 x 16 and B 16 x 8 of 16-bit floats, C and D float32."""
    if EMULATE:
        top = _half_product(a[0], b0, BFLOAT16, WARPS) + _half_product(a[2], b1, BFLOAT16, WARPS)
        bottom = _half_product(a[1], b0, BFLOAT16, WARPS) + _half_product(a[3], b1, BFLOAT16, WARPS)
        d0, d1 = tl.split(tl.reshape(top, [WARPS * 32, 2]))
        d2, d3 = tl.split(tl.reshape(bottom, [WARPS * 32, 2]))
        return (c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3)
    elif BFLOAT16:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
            "{$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
            "{$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _values(table, codes, PART: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """16-bit table values of four codes, in the lower (PART 0) or upper nibbles of `codes`: two words of two
    values each."""
    if BITS == 4:
        octet = (codes & 0x77777777) >> (16 * PART)
        which = (((codes >> 1) & 0x44444444) | 0x32103210) >> (16 * PART)  # i for a code < 8, else 4 + i
        low = _prmt(
            _prmt(table[2], table[3], octet, EMULATE),
            _prmt(table[6], table[7], octet, EMULATE),
            which,
            EMULATE,
        )
        high = _prmt(
            _prmt(table[0], table[1], octet, EMULATE),
            _prmt(table[4], table[5], octet, EMULATE),
            which,
            EMULATE,
        )
    elif BITS == 3:
        low = _prmt(table[2], table[3], codes >> (16 * PART), EMULATE)
        high = _prmt(table[0], table[1], codes >> (16 * PART), EMULATE)
    else:
        low = _prmt(table[1], table[0], codes >> (16 * PART), EMULATE)
        high = _prmt(table[0], table[1], codes >> (16 * PART), EMULATE)
    return _prmt(low, high, (low & 0) + 0x5140, EMULATE), _prmt(low, high, (low & 0) + 0x7362, EMULATE)


@triton.jit
def _affine(words, minus_zero, scale, EMULATE: tl.constexpr):
    """(code - zero) * scale of two float16 codes a word, rounded once: `minus_zero` and `scale` hold their
    value twice."""
    if EMULATE:
        code_low, code_high = _halves(words, False)
        zero_low, zero_high = _halves(minus_zero, False)
        scale_low, scale_high = _halves(scale, False)
        low = ((code_low + zero_low) * scale_low).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = ((code_high + zero_high) * scale_high).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high << 16)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 d; add.f16x2 d, $1, $2; mul.f16x2 $0, d, $3; }",
            "=r,r,r,r",
            [words, minus_zero, scale],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _byte_weights(word, minus_zero, scale, BFLOAT16: tl.constexpr, EMULATE: tl.constexpr):
    """(code - zero) * scale of the four bytes of `word`, rounded once: two words of two 16-bit floats each.

    A byte becomes the last bits of 1024 in float16 (`minus_zero` and `scale` hold their value twice, and
    1024 is taken away with the zero), of 2^23 in float32 for bfloat16, which holds no 255.
    """
    if EMULATE:
        off = _halves(minus_zero, False)[0] + 1024.0
        factor = _halves(scale, False)[0]
        if BFLOAT16:
            off = minus_zero.to(tl.float32, bitcast=True) + 8388608.0
            factor = scale.to(tl.float32, bitcast=True)
        found = (word & 0, word & 0)
        for i in tl.static_range(4):
            weight = (((word >> (8 * i)) & 0xFF).to(tl.float32) + off) * factor
            if BFLOAT16:
                bits = weight.to(tl.uint32, bitcast=True)
                bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            else:
                bits = weight.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            if i < 2:
                found = (found[0] | (bits << (16 * i)), found[1])
            else:
                found = (found[0], found[1] | (bits << (16 * i - 32)))
        return found
    elif BFLOAT16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 v<4>;\n"
            "prmt.b32 v0, $2, 0x4B000000, 0x7540; prmt.b32 v1, $2, 0x4B000000, 0x7541;\n"
            "prmt.b32 v2, $2, 0x4B000000, 0x7542; prmt.b32 v3, $2, 0x4B000000, 0x7543;\n"
            "add.f32 v0, v0, $3; add.f32 v1, v1, $3; add.f32 v2, v2, $3; add.f32 v3, v3, $3;\n"
            "mul.f32 v0, v0, $4; mul.f32 v1, v1, $4; mul.f32 v2, v2, $4; mul.f32 v3, v3, $4;\n"
            "cvt.rn.bf16x2.f32 $0, v1, v0; cvt.rn.bf16x2.f32 $1, v3, v2; }",
            "=&r,=&r,r,r,r",
            [word, minus_zero, scale],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 l, h;\n"
            "prmt.b32 l, $2, 0x64646464, 0x4140; prmt.b32 h, $2, 0x64646464, 0x4342;\n"
            "add.f16x2 l, l, $3; add.f16x2 h, h, $3; mul.f16x2 $0, l, $4; mul.f16x2 $1, h, $4; }",
            "=&r,=&r,r,r,r",
            [word, minus_zero, scale],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _x_words(x_row, column, K, EXACT: tl.constexpr, EMULATE: tl.constexpr):
    """Eight 16-bit activations from `column` (a multiple of 8) as four words; zeros past K."""
    if EXACT:
        return _load16(x_row + column // 2, EMULATE, False)
    else:
        w0, w1, w2, w3 = _load16(x_row + tl.where(column < K, column, 0) // 2, EMULATE, False)
        keep = (column < K).to(tl.uint32)
        return (w0 * keep, w1 * keep, w2 * keep, w3 * keep)


@triton.jit
def _add_halves(
    acc, a, x_words,
    PART: tl.constexpr, OCTETS: tl.constexpr, WARPS: tl.constexpr, BFLOAT16: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """`acc` (four an octet of tokens) and the products of the weights `a` of PART."""
    updated = ()
    for n in tl.static_range(OCTETS):
        b0 = x_words[4 * n + 2 * PART]
        b1 = x_words[4 * n + 2 * PART + 1]
        c = (acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3])
        updated = updated + _accumulate_halves(a, b0, b1, c, BFLOAT16, EMULATE, WARPS)
    return updated


# -- the loop over a row block's tiles, and the two kernels around it
# ------------------------------------------------------------


@triton.jit
def _sum_tiles(
    ACC: tl.constexpr, x, planes, top, bottom, scales, minus_zeros, M, K, token0, plane_stride, x_stride,
    group_stride, LAST_GROUP,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
    DIGITS: tl.constexpr, MERGE: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
    BFLOAT16: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The accumulators (of type ACC) of this warp's share of a row block, after all its tiles.

    DIGITS: `x` are digits and GROUPS pairs of tokens; else 16-bit floats and GROUPS octets. BLOCKS = tiles of
    the row block, TILES = those of one warp. The rest as in the kernels.
    """
    BYTES: tl.constexpr = BITS == 8 and GROUP > 0
    WIDE: tl.constexpr = BITS > 4 and GROUP == 0
    row_block = tl.program_id(0)
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    lane = thread % 32
    g = lane // 4
    t = lane % 4
    row_base = planes + row_block.to(tl.int64) * (BLOCKS * 128)
    zero = tl.zeros([32 * WARPS], ACC)
    acc = ()
    for _ in tl.static_range(GROUPS * (8 if DIGITS else 4)):
        acc = acc + (zero,)  # type: ignore[assignment]  # noqa: RUF005 - Triton's tuples grow, and it knows no unpacking
    first = row_base + lane * 4 + tl.minimum(warp, BLOCKS - 1) * 128
    words = _planes(first, plane_stride, BITS, PLAIN, EMULATE)
    if WIDE:
        top, bottom = _own_tables(top, BITS, WARPS, EMULATE)
    _wait_for_last(PDL)

    for i in range(TILES):
        block = warp + i * WARPS
        # behind the last tile all lanes read the same word, in place of a tile once more
        ahead = tl.where(block + WARPS < BLOCKS, lane * 4 + (block + WARPS) * 128, 0)
        after = _planes(row_base + ahead, plane_stride, BITS, PLAIN, EMULATE)
        for h in tl.static_range(2):
            x_words = ()
            if DIGITS:
                x_words = _digit_words(x, x_stride, block, g, t, M, h, GROUPS, EMULATE)
            if not BYTES:
                n_top = _tile_nibbles(words, 2 * h, BITS, EMULATE)
                n_bottom = _tile_nibbles(words, 2 * h + 1, BITS, EMULATE)
            if WIDE:
                low_top = _low_nibbles(words, 2 * h, BITS, EMULATE)
                low_bottom = _low_nibbles(words, 2 * h + 1, BITS, EMULATE)
            for s in tl.static_range(4):
                if DIGITS:
                    acc = _add_digits(
                        acc,
                        top,
                        bottom,
                        n_top[s],
                        n_bottom[s],
                        x_words,
                        s,
                        BITS,
                        GROUPS,
                        WARPS,
                        MERGE,
                        EMULATE,
                    )
                else:
                    if GROUP > 0 and s * 32 % (GROUP & -GROUP) == 0:
                        of_group = (
                            tl.minimum((block * 256 + h * 128 + s * 32) // GROUP, LAST_GROUP) * group_stride
                            + row_block * 16
                            + g
                        )
                        scale_top = tl.load(scales + of_group).to(tl.uint32, bitcast=True)
                        scale_bottom = tl.load(scales + of_group + 8).to(tl.uint32, bitcast=True)
                        zero_top = tl.load(minus_zeros + of_group).to(tl.uint32, bitcast=True)
                        zero_bottom = tl.load(minus_zeros + of_group + 8).to(tl.uint32, bitcast=True)
                    x_words = ()
                    for n in tl.static_range(GROUPS):
                        x_row = x + tl.minimum(token0 + n * 8 + g, M - 1).to(tl.int64) * x_stride
                        x_words = x_words + _x_words(
                            x_row, block * 256 + h * 128 + s * 32 + t * 8, K, EXACT, EMULATE
                        )
                    for part in tl.static_range(2):
                        if BYTES:
                            word = words[16 * h + 4 * s + part]
                            a0, a2 = _byte_weights(word, zero_top, scale_top, BFLOAT16, EMULATE)
                            word = words[16 * h + 4 * s + 2 + part]
                            a1, a3 = _byte_weights(word, zero_bottom, scale_bottom, BFLOAT16, EMULATE)
                        elif WIDE:
                            a0, a2 = _looked_up(top, n_top[s], low_top[s], part, BITS, not EMULATE)
                            a1, a3 = _looked_up(bottom, n_bottom[s], low_bottom[s], part, BITS, not EMULATE)
                        else:
                            a0, a2 = _values(top, n_top[s], part, BITS, EMULATE)
                            a1, a3 = _values(bottom, n_bottom[s], part, BITS, EMULATE)
                        if GROUP > 0 and not BYTES:
                            a0 = _affine(a0, zero_top, scale_top, EMULATE)
                            a2 = _affine(a2, zero_top, scale_top, EMULATE)
                            a1 = _affine(a1, zero_bottom, scale_bottom, EMULATE)
                            a3 = _affine(a3, zero_bottom, scale_bottom, EMULATE)
                        acc = _add_halves(
                            acc, (a0, a1, a2, a3), x_words, part, GROUPS, WARPS, BFLOAT16, EMULATE
                        )
        words = after
    return acc


@triton.jit(do_not_specialize=["M"])
def digits_matmul(
    planes, tables, table_scales, table_offsets, digits, x_scales, x_sums, bias, y,
    M, N, plane_stride, digits_stride, y_stride,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr, TOKEN_PAIRS: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, MERGE: tl.constexpr, PDL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M <= 2 * TOKEN_PAIRS from digits of x: one program = 16 rows, its warps share the columns.

    BLOCKS = tiles of a row block, TILES = those of one warp. MERGE (b = 4): `or` the digits of the two half
    tables before the product, in place of two products (fewer products, for many tokens). A thread holds
    exactly one element of every tensor, so element = thread.
    """
    _let_next_start(PDL)
    row_block = tl.program_id(0)
    lane = tl.arange(0, 32 * WARPS) % 32
    g = lane // 4
    t = lane % 4
    WORDS: tl.constexpr = 2 if BITS == 2 else (4 if BITS == 3 else 8)
    top = _table(tables + (row_block * 16 + g) * WORDS, BITS, EMULATE)
    bottom = _table(tables + (row_block * 16 + 8 + g) * WORDS, BITS, EMULATE)
    acc = _sum_tiles(
        tl.int32, digits, planes, top, bottom, table_scales, table_offsets, M, 0, 0, plane_stride,
        digits_stride, 0, 0,
        BLOCKS, TILES, BITS, TOKEN_PAIRS, WARPS, True, MERGE, 0, True, False, False, PDL, EMULATE,
    )  # fmt: skip

    # Columns 2t and 2t + 1 of the product are two digits of one token: t = 0, 2 hold d0, d1 and t = 1, 3 hold
    # d2, 0.
    weight_even = tl.where(t % 2 == 0, 65536.0, 1.0)
    weight_odd = tl.where(t % 2 == 0, 256.0, 0.0)
    slot = tl.arange(0, 16)
    row_top = row_block * 16 + slot // 2
    row_bottom = row_top + 8
    for n in tl.static_range(TOKEN_PAIRS):
        even_top = acc[8 * n].to(tl.float32) * 128.0 + acc[8 * n + 4].to(tl.float32)
        odd_top = acc[8 * n + 1].to(tl.float32) * 128.0 + acc[8 * n + 5].to(tl.float32)
        even_bottom = acc[8 * n + 2].to(tl.float32) * 128.0 + acc[8 * n + 6].to(tl.float32)
        odd_bottom = acc[8 * n + 3].to(tl.float32) * 128.0 + acc[8 * n + 7].to(tl.float32)
        sum_top = tl.sum(tl.reshape(even_top * weight_even + odd_top * weight_odd, [WARPS, 32]), axis=0)
        sum_bottom = tl.sum(
            tl.reshape(even_bottom * weight_even + odd_bottom * weight_odd, [WARPS, 32]), axis=0
        )
        sum_top = tl.sum(tl.reshape(sum_top, [16, 2]), axis=1)  # [8 rows, 2 tokens]
        sum_bottom = tl.sum(tl.reshape(sum_bottom, [16, 2]), axis=1)
        token = 2 * n + slot % 2
        x_scale = tl.load(x_scales + token)
        x_sum = tl.load(x_sums + token)
        y_top = sum_top * x_scale * tl.load(table_scales + row_top) + x_sum * tl.load(table_offsets + row_top)
        y_bottom = sum_bottom * x_scale * tl.load(table_scales + row_bottom) + x_sum * tl.load(
            table_offsets + row_bottom
        )
        if HAS_BIAS:
            y_top += tl.load(bias + row_top, mask=row_top < N, other=0.0).to(tl.float32)
            y_bottom += tl.load(bias + row_bottom, mask=row_bottom < N, other=0.0).to(tl.float32)
        tl.store(
            y + token * y_stride + row_top, y_top.to(y.dtype.element_ty), mask=(token < M) & (row_top < N)
        )
        tl.store(
            y + token * y_stride + row_bottom,
            y_bottom.to(y.dtype.element_ty),
            mask=(token < M) & (row_bottom < N),
        )


@triton.jit(do_not_specialize=["M"])
def halves_matmul(
    x, planes, tables, scales, minus_zeros, bias, y, M, N, K, plane_stride, x_stride, y_stride, group_stride,
    LAST_GROUP,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr, OCTETS: tl.constexpr, WARPS: tl.constexpr,
    GROUP: tl.constexpr, EXACT: tl.constexpr, HAS_BIAS: tl.constexpr, BFLOAT16: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """y [M, N] from x [M, K] of 16-bit floats (as int32 words, x_stride words a token); a program: 16 rows, 8
    * OCTETS tokens.

    The order of the columns in a product is free, if weights and activations agree: thread t takes columns 32
    s + 8 t + 0..7 of 128 in two products, four consecutive ones each. EXACT: TILES * WARPS * 256 = K, so that
    no column is past the end.

    GROUP = 0: `tables` holds a table a row, of more than 4 bits int16 [N padded, 2^b], the values themselves.
    Else it holds one for all, of the float16 codes, and every GROUP
    columns (a multiple of 32) of a row have a scale and a zero: `scales`, `minus_zeros` int32 [groups, N
    padded], each value twice. BITS = 8 has groups, no tables, and words as `_byte_weights` takes them.
    """
    _let_next_start(PDL)
    row_block = tl.program_id(0)
    token0 = tl.program_id(1) * (8 * OCTETS)
    g = tl.arange(0, 32 * WARPS) % 32 // 4
    WORDS: tl.constexpr = 2 if BITS == 2 else (4 if BITS == 3 else 8)
    if BITS > 4:
        top = tables + ((row_block * 16 + g) << BITS)  # bytes have none
        bottom = top
    elif GROUP > 0:
        top = _table(tables + g * 0, BITS, EMULATE)
        bottom = top
    else:
        top = _table(tables + (row_block * 16 + g) * WORDS, BITS, EMULATE)
        bottom = _table(tables + (row_block * 16 + 8 + g) * WORDS, BITS, EMULATE)
    acc = _sum_tiles(
        tl.float32, x, planes, top, bottom, scales, minus_zeros, M, K, token0, plane_stride, x_stride,
        group_stride, LAST_GROUP,
        BLOCKS, TILES, BITS, OCTETS, WARPS, False, False, GROUP, EXACT, BFLOAT16, PLAIN, PDL, EMULATE,
    )  # fmt: skip

    slot = tl.arange(0, 32)
    row_top = row_block * 16 + slot // 4
    for n in tl.static_range(OCTETS):
        pairs = tl.join(
            tl.join(acc[4 * n], acc[4 * n + 2]), tl.join(acc[4 * n + 1], acc[4 * n + 3])
        )  # [threads, row, token]
        total = tl.sum(tl.reshape(pairs, [WARPS, 32, 2, 2]), axis=0)
        row = row_top[:, None, None] + 8 * tl.arange(0, 2)[None, :, None]
        token = token0 + n * 8 + 2 * (slot % 4)[:, None, None] + tl.arange(0, 2)[None, None, :]
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        tl.store(y + token * y_stride + row, total.to(y.dtype.element_ty), mask=(token < M) & (row < N))


# -- plain Triton: decode a tile, then dot, sum or store it
# --------------------------------------------------------------------


@triton.jit
def _tile_codes(
    planes,
    row,
    first,
    plane_stride,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Codes of rows `row` [ROWS] and columns `first` (a multiple of 128)...: int32 [ROWS, COLUMNS]; rubbish
    past the last block."""
    word = tl.minimum(first // 32 + tl.arange(0, COLUMNS // 32), BLOCKS * 8 - 1)
    at = (row // 16).to(tl.int64)[:, None] * (BLOCKS * 128) + ((row % 8) * 16 + (row % 16) // 8)[:, None]
    at += ((word // 8) * 128 + word % 4 * 4 + (word // 4) % 2 * 2)[None, :]
    c = tl.arange(0, 32)
    codes = tl.zeros([ROWS, COLUMNS // 32, 32], tl.int32)
    for p in tl.static_range(BITS):
        bits = tl.load(planes + p * plane_stride + at).to(tl.uint32, bitcast=True)
        position = (4 * (c % 8) + 3 - (0 if PLAIN else p % 4) + 32 - c // 8) % 32
        codes = codes * 2 + ((bits[:, :, None] >> position[None, None, :].to(tl.uint32)) & 1).to(tl.int32)
    by_thread = tl.reshape(
        codes, [ROWS, COLUMNS // 128, 4, 4, 8]
    )  # [row, half, t, s, i]: column 32 s + 8 t + i
    return tl.reshape(tl.permute(by_thread, (0, 1, 3, 2, 4)), [ROWS, COLUMNS])


@triton.jit
def _byte_codes(words, row, first, plane_stride, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """As `_tile_codes`, of bytes (`triton.tile_bytes`)."""
    column = first + tl.arange(0, COLUMNS)
    at = (row // 16).to(tl.int64)[:, None] * (BLOCKS * 512) + ((row % 8) * 64 + (row % 16) // 8 * 8)[:, None]
    part = (column // 32 % 8).to(tl.int64) * plane_stride * 4
    at += (part + tl.minimum(column // 256, BLOCKS - 1) * 512 + column // 8 % 4 * 16 + column % 8)[None, :]
    return tl.load(words.to(tl.pointer_type(tl.uint8), bitcast=True) + at).to(tl.int32)


@triton.jit
def _tile_weights(
    planes, values, zeros, groups, row, first, plane_stride, N_PADDED,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """float32 weights [ROWS, COLUMNS]: table look-up, or (AFFINE) scale * (code - zero) of the column's
    group."""
    if AFFINE and BITS == 8:
        codes = _byte_codes(planes, row, first, plane_stride, BLOCKS, COLUMNS)
    else:
        codes = _tile_codes(planes, row, first, plane_stride, BLOCKS, BITS, ROWS, COLUMNS, PLAIN)
    if AFFINE:
        group = tl.load(groups + tl.minimum(first + tl.arange(0, COLUMNS), BLOCKS * 256 - 1))
        at = group[None, :] * N_PADDED + row[:, None]
        return tl.load(values + at).to(tl.float32) * (codes - tl.load(zeros + at).to(tl.int32)).to(tl.float32)
    else:
        return tl.load(values + row[:, None] * (1 << BITS) + codes).to(tl.float32)


@triton.jit
def dequantize_tiles(
    planes, values, zeros, groups, out, N, K, plane_stride, N_PADDED,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """out [N, K] <- the weights; one program = 16 rows x 256 columns."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    first = tl.program_id(1) * 256
    weights = _tile_weights(
        planes, values, zeros, groups, row, first, plane_stride, N_PADDED,
        BLOCKS, BITS, AFFINE, 16, 256, PLAIN,
    )  # fmt: skip
    column = first + tl.arange(0, 256)
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(out + at, weights.to(out.dtype.element_ty), mask=(row < N)[:, None] & (column < K)[None, :])


@triton.jit
def dequantize_words(
    planes, values, out, N, K, plane_stride,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [N, K] (int32 words of two 16-bit floats, K a multiple of 32) <- the weights by table, `values`
    int16 [N padded, 2^b]. One program = 16 rows of eight tiles; a warp looks up in the tables of two rows
    only, one after the other, so that its lanes find their values in few cache lines."""
    row_block = tl.program_id(0)
    thread = tl.arange(0, 256)
    g = thread // 32
    t = thread % 4
    block = tl.program_id(1) * 8 + thread % 32 // 4
    base = planes + (row_block.to(tl.int64) * BLOCKS + tl.minimum(block, BLOCKS - 1)) * 128 + (4 * g + t) * 4
    words = _planes(base, plane_stride, BITS, PLAIN, EMULATE)
    for at in tl.static_range(4):  # half and row part of the tile
        row = row_block * 16 + g + at % 2 * 8
        table = values + (row << BITS)
        high = _tile_nibbles(words, at, BITS, EMULATE)
        low = high
        if BITS > 4:
            low = _low_nibbles(words, at, BITS, EMULATE)
        for s in tl.static_range(4):
            column = block * 256 + at // 2 * 128 + s * 32 + t * 8
            found = _looked_up(table, high[s], low[s], 0, BITS, False)
            found = found + _looked_up(table, high[s], low[s], 1, BITS, False)
            place = out + (row.to(tl.int64) * K + column) // 2
            _store16(place, found, (row < N) & (column < K), EMULATE)


@triton.jit
def dequantize_bytes(
    words, scales, minus_zeros, out, N, K, part_stride, group_stride, LAST_GROUP,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, BFLOAT16: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [N, K] (int32 words of two 16-bit floats, K a multiple of 8) <- GPTQ codes of 8 bits, scales and
    zeros as of `halves_matmul`. One program = 16 rows of eight tiles, a warp a tile."""
    row_block = tl.program_id(0)
    lane = tl.arange(0, 256) % 32
    block = tl.program_id(1) * 8 + tl.arange(0, 256) // 32
    base = words + (row_block.to(tl.int64) * BLOCKS + tl.minimum(block, BLOCKS - 1)) * 128 + lane * 4
    tile = _planes(base, part_stride, 8, False, EMULATE)
    for part in tl.static_range(8):
        column = block * 256 + part * 32 + lane % 4 * 8
        for r in tl.static_range(2):
            row = row_block * 16 + lane // 4 + 8 * r
            of_group = tl.minimum(column // GROUP, LAST_GROUP) * group_stride + row
            scale = tl.load(scales + of_group).to(tl.uint32, bitcast=True)
            zero = tl.load(minus_zeros + of_group).to(tl.uint32, bitcast=True)
            found = _byte_weights(tile[4 * part + 2 * r], zero, scale, BFLOAT16, EMULATE)
            found = found + _byte_weights(tile[4 * part + 2 * r + 1], zero, scale, BFLOAT16, EMULATE)
            place = out + (row.to(tl.int64) * K + column) // 2
            _store16(place, found, (row < N) & (column < K), EMULATE)


@triton.jit(do_not_specialize=["M"])
def plain_matmul(
    x, planes, values, zeros, groups, bias, y, partial,
    M, N, K, x_stride, y_stride, plane_stride, N_PADDED,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr,
    USE_DOT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """y [M, N] for any b: decode [ROWS, COLUMNS], then a tensor-core dot (USE_DOT) or a sum for each of
    TOKENS tokens.

    Programs: (row blocks, SPLIT parts of the columns, token blocks). With SPLIT > 1 the parts land in
    `partial` float32 [SPLIT, M, N].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token0 = tl.program_id(2) * TOKENS
    token = token0 + tl.arange(0, TOKENS)
    inside = row < N
    safe_row = tl.minimum(row, N_PADDED - 1)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(STEPS):
        first = (part * STEPS + step) * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        weights = _tile_weights(
            planes,
            values,
            zeros,
            groups,
            safe_row,
            first,
            plane_stride,
            N_PADDED,
            BLOCKS,
            BITS,
            AFFINE,
            ROWS,
            COLUMNS,
            PLAIN,
        )
        x_at = token.to(tl.int64)[:, None] * x_stride + column[None, :]
        x_tile = tl.load(x + x_at, mask=(token < M)[:, None] & (column < K)[None, :], other=0.0)
        if USE_DOT:
            acc = tl.dot(weights.to(x.dtype.element_ty), tl.trans(x_tile), acc, input_precision="ieee")
        else:
            rounded = weights.to(x.dtype.element_ty).to(tl.float32)
            acc += tl.sum(rounded[:, None, :] * x_tile.to(tl.float32)[None, :, :], axis=2)
    mask = inside[:, None] & (token < M)[None, :]
    at = token.to(tl.int64)[None, :] * y_stride + row[:, None]
    if SPLIT == 1:
        if HAS_BIAS:
            acc += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + part * M * N + token[None, :] * N + row[:, None], acc, mask=mask)


# -- the rest of a decoder layer of the Llama family, one launch a stage
# -------------------------------------------------------


@triton.jit
def add_norm_split(
    x, delta, weight, out, digits, scales, sums, epsilon, C, out_stride, digits_stride,
    BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_OUT: tl.constexpr, HAS_DIGITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [n, C] += delta; h = RMS norm of x times weight, rounded as transformers does -> `out` [n, C] and /
    or its digits."""
    _let_next_start(PDL)
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < C
    at = token.to(tl.int64) * C + column
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    _wait_for_last(PDL)
    h = tl.load(x + at, mask=inside, other=0.0)
    if HAS_DELTA:
        h = (h.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(x + at, h, mask=inside)
    wide = h.to(tl.float32)
    normal = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / C + epsilon)
    scaled = (normal.to(h.dtype).to(tl.float32) * factor).to(h.dtype)
    if HAS_OUT:
        tl.store(out + token.to(tl.int64) * out_stride + column, scaled, mask=inside)
    if HAS_DIGITS:
        _store_digits(scaled.to(tl.float32), column, token, digits, scales, sums, digits_stride)


@triton.jit
def silu_split(
    gate_up, out, digits, scales, sums, F, out_stride, digits_stride,
    BLOCK: tl.constexpr, HAS_DIGITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of gate_up [n, 2 F], rounded as transformers does -> digits, or `out` [n, F]."""
    _let_next_start(PDL)
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < F
    _wait_for_last(PDL)
    at = token.to(tl.int64) * 2 * F + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0)
    up = tl.load(gate_up + at + F, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    product = (active * up).to(gate.dtype)
    if HAS_DIGITS:
        _store_digits(product.to(tl.float32), column, token, digits, scales, sums, digits_stride)
    else:
        tl.store(out + token.to(tl.int64) * out_stride + column, product, mask=inside)
