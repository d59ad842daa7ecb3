// Products in fixed point: table values of 8 bits times tokens of 8 bits, added as integers. For matrices of bfloat16 models with at
// most four planes. Compiled once per class of processors (everything is static), with one difference: how products are added.
//
// Memory layout. Rows go in groups of GROUP_ROWS, columns in halves of 128; two halves are a unit, the last unit may have one half
// only. Columns past the last hold code 0, and tokens are 0 there.
//   stream 0 (planes 0 and 1): [group][unit][row][32 bytes a half]. Byte i of a half holds the codes' two leading bits of columns i,
//     32 + i, 64 + i and 96 + i in its bits 0-1, 2-3, 4-5 and 6-7, the more significant one above.
//   stream 1 (plane 2) and stream 2 (plane 3): [group][unit][row][32 bytes]. Byte i holds one bit of columns i, 32 + i, ... of both
//     halves. Column 32 j + i of half h has its bit at 2 (j ^ 1) + (h ^ (stream == 2)).
// So b bits read the first b - 1 streams and nothing else, and masked merges of whole registers give indices of 4 bits, whatever the
// precision: a merge leaves the table's index permuted, or with bits of other columns where b < 4. Instead of mending that, the table
// in registers is permuted or repeated: four variants, by half and by parity of j.
//
// A row's table is 16 bytes u with value = scale * u + low. A token is int8 with a scale per unit. So
//   y = scale * sum_units(scale_of_unit * sum(u * x)) + low * sum_units(scale_of_unit * sum(x)):
// integers within a unit are exact, in whatever order they are added. u is at most 31, 63 and 127 at 2, 3 and 4 bits, so that 8, 4 and 2
// products fit the 16 bits that AVX2 adds them in (fewer levels need fewer digits); matrices of 8 bits (a head) hold signed bytes, whose
// sign is moved to the token and back.
#pragma once
#include "attention.h"
#include "bitplane.h"

#include <immintrin.h>

namespace {

// ------------------------------------------------------------------------------------------------------------------- tokens

// x [columns] -> int8 [halves * 128], a scale per unit, and the sum of what the integers are worth. Not finite: the unit's scale is NaN.
void prepare_token(const float* x, int64_t columns, int8_t* out, float* scales, float* sum) {
    const int64_t padded = (columns + HALF_COLUMNS - 1) / HALF_COLUMNS * HALF_COLUMNS;
    float total = 0;
    for (int64_t first = 0; first < padded; first += UNIT_COLUMNS) {
        const int64_t left = columns - first, size = left < UNIT_COLUMNS ? left : (int64_t)UNIT_COLUMNS;  // a multiple of 32
        __m256i largest = _mm256_setzero_si256();  // as integers: larger than that of any number where there is an infinity or a NaN
        for (int64_t i = 0; i < size; i += 8)
            largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + first + i)), _mm256_set1_epi32(0x7fffffff)));
        __m128i m = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
        const float top = _mm_cvtss_f32(_mm_castsi128_ps(m));
        const float scale = top / TOKEN_MAX;
        const __m256 inverse = _mm256_set1_ps(top > 1e-30f ? TOKEN_MAX / top : 0.0f);
        __m256i added = _mm256_setzero_si256();
        const int64_t stop = first + UNIT_COLUMNS < padded ? first + UNIT_COLUMNS : padded;
        for (int64_t at = first; at < stop; at += 32) {
            if (at >= columns) {
                _mm256_storeu_si256((__m256i*)(out + at), _mm256_setzero_si256());
                continue;
            }
            __m256i part[4];
            for (int i = 0; i < 4; ++i) {
                part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + at + 8 * i), inverse));
                added = _mm256_add_epi32(added, part[i]);
            }
            const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
            _mm256_storeu_si256((__m256i*)(out + at), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        }
        int32_t lanes[8], integers = 0;
        _mm256_storeu_si256((__m256i*)lanes, added);
        for (int i = 0; i < 8; ++i) integers += lanes[i];
        const float worth = scale - scale == 0 ? scale : __builtin_nanf("");
        scales[first / UNIT_COLUMNS] = worth;
        total += worth * (float)integers;
    }
    *sum = total;
}

// ------------------------------------------------------------------------------------------------------------------ weights

template <int B>
struct Tables {  // a row's, by 2 * half + parity of j; both 128-bit lanes alike
    __m256i variant[4];
};

template <int B>
INLINE void read_tables(const uint8_t* table, Tables<B>& t) {
    const __m256i natural = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    alignas(16) static const uint8_t order[3][4][16] = {
        {{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}, {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
         {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}, {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}},
        {{0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7}, {0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7},
         {0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7}, {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7}},
        {{0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15}, {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15},
         {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    };
    for (int v = 0; v < 4; ++v)
        t.variant[v] = _mm256_shuffle_epi8(natural, _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)order[B - 2][v])));
}

