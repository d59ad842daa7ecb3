// What the files of this library share: the memory layout of a matrix and the job a thread works on.
//
// Legend: M tokens, K columns (in_features, a multiple of 32), N rows (out_features), b bits of this multiplication.
//
// Memory layout. Rows go in groups of GROUP_ROWS, columns in blocks of BLOCK_COLUMNS = 512, the last block may be shorter. In a
// block, 16 consecutive columns are a run: run = quarter * 8 + nibble (quarter 0..3, nibble 0..7), lane = column % 16.
//   stream 0 holds planes 0 and 1: 16 dwords for quarters 0, 1, then 16 dwords for quarters 2, 3. Dword `lane`, bits 4*nibble + 0,1
//     are quarter 0's (or 2's) two leading bits of the code, the less significant one first; bits 4*nibble + 2,3 are quarter 1's (3's).
//   stream i >= 1 holds plane i + 1: 16 dwords; in dword `lane`, bit 4*nibble + s is the quarter's bit, with
//     s = 2,0,3,1 for quarters 0..3 (stream 1), 3,1,2,0 (stream 2), 0,1,2,3 (streams 3 and up).
// A masked merge of one stream-0 dword with those of streams 1 and 2 thus gives four-bit codes of a quarter, eight to a dword; streams 3
// and up give the next four bits the same way. In memory, stream by stream: [group][block][row of the group][dwords], so every stream
// is read from front to back, and b bits read the first b - 1 streams and nothing else.
// A last block of at most 256 columns leaves out the second 16 dwords of stream 0.
//
// The code that comes out of the merge ("index") has the bits in another order than the file's code: bit 0 = plane 1, bit 1 = plane 0,
// bit p = plane p. Tables are stored in the order of the index. In quarters 1 and 3 the merge gives bits 2,3 and 0,1 swapped, and
// bits above b are rubbish: tables in registers are arranged so that neither matters.
#pragma once
#include <stdint.h>

enum { GROUP_ROWS = 4, BLOCK_COLUMNS = 512, RUN_COLUMNS = 16, BLOCK_RUNS = 32, MAX_STREAMS = 7, MAX_BITS = 8, MAX_PASS_TOKENS = 8, TILE_GROUPS = 8 };
// Products in fixed point (fixed.h).
enum { UNIT_COLUMNS = 256, HALF_COLUMNS = 128, FIXED_PLANES = 4, TOKEN_MAX = 127, FIXED_TILE_ROWS = 16, FIXED_TILE_TOKENS = 32 };

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

extern "C" struct PmpdMatrix {  // mirrored in cpu.py
    int64_t rows, columns;
    int32_t planes;
    int32_t bfloat16;                   // tables and dense values are bfloat16 (else float32)
    const uint8_t* stream[MAX_STREAMS];
    const void* table[MAX_BITS + 1];    // by bits: [rows rounded up to GROUP_ROWS, 2**bits]
    const float* bias;                  // [rows] or null
    // In fixed point the streams hold the layout of fixed.h instead, `table` is in the order of the codes, and these are set:
    const uint8_t* fixed_table[MAX_BITS + 1];  // by bits: [rows rounded up, 16], integers 0..31, 63 or 127
    const float* fixed_scale[MAX_BITS + 1];    // by bits: [rows rounded up, 2], value = integer * first + second
};

struct Job {
    const PmpdMatrix* matrix;
    int bits;
    int64_t tokens;
    const void* x;   // [tokens, x_stride] float32
    int64_t x_stride;
    void* y;         // [tokens, y_stride], or, dequantized, [rows from first_row, y_stride]; in the type of the matrix
    int64_t y_stride;
    int64_t first_row;
};

// One row of one plane of a checkpoint, `count` words -> one byte per column.
void unpack_row(const int32_t* words, int64_t count, uint8_t* bits);

struct Shape {
    int64_t full_blocks;
    int tail_runs;               // runs of the shorter last block, 0 where there is none
    int64_t tail_pair_bytes;     // its bytes of stream 0 per row
    int64_t group_bytes[2];      // bytes of a group of rows in stream 0, in any other stream
};

