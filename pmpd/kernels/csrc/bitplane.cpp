// The C interface: packing, choice of the level, threads; and the portable level, which says what the others must compute.
#include "attention.h"
#include "bitplane.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---------------------------------------------------------------------------------------------------------------- threads
// The caller's OpenMP runtime, found at run time: linking one would bring a second pool of threads beside torch's.

typedef void (*ParallelFn)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
typedef int (*CountFn)(void);
static ParallelFn gomp_parallel;
static CountFn thread_number, thread_count;

EXPORT void pmpd_set_threads(void* parallel, void* number, void* count) {
    gomp_parallel = (ParallelFn)parallel;
    thread_number = (CountFn)number;
    thread_count = (CountFn)count;
}

typedef void (*RangeFn)(const void* context, int64_t begin, int64_t end);
struct Range {
    RangeFn body;
    const void* context;
    int64_t items;
};

static void run_share(void* data) {
    const Range* range = (const Range*)data;
    const int64_t count = thread_count(), number = thread_number();
    const int64_t begin = range->items * number / count, end = range->items * (number + 1) / count;
    if (begin < end) range->body(range->context, begin, end);
}

static void parallel(int64_t items, int threads, RangeFn body, const void* context) {
    if (threads > items) threads = (int)items;
    if (threads <= 1 || !gomp_parallel) {
        body(context, 0, items);
        return;
    }
    Range range = {body, context, items};
    gomp_parallel(run_share, &range, (unsigned)threads, 0);
}

// ------------------------------------------------------------------------------------------------------------------ scratch

struct Scratch {  // one per thread, freed with it
    void* data = nullptr;
    size_t bytes = 0;
    ~Scratch() { free(data); }
    void* get(size_t wanted) {
        if (wanted > bytes) {
            free(data);
            bytes = (wanted + 4095) / 4096 * 4096;
            data = aligned_alloc(64, bytes);
            if (!data) bytes = 0;
        }
        return data;
    }
};
static thread_local Scratch scratch;

// ------------------------------------------------------------------------------------------------------------------ packing

static int plane_shift(int level, int quarter) {  // where in a nibble a plane of `level` >= 1 has the bit of `quarter`
    static const int level1[4] = {2, 0, 3, 1}, level2[4] = {3, 1, 2, 0};
    return level == 1 ? level1[quarter] : level == 2 ? level2[quarter] : quarter;
}

struct PackJob {
    const PmpdMatrix* matrix;
    const int32_t* planes;  // [P, N, K/32], the order of Any-Precision checkpoints
};