// Where a row's bytes of a unit lie.
struct Place {
    const uint8_t* stream[3];
};

template <int B>
INLINE Place place_of(const PmpdMatrix* m, const FixedShape& s, int64_t group, int row, int64_t unit) {
    Place place;
    place.stream[0] = m->stream[0] + group * s.group_bytes[0] + unit * (GROUP_ROWS * 64) + row * (unit < s.full_units ? 64 : 32);
    for (int stream = 1; stream < B - 1; ++stream) place.stream[stream] = m->stream[stream] + group * s.group_bytes[1] + (unit * GROUP_ROWS + row) * 32;
    return place;
}

INLINE __m256i load_bytes(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }

// Four-bit indices of a half: `even` has columns 0..31 in its low nibbles and 64..95 in its high ones, `odd` 32..63 and 96..127.
template <int B, int HALF>
INLINE void read_half(const Place& place, __m256i& even, __m256i& odd) {
    const __m256i base = load_bytes(place.stream[0] + HALF * 32);
    if constexpr (B == 2) {
        even = odd = base;
    } else {
        __m256i rest = load_bytes(place.stream[1]);
        if constexpr (B == 4) {
            const __m256i last = load_bytes(place.stream[2]);
            const __m256i differ = _mm256_and_si256(_mm256_xor_si256(rest, last), _mm256_set1_epi8((char)0xaa));
            rest = _mm256_xor_si256(HALF ? last : rest, differ);
        }
        const __m256i differ = _mm256_and_si256(_mm256_xor_si256(base, rest), _mm256_set1_epi8((char)0xcc));
        even = _mm256_xor_si256(base, differ);
        odd = _mm256_xor_si256(rest, differ);
    }
}

// Table bytes of the two times 32 columns at 64 * STEP of a half.
template <int B, int HALF, int STEP>
INLINE void look_up(const Tables<B>& t, __m256i even, __m256i odd, __m256i& first, __m256i& second) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i a = _mm256_and_si256(STEP ? _mm256_srli_epi16(even, 4) : even, nibble);
    const __m256i b = B == 2 ? a : _mm256_and_si256(STEP ? _mm256_srli_epi16(odd, 4) : odd, nibble);
    first = _mm256_shuffle_epi8(t.variant[2 * HALF], a);
    second = _mm256_shuffle_epi8(t.variant[2 * HALF + 1], b);
}

INLINE float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE __m256 add_unit(__m256 total, __m256i sum, float scale) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), total); }

INLINE void finish(const FixedJob* job, int64_t token, int64_t row, __m256 total) {
    if (row >= job->matrix->rows) return;
    const float* line = job->matrix->fixed_scale[job->bits] + 2 * row;
    float y = line[0] * sum_of(total) + line[1] * job->sums[token];
    if (job->matrix->bias) y += job->matrix->bias[row];
    if (job->kind == OUT_BFLOAT16) ((uint16_t*)job->y)[token * job->y_stride + row] = to_bfloat16(y);
    else if (job->kind == OUT_ADD) ((float*)job->y)[token * job->y_stride + row] += y;
    else ((float*)job->y)[token * job->y_stride + row] = y;
}

// -------------------------------------------------------------------------------------------------------- one token, from codes

template <int B, int HALF>
INLINE void half_of_group(const Place (&place)[GROUP_ROWS], const Tables<B> (&tables)[GROUP_ROWS], const int8_t* x, __m256i (&sum)[GROUP_ROWS]) {
    for (int r = 0; r < GROUP_ROWS; ++r) {
        __m256i even, odd, w[4];
        read_half<B, HALF>(place[r], even, odd);
        look_up<B, HALF, 0>(tables[r], even, odd, w[0], w[1]);
        look_up<B, HALF, 1>(tables[r], even, odd, w[2], w[3]);
        for (int first = 0; first < 4; first += steps<B>()) {
            __m256i part = _mm256_setzero_si256();
            for (int i = first; i < first + steps<B>(); ++i) part = add_products(part, w[i], load_bytes(x + 32 * i));
            sum[r] = add_part(sum[r], part);
        }
    }
}

