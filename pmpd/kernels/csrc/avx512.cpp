// AVX-512 (F, BW, VL, DQ): float32 tokens. Codes index a table of 16 float32 in one register (5 to 8 bits: in 2 to 16 registers).
#include "bitplane.h"

#ifdef PMPD_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#include "attention.h"
#include "avx512_common.h"

namespace {

INLINE __m512 load_floats(const void* table, int bfloat16, int64_t at) {  // 16 entries
    if (!bfloat16) return _mm512_loadu_ps((const float*)table + at);
    const __m256i words = _mm256_loadu_si256((const __m256i*)((const uint16_t*)table + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// A row's table: B <= 4 in two registers, for even and odd quarters, repeated over the rubbish bits; else in 2**(B-4) registers.
template <int B>
struct Table {
    __m512 part[B <= 4 ? 2 : 1 << (B - 4)];
};

template <int B>
INLINE void read_table(const PmpdMatrix* m, int64_t row, Table<B>& t) {
    const int64_t at = row << B;
    if constexpr (B <= 4) {
        const __mmask16 some = (__mmask16)((1u << (1 << B)) - 1);
        __m512 natural;
        if (m->bfloat16) {
            const __m256i words = _mm256_maskz_loadu_epi16(some, (const uint16_t*)m->table[B] + at);
            natural = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
        } else {
            natural = _mm512_maskz_loadu_ps(some, (const float*)m->table[B] + at);
        }
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i odd = _mm512_or_si512(_mm512_srli_epi32(lanes, 2), _mm512_slli_epi32(_mm512_and_si512(lanes, _mm512_set1_epi32(3)), 2));
        const __m512i valid = _mm512_set1_epi32((1 << B) - 1);
        t.part[0] = _mm512_permutexvar_ps(_mm512_and_si512(lanes, valid), natural);
        t.part[1] = _mm512_permutexvar_ps(_mm512_and_si512(odd, valid), natural);
    } else {
        for (int i = 0; i < 1 << (B - 4); ++i) t.part[i] = load_floats(m->table[B], m->bfloat16, at + 16 * i);
    }
}

template <int B>
INLINE __m512 look_up(const Table<B>& t, __m512i index) {  // B > 4; bits above B are rubbish
    __m512 found[1 << (B - 5)];
    for (int i = 0; i < 1 << (B - 5); ++i) found[i] = _mm512_permutex2var_ps(t.part[2 * i], index, t.part[2 * i + 1]);
    for (int bit = 5; bit < B; ++bit) {
        const __mmask16 set = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
        for (int i = 0; i < 1 << (B - 1 - bit); ++i) found[i] = _mm512_mask_blend_ps(set, found[2 * i], found[2 * i + 1]);
    }
    return found[0];
}

// What happens to 16 weights of a row: they are multiplied with tokens ...
template <int R, int MT>
struct Dot {
    const float* x[MT];
    __m512 sum[R][MT];
    INLINE_MEMBER void run(const __m512 (&weight)[R], int64_t column) {
#pragma GCC unroll 8
        for (int t = 0; t < MT; ++t) {
            const __m512 value = _mm512_loadu_ps(x[t] + column);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r][t] = _mm512_fmadd_ps(weight[r], value, sum[r][t]);
        }
    }
};

// ... or stored.
template <int R>
struct Store {
    void* row[R];  // null: a row past the last
    int bfloat16;
    INLINE_MEMBER void run(const __m512 (&weight)[R], int64_t column) {
        for (int r = 0; r < R; ++r) {
            if (!row[r]) continue;
            if (bfloat16)  // the table is bfloat16 already: the lower halves are 0
                _mm256_storeu_si256((__m256i*)((uint16_t*)row[r] + column), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(weight[r]), 16)));
            else
                _mm512_storeu_ps((float*)row[r] + column, weight[r]);
        }
    }
};

// The next 16 columns of a quarter.
template <int B, int R, int QUARTER, class Sink>
INLINE void next(__m512i (&high)[R], __m512i (&low)[R], const Table<B> (&table)[R], int64_t column, Sink& sink) {
    __m512 weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        if constexpr (B <= 4) {
            weight[r] = _mm512_permutexvar_ps(high[r], table[r].part[QUARTER % 2]);
        } else {
            weight[r] = look_up<B>(table[r], select_bits(_mm512_set1_epi32(15), high[r], _mm512_slli_epi32(low[r], 4)));
            low[r] = _mm512_srli_epi32(low[r], 4);
        }
        high[r] = _mm512_srli_epi32(high[r], 4);
    }
    sink.run(weight, column);
}

template <int B, int R, int QUARTER, bool FULL, class Sink>
INLINE void quarter(const Source<B> (&source)[R], const Table<B> (&table)[R], int runs, int64_t column, Sink& sink) {
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
        for (int run = 0; run < 8; ++run) next<B, R, QUARTER>(high, low, table, column + run * RUN_COLUMNS, sink);
    } else {
#pragma GCC unroll 1
        for (int run = 0; run < runs; ++run) next<B, R, QUARTER>(high, low, table, column + run * RUN_COLUMNS, sink);
    }
}