// One row of one plane in the file's order -> one byte per column.
static void expand_row(const int32_t* words, int64_t count, uint8_t* bits) {
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

static void pack_groups(const void* context, int64_t begin, int64_t end) {
    const PackJob* job = (const PackJob*)context;
    const PmpdMatrix* m = job->matrix;
    const Shape s = shape_of(m);
    const int64_t words = m->columns / 32, blocks = s.full_blocks + (s.tail_runs > 0);
    uint8_t* bits = (uint8_t*)malloc((size_t)m->columns);
    if (!bits) return;
    for (int64_t group = begin; group < end; ++group)
        for (int row = 0; row < GROUP_ROWS; ++row) {
            const int64_t n = group * GROUP_ROWS + row;
            for (int plane = 0; plane < m->planes; ++plane) {
                const int level = plane < 2 ? 0 : plane - 1;
                uint8_t* base = const_cast<uint8_t*>(m->level[level]) + group * s.group_bytes[level > 0];
                if (n < m->rows)
                    expand_row(job->planes + ((int64_t)plane * m->rows + n) * words, words, bits);
                else
                    memset(bits, 0, (size_t)m->columns);
                for (int64_t block = 0; block < blocks; ++block) {
                    const int runs = block < s.full_blocks ? BLOCK_RUNS : s.tail_runs;
                    const int64_t pair_bytes = block < s.full_blocks ? 128 : s.tail_pair_bytes;
                    uint8_t* at = level == 0 ? base + block * GROUP_ROWS * 128 + row * pair_bytes : base + (block * GROUP_ROWS + row) * 64;
                    uint32_t dwords[32] = {};
                    for (int run = 0; run < runs; ++run) {
                        const int quarter = run / 8, nibble = run % 8;
                        const uint8_t* in = bits + block * BLOCK_COLUMNS + run * RUN_COLUMNS;
                        const int shift = 4 * nibble + (level == 0 ? (quarter & 1) * 2 + (plane == 0) : plane_shift(level, quarter));
                        uint32_t* out = dwords + (level == 0 ? (quarter >> 1) * 16 : 0);
                        for (int lane = 0; lane < 16; ++lane) out[lane] |= (uint32_t)in[lane] << shift;
                    }
                    const int64_t size = level == 0 ? pair_bytes : 64;
                    if (plane == 1) {  // the second plane of level 0 joins the first
                        uint32_t first[32];
                        memcpy(first, at, (size_t)size);
                        for (int64_t i = 0; i < size / 4; ++i) dwords[i] |= first[i];
                    }
                    memcpy(at, dwords, (size_t)size);
                }
            }
        }
    free(bits);
}

EXPORT void pmpd_level_bytes(int64_t rows, int64_t columns, int64_t* first, int64_t* other) {
    PmpdMatrix matrix = {};
    matrix.columns = columns;
    const Shape s = shape_of(&matrix);
    const int64_t groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
    *first = groups * s.group_bytes[0];
    *other = groups * s.group_bytes[1];
}

// Fills matrix->level[0 .. planes - 2] from `planes` int32 [P, N, K/32].
EXPORT void pmpd_pack(const PmpdMatrix* matrix, const int32_t* planes, int threads) {
    PackJob job = {matrix, planes};
    parallel((matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, threads, pack_groups, &job);
}

// ----------------------------------------------------------------------------------------------------------- portable level

// One row of one block as float32.
static void decode_block(const PmpdMatrix* m, const Shape& s, int bits, int64_t group, int row, int64_t block, float* out) {
    const int runs = block < s.full_blocks ? BLOCK_RUNS : s.tail_runs;
    const int64_t pair_bytes = block < s.full_blocks ? 128 : s.tail_pair_bytes;
    uint32_t dwords[MAX_LEVELS][32] = {};
    memcpy(dwords[0], m->level[0] + group * s.group_bytes[0] + block * GROUP_ROWS * 128 + row * pair_bytes, (size_t)pair_bytes);
    for (int level = 1; level < bits - 1; ++level)
        memcpy(dwords[level], m->level[level] + group * s.group_bytes[1] + (block * GROUP_ROWS + row) * 64, 64);
    const int64_t table_row = (group * GROUP_ROWS + row) << bits;
    const float* table = (const float*)m->table[bits] + table_row;
    const uint16_t* table_bfloat16 = (const uint16_t*)m->table[bits] + table_row;
    for (int run = 0; run < runs; ++run) {
        const int quarter = run / 8, nibble = run % 8;
        uint32_t index[RUN_COLUMNS];
        for (int lane = 0; lane < RUN_COLUMNS; ++lane)
            index[lane] = (dwords[0][(quarter >> 1) * 16 + lane] >> (4 * nibble + (quarter & 1) * 2)) & 3;
        for (int level = 1; level < bits - 1; ++level) {
            const int shift = 4 * nibble + plane_shift(level, quarter);
            for (int lane = 0; lane < RUN_COLUMNS; ++lane) index[lane] |= ((dwords[level][lane] >> shift) & 1) << (level + 1);
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

const Level portable_level = {"portable", portable_linear, nullptr, nullptr, portable_dequantize, attend};

// ------------------------------------------------------------------------------------------------------------------- levels

static const Level* const levels[] = {
    &portable_level,
#ifdef PMPD_X86
    &avx2_level, &avx512_level, &avx512vnni_level,
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

EXPORT const char* pmpd_level_name(int level) { return level >= 0 && level < LEVELS ? levels[level]->name : nullptr; }

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

static void run_level(const void* context, int64_t begin, int64_t end) {
    const LevelJob* work = (const LevelJob*)context;
    work->body(&work->job, begin, end);
}

// y [tokens, N] = x [tokens, K] Wᵀ + bias; x and y float32, or bfloat16 where matrix->bfloat16. 0, or 1 where memory ran out.
EXPORT int pmpd_linear(const PmpdMatrix* matrix, int level, int bits, int64_t tokens, const void* x, int64_t x_stride, void* y, int threads) {
    LevelJob work = {{matrix, bits, tokens, x, x_stride, y, matrix->rows, 0, nullptr, 0}, best(level, &Level::linear)};
    Job* job = &work.job;
    if (matrix->bfloat16) {
        const Level* chosen = levels[level];
        const uint16_t* in = (const uint16_t*)x;
        const int64_t blocks = (matrix->columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
        const int64_t pairs = (matrix->columns + 127) / 128 * 64;
        char* room = (char*)scratch.get((size_t)(tokens * (chosen->linear_fixed ? (pairs + blocks) * 4 : matrix->columns * 4)));
        if (!room) return 1;
        job->x = room;
        if (chosen->linear_fixed) {
            float* scales = (float*)(room + tokens * pairs * 4);
            job->x_stride = pairs;
            job->scales = scales;
            job->scales_stride = blocks;
            chosen->prepare(job, in, x_stride, (uint32_t*)room, scales);
            work.body = chosen->linear_fixed;
        } else {
            for (int64_t token = 0; token < tokens; ++token)
                for (int64_t i = 0; i < matrix->columns; ++i) ((float*)room)[token * matrix->columns + i] = from_bfloat16(in[token * x_stride + i]);
            job->x_stride = matrix->columns;
        }
    }
    parallel((matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, threads, run_level, &work);
    return 0;
}

struct RowsJob {
    LevelJob work;
    int64_t first_group;
};

static void run_rows(const void* context, int64_t begin, int64_t end) {
    const RowsJob* rows = (const RowsJob*)context;
    rows->work.body(&rows->work.job, rows->first_group + begin, rows->first_group + end);
}

// Rows first_row (a multiple of 4) .. last_row - 1 of the matrix -> y [last_row - first_row, K], float32 or bfloat16 as the matrix is.
EXPORT void pmpd_dequantize(const PmpdMatrix* matrix, int level, int bits, int64_t first_row, int64_t last_row, void* y, int threads) {
    PmpdMatrix part = *matrix;
    part.rows = last_row;
    RowsJob job = {{{&part, bits, 0, nullptr, 0, y, matrix->columns, first_row, nullptr, 0}, best(level, &Level::dequantize)}, first_row / GROUP_ROWS};
    parallel((last_row + GROUP_ROWS - 1) / GROUP_ROWS - job.first_group, threads, run_rows, &job);
}

// ----------------------------------------------------------------------------------------------------------------- attention

struct AttentionJob {
    const Attention* attention;
    int level;
    int64_t longest;
};

static void run_attention(const void* context, int64_t begin, int64_t end) {
    const AttentionJob* job = (const AttentionJob*)context;
    int level = job->level;
    while (!levels[level]->attend) --level;
    float* scores = (float*)scratch.get((size_t)(job->longest + LANES) * 4);
    if (scores) levels[level]->attend(job->attention, scores, begin, end);
}

EXPORT void pmpd_attention(int level, const float* queries, const float* keys, const float* values, const int64_t* slots, const int64_t* lengths,
                           float* out, int64_t rows, int64_t query_heads, int64_t key_heads, int64_t dim, int64_t slot_stride,
                           int64_t head_stride, int64_t position_stride, int64_t longest, int64_t window, float scale, int threads) {
    const Attention attention = {queries, keys, values, slots, lengths, out, query_heads, key_heads, dim, slot_stride, head_stride, position_stride, window, scale};
    const AttentionJob job = {&attention, level, longest};
    parallel(rows * key_heads, threads, run_attention, &job);
}
