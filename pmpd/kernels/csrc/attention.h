// Attention of single query tokens over caches of their own length. Written with the compiler's vectors and included, as static
// functions, by one file per class of processors.
#pragma once
#include "bitplane.h"

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
enum { LANES = 16 };

INLINE Floats load_floats_at(const float* at) {
    Floats v;
    __builtin_memcpy(&v, at, sizeof(v));
    return v;
}

INLINE Floats load_floats_at(const uint16_t* at) {  // bfloat16
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef uint32_t Words __attribute__((vector_size(64)));
    Halves halves;
    __builtin_memcpy(&halves, at, sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Floats v;
    __builtin_memcpy(&v, &words, sizeof(v));
    return v;
}

INLINE float sum_lanes(const Floats& v) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight[2];  // by memory, which compilers see through: __builtin_shufflevector came with GCC 12
    __builtin_memcpy(eight, &v, sizeof(eight));
    eight[0] += eight[1];
    Four four[2];
    __builtin_memcpy(four, eight, sizeof(four));
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

// e**x for x <= 0, to about 1e-7; 0 below -87.
INLINE Floats exponential(const Floats& x) {
    const Floats scaled = x * 1.44269504f;
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
    const Floats shifted = scaled + magic, whole = shifted - magic;
    const Floats f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    Ints bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4b400000 + 127) << 23;
    Floats power;
    __builtin_memcpy(&power, &bits, sizeof(power));
    return x < -87.0f ? Floats{} : p * power;
}

// Items begin..end of [rows, key heads]; caches of T, float or (as uint16_t) bfloat16.
template <class T>
INLINE void attend_items(const Attention* a, float* scores, int64_t begin, int64_t end) {
    const int64_t group = a->query_heads / a->key_heads, dim = a->dim;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / a->key_heads, head = item % a->key_heads, length = a->lengths[row];
        const int64_t first = a->window > 0 && length > a->window ? length - a->window : 0, count = length - first;
        const T* keys = (const T*)a->keys + a->slots[row] * a->slot_stride + head * a->head_stride + first * a->position_stride;
        const T* values = (const T*)a->values + a->slots[row] * a->slot_stride + head * a->head_stride + first * a->position_stride;
        const int64_t room = (count + LANES - 1) / LANES * LANES;
        for (int64_t g = 0; g < group; ++g) {
            const float* q = a->queries + (row * a->query_heads + head * group + g) * dim;
            float* out = a->out + (row * a->query_heads + head * group + g) * dim;
            float largest = -__builtin_inff();
            for (int64_t t = 0; t < count; ++t) {
                Floats sum = {};
                for (int64_t d = 0; d < dim; d += LANES) sum += load_floats_at(q + d) * load_floats_at(keys + t * a->position_stride + d);
                scores[t] = sum_lanes(sum) * a->scale;
                if (scores[t] > largest) largest = scores[t];
            }
            for (int64_t t = count; t < room; ++t) scores[t] = -__builtin_inff();
            Floats total = {};
            for (int64_t t = 0; t < room; t += LANES) {
                const Floats e = exponential(load_floats_at(scores + t) - largest);
                __builtin_memcpy(scores + t, &e, sizeof(e));
                total += e;
            }
            const float inverse = 1.0f / sum_lanes(total);
            for (int64_t d = 0; d < dim; d += LANES) {
                Floats even = {}, odd = {};
                int64_t t = 0;
                for (; t + 1 < count; t += 2) {
                    even += scores[t] * load_floats_at(values + t * a->position_stride + d);
                    odd += scores[t + 1] * load_floats_at(values + (t + 1) * a->position_stride + d);
                }
                if (t < count) even += scores[t] * load_floats_at(values + t * a->position_stride + d);
                even = (even + odd) * inverse;
                __builtin_memcpy(out + d, &even, sizeof(even));
            }
        }
    }
}

void attend(const Attention* a, float* scores, int64_t begin, int64_t end) { attend_items<float>(a, scores, begin, end); }

}  // namespace
