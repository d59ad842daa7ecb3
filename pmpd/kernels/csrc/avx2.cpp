// AVX2 with FMA: float32 tokens. Up to 4 bits, codes index tables of 8 float32 in one or two registers; above, a table in memory.
#include "bitplane.h"

#ifdef PMPD_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "attention.h"

namespace {

template <int LEFT>
INLINE __m256i shift_left(__m256i value) {
    if constexpr (LEFT > 0) return _mm256_slli_epi32(value, LEFT);
    else if constexpr (LEFT < 0) return _mm256_srli_epi32(value, -LEFT);
    else return value;
}

INLINE __m256i load(const uint8_t* at) { return _mm256_loadu_si256((const __m256i*)at); }

template <int LEFT>
INLINE __m256i plane_bits(const uint8_t* at, int mask) { return _mm256_and_si256(shift_left<LEFT>(load(at)), _mm256_set1_epi32(mask)); }

// Index bits 0..3, and 4..7, of half a quarter (8 lanes), eight nibbles to a dword; bits above B are 0.
template <int B, int QUARTER>
INLINE void read_bits(const uint8_t* pairs, const uint8_t* const* plane, int half, __m256i& high, __m256i& low) {
    constexpr int shift2[4] = {0, 2, -1, 1}, shift3[4] = {0, 2, 1, 3};
    high = _mm256_and_si256(shift_left<-2 * (QUARTER % 2)>(load(pairs + (QUARTER / 2) * 64 + half * 32)), _mm256_set1_epi32(0x33333333));
    if constexpr (B > 2) high = _mm256_or_si256(high, plane_bits<shift2[QUARTER]>(plane[1] + half * 32, 0x44444444));
    if constexpr (B > 3) high = _mm256_or_si256(high, plane_bits<shift3[QUARTER]>(plane[2] + half * 32, (int)0x88888888));
    if constexpr (B > 4) low = plane_bits<-QUARTER>(plane[3] + half * 32, 0x11111111);
    if constexpr (B > 5) low = _mm256_or_si256(low, plane_bits<1 - QUARTER>(plane[4] + half * 32, 0x22222222));
    if constexpr (B > 6) low = _mm256_or_si256(low, plane_bits<2 - QUARTER>(plane[5] + half * 32, 0x44444444));
    if constexpr (B > 7) low = _mm256_or_si256(low, plane_bits<3 - QUARTER>(plane[6] + half * 32, (int)0x88888888));
}

template <int B>
INLINE __m256 look_up(const float* table, __m256 first, __m256 second, __m256i high, __m256i low) {
    if constexpr (B <= 3) return _mm256_permutevar8x32_ps(first, high);
    else if constexpr (B == 4)
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, high), _mm256_permutevar8x32_ps(second, high), _mm256_castsi256_ps(_mm256_slli_epi32(high, 28)));
    else {
        const __m256i nibble = _mm256_set1_epi32(15);
        const __m256i index = _mm256_or_si256(_mm256_and_si256(high, nibble), _mm256_slli_epi32(_mm256_and_si256(low, nibble), 4));
        return _mm256_i32gather_ps(table, index, 4);
    }
}

template <int R, int MT>
struct Sums {
    __m256 of[R][MT];
};

template <int B, int R, int MT, int QUARTER>
INLINE void quarter(const uint8_t* const (&pairs)[R], const uint8_t* const (&plane)[R][MAX_STREAMS], const float* const (&table)[R],
                    const float* const (&x)[MT], int runs, int64_t column, Sums<R, MT>& sums) {
    __m256 first[R], second[R];
    for (int r = 0; r < R; ++r) {
        first[r] = _mm256_loadu_ps(table[r]);
        second[r] = _mm256_loadu_ps(table[r] + 8);
    }
    for (int half = 0; half < 2; ++half) {
        __m256i high[R], low[R];
        for (int r = 0; r < R; ++r) {
            low[r] = _mm256_setzero_si256();
            read_bits<B, QUARTER>(pairs[r], plane[r], half, high[r], low[r]);
        }
#pragma GCC unroll 2
        for (int run = 0; run < runs; ++run) {
            __m256 weight[R];
            for (int r = 0; r < R; ++r) {
                weight[r] = look_up<B>(table[r], first[r], second[r], high[r], low[r]);
                high[r] = _mm256_srli_epi32(high[r], 4);
                if constexpr (B > 4) low[r] = _mm256_srli_epi32(low[r], 4);
            }
            for (int t = 0; t < MT; ++t) {
                const __m256 value = _mm256_loadu_ps(x[t] + column + run * RUN_COLUMNS + half * 8);
                for (int r = 0; r < R; ++r) sums.of[r][t] = _mm256_fmadd_ps(weight[r], value, sums.of[r][t]);
            }
        }
    }
}