static inline Shape shape_of(const PmpdMatrix* matrix) {
    Shape s;
    s.full_blocks = matrix->columns / BLOCK_COLUMNS;
    s.tail_runs = (int)(matrix->columns % BLOCK_COLUMNS) / RUN_COLUMNS;
    s.tail_pair_bytes = s.tail_runs > 16 ? 128 : s.tail_runs > 0 ? 64 : 0;
    s.group_bytes[0] = GROUP_ROWS * (s.full_blocks * 128 + s.tail_pair_bytes);
    s.group_bytes[1] = GROUP_ROWS * (s.full_blocks + (s.tail_runs > 0)) * 64;
    return s;
}

static inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
    uint32_t u;
    __builtin_memcpy(&u, &value, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float from_bfloat16(uint16_t value) {
    uint32_t u = (uint32_t)value << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}

static inline void put(const Job* job, int64_t token, int64_t row, float sum) {
    if (row >= job->matrix->rows) return;
    if (job->matrix->bias) sum += job->matrix->bias[row];
    if (job->matrix->bfloat16)
        ((uint16_t*)job->y)[token * job->y_stride + row] = to_bfloat16(sum);
    else
        ((float*)job->y)[token * job->y_stride + row] = sum;
}

// Queries [rows, query heads, dim] over caches [slots, key heads, positions, dim], all float32. Strides of the caches in numbers.
struct Attention {
    const float *queries, *keys, *values;
    const int64_t *slots, *lengths;  // [rows]: whose cache, and how many of its positions
    float* out;                      // as the queries
    int64_t query_heads, key_heads, dim, slot_stride, head_stride, position_stride;
    int64_t window;                  // only so many last positions; 0: all
    float scale;
};

enum Output { OUT_FLOAT32, OUT_BFLOAT16, OUT_ADD };  // OUT_ADD: float32, added to what is there

struct FixedJob {
    const PmpdMatrix* matrix;
    int bits;                // 8: stream 0 holds [rows rounded up, halves * 128] int8, and no table is used
    int64_t tokens;
    const int8_t* x;         // [tokens, x_stride], as `prepare_token` leaves it
    int64_t x_stride;
    const float* scales;     // [tokens, scales_stride], by unit
    int64_t scales_stride;
    const float* sums;       // [tokens]
    void* y;                 // [tokens, y_stride]
    int64_t y_stride;
    int kind;                // Output
};

struct FixedShape {
    int64_t halves, units, full_units;
    int64_t group_bytes[2];  // bytes of a group of rows in stream 0, in any other stream
};

static inline FixedShape fixed_shape_of(int64_t columns) {
    FixedShape s;
    s.halves = (columns + HALF_COLUMNS - 1) / HALF_COLUMNS;
    s.units = (s.halves + 1) / 2;
    s.full_units = s.halves / 2;
    s.group_bytes[0] = GROUP_ROWS * s.halves * 32;
    s.group_bytes[1] = GROUP_ROWS * s.units * 32;
    return s;
}

struct PmpdStep;
struct StepRoom;

// The implementation for one class of processors. A function works on groups begin..end of rows; null: that of the next lower level.
struct Level {
    const char* name;
    void (*linear)(const Job*, int64_t begin, int64_t end);      // x float32
    void (*dequantize)(const Job*, int64_t begin, int64_t end);  // to y
    void (*attend)(const Attention*, float* scores, int64_t begin, int64_t end);
};

// Products in fixed point and the decode step, for one class of processors.
struct Fixed {
    void (*prepare_token)(const float* x, int64_t columns, int8_t* out, float* scales, float* sum);
    void (*multiply)(const FixedJob*, int64_t begin, int64_t end, uint8_t* room);
    void (*dequantize)(const PmpdMatrix*, int bits, int64_t begin, int64_t end, uint16_t* out, uint8_t* room);
    void (*step)(const PmpdStep*, const StepRoom*, int thread, int threads);
};

extern const Level portable_level;
#if defined(__x86_64__)
#define PMPD_X86 1
extern const Level avx2_level, avx512_level;
extern const Fixed fixed_avx2, fixed_vnni;
#endif
