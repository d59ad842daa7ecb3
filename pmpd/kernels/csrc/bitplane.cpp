// The C interface: packing, choice of the level, threads; and the portable level, which says what the others must compute.
#include "attention.h"
#include "bitplane.h"
#include "threads.h"

#include <string.h>

// ------------------------------------------------------------------------------------------------------------------ packing

static int plane_shift(int stream, int quarter) {  // where in a nibble a plane of `stream` >= 1 has the bit of `quarter`
    static const int stream1[4] = {2, 0, 3, 1}, stream2[4] = {3, 1, 2, 0};
    return stream == 1 ? stream1[quarter] : stream == 2 ? stream2[quarter] : quarter;
}

struct PackJob {
    const PmpdMatrix* matrix;
    const int32_t* planes;  // [P, N, K/32], the order of Any-Precision checkpoints
};

void unpack_row(const int32_t* words, int64_t count, uint8_t* bits) {
    for (int64_t first = 0; first < count; first += 32) {
        const int64_t size = count - first < 32 ? count - first : 32;
        for (int64_t t = 0; t < size; ++t) {
            const uint32_t word = (uint32_t)words[first + t];
            for (int j = 0; j < 4; ++j) {
                const uint32_t byte = (word >> (24 - 8 * j)) & 0xff;
                uint8_t* out = bits + first * 32 + (j * size + t) * 8;
                for (int c = 0; c < 8; ++c) out[c] = (uint8_t)((byte >> (7 - c)) & 1);
            }
        }
    }
}

static int pack_groups(const void* context, int64_t begin, int64_t end) {
    const PackJob* job = (const PackJob*)context;
    const PmpdMatrix* m = job->matrix;
    const Shape s = shape_of(m);
    const int64_t words = m->columns / 32, blocks = s.full_blocks + (s.tail_runs > 0);
    uint8_t* bits = (uint8_t*)scratch_bytes((size_t)m->columns);
    if (!bits) return 1;
    for (int64_t group = begin; group < end; ++group)
        for (int row = 0; row < GROUP_ROWS; ++row) {
            const int64_t n = group * GROUP_ROWS + row;
            for (int plane = 0; plane < m->planes; ++plane) {
                const int stream = plane < 2 ? 0 : plane - 1;
                uint8_t* base = const_cast<uint8_t*>(m->stream[stream]) + group * s.group_bytes[stream > 0];
                if (n < m->rows)
                    unpack_row(job->planes + ((int64_t)plane * m->rows + n) * words, words, bits);
                else
                    memset(bits, 0, (size_t)m->columns);
                for (int64_t block = 0; block < blocks; ++block) {
                    const int runs = block < s.full_blocks ? BLOCK_RUNS : s.tail_runs;
                    const int64_t pair_bytes = block < s.full_blocks ? 128 : s.tail_pair_bytes;
                    uint8_t* at = stream == 0 ? base + block * GROUP_ROWS * 128 + row * pair_bytes : base + (block * GROUP_ROWS + row) * 64;
                    uint32_t dwords[32] = {};
                    for (int run = 0; run < runs; ++run) {
                        const int quarter = run / 8, nibble = run % 8;
                        const uint8_t* in = bits + block * BLOCK_COLUMNS + run * RUN_COLUMNS;
                        const int shift = 4 * nibble + (stream == 0 ? (quarter & 1) * 2 + (plane == 0) : plane_shift(stream, quarter));
                        uint32_t* out = dwords + (stream == 0 ? (quarter >> 1) * 16 : 0);
                        for (int lane = 0; lane < 16; ++lane) out[lane] |= (uint32_t)in[lane] << shift;
                    }
                    const int64_t size = stream == 0 ? pair_bytes : 64;
                    if (plane == 1) {  // the second plane of stream 0 joins the first
                        uint32_t first[32];
                        memcpy(first, at, (size_t)size);
                        for (int64_t i = 0; i < size / 4; ++i) dwords[i] |= first[i];
                    }
                    memcpy(at, dwords, (size_t)size);
                }
            }
        }
    return 0;
}

EXPORT void pmpd_plane_bytes(int64_t rows, int64_t columns, int64_t* first, int64_t* other) {
    PmpdMatrix matrix = {};
    matrix.columns = columns;
    const Shape s = shape_of(&matrix);
    const int64_t groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
    *first = groups * s.group_bytes[0];
    *other = groups * s.group_bytes[1];
}

