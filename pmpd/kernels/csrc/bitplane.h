// What the files of this library share: the memory layout of a matrix and the job a thread works on.
//
// Legend: M tokens, K columns (in_features, a multiple of 32), N rows (out_features), b bits of this multiplication.
//
// Memory layout. Rows go in groups of GROUP_ROWS, columns in blocks of BLOCK_COLUMNS = 512, the last block may be shorter. In a
// block, 16 consecutive columns are a run: run = quarter * 8 + nibble (quarter 0..3, nibble 0..7), lane = column % 16.
//   level 0 holds planes 0 and 1: 16 dwords for quarters 0, 1, then 16 dwords for quarters 2, 3. Dword `lane`, bits 4*nibble + 0,1
//     are quarter 0's (or 2's) two leading bits of the code, the less significant one first; bits 4*nibble + 2,3 are quarter 1's (3's).
//   level i >= 1 holds plane i + 1: 16 dwords; in dword `lane`, bit 4*nibble + s is the quarter's bit, with
//     s = 2,0,3,1 for quarters 0..3 (level 1), 3,1,2,0 (level 2), 0,1,2,3 (levels 3 and up).
// A masked merge of one level-0 dword with those of levels 1 and 2 thus gives four-bit codes of a quarter, eight to a dword; levels 3
// and up give the next four bits the same way. In memory, level by level: [group][block][row of the group][dwords], so every level
// is read from front to back, and b bits read the first b - 1 levels and nothing else.
// A last block of at most 256 columns leaves out the second 16 dwords of level 0.
//
// The code that comes out of the merge ("index") has the bits in another order than the file's code: bit 0 = plane 1, bit 1 = plane 0,
// bit p = plane p. Tables are stored in the order of the index. In quarters 1 and 3 the merge gives bits 2,3 and 0,1 swapped, and
// bits above b are rubbish: tables in registers are arranged so that neither matters.
#pragma once
#include <stdint.h>

enum { GROUP_ROWS = 4, BLOCK_COLUMNS = 512, RUN_COLUMNS = 16, BLOCK_RUNS = 32, MAX_LEVELS = 7, MAX_BITS = 8, MAX_PASS_TOKENS = 8, TILE_GROUPS = 8, FIXED_MAX = 8191 };

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

extern "C" struct PmpdMatrix {  // mirrored in cpu.py
    int64_t rows, columns;
    int32_t planes;
    int32_t bfloat16;                   // tables and dense values are bfloat16 (else float32)
    const uint8_t* level[MAX_LEVELS];
    const void* table[MAX_BITS + 1];    // by bits: [rows rounded up to GROUP_ROWS, 2**bits]
    const float* bias;                  // [rows] or null
    // The same tables in fixed point, value = integer * scale, integers within +-FIXED_MAX; null where the level has no use for them.
    const int16_t* fixed_table[MAX_BITS + 1];  // [rows rounded up, 2**bits]
    const float* fixed_scale[MAX_BITS + 1];    // [rows rounded up]
};

struct Job {
    const PmpdMatrix* matrix;
    int bits;
    int64_t tokens;
    const void* x;   // [tokens, x_stride]: float32, or what `prepare` of the level made of it
    int64_t x_stride;
    void* y;         // [tokens, y_stride], or, dequantized, [rows from first_row, y_stride]; in the type of the matrix
    int64_t y_stride;
    int64_t first_row;
    const float* scales;  // [tokens, scales_stride]: what a unit of x is worth, by block, where x was made fixed point
    int64_t scales_stride;
};

struct Shape {
    int64_t full_blocks;
    int tail_runs;               // runs of the shorter last block, 0 where there is none
    int64_t tail_pair_bytes;     // its bytes of level 0 per row
    int64_t group_bytes[2];      // bytes of a group of rows in level 0, in any other level
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

// The implementation for one class of processors. A function works on groups begin..end of rows; null: that of the next lower level.
struct Level {
    const char* name;
    void (*linear)(const Job*, int64_t begin, int64_t end);        // x float32
    void (*linear_fixed)(const Job*, int64_t begin, int64_t end);  // x as `prepare` leaves it; null: bfloat16 tokens become float32
    void (*prepare)(const Job*, const uint16_t* x, int64_t x_stride, uint32_t* pairs, float* scales);
    void (*dequantize)(const Job*, int64_t begin, int64_t end);    // to y
    void (*attend)(const Attention*, float* scores, int64_t begin, int64_t end);
};

extern const Level portable_level;
#if defined(__x86_64__)
#define PMPD_X86 1
extern const Level avx2_level, avx512_level, avx512vnni_level;
#endif
