// AVX-512 with VNNI: bfloat16 tokens, in fixed point. A block of a token's columns and a row's table become integers of 13 bits and a
// sign, with one scale each; codes index a table of 32 of them in one register (6 to 8 bits: in 2 to 8 registers), which gives 32
// weights at once; products of pairs are added in 32-bit integers without rounding, and blocks in float32.
// Why not vdpbf16ps: where it takes two cycles (Sapphire Rapids: measured, and both vector ports are busy), it is slower than float32
// arithmetic, vpdpwssd takes half a cycle; and 13 bits of a table are more than the 8 of bfloat16.
#include "bitplane.h"

#ifdef PMPD_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#include "avx512_common.h"

namespace {

// A row's table: B <= 4 in two registers, for even and odd quarters, repeated over the rubbish bits; 5 in one; else in 2**(B-5).
template <int B>
struct Table {
    __m512i part[B <= 4 ? 2 : 1 << (B - 5)];
};

template <int B>
INLINE void read_table(const PmpdMatrix* m, int64_t row, Table<B>& t) {
    const int16_t* at = m->fixed_table[B] + (row << B);
    if constexpr (B <= 4) {
        const __m512i natural = _mm512_maskz_loadu_epi16((__mmask32)((1u << (1 << B)) - 1), at);
        const __m512i lanes = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6,
                                               5, 4, 3, 2, 1, 0);
        const __m512i three = _mm512_set1_epi16(3);
        const __m512i odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(lanes, 2), three), _mm512_slli_epi16(_mm512_and_si512(lanes, three), 2));
        const __m512i valid = _mm512_set1_epi16((1 << B) - 1);
        t.part[0] = _mm512_permutexvar_epi16(_mm512_and_si512(lanes, valid), natural);
        t.part[1] = _mm512_permutexvar_epi16(_mm512_and_si512(odd, valid), natural);
    } else {
        for (int i = 0; i < 1 << (B - 5); ++i) t.part[i] = _mm512_loadu_si512(at + 32 * i);
    }
}

template <int B>
INLINE __m512i look_up(const Table<B>& t, __m512i index) {  // B > 4; bits above B are rubbish
    if constexpr (B == 5) return _mm512_permutexvar_epi16(index, t.part[0]);
    else {
        __m512i found[1 << (B - 6)];
        for (int i = 0; i < 1 << (B - 6); ++i) found[i] = _mm512_permutex2var_epi16(t.part[2 * i], index, t.part[2 * i + 1]);
        for (int bit = 6; bit < B; ++bit) {
            const __mmask32 set = _mm512_test_epi16_mask(index, _mm512_set1_epi16((short)(1 << bit)));
            for (int i = 0; i < 1 << (B - 1 - bit); ++i) found[i] = _mm512_mask_blend_epi16(set, found[2 * i], found[2 * i + 1]);
        }
        return found[0];
    }
}

template <int R, int MT>
struct Dot {
    const uint32_t* x[MT];  // pairs
    const float* scale[MT];  // of a token's blocks
    __m512i sum[R][MT];    // of the current block
    __m512 total[R][MT];
    INLINE_MEMBER void run(const __m512i (&weight)[R], int64_t pair) {
#pragma GCC unroll 8
        for (int t = 0; t < MT; ++t) {
            const __m512i value = _mm512_loadu_si512(x[t] + pair);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r][t] = _mm512_dpwssd_epi32(sum[r][t], weight[r], value);
        }
    }
    // 32 products of 2 * 13 bits were added per lane: less than 2**31.
    INLINE_MEMBER void end_block(int64_t block) {
#pragma GCC unroll 8
        for (int t = 0; t < MT; ++t) {
            const __m512 factor = _mm512_set1_ps(scale[t][block]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][t]), factor, total[r][t]);
                sum[r][t] = _mm512_setzero_si512();
            }
        }
    }
};

// The next 16 pairs of a quarter.
template <int B, int R, int QUARTER, class Sink>
INLINE void next(__m512i (&high)[R], __m512i (&low)[R], const Table<B> (&table)[R], int64_t pair, Sink& sink) {
    __m512i weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        if constexpr (B <= 4) {
            weight[r] = _mm512_permutexvar_epi16(high[r], table[r].part[QUARTER % 2]);
        } else {
            weight[r] = look_up<B>(table[r], select_bits(_mm512_set1_epi16(15), high[r], _mm512_slli_epi16(low[r], 4)));
            low[r] = _mm512_srli_epi16(low[r], 4);
        }
        high[r] = _mm512_srli_epi16(high[r], 4);
    }
    sink.run(weight, pair);
}

