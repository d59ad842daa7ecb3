// Reading codes with AVX-512. Included by files whose functions are all compiled for AVX-512 (a pragma there); everything is
// static, so that no such function can be merged with one of the same name that is compiled for a plain processor.
#pragma once

// Bits chosen by `mask` from `yes`, the others from `no`.
INLINE __m512i select_bits(__m512i mask, __m512i yes, __m512i no) { return _mm512_ternarylogic_epi32(mask, yes, no, 0xca); }

template <int RIGHT>
INLINE __m512i shift_bits(__m512i value) {
    if constexpr (RIGHT > 0) return _mm512_srli_epi32(value, RIGHT);
    else if constexpr (RIGHT < 0) return _mm512_slli_epi32(value, -RIGHT);
    else return value;
}

// Where one row of one block lies: stream 0, and the higher streams by number.
template <int B>
struct Source {
    const uint8_t* pairs;
    const uint8_t* plane[B < 3 ? 1 : B - 1];
};

// The leading (up to) four bits of the codes of a quarter, eight to a dword, in the bit order of the index for even quarters and with
// the pairs of bits swapped for odd ones; bits above B are rubbish.
template <int B, int QUARTER>
INLINE __m512i leading_bits(const Source<B>& source) {
    const __m512i pairs = _mm512_loadu_si512(source.pairs + (QUARTER / 2) * 64);
    if constexpr (B == 2) return pairs;
    else {
        __m512i planes = shift_bits<QUARTER / 2>(_mm512_loadu_si512(source.plane[1]));
        if constexpr (B > 3) {
            const __m512i plane3 = shift_bits<-(QUARTER / 2)>(_mm512_loadu_si512(source.plane[2]));
            planes = select_bits(_mm512_set1_epi32(0x55555555), planes, plane3);
        }
        return select_bits(_mm512_set1_epi32(QUARTER % 2 ? (int)0xcccccccc : 0x33333333), pairs, planes);
    }
}

// Bits 4.. of the codes of a quarter, eight nibbles to a dword; bits above B are rubbish.
template <int B, int QUARTER>
INLINE __m512i trailing_bits(const Source<B>& source) {
    __m512i bits = shift_bits<QUARTER>(_mm512_loadu_si512(source.plane[3]));
    if constexpr (B > 5) bits = select_bits(_mm512_set1_epi32(0x22222222), shift_bits<QUARTER - 1>(_mm512_loadu_si512(source.plane[4])), bits);
    if constexpr (B > 6) bits = select_bits(_mm512_set1_epi32(0x44444444), shift_bits<QUARTER - 2>(_mm512_loadu_si512(source.plane[5])), bits);
    if constexpr (B > 7) bits = select_bits(_mm512_set1_epi32((int)0x88888888), shift_bits<QUARTER - 3>(_mm512_loadu_si512(source.plane[6])), bits);
    return bits;
}

template <int B>
INLINE Source<B> source_of(const PmpdMatrix* m, const Shape& s, int64_t group, int row, int64_t block, int64_t pair_bytes) {
    Source<B> source;
    source.pairs = m->stream[0] + group * s.group_bytes[0] + block * GROUP_ROWS * 128 + row * pair_bytes;
    for (int stream = 1; stream < B - 1; ++stream)
        source.plane[stream] = m->stream[stream] + group * s.group_bytes[1] + (block * GROUP_ROWS + row) * 64;
    return source;
}

// Asks for what this row needs some blocks later: streams are read from front to back, across rows, but by more streams, and faster,
// than the processor's own prefetching keeps up with. Past the end of a stream this does nothing.
template <int B>
INLINE void prefetch(const Source<B>& source) {
    constexpr int blocks = 8;
    _mm_prefetch((const char*)source.pairs + blocks * GROUP_ROWS * 128, _MM_HINT_T0);
    _mm_prefetch((const char*)source.pairs + blocks * GROUP_ROWS * 128 + 64, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int stream = 1; stream < B - 1; ++stream) _mm_prefetch((const char*)source.plane[stream] + blocks * GROUP_ROWS * 64, _MM_HINT_T0);
}