template <int B>
void single_group(const FixedJob* job, const FixedShape& s, int64_t group) {
    const PmpdMatrix* m = job->matrix;
    Tables<B> tables[GROUP_ROWS];
    __m256 total[GROUP_ROWS];
    for (int r = 0; r < GROUP_ROWS; ++r) {
        read_tables<B>(m->fixed_table[B] + (group * GROUP_ROWS + r) * 16, tables[r]);
        total[r] = _mm256_setzero_ps();
    }
    for (int64_t unit = 0; unit < s.units; ++unit) {
        Place place[GROUP_ROWS];
        for (int r = 0; r < GROUP_ROWS; ++r) place[r] = place_of<B>(m, s, group, r, unit);
        for (int i = 0; i < 4; ++i) _mm_prefetch((const char*)place[0].stream[0] + 4096 + 64 * i, _MM_HINT_T0);
        for (int stream = 1; stream < B - 1; ++stream)
            for (int i = 0; i < 2; ++i) _mm_prefetch((const char*)place[0].stream[stream] + 2048 + 64 * i, _MM_HINT_T0);
        __m256i sum[GROUP_ROWS];
        for (int r = 0; r < GROUP_ROWS; ++r) sum[r] = _mm256_setzero_si256();
        half_of_group<B, 0>(place, tables, job->x + unit * UNIT_COLUMNS, sum);
        if (unit < s.full_units) half_of_group<B, 1>(place, tables, job->x + unit * UNIT_COLUMNS + HALF_COLUMNS, sum);
        for (int r = 0; r < GROUP_ROWS; ++r) total[r] = add_unit(total[r], sum[r], job->scales[unit]);
    }
    for (int r = 0; r < GROUP_ROWS; ++r) finish(job, 0, group * GROUP_ROWS + r, total[r]);
}

// ------------------------------------------------------------------------------------- more tokens: table bytes first, then products

// One row of a group as bytes [halves * 128]: the table's, or with `codes` the codes themselves.
template <int B>
void expand_row(const PmpdMatrix* m, const FixedShape& s, int64_t group, int row, uint8_t* out, bool codes) {
    alignas(16) static const uint8_t identity[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Tables<B> t;
    read_tables<B>(codes ? identity : m->fixed_table[B] + (group * GROUP_ROWS + row) * 16, t);
    for (int64_t unit = 0; unit < s.units; ++unit) {
        const Place place = place_of<B>(m, s, group, row, unit);
        __m256i even, odd, part[4];
        __m256i* at = (__m256i*)(out + unit * UNIT_COLUMNS);
        read_half<B, 0>(place, even, odd);
        look_up<B, 0, 0>(t, even, odd, part[0], part[1]);
        look_up<B, 0, 1>(t, even, odd, part[2], part[3]);
        for (int i = 0; i < 4; ++i) _mm256_storeu_si256(at + i, part[i]);
        if (unit == s.full_units) break;
        read_half<B, 1>(place, even, odd);
        look_up<B, 1, 0>(t, even, odd, part[0], part[1]);
        look_up<B, 1, 1>(t, even, odd, part[2], part[3]);
        for (int i = 0; i < 4; ++i) _mm256_storeu_si256(at + 4 + i, part[i]);
    }
}

typedef void (*ExpandFn)(const PmpdMatrix*, const FixedShape&, int64_t, int, uint8_t*, bool);
const ExpandFn expand_functions[5] = {nullptr, nullptr, expand_row<2>, expand_row<3>, expand_row<4>};

// Two rows of bytes (with B = 8 signed ones) times MT tokens. Units are added in the order of `single_group`, for any MT.
template <int MT, int B>
void multiply_bytes(const FixedJob* job, const FixedShape& s, const uint8_t* bytes, int64_t stride, int64_t row, int64_t token) {
    enum { R = 2 };
    const int8_t* x[MT];
    __m256 total[R][MT];
    for (int t = 0; t < MT; ++t) {
        x[t] = job->x + (token + t) * job->x_stride;
        for (int r = 0; r < R; ++r) total[r][t] = _mm256_setzero_ps();
    }
    for (int64_t unit = 0; unit < s.units; ++unit) {
        const int64_t first = unit * UNIT_COLUMNS, stop = unit < s.full_units ? first + UNIT_COLUMNS : first + HALF_COLUMNS;
        __m256i sum[R][MT];
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < MT; ++t) sum[r][t] = _mm256_setzero_si256();
        for (int64_t at = first; at < stop; at += 32 * steps<B>()) {
            __m256i part[R][MT];
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < MT; ++t) part[r][t] = _mm256_setzero_si256();
            for (int i = 0; i < 32 * steps<B>(); i += 32) {
                const __m256i w0 = load_bytes(bytes + at + i), w1 = load_bytes(bytes + stride + at + i);
                for (int t = 0; t < MT; ++t) {
                    const __m256i value = load_bytes(x[t] + at + i), size = _mm256_abs_epi8(value);
                    part[0][t] = B == 8 ? add_products(part[0][t], size, _mm256_sign_epi8(w0, value)) : add_products(part[0][t], w0, value);
                    part[1][t] = B == 8 ? add_products(part[1][t], size, _mm256_sign_epi8(w1, value)) : add_products(part[1][t], w1, value);
                }
            }
            for (int t = 0; t < MT; ++t)
                for (int r = 0; r < R; ++r) sum[r][t] = add_part(sum[r][t], part[r][t]);
        }
        for (int t = 0; t < MT; ++t)
            for (int r = 0; r < R; ++r) total[r][t] = add_unit(total[r][t], sum[r][t], job->scales[(token + t) * job->scales_stride + unit]);
    }
    for (int t = 0; t < MT; ++t)
        for (int r = 0; r < R; ++r) finish(job, token + t, row + r, total[r][t]);
}