// `steps`: nibbles of a 16-bit lane that hold columns.
template <int B, int R, int QUARTER, bool FULL, class Sink>
INLINE void quarter(const Source<B> (&source)[R], const Table<B> (&table)[R], int steps, int64_t pair, Sink& sink) {
    __m512i high[R], low[R];
    for (int r = 0; r < R; ++r) {
        high[r] = leading_bits<B, QUARTER>(source[r]);
        if constexpr (B > 4) {
            low[r] = trailing_bits<B, QUARTER>(source[r]);
            if constexpr (QUARTER % 2)  // put the pairs of bits in the order of the table
                high[r] = select_bits(_mm512_set1_epi32(0x33333333), _mm512_srli_epi32(high[r], 2), _mm512_slli_epi32(high[r], 2));
        }
    }
    if constexpr (FULL) {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) next<B, R, QUARTER>(high, low, table, pair + step * 16, sink);
    } else {
#pragma GCC unroll 1
        for (int step = 0; step < steps; ++step) next<B, R, QUARTER>(high, low, table, pair + step * 16, sink);
    }
}

// Two bits: quarters 0 and 1 (2 and 3) are in one register, so one shift serves two lookups.
template <int R, int HALF, class Sink>
INLINE void half_of_two_bits(const Source<2> (&source)[R], const Table<2> (&table)[R], int64_t pair, Sink& sink) {
    __m512i codes[R];
    for (int r = 0; r < R; ++r) codes[r] = leading_bits<2, 2 * HALF>(source[r]);
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
        __m512i weight[R];
        for (int r = 0; r < R; ++r) weight[r] = _mm512_permutexvar_epi16(codes[r], table[r].part[0]);
        sink.run(weight, pair + step * 16);
        for (int r = 0; r < R; ++r) weight[r] = _mm512_permutexvar_epi16(codes[r], table[r].part[1]);
        sink.run(weight, pair + (4 + step) * 16);
        for (int r = 0; r < R; ++r) codes[r] = _mm512_srli_epi16(codes[r], 4);
    }
}

template <int B, int R, class Sink>
INLINE void rows(const PmpdMatrix* m, const Shape& s, int64_t group, int row, Sink& sink) {
    Table<B> table[R];
    for (int r = 0; r < R; ++r) read_table<B>(m, group * GROUP_ROWS + row + r, table[r]);
    Source<B> source[R];
    for (int64_t block = 0; block < s.full_blocks; ++block) {
        for (int r = 0; r < R; ++r) {
            source[r] = source_of<B>(m, s, group, row + r, block, 128);
            prefetch<B>(source[r]);
        }
        const int64_t pair = block * (BLOCK_COLUMNS / 2);
        if constexpr (B == 2) {
            half_of_two_bits<R, 0>(source, table, pair, sink);
            half_of_two_bits<R, 1>(source, table, pair + 128, sink);
        } else {
            quarter<B, R, 0, true>(source, table, 4, pair, sink);
            quarter<B, R, 1, true>(source, table, 4, pair + 64, sink);
            quarter<B, R, 2, true>(source, table, 4, pair + 128, sink);
            quarter<B, R, 3, true>(source, table, 4, pair + 192, sink);
        }
        sink.end_block(block);
    }
    const int runs = s.tail_runs;
    if (runs > 0) {
        for (int r = 0; r < R; ++r) source[r] = source_of<B>(m, s, group, row + r, s.full_blocks, s.tail_pair_bytes);
        const int64_t pair = s.full_blocks * (BLOCK_COLUMNS / 2);
        quarter<B, R, 0, false>(source, table, runs < 4 ? runs : 4, pair, sink);
        if (runs > 8) quarter<B, R, 1, false>(source, table, runs < 12 ? runs - 8 : 4, pair + 64, sink);
        if (runs > 16) quarter<B, R, 2, false>(source, table, runs < 20 ? runs - 16 : 4, pair + 128, sink);
        if (runs > 24) quarter<B, R, 3, false>(source, table, runs < 28 ? runs - 24 : 4, pair + 192, sink);
        sink.end_block(s.full_blocks);
    }
}