// Two bits: quarters 0 and 1 (2 and 3) are in one register, so one shift serves two runs.
template <int R, int HALF, class Sink>
INLINE void half_of_two_bits(const Source<2> (&source)[R], const Table<2> (&table)[R], int64_t column, Sink& sink) {
    __m512i codes[R];
    for (int r = 0; r < R; ++r) codes[r] = leading_bits<2, 2 * HALF>(source[r]);
#pragma GCC unroll 4
    for (int run = 0; run < 8; ++run) {
        __m512 weight[R];
        for (int r = 0; r < R; ++r) weight[r] = _mm512_permutexvar_ps(codes[r], table[r].part[0]);
        sink.run(weight, column + run * RUN_COLUMNS);
        for (int r = 0; r < R; ++r) weight[r] = _mm512_permutexvar_ps(codes[r], table[r].part[1]);
        sink.run(weight, column + (8 + run) * RUN_COLUMNS);
        for (int r = 0; r < R; ++r) codes[r] = _mm512_srli_epi32(codes[r], 4);
    }
}

// R rows from `row` of a group, all columns.
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
        const int64_t column = block * BLOCK_COLUMNS;
        if constexpr (B == 2) {
            half_of_two_bits<R, 0>(source, table, column, sink);
            half_of_two_bits<R, 1>(source, table, column + 256, sink);
        } else {
            quarter<B, R, 0, true>(source, table, 8, column, sink);
            quarter<B, R, 1, true>(source, table, 8, column + 128, sink);
            quarter<B, R, 2, true>(source, table, 8, column + 256, sink);
            quarter<B, R, 3, true>(source, table, 8, column + 384, sink);
        }
    }
    const int runs = s.tail_runs;
    if (runs > 0) {
        for (int r = 0; r < R; ++r) source[r] = source_of<B>(m, s, group, row + r, s.full_blocks, s.tail_pair_bytes);
        const int64_t column = s.full_blocks * BLOCK_COLUMNS;
        quarter<B, R, 0, false>(source, table, runs < 8 ? runs : 8, column, sink);
        if (runs > 8) quarter<B, R, 1, false>(source, table, runs < 16 ? runs - 8 : 8, column + 128, sink);
        if (runs > 16) quarter<B, R, 2, false>(source, table, runs < 24 ? runs - 16 : 8, column + 256, sink);
        if (runs > 24) quarter<B, R, 3, false>(source, table, runs - 24, column + 384, sink);
    }
}

// `count` <= MT tokens from `token` with a group of rows (the first takes the places that are left over). The order of additions is
// the same for every MT: a token's result does not depend on how many others are multiplied with it.
template <int B, int MT>
void dot_group(const Job* job, const Shape& s, int64_t group, int64_t token, int count) {
    constexpr int R = B > 4 ? 1 : MT > 4 ? 2 : 4;
    for (int row = 0; row < GROUP_ROWS; row += R) {
        Dot<R, MT> dot;
        for (int t = 0; t < MT; ++t) {
            const int64_t at = token + (t < count ? t : 0);
            dot.x[t] = (const float*)job->x + at * job->x_stride;
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < MT; ++t) dot.sum[r][t] = _mm512_setzero_ps();
        rows<B, R>(job->matrix, s, group, row, dot);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int t = 0; t < MT; ++t)
                if (t < count) put(job, token + t, group * GROUP_ROWS + row + r, _mm512_reduce_add_ps(dot.sum[r][t]));
    }
}

template <int B>
void store_group(const Job* job, const Shape& s, int64_t group) {
    constexpr int R = B > 4 ? 1 : 4;
    const PmpdMatrix* m = job->matrix;
    for (int row = 0; row < GROUP_ROWS; row += R) {
        Store<R> store;
        store.bfloat16 = m->bfloat16;
        for (int r = 0; r < R; ++r) {
            const int64_t n = group * GROUP_ROWS + row + r;
            store.row[r] = n < m->rows ? (char*)job->y + (n - job->first_row) * job->y_stride * (m->bfloat16 ? 2 : 4) : nullptr;
        }
        rows<B, R>(m, s, group, row, store);
    }
}

typedef void (*DotFn)(const Job*, const Shape&, int64_t, int64_t, int);
typedef void (*StoreFn)(const Job*, const Shape&, int64_t);

#define TOKENS(B) {dot_group<B, 1>, dot_group<B, 2>, dot_group<B, 4>, dot_group<B, 8>}
const DotFn dot_functions[MAX_BITS + 1][4] = {{}, {}, TOKENS(2), TOKENS(3), TOKENS(4), TOKENS(5), TOKENS(6), TOKENS(7), TOKENS(8)};
const StoreFn store_functions[MAX_BITS + 1] = {nullptr, nullptr, store_group<2>, store_group<3>, store_group<4>, store_group<5>, store_group<6>, store_group<7>, store_group<8>};

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

void dequantize(const Job* job, int64_t begin, int64_t end) {
    const Shape s = shape_of(job->matrix);
    for (int64_t group = begin; group < end; ++group) store_functions[job->bits](job, s, group);
}

}  // namespace

const Level avx512_level = {"avx512", linear, dequantize, attend};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