template <int B>
void multiply_rows(const FixedJob* job, const FixedShape& s, const uint8_t* bytes, int64_t stride, int64_t row, int64_t token, int64_t stop) {
    for (; token + 4 <= stop; token += 4) multiply_bytes<4, B>(job, s, bytes, stride, row, token);
    if (token + 2 <= stop) {
        multiply_bytes<2, B>(job, s, bytes, stride, row, token);
        token += 2;
    }
    if (token < stop) multiply_bytes<1, B>(job, s, bytes, stride, row, token);
}

// Groups begin..end. `room`: FIXED_TILE_ROWS rows of halves * 128 bytes (one group where there are few tokens).
void multiply_fixed(const FixedJob* job, int64_t begin, int64_t end, uint8_t* room) {
    const PmpdMatrix* m = job->matrix;
    const FixedShape s = fixed_shape_of(m->columns);
    const int64_t stride = s.halves * HALF_COLUMNS;
    if (job->bits == 8) {  // bytes already: [row][halves * 128]
        for (int64_t first = begin; first < end; first += FIXED_TILE_ROWS / GROUP_ROWS)
            for (int64_t token = 0; token < job->tokens; token += FIXED_TILE_TOKENS) {
                const int64_t stop = token + FIXED_TILE_TOKENS < job->tokens ? token + FIXED_TILE_TOKENS : job->tokens;
                const int64_t last = first + FIXED_TILE_ROWS / GROUP_ROWS < end ? first + FIXED_TILE_ROWS / GROUP_ROWS : end;
                for (int64_t row = first * GROUP_ROWS; row < last * GROUP_ROWS; row += 2) {
                    for (int64_t i = 0; token == 0 && i < 2 * stride; i += 64) _mm_prefetch((const char*)m->stream[0] + (row + 2) * stride + i, _MM_HINT_T0);
                    multiply_rows<8>(job, s, m->stream[0] + row * stride, stride, row, token, stop);
                }
            }
        return;
    }
    if (job->tokens == 1) {
        for (int64_t group = begin; group < end; ++group) {
            if (job->bits == 2) single_group<2>(job, s, group);
            else if (job->bits == 3) single_group<3>(job, s, group);
            else single_group<4>(job, s, group);
        }
        return;
    }
    const auto multiply = job->bits == 2 ? multiply_rows<2> : job->bits == 3 ? multiply_rows<3> : multiply_rows<4>;
    const int64_t tile = job->tokens > FIXED_TILE_TOKENS ? FIXED_TILE_ROWS / GROUP_ROWS : 1;
    for (int64_t first = begin; first < end; first += tile) {
        const int64_t last = first + tile < end ? first + tile : end;
        for (int64_t group = first; group < last; ++group)
            for (int r = 0; r < GROUP_ROWS; ++r) expand_functions[job->bits](m, s, group, r, room + ((group - first) * GROUP_ROWS + r) * stride, false);
        for (int64_t token = 0; token < job->tokens; token += FIXED_TILE_TOKENS) {
            const int64_t stop = token + FIXED_TILE_TOKENS < job->tokens ? token + FIXED_TILE_TOKENS : job->tokens;
            for (int64_t row = 0; row < (last - first) * GROUP_ROWS; row += 2)
                multiply(job, s, room + row * stride, stride, first * GROUP_ROWS + row, token, stop);
        }
    }
}

// Rows begin..end as bfloat16 or float32, from the exact tables (`table`, in the order of the codes). `room`: one row.
void dequantize_fixed(const PmpdMatrix* m, int bits, int64_t begin, int64_t end, uint16_t* out, uint8_t* room) {
    const FixedShape s = fixed_shape_of(m->columns);
    for (int64_t row = begin; row < end; ++row) {
        expand_functions[bits](m, s, row / GROUP_ROWS, (int)(row % GROUP_ROWS), room, true);
        const uint16_t* table = (const uint16_t*)m->table[bits] + (row << bits);
        for (int64_t i = 0; i < m->columns; ++i) out[(row - begin) * m->columns + i] = table[room[i]];
    }
}

}  // namespace
