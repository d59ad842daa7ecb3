// One decode step of a Llama tree (Mistral's and Qwen2's are the same): embedding to logits in one parallel region. Matrices are in
// fixed point, everything between them is float32; keys and values are rounded to the bfloat16 of the cache. Included after fixed.h.
//
// Threads take rows of a product, or items of attention, a part at a time, so that one which gets less of its processor holds nobody
// up for long, and wait for each other in between. What all of them need and is
// cheap (norms, tokens in fixed point) each computes for itself. So results depend neither on the number of threads nor on the other
// tokens of the step.
#pragma once
#include "fixed.h"
#include "step.h"

#include <sched.h>
#include <time.h>

namespace {

struct Worker {  // what one thread needs of a step
    const PmpdStep* step;
    const StepRoom* room;
    int thread, threads;
    int8_t* x;       // [tokens, padded]
    float *scales, *sums, *line, *scores;
    uint8_t* bytes;  // FIXED_TILE_ROWS rows
};

// The next of so many items that no thread has taken yet, at least `least` of them; false: there are none. `what` counts over the step.
INLINE bool take(const Worker& w, int64_t what, int64_t items, int64_t least, int64_t& begin, int64_t& end) {
    int64_t size = w.threads == 1 ? items : items / (w.threads * 8);
    if (size < least) size = least;
    begin = __atomic_fetch_add(w.room->taken + what * TAKEN_STRIDE, size, __ATOMIC_RELAXED);
    end = begin + size < items ? begin + size : items;
    return begin < items;
}

// `line` = x times 1 / rms(x) times weight.
INLINE void rms_norm(const float* x, const float* weight, int64_t size, float epsilon, float* line) {
    Floats sum = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats v = load_floats_at(x + i);
        sum += v * v;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(sum) / (float)size + epsilon);
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats v = load_floats_at(x + i) * factor * load_floats_at(weight + i);
        __builtin_memcpy(line + i, &v, sizeof(v));
    }
}

// All tokens' x [columns], normed where there is a weight, in fixed point.
void prepare_tokens(const Worker& w, const float* x, int64_t stride, int64_t columns, const float* norm) {
    const FixedShape s = fixed_shape_of(columns);
    for (int64_t t = 0; t < w.step->tokens; ++t) {
        const float* in = x + t * stride;
        if (norm) {
            rms_norm(in, norm, columns, w.step->epsilon, w.line);
            in = w.line;
        }
        prepare_token(in, columns, w.x + t * s.halves * HALF_COLUMNS, w.scales + t * s.units, w.sums + t);
    }
}

// Groups begin..end of y [tokens, stride] = (or +=) the prepared tokens times the matrix, each token at its precision.
void multiply_segments(const Worker& w, const PmpdMatrix* matrix, float* y, int64_t stride, int kind, int64_t begin, int64_t end) {
    const FixedShape s = fixed_shape_of(matrix->columns);
    const int64_t padded = s.halves * HALF_COLUMNS;
    int64_t first = 0;
    for (int64_t i = 0; i < w.step->segments; ++i) {
        const int64_t stop = w.step->segment_stops[i];
        const FixedJob job = {matrix, (int)w.step->segment_bits[i], stop - first, w.x + first * padded, padded, w.scales + first * s.units, s.units,
                              w.sums + first, y + first * stride, stride, kind};
        multiply_fixed(&job, begin, end, w.bytes);
        first = stop;
    }
}

enum { LEAST_GROUPS = 8 };

void multiply_share(const Worker& w, int64_t what, const PmpdMatrix* matrix, float* y, int64_t stride, int kind) {
    int64_t begin, end;
    while (take(w, what, (matrix->rows + GROUP_ROWS - 1) / GROUP_ROWS, LEAST_GROUPS, begin, end))
        multiply_segments(w, matrix, y, stride, kind, begin, end);
}

// x [dim] turned by the angles: rotate_half of transformers.
INLINE void rotate(float* x, const float* cosine, const float* sine, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
}