// Fills matrix->stream[0 .. planes - 2] from `planes` int32 [P, N, K/32]. As all that follows: 0, or 1 where memory ran out.
EXPORT int pmpd_pack(const PmpdMatrix* matrix, const int32_t* planes, int threads) {
    PackJob job = {matrix, planes};
    return parallel((matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, threads, pack_groups, &job);
}

// ----------------------------------------------------------------------------------------------------------- portable level

// One row of one block as float32.
static void decode_block(const PmpdMatrix* m, const Shape& s, int bits, int64_t group, int row, int64_t block, float* out) {
    const int runs = block < s.full_blocks ? BLOCK_RUNS : s.tail_runs;
    const int64_t pair_bytes = block < s.full_blocks ? 128 : s.tail_pair_bytes;
    uint32_t dwords[MAX_STREAMS][32] = {};
    memcpy(dwords[0], m->stream[0] + group * s.group_bytes[0] + block * GROUP_ROWS * 128 + row * pair_bytes, (size_t)pair_bytes);
    for (int stream = 1; stream < bits - 1; ++stream)
        memcpy(dwords[stream], m->stream[stream] + group * s.group_bytes[1] + (block * GROUP_ROWS + row) * 64, 64);
    const int64_t table_row = (group * GROUP_ROWS + row) << bits;
    const float* table = (const float*)m->table[bits] + table_row;
    const uint16_t* table_bfloat16 = (const uint16_t*)m->table[bits] + table_row;
    for (int run = 0; run < runs; ++run) {
        const int quarter = run / 8, nibble = run % 8;
        uint32_t index[RUN_COLUMNS];
        for (int lane = 0; lane < RUN_COLUMNS; ++lane)
            index[lane] = (dwords[0][(quarter >> 1) * 16 + lane] >> (4 * nibble + (quarter & 1) * 2)) & 3;
        for (int stream = 1; stream < bits - 1; ++stream) {
            const int shift = 4 * nibble + plane_shift(stream, quarter);
            for (int lane = 0; lane < RUN_COLUMNS; ++lane) index[lane] |= ((dwords[stream][lane] >> shift) & 1) << (stream + 1);
        }
        float* at = out + run * RUN_COLUMNS;
        if (m->bfloat16)
            for (int lane = 0; lane < RUN_COLUMNS; ++lane) at[lane] = from_bfloat16(table_bfloat16[index[lane]]);
        else
            for (int lane = 0; lane < RUN_COLUMNS; ++lane) at[lane] = table[index[lane]];
    }
}

static void portable_linear(const Job* job, int64_t begin, int64_t end) {
    const PmpdMatrix* m = job->matrix;
    const Shape s = shape_of(m);
    const int64_t blocks = s.full_blocks + (s.tail_runs > 0);
    const int64_t pass = 16;
    float weights[BLOCK_COLUMNS], sums[pass][RUN_COLUMNS];
    for (int64_t group = begin; group < end; ++group)
        for (int row = 0; row < GROUP_ROWS && group * GROUP_ROWS + row < m->rows; ++row)
            for (int64_t first = 0; first < job->tokens; first += pass) {
                const int64_t tokens = job->tokens - first < pass ? job->tokens - first : pass;
                memset(sums, 0, sizeof(sums));
                for (int64_t block = 0; block < blocks; ++block) {
                    const int runs = block < s.full_blocks ? BLOCK_RUNS : s.tail_runs;
                    decode_block(m, s, job->bits, group, row, block, weights);
                    for (int64_t token = 0; token < tokens; ++token) {
                        const float* x = (const float*)job->x + (first + token) * job->x_stride + block * BLOCK_COLUMNS;
                        for (int run = 0; run < runs; ++run)
                            for (int lane = 0; lane < RUN_COLUMNS; ++lane)
                                sums[token][lane] += weights[run * RUN_COLUMNS + lane] * x[run * RUN_COLUMNS + lane];
                    }
                }
                for (int64_t token = 0; token < tokens; ++token) {
                    float sum = 0;
                    for (int lane = 0; lane < RUN_COLUMNS; ++lane) sum += sums[token][lane];
                    put(job, first + token, group * GROUP_ROWS + row, sum);
                }
            }
}

static void portable_dequantize(const Job* job, int64_t begin, int64_t end) {
    const PmpdMatrix* m = job->matrix;
    const Shape s = shape_of(m);
    const int64_t blocks = s.full_blocks + (s.tail_runs > 0);
    float weights[BLOCK_COLUMNS];
    for (int64_t group = begin; group < end; ++group)
        for (int row = 0; row < GROUP_ROWS && group * GROUP_ROWS + row < m->rows; ++row)
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t columns = (block < s.full_blocks ? BLOCK_RUNS : s.tail_runs) * RUN_COLUMNS;
                const int64_t at = (group * GROUP_ROWS + row - job->first_row) * job->y_stride + block * BLOCK_COLUMNS;
                decode_block(m, s, job->bits, group, row, block, weights);
                if (m->bfloat16)
                    for (int64_t i = 0; i < columns; ++i) ((uint16_t*)job->y)[at + i] = to_bfloat16(weights[i]);
                else
                    memcpy((float*)job->y + at, weights, (size_t)columns * 4);
            }
}

