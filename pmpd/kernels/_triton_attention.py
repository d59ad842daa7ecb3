"""The Triton kernel behind `pmpd.kernels.step_attention`.

Legend: n rows, Hq query heads, H KV heads, G = Hq / H query heads of a KV head, T tokens a slot can hold, D
head dim, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pmpd.kernels._triton_kernels import _let_next_start, _wait_for_last


@triton.jit
def _turned(own, other, cosine, signed_sine):
    """Rotated heads: their halves turn as pairs, and `other` is what `own` turns with."""
    turned = own.to(tl.float32) * cosine + other.to(tl.float32) * signed_sine
    return turned.to(own.dtype)


@triton.jit
def _cached(base, token, stop, stride, d, D: tl.constexpr):
    """Keys or values [TOKENS, D_PADDED] of the tokens `token` below `stop`."""
    at = base + token.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(token < stop)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _join(
    parts, tops, sums, y, first, last,
    GROUP: tl.constexpr, GROUP_JOINED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """`y` [G, D] <- the parts `first` to `last` of one row and KV head, CHUNK of them at a time."""
    member = tl.arange(0, GROUP_JOINED)
    safe = tl.minimum(member, GROUP - 1)
    d = tl.arange(0, D_PADDED)
    best = tl.full([GROUP_JOINED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_JOINED], tl.float32)
    joined = tl.zeros([GROUP_JOINED, D_PADDED], tl.float32)
    for start in range(first, last + 1, CHUNK):
        part = start + tl.arange(0, CHUNK)
        there = (part <= last)[:, None] & (safe < GROUP)[None, :]
        at = part[:, None] * GROUP + safe[None, :]
        top = tl.load(tops + at, mask=there, other=float("-inf"))
        part_sum = tl.load(sums + at, mask=there, other=0.0)
        inside = there[:, :, None] & (d < D)[None, None, :]
        value = tl.load(parts + at[:, :, None] * D + d[None, None, :], mask=inside, other=0.0)
        new_best = tl.maximum(best, tl.max(top, axis=0))
        share = tl.exp2(top - new_best[None, :])
        shrink = tl.exp2(best - new_best)
        # A bare product would be fused into the sum's first addition: a lane's own would be rounded less than
        # the one that its neighbour sends, and lanes that store the same sum would differ in its last bit.
        weighted = tl.where(there, share * part_sum, 0.0)
        total = total * shrink + tl.sum(weighted, axis=0)
        joined = joined * shrink[:, None] + tl.sum(value * share[:, :, None], axis=0)
        best = new_best
    result = (joined / total[:, None]).to(y.dtype.element_ty)
    tl.store(y + member[:, None] * D + d[None, :], result, mask=(member < GROUP)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["part_tokens", "part_count", "window"])
def rotary_attention(
    qkv, inverse_frequencies, slots, positions, keys, values, y, parts, tops, sums, arrivals,
    scale_log2, rope_scale, window, part_tokens, part_count,
    qkv_row, k_slot, k_head, k_token, v_slot, v_head, v_token, y_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, GROUP_JOINED: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr, MORE: tl.constexpr, ONE: tl.constexpr,
    CHUNK: tl.constexpr, HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One (row, KV head, part of `part_tokens` cached tokens); `step_attention` says what it computes. MORE:
    a part has several tiles; ONE: there is one part. How long and how many parts are is no constant, since
    both follow from the number of rows: every batch would be compiled for.

    Only the part that holds the row's own position rotates the new key, and it alone uses that key and value:
    from registers, so no program reads what another one writes to the cache. `parts` float32 [n, H, P, G, D]
    (weighted sums of values), `tops` and `sums` [n, H, P, G] (the largest score, base 2, and the sum of the
    weights relative to it) hold what the parts found; `arrivals` int32 [n, H], zeros before and after, counts
    them, and the last one joins them all.

    Before `_wait_for_last` it reads slots, positions and cached tokens: those were there before the forward,
    which begins with an ordinary launch.
    """
    _let_next_start(PDL)
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    first_seen = 0
    if HAS_WINDOW:
        first_seen = tl.maximum(position + 1 - window, 0)
    first_part = first_seen // part_tokens
    last_part = position // part_tokens
    if (part >= first_part) & (part <= last_part):
        d = tl.arange(0, D_PADDED)
        inside = d < D
        begin = tl.maximum(part * part_tokens, first_seen)
        stop = tl.minimum(part * part_tokens + part_tokens, position)  # of what is cached
        token = tl.arange(0, TOKENS)
        row_keys = keys + slot * k_slot + kv_head.to(tl.int64) * k_head
        row_values = values + slot * v_slot + kv_head.to(tl.int64) * v_head
        key = _cached(row_keys, begin + token, stop, k_token, d, D)
        value = _cached(row_values, begin + token, stop, v_token, d, D)

        half: tl.constexpr = D // 2
        partner = tl.where(d < half, d + half, d - half)
        frequency = tl.load(inverse_frequencies + tl.minimum(d, partner), mask=inside, other=0.0)
        angle = position.to(tl.float32) * frequency
        cosine = (tl.cos(angle) * rope_scale).to(qkv.dtype.element_ty).to(tl.float32)
        sine = (tl.sin(angle) * rope_scale).to(qkv.dtype.element_ty).to(tl.float32)
        sine = tl.where(d < half, -sine, sine)

        member = tl.arange(0, GROUP_PADDED)
        real = (member < GROUP)[:, None] & inside[None, :]
        row_qkv = qkv + row.to(tl.int64) * qkv_row
        query_at = row_qkv + (kv_head * GROUP + member)[:, None] * D
        new_key_at = row_qkv + (KV_HEADS * GROUP + kv_head) * D
        new_value_at = new_key_at + KV_HEADS * D
        cosines = cosine[None, :]
        sines = sine[None, :]
        _wait_for_last(PDL)
        # every program reads the new key and value, so that they come with the queries, not after them
        key_own = tl.load(new_key_at + d, mask=inside, other=0.0)
        key_other = tl.load(new_key_at + partner, mask=inside, other=0.0)
        new_value = tl.load(new_value_at + d, mask=inside, other=0.0)
        query_own = tl.load(query_at + d[None, :], mask=real, other=0.0)
        query_other = tl.load(query_at + partner[None, :], mask=real, other=0.0)
        query = _turned(query_own, query_other, cosines, sines)
        best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        acc = tl.zeros([GROUP_PADDED, D_PADDED], tl.float32)
        if part == last_part:
            new_key = _turned(key_own, key_other, cosine, sine)
            tl.store(row_keys + position.to(tl.int64) * k_token + d, new_key, mask=inside)
            tl.store(row_values + position.to(tl.int64) * v_token + d, new_value, mask=inside)
            best = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale_log2
            total += 1.0
            acc += new_value.to(tl.float32)[None, :]
        for at in range(begin, stop, TOKENS):
            # the next tile is on its way while this one is worked on
            if MORE:
                next_key = _cached(row_keys, at + TOKENS + token, stop, k_token, d, D)
                next_value = _cached(row_values, at + TOKENS + token, stop, v_token, d, D)
            else:
                next_key = key
                next_value = value
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            scores = tl.where((at + token < stop)[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            shrink = tl.exp2(best - new_best)
            weights = tl.exp2(scores - new_best[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            best = new_best
            key = next_key
            value = next_value

        first_head = y + row.to(tl.int64) * y_row + kv_head * GROUP * D
        y_at = first_head + member[:, None] * D + d[None, :]
        if ONE:  # noqa: SIM114 - known at compile time, the next one is not
            tl.store(y_at, (acc / total[:, None]).to(y.dtype.element_ty), mask=real)
        elif first_part == last_part:
            tl.store(y_at, (acc / total[:, None]).to(y.dtype.element_ty), mask=real)
        else:
            group = row * KV_HEADS + kv_head
            base = group.to(tl.int64) * (part_count * GROUP)
            at_part = base + part * GROUP + member
            tl.store(parts + at_part[:, None] * D + d[None, :], acc, mask=real)
            tl.store(tops + at_part, best, mask=member < GROUP)
            tl.store(sums + at_part, total, mask=member < GROUP)
            # All threads of this program have stored when the barrier lets the first go on, and its addition
            # releases, to the whole GPU, what lies before it, the barrier included. The program that finds
            # all others arrived has read the count that each of them left (additions follow each other in
            # one order, and continue each other's releases): it acquires what they stored, and its other
            # threads go on only when the first has handed them the count, through a barrier again.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + group, 1, sem="acq_rel", scope="gpu")
            if arrived == last_part - first_part:
                tl.store(arrivals + group, 0)  # for the next launch, which waits for the end of this one
                _join(
                    parts + base * D, tops + base, sums + base, first_head, first_part, last_part,
                    GROUP, GROUP_JOINED, D, D_PADDED, CHUNK,
                )  # fmt: skip