// `count` <= MT tokens from `token` with a group of rows (the first takes the places that are left over). The order of additions is
// the same for every MT: a token's result does not depend on how many others are multiplied with it.
template <int B, int MT>
void dot_group(const Job* job, const Shape& s, int64_t group, int64_t token, int count) {
    constexpr int R = B > 4 ? 1 : MT > 4 ? 2 : 4;
    const PmpdMatrix* m = job->matrix;
    for (int row = 0; row < GROUP_ROWS; row += R) {
        Dot<R, MT> dot;
        for (int t = 0; t < MT; ++t) {
            const int64_t at = token + (t < count ? t : 0);
            dot.x[t] = (const uint32_t*)job->x + at * job->x_stride;
            dot.scale[t] = job->scales + at * job->scales_stride;
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < MT; ++t) {
                dot.sum[r][t] = _mm512_setzero_si512();
                dot.total[r][t] = _mm512_setzero_ps();
            }
        rows<B, R>(m, s, group, row, dot);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const int64_t n = group * GROUP_ROWS + row + r;
#pragma GCC unroll 8
            for (int t = 0; t < MT; ++t)
                if (t < count) put(job, token + t, n, _mm512_reduce_add_ps(dot.total[r][t]) * m->fixed_scale[B][n]);
        }
    }
}

// bfloat16 tokens -> integers in pairs, and a scale per block. For every 128 columns 4 vectors; pair `lane` of vector v = columns
// 16 v + lane and 16 (v + 4) + lane, which is how the nibbles of a dword fall into two 16-bit lanes. Columns past the last are 0.
void prepare(const Job* job, const uint16_t* x, int64_t x_stride, uint32_t* pairs, float* scales) {
    const int64_t columns = job->matrix->columns;
    for (int64_t token = 0; token < job->tokens; ++token) {
        const uint16_t* in = x + token * x_stride;
        uint32_t* out = pairs + token * job->x_stride;
        for (int64_t block = 0; block * BLOCK_COLUMNS < columns; ++block) {
            const int64_t first = block * BLOCK_COLUMNS, left = columns - first, size = left < BLOCK_COLUMNS ? left : (int64_t)BLOCK_COLUMNS;
            __m512i largest = _mm512_setzero_si512();  // as integers: larger than that of any number where there is an infinity or a NaN
            for (int64_t i = 0; i < size; i += 32) {   // columns are a multiple of 32
                const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(in + first + i), _mm512_set1_epi16(0x7fff));
                largest = _mm512_max_epu16(largest, bits);
            }
            const __m512i even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(largest, 16);
            const float top = from_bfloat16((uint16_t)_mm512_reduce_max_epu32(_mm512_max_epu32(even, odd)));
            const float scale = top / FIXED_MAX;
            scales[token * job->scales_stride + block] = scale - scale == 0 ? scale : __builtin_nanf("");  // an infinity or a NaN spoils the sum
            const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? FIXED_MAX / top : 0.0f);
            for (int64_t unit = 0; unit < size; unit += 128)
                for (int64_t i = 0; i < 64; i += 16) {
                    const int64_t column = first + unit + i;
                    const __m256i low = column < columns ? _mm256_loadu_si256((const __m256i*)(in + column)) : _mm256_setzero_si256();
                    const __m256i high = column + 64 < columns ? _mm256_loadu_si256((const __m256i*)(in + column + 64)) : _mm256_setzero_si256();
                    const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
                    const __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
                    const __m512i ia = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), ib = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
                    const __m512i both = _mm512_or_si512(_mm512_and_si512(ia, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(ib, 16));
                    _mm512_storeu_si512(out + (first + unit) / 2 + i, both);
                }
        }
    }
}

typedef void (*DotFn)(const Job*, const Shape&, int64_t, int64_t, int);

#define TOKENS(B) {dot_group<B, 1>, dot_group<B, 2>, dot_group<B, 4>, dot_group<B, 8>}
const DotFn dot_functions[MAX_BITS + 1][4] = {{}, {}, TOKENS(2), TOKENS(3), TOKENS(4), TOKENS(5), TOKENS(6), TOKENS(7), TOKENS(8)};

void linear(const Job* job, int64_t begin, int64_t end) {
    const Shape s = shape_of(job->matrix);
    for (int64_t first = begin; first < end; first += TILE_GROUPS) {
        const int64_t last = first + TILE_GROUPS < end ? first + TILE_GROUPS : end;
        for (int64_t token = 0; token < job->tokens; token += MAX_PASS_TOKENS) {
            const int64_t left = job->tokens - token, pass = left < MAX_PASS_TOKENS ? left : (int64_t)MAX_PASS_TOKENS;
            const DotFn dot = dot_functions[job->bits][pass > 4 ? 3 : pass > 2 ? 2 : pass - 1];
            for (int64_t group = first; group < last; ++group) dot(job, s, group, token, (int)pass);
        }
    }
}

}  // namespace

const Level avx512vnni_level = {"avx512vnni", nullptr, linear, prepare, nullptr, nullptr};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