// One token's attention by the query heads of one key head; its key and value go to the cache first.
void attention_item(const Worker& w, const PmpdLayer& layer, int64_t item) {
    const PmpdStep* s = w.step;
    const int64_t dim = s->dim, group = s->heads / s->key_heads, width = (s->heads + 2 * s->key_heads) * dim;
    const int64_t t = item / s->key_heads, head = item % s->key_heads;
    const float *cosine = s->cosine + t * dim, *sine = s->sine + t * dim;
    float* line = w.room->wide + t * width;
    for (int64_t g = 0; g < group; ++g) {
        float* query = line + (head * group + g) * dim;
        rotate(query, cosine, sine, dim);
        __builtin_memcpy(w.room->attended + (t * s->heads + head * group + g) * dim, query, (size_t)dim * 4);
    }
    float *key = line + (s->heads + head) * dim, *value = line + (s->heads + s->key_heads + head) * dim;
    rotate(key, cosine, sine, dim);
    const int64_t at = s->slots[t] * s->slot_stride + head * s->head_stride + (s->lengths[t] - 1) * s->position_stride;
    for (int64_t d = 0; d < dim; ++d) {
        ((uint16_t*)layer.keys)[at + d] = to_bfloat16(key[d]);
        ((uint16_t*)layer.values)[at + d] = to_bfloat16(value[d]);
    }
    // queries are read before `out` of their head is written, so both can be one place
    const Attention attention = {w.room->attended, (const float*)layer.keys, (const float*)layer.values, s->slots, s->lengths, w.room->attended,
                                 s->heads, s->key_heads, dim, s->slot_stride, s->head_stride, s->position_stride, layer.window, s->scale};
    attend_items<uint16_t>(&attention, w.scores, item, item + 1);
}

void attention_share(const Worker& w, int64_t what, const PmpdLayer& layer) {
    int64_t begin, end;
    while (take(w, what, w.step->tokens * w.step->key_heads, 1, begin, end))
        for (int64_t item = begin; item < end; ++item) attention_item(w, layer, item);
}

// gate := silu(gate) * up, on the rows of this thread.
void gate_share(const Worker& w, int64_t what, const PmpdLayer& layer) {
    const PmpdStep* s = w.step;
    float *gate = w.room->wide, *up = gate + s->tokens * s->inner;
    int64_t begin, end;
    while (take(w, what, (s->inner + GROUP_ROWS - 1) / GROUP_ROWS, LEAST_GROUPS, begin, end)) {
        multiply_segments(w, layer.gate, gate, s->inner, OUT_FLOAT32, begin, end);
        multiply_segments(w, layer.up, up, s->inner, OUT_FLOAT32, begin, end);
        const int64_t first = begin * GROUP_ROWS, last = end * GROUP_ROWS < s->inner ? end * GROUP_ROWS : s->inner;
        for (int64_t t = 0; t < s->tokens; ++t)
            for (int64_t i = first; i < last; i += LANES) {
                const int64_t left = last - i < LANES ? last - i : (int64_t)LANES;
                Floats g = {}, u = {};
                __builtin_memcpy(&g, gate + t * s->inner + i, (size_t)left * 4);
                __builtin_memcpy(&u, up + t * s->inner + i, (size_t)left * 4);
                const Floats e = exponential(g < 0.0f ? g : -g);  // of -|g|
                g = g * u * (g < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
                __builtin_memcpy(gate + t * s->inner + i, &g, (size_t)left * 4);
            }
    }
}

// Rows of a bfloat16 matrix times up to MT tokens. x [hidden]: of 16 neighbours, the 8 of even columns first, then the odd ones.
template <int R, int MT>
INLINE void dense_rows(const uint16_t* weights, int64_t columns, const float* x, int64_t x_stride, float* y, int64_t y_stride) {
    __m256 sum[R][MT];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < MT; ++t) sum[r][t] = _mm256_setzero_ps();
    for (int64_t i = 0; i < columns; i += 16) {
        __m256 even[R], odd[R];
        for (int r = 0; r < R; ++r) {
            _mm_prefetch((const char*)(weights + (r + R) * columns + i), _MM_HINT_T0);
            const __m256i both = load_bytes(weights + r * columns + i);
            even[r] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            odd[r] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
        }
        for (int t = 0; t < MT; ++t) {
            const __m256 a = _mm256_loadu_ps(x + t * x_stride + i), b = _mm256_loadu_ps(x + t * x_stride + i + 8);
            for (int r = 0; r < R; ++r) sum[r][t] = _mm256_fmadd_ps(odd[r], b, _mm256_fmadd_ps(even[r], a, sum[r][t]));
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < MT; ++t) y[t * y_stride + r] = sum_of(sum[r][t]);
}

// Rows begin..end of the dense head times all tokens' x.
void dense_head(const PmpdStep* s, const float* x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
        const int rows = end - row >= 4 ? 4 : 1;
        const uint16_t* weights = s->dense_head + row * s->hidden;
        int64_t t = 0;
        for (; rows == 4 && t + 2 <= s->tokens; t += 2) dense_rows<4, 2>(weights, s->hidden, x + t * s->hidden, s->hidden, s->logits + t * s->vocabulary + row, s->vocabulary);
        for (; t < s->tokens; ++t) {
            float* y = s->logits + t * s->vocabulary + row;
            if (rows == 4) dense_rows<4, 1>(weights, s->hidden, x + t * s->hidden, s->hidden, y, s->vocabulary);
            else dense_rows<1, 1>(weights, s->hidden, x + t * s->hidden, s->hidden, y, s->vocabulary);
        }
        row += rows;
    }
}