INLINE float add_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// As in avx512.cpp: `count` <= MT tokens, one order of additions for every MT.
template <int B, int MT>
void dot_group(const Job* job, const Shape& s, int64_t group, int64_t token, int count) {
    constexpr int R = B > 4 ? 1 : MT > 1 ? 2 : 4;
    const PmpdMatrix* m = job->matrix;
    const float* x[MT];
    for (int t = 0; t < MT; ++t) x[t] = (const float*)job->x + (token + (t < count ? t : 0)) * job->x_stride;
    for (int row = 0; row < GROUP_ROWS; row += R) {
        float values[R][B < 4 ? 16 : 1 << B] = {};
        const float* table[R];
        Sums<R, MT> sums;
        for (int r = 0; r < R; ++r) {
            const int64_t at = (group * GROUP_ROWS + row + r) << B;
            for (int i = 0; i < 1 << B; ++i)
                values[r][i] = m->bfloat16 ? from_bfloat16(((const uint16_t*)m->table[B])[at + i]) : ((const float*)m->table[B])[at + i];
            table[r] = values[r];
            for (int t = 0; t < MT; ++t) sums.of[r][t] = _mm256_setzero_ps();
        }
        for (int64_t block = 0; block < s.full_blocks + (s.tail_runs > 0); ++block) {
            const int runs = block < s.full_blocks ? BLOCK_RUNS : s.tail_runs;
            const int64_t pair_bytes = block < s.full_blocks ? 128 : s.tail_pair_bytes, column = block * BLOCK_COLUMNS;
            const uint8_t *pairs[R], *plane[R][MAX_STREAMS] = {};
            for (int r = 0; r < R; ++r) {
                pairs[r] = m->stream[0] + group * s.group_bytes[0] + block * GROUP_ROWS * 128 + (row + r) * pair_bytes;
                _mm_prefetch((const char*)pairs[r] + 4096, _MM_HINT_T0);
                _mm_prefetch((const char*)pairs[r] + 4160, _MM_HINT_T0);
                for (int stream = 1; stream < B - 1; ++stream) {
                    plane[r][stream] = m->stream[stream] + group * s.group_bytes[1] + (block * GROUP_ROWS + row + r) * 64;
                    _mm_prefetch((const char*)plane[r][stream] + 2048, _MM_HINT_T0);
                }
            }
            quarter<B, R, MT, 0>(pairs, plane, table, x, runs < 8 ? runs : 8, column, sums);
            if (runs > 8) quarter<B, R, MT, 1>(pairs, plane, table, x, runs < 16 ? runs - 8 : 8, column + 128, sums);
            if (runs > 16) quarter<B, R, MT, 2>(pairs, plane, table, x, runs < 24 ? runs - 16 : 8, column + 256, sums);
            if (runs > 24) quarter<B, R, MT, 3>(pairs, plane, table, x, runs - 24, column + 384, sums);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < MT; ++t)
                if (t < count) put(job, token + t, group * GROUP_ROWS + row + r, add_lanes(sums.of[r][t]));
    }
}

typedef void (*DotFn)(const Job*, const Shape&, int64_t, int64_t, int);

#define TOKENS(B) {dot_group<B, 1>, dot_group<B, 4>}
const DotFn dot_functions[MAX_BITS + 1][2] = {{}, {}, TOKENS(2), TOKENS(3), TOKENS(4), TOKENS(5), TOKENS(6), TOKENS(7), TOKENS(8)};

void linear(const Job* job, int64_t begin, int64_t end) {
    const Shape s = shape_of(job->matrix);
    for (int64_t first = begin; first < end; first += TILE_GROUPS) {
        const int64_t last = first + TILE_GROUPS < end ? first + TILE_GROUPS : end;
        for (int64_t token = 0; token < job->tokens; token += 4) {
            const int64_t left = job->tokens - token, pass = left < 4 ? left : 4;
            for (int64_t group = first; group < last; ++group) dot_functions[job->bits][pass > 1](job, s, group, token, (int)pass);
        }
    }
}

}  // namespace

const Level avx2_level = {"avx2", linear, nullptr, attend};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
