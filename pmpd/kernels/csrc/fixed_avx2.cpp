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

// sum + the products of four neighbours a lane: w bytes 0..127, x -127..127. Two such products fit 16 bits.
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}

}  // namespace

#include "fixed.h"
#include "llama_step.h"

const Fixed fixed_avx2 = {prepare_token, multiply_fixed, dequantize_fixed, decode_step};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
