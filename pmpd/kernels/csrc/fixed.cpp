// Matrices in fixed point (fixed.h): packing and the C interface, and that of the decode step (step.h).
#include "bitplane.h"
#include "step.h"
#include "threads.h"

#include <string.h>

static const Fixed* fixed_of(int level) {  // null below level 1
#ifdef PMPD_X86
    return level >= 3 ? &fixed_vnni : level >= 1 ? &fixed_avx2 : nullptr;
#else
    return nullptr;
#endif
}

EXPORT void pmpd_fixed_bytes(int64_t rows, int64_t columns, int64_t* first, int64_t* other) {
    const FixedShape s = fixed_shape_of(columns);
    const int64_t groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
    *first = groups * s.group_bytes[0];
    *other = groups * s.group_bytes[1];
}

struct PackFixedJob {
    const PmpdMatrix* matrix;
    const int32_t* planes;  // [P, N, K/32]
};

static int pack_fixed(const void* context, int64_t begin, int64_t end) {
    const PackFixedJob* job = (const PackFixedJob*)context;
    const PmpdMatrix* m = job->matrix;
    const FixedShape s = fixed_shape_of(m->columns);
    const int64_t words = m->columns / 32;
    uint8_t* bits = (uint8_t*)scratch_bytes((size_t)m->columns);
    if (!bits) return 1;
    for (int64_t n = begin * GROUP_ROWS; n < end * GROUP_ROWS && n < m->rows; ++n)
        for (int plane = 0; plane < m->planes; ++plane) {
            const int stream = plane < 2 ? 0 : plane - 1;
            const int64_t group = n / GROUP_ROWS, row = n % GROUP_ROWS;
            uint8_t* base = const_cast<uint8_t*>(m->stream[stream]) + group * s.group_bytes[stream > 0];
            unpack_row(job->planes + ((int64_t)plane * m->rows + n) * words, words, bits);
            for (int64_t column = 0; column < m->columns; ++column) {
                const int64_t unit = column / UNIT_COLUMNS, half = column / HALF_COLUMNS % 2, j = column / 32 % 4, i = column % 32;
                uint8_t* at;
                int64_t shift;
                if (stream == 0) {
                    at = base + unit * (GROUP_ROWS * 64) + row * (unit < s.full_units ? 64 : 32) + half * 32 + i;
                    shift = 2 * j + (plane == 0);
                } else {
                    at = base + (unit * GROUP_ROWS + row) * 32 + i;
                    shift = 2 * (j ^ 1) + (half ^ (stream == 2));
                }
                *at |= (uint8_t)(bits[column] << shift);
            }
        }
    return 0;
}

// Fills matrix->stream[0 .. planes - 2], which are zero, from `planes` int32 [P, N, K/32]. 0, or as below 1 where memory ran out.
EXPORT int pmpd_pack_fixed(const PmpdMatrix* matrix, const int32_t* planes, int threads) {
    const PackFixedJob job = {matrix, planes};
    return parallel((matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, threads, pack_fixed, &job);
}

// -------------------------------------------------------------------------------------------------------------------- products

struct LinearJob {
    FixedJob job;
    const Fixed* fixed;
    size_t room_bytes;
};

static int run_linear(const void* context, int64_t begin, int64_t end) {
    const LinearJob* work = (const LinearJob*)context;
    uint8_t* room = (uint8_t*)scratch_bytes(work->room_bytes);
    if (!room) return 1;
    work->fixed->multiply(&work->job, begin, end, room);
    return 0;
}

struct PrepareJob {
    const uint16_t* x;
    int64_t x_stride, columns;
    const Fixed* fixed;
    int8_t* out;
    float *scales, *sums;
};

static int run_prepare(const void* context, int64_t begin, int64_t end) {
    const PrepareJob* job = (const PrepareJob*)context;
    const FixedShape s = fixed_shape_of(job->columns);
    float* line = (float*)scratch_bytes((size_t)job->columns * 4);
    if (!line) return 1;
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t i = 0; i < job->columns; ++i) line[i] = from_bfloat16(job->x[t * job->x_stride + i]);
        job->fixed->prepare_token(line, job->columns, job->out + t * s.halves * HALF_COLUMNS, job->scales + t * s.units, job->sums + t);
    }
    return 0;
}

// Bytes of `tokens` in fixed point: what pmpd_linear_fixed needs as `room`.
EXPORT int64_t pmpd_tokens_bytes(int64_t tokens, int64_t columns) {
    const FixedShape s = fixed_shape_of(columns);
    return tokens * (s.halves * HALF_COLUMNS + s.units * 4 + 4);
}

