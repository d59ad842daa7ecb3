// What a decode step of a Llama tree is given (mirrored in llama_step.py), and what its threads share.
#pragma once
#include "bitplane.h"

struct PmpdLayer {
    const float* norm;
    const PmpdMatrix *q, *k, *v, *out;
    const float* post_norm;
    const PmpdMatrix *gate, *up, *down;
    void *keys, *values;  // bfloat16 [slots, key heads, positions, dim]
    int64_t window;       // attention sees only so many last positions; 0: all
};

enum { TIME_PRODUCTS, TIME_NORM, TIME_ATTENTION, TIME_HEAD, TIME_WAIT, TIMES };

struct PmpdStep {
    const PmpdLayer* layers;
    int64_t layer_count, hidden, heads, key_heads, dim, inner, vocabulary;
    int64_t slot_stride, head_stride, position_stride;  // of all caches, in numbers
    const uint16_t* embedding;   // bfloat16 [vocabulary, hidden]
    const float* norm;
    const PmpdMatrix* head;      // of 8 bits, or null: then
    const uint16_t* dense_head;  // bfloat16 [vocabulary, hidden]
    float epsilon, scale;
    // This step's. Tokens are rows of different slots; neighbours of equal precision are a segment.
    int64_t tokens, segments;
    const int64_t *ids, *slots, *lengths;           // [tokens]; lengths: keys that a token sees, its own included
    const float *cosine, *sine;                     // [tokens, dim]
    const int64_t *segment_stops, *segment_bits;    // [segments]
    float* logits;                                  // [tokens, vocabulary]
    int64_t* times;                                 // [TIMES] nanoseconds of the first thread, added to; or null
    int64_t cpu_clock;                              // of that thread's processor time, not of time on the wall
};

// Where threads wait for each other. Spinning is bounded: on a machine that others use, the one waited for may not be running.
enum { BARRIER_TURNS = 2000 };
struct Barrier {
    int arrived, generation;
};

// What threads take parts of, in this order in each layer; the head comes after the layers.
enum { TAKE_QUERY, TAKE_KEY, TAKE_VALUE, TAKE_ATTENTION, TAKE_OUT, TAKE_GATE, TAKE_DOWN, TAKES, TAKEN_STRIDE = 8 };

struct StepRoom {
    Barrier* barrier;
    int64_t* taken;  // [layers * TAKES + 1, TAKEN_STRIDE]: how many items have been taken
    float *x, *wide, *attended, *lines;  // [tokens, hidden], [tokens, 2 inner or all heads], [tokens, heads * dim], [threads, tokens, hidden]
    char* own;                           // per thread own_bytes, in it:
    int64_t own_bytes, x_at, scales_at, sums_at, line_at, scores_at, bytes_at;
};
