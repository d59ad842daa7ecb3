// Products in fixed point and the decode step, for AVX2 with FMA.
#include "bitplane.h"

#ifdef PMPD_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

// Products are added in 16 bits first, two neighbours a lane, and then in 32. x is -127..127; so many w of B bits can be added in 16.
template <int B>
constexpr int steps() { return B == 2 ? 4 : B == 3 ? 2 : 1; }

INLINE __m256i add_products(__m256i part, __m256i w, __m256i x) {
    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w, x));
    __asm__("" : "+x"(part));  // else GCC adds in another order, for which it has no registers
    return part;
}

INLINE __m256i add_part(__m256i sum, __m256i part) { return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1))); }

}  // namespace

#include "fixed.h"
#include "llama_step.h"

const Fixed fixed_avx2 = {prepare_token, multiply_fixed, dequantize_fixed, decode_step};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