void head_share(const Worker& w) {
    const PmpdStep* s = w.step;
    const int64_t what = s->layer_count * TAKES, groups = (s->vocabulary + GROUP_ROWS - 1) / GROUP_ROWS;
    int64_t begin, end;
    if (s->head) {
        prepare_tokens(w, w.room->x, s->hidden, s->hidden, s->norm);
        const FixedShape shape = fixed_shape_of(s->hidden);
        const FixedJob job = {s->head, 8, s->tokens, w.x, shape.halves * HALF_COLUMNS, w.scales, shape.units, w.sums, s->logits, s->vocabulary, OUT_FLOAT32};
        while (take(w, what, groups, LEAST_GROUPS, begin, end)) multiply_fixed(&job, begin, end, w.bytes);
        return;
    }
    float* x = w.room->lines + w.thread * s->tokens * s->hidden;
    for (int64_t t = 0; t < s->tokens; ++t) {
        rms_norm(w.room->x + t * s->hidden, s->norm, s->hidden, s->epsilon, w.line);
        for (int64_t i = 0; i < s->hidden; ++i) x[t * s->hidden + i / 16 * 16 + i % 2 * 8 + i % 16 / 2] = w.line[i];
    }
    while (take(w, what, groups, LEAST_GROUPS, begin, end)) {
        const int64_t last = end * GROUP_ROWS < s->vocabulary ? end * GROUP_ROWS : s->vocabulary;
        dense_head(s, x, begin * GROUP_ROWS, last);
    }
}

int64_t ticks(bool of_thread) {
    timespec now;
    clock_gettime(of_thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

void meet(Barrier* barrier, int threads) {
    if (threads == 1) return;
    const int generation = __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->generation, generation + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int turn = 0; __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE) == generation; ++turn)
        if (turn < BARRIER_TURNS) _mm_pause();
        else sched_yield();
}

void decode_step(const PmpdStep* s, const StepRoom* room, int thread, int threads) {
    char* own = room->own + thread * room->own_bytes;
    Worker w = {s, room, thread, threads, (int8_t*)(own + room->x_at), (float*)(own + room->scales_at), (float*)(own + room->sums_at),
                (float*)(own + room->line_at), (float*)(own + room->scores_at), (uint8_t*)(own + room->bytes_at)};
    const int64_t width = (s->heads + 2 * s->key_heads) * s->dim;
    int64_t* times = thread == 0 ? s->times : nullptr;
    int64_t since = times ? ticks(s->cpu_clock) : 0;
    auto spent = [&](int part) {
        if (!times) return;
        const int64_t now = ticks(s->cpu_clock);
        times[part] += now - since;
        since = now;
    };
    auto wait = [&](int part) {
        spent(part);
        meet(room->barrier, threads);
        spent(TIME_WAIT);
    };
    for (int64_t t = thread; t < s->tokens; t += threads)
        for (int64_t i = 0; i < s->hidden; ++i) room->x[t * s->hidden + i] = from_bfloat16(s->embedding[s->ids[t] * s->hidden + i]);
    wait(TIME_NORM);
    for (int64_t index = 0; index < s->layer_count; ++index) {
        const PmpdLayer& layer = s->layers[index];
        const int64_t first = index * TAKES;
        prepare_tokens(w, room->x, s->hidden, s->hidden, layer.norm);
        spent(TIME_NORM);
        multiply_share(w, first + TAKE_QUERY, layer.q, room->wide, width, OUT_FLOAT32);
        multiply_share(w, first + TAKE_KEY, layer.k, room->wide + s->heads * s->dim, width, OUT_FLOAT32);
        multiply_share(w, first + TAKE_VALUE, layer.v, room->wide + (s->heads + s->key_heads) * s->dim, width, OUT_FLOAT32);
        wait(TIME_PRODUCTS);
        attention_share(w, first + TAKE_ATTENTION, layer);
        wait(TIME_ATTENTION);
        prepare_tokens(w, room->attended, s->heads * s->dim, s->heads * s->dim, nullptr);
        spent(TIME_NORM);
        multiply_share(w, first + TAKE_OUT, layer.out, room->x, s->hidden, OUT_ADD);
        wait(TIME_PRODUCTS);
        prepare_tokens(w, room->x, s->hidden, s->hidden, layer.post_norm);
        spent(TIME_NORM);
        gate_share(w, first + TAKE_GATE, layer);
        wait(TIME_PRODUCTS);
        prepare_tokens(w, room->wide, s->inner, s->inner, nullptr);
        spent(TIME_NORM);
        multiply_share(w, first + TAKE_DOWN, layer.down, room->x, s->hidden, OUT_ADD);
        wait(TIME_PRODUCTS);
    }
    head_share(w);
    spent(TIME_HEAD);
}

}  // namespace