// y bfloat16 [tokens, N] = x bfloat16 [tokens, K] Wᵀ + bias.
EXPORT int pmpd_linear_fixed(const PmpdMatrix* matrix, int level, int bits, int64_t tokens, const uint16_t* x, int64_t x_stride, uint16_t* y,
                             void* room, int threads) {
    const FixedShape s = fixed_shape_of(matrix->columns);
    const int64_t padded = s.halves * HALF_COLUMNS;
    int8_t* bytes = (int8_t*)room;
    float *scales = (float*)(bytes + tokens * padded), *sums = scales + tokens * s.units;
    const PrepareJob prepare = {x, x_stride, matrix->columns, fixed_of(level), bytes, scales, sums};
    if (parallel(tokens, tokens > 16 ? threads : 1, run_prepare, &prepare)) return 1;
    const LinearJob work = {{matrix, bits, tokens, bytes, padded, scales, s.units, sums, y, matrix->rows, OUT_BFLOAT16},
                            prepare.fixed, (size_t)(FIXED_TILE_ROWS * padded)};
    return parallel((matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, threads, run_linear, &work);
}

struct DequantizeJob {
    const PmpdMatrix* matrix;
    const Fixed* fixed;
    int bits;
    int64_t first_row;
    uint16_t* y;
};

static int run_dequantize(const void* context, int64_t begin, int64_t end) {
    const DequantizeJob* job = (const DequantizeJob*)context;
    const FixedShape s = fixed_shape_of(job->matrix->columns);
    uint8_t* room = (uint8_t*)scratch_bytes((size_t)(s.halves * HALF_COLUMNS));
    if (!room) return 1;
    job->fixed->dequantize(job->matrix, job->bits, job->first_row + begin, job->first_row + end, job->y + begin * job->matrix->columns, room);
    return 0;
}

// Rows first_row .. last_row - 1 -> y bfloat16 [rows, K], from the tables as they were before they became integers.
EXPORT int pmpd_dequantize_fixed(const PmpdMatrix* matrix, int level, int bits, int64_t first_row, int64_t last_row, uint16_t* y, int threads) {
    const DequantizeJob job = {matrix, fixed_of(level), bits, first_row, y};
    return parallel(last_row - first_row, threads, run_dequantize, &job);
}

// ------------------------------------------------------------------------------------------------------------------------ step

struct StepJob {
    const PmpdStep* step;
    const StepRoom* room;
    const Fixed* fixed;
};

static void run_step(const void* context, int thread, int threads) {
    const StepJob* job = (const StepJob*)context;
    job->fixed->step(job->step, job->room, thread, threads);
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

EXPORT int pmpd_step(const PmpdStep* step, int level, int threads) {
    const int64_t tokens = step->tokens, heads = step->heads * step->dim, width = heads + 2 * step->key_heads * step->dim;
    const int64_t columns = larger(larger(step->hidden, step->inner), heads);
    const FixedShape s = fixed_shape_of(columns);
    int64_t longest = 0, size = 0;
    for (int64_t t = 0; t < tokens; ++t) longest = larger(longest, step->lengths[t]);
    auto take = [&size](int64_t bytes) {
        const int64_t at = size;
        size += (bytes + 63) / 64 * 64;
        return at;
    };
    StepRoom room = {};
    room.x_at = take(tokens * s.halves * HALF_COLUMNS);
    room.scales_at = take(tokens * s.units * 4);
    room.sums_at = take(tokens * 4);
    room.line_at = take(columns * 4);
    room.scores_at = take((longest + 16) * 4);
    room.bytes_at = take(FIXED_TILE_ROWS * s.halves * HALF_COLUMNS);
    room.own_bytes = size;
    size = 0;
    const int64_t counters = (step->layer_count * TAKES + 1) * TAKEN_STRIDE * 8;
    const int64_t barrier_at = take(64), taken_at = take(counters), x_at = take(tokens * step->hidden * 4), wide_at = take(tokens * larger(width, 2 * step->inner) * 4),
                  attended_at = take(tokens * heads * 4), lines_at = take(threads * tokens * step->hidden * 4), own_at = take(threads * room.own_bytes);
    char* base = (char*)scratch_bytes((size_t)size);
    if (!base) return 1;
    memset(base + barrier_at, 0, 64);
    memset(base + taken_at, 0, (size_t)counters);
    room.taken = (int64_t*)(base + taken_at);
    room.barrier = (Barrier*)(base + barrier_at);
    room.x = (float*)(base + x_at);
    room.wide = (float*)(base + wide_at);
    room.attended = (float*)(base + attended_at);
    room.lines = (float*)(base + lines_at);
    room.own = base + own_at;
    const StepJob job = {step, &room, fixed_of(level)};
    together(threads, run_step, &job);
    return 0;
}