const Level portable_level = {"portable", portable_linear, portable_dequantize, attend};

// ------------------------------------------------------------------------------------------------------------------- levels

static const Level* const levels[] = {
    &portable_level,
#ifdef PMPD_X86
    &avx2_level, &avx512_level, &avx512_level,  // the last differs in fixed point only: fixed.cpp
#endif
};
enum { LEVELS = sizeof(levels) / sizeof(levels[0]) };

static int highest_level() {
#ifdef PMPD_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq")))
        return 1;
    return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
    return 0;
#endif
}

EXPORT int pmpd_highest_level() { return highest_level(); }

// The hash of the sources that this library was built from (cpu.py refuses a library of other sources).
#ifndef PMPD_SOURCES
#define PMPD_SOURCES "unknown"
#endif
EXPORT const char* pmpd_sources() { return PMPD_SOURCES; }

// ------------------------------------------------------------------------------------------------------------ multiplication

typedef void (*GroupsFn)(const Job*, int64_t, int64_t);

static GroupsFn best(int level, GroupsFn Level::* function) {  // a level that lacks a function uses the next lower one's
    while (!(levels[level]->*function)) --level;
    return levels[level]->*function;
}

struct LevelJob {
    Job job;
    GroupsFn body;
};

static int run_level(const void* context, int64_t begin, int64_t end) {
    const LevelJob* work = (const LevelJob*)context;
    work->body(&work->job, begin, end);
    return 0;
}

// y [tokens, N] = x [tokens, K] Wᵀ + bias; x and y float32, or bfloat16 where matrix->bfloat16.
EXPORT int pmpd_linear(const PmpdMatrix* matrix, int level, int bits, int64_t tokens, const void* x, int64_t x_stride, void* y, int threads) {
    LevelJob work = {{matrix, bits, tokens, x, x_stride, y, matrix->rows, 0}, best(level, &Level::linear)};
    if (matrix->bfloat16) {
        const uint16_t* in = (const uint16_t*)x;
        float* room = (float*)scratch_bytes((size_t)(tokens * matrix->columns) * 4);
        if (!room) return 1;
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t i = 0; i < matrix->columns; ++i) room[token * matrix->columns + i] = from_bfloat16(in[token * x_stride + i]);
        work.job.x = room;
        work.job.x_stride = matrix->columns;
    }
    return parallel((matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, threads, run_level, &work);
}

struct RowsJob {
    LevelJob work;
    int64_t first_group;
};

static int run_rows(const void* context, int64_t begin, int64_t end) {
    const RowsJob* rows = (const RowsJob*)context;
    rows->work.body(&rows->work.job, rows->first_group + begin, rows->first_group + end);
    return 0;
}

// Rows first_row (a multiple of 4) .. last_row - 1 of the matrix -> y [last_row - first_row, K], float32 or bfloat16 as the matrix is.
EXPORT int pmpd_dequantize(const PmpdMatrix* matrix, int level, int bits, int64_t first_row, int64_t last_row, void* y, int threads) {
    PmpdMatrix part = *matrix;
    part.rows = last_row;
    RowsJob job = {{{&part, bits, 0, nullptr, 0, y, matrix->columns, first_row}, best(level, &Level::dequantize)}, first_row / GROUP_ROWS};
    return parallel((last_row + GROUP_ROWS - 1) / GROUP_ROWS - job.first_group, threads, run_rows, &job);
}

// ----------------------------------------------------------------------------------------------------------------- attention

struct AttentionJob {
    const Attention* attention;
    int level;
    int64_t longest;
};

static int run_attention(const void* context, int64_t begin, int64_t end) {
    const AttentionJob* job = (const AttentionJob*)context;
    int level = job->level;
    while (!levels[level]->attend) --level;
    float* scores = (float*)scratch_bytes((size_t)(job->longest + LANES) * 4);
    if (!scores) return 1;
    levels[level]->attend(job->attention, scores, begin, end);
    return 0;
}

EXPORT int pmpd_attention(int level, const float* queries, const float* keys, const float* values, const int64_t* slots, const int64_t* lengths,
                           float* out, int64_t rows, int64_t query_heads, int64_t key_heads, int64_t dim, int64_t slot_stride,
                           int64_t head_stride, int64_t position_stride, int64_t longest, int64_t window, float scale, int threads) {
    const Attention attention = {queries, keys, values, slots, lengths, out, query_heads, key_heads, dim, slot_stride, head_stride, position_stride, window, scale};
    const AttentionJob job = {&attention, level, longest};
    return parallel(rows * key_heads, threads, run_attention, &job);
}
