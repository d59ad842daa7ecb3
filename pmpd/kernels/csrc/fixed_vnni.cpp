// Products in fixed point and the decode step, for processors that also have AVX-512 VNNI, in 256 bits: the integers are the same, one instruction adds them.
#include "bitplane.h"

#ifdef PMPD_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512vnni")
#endif

namespace {

// Products are added in 32 bits, four neighbours a lane.
template <int B>
constexpr int steps() { return 4; }

INLINE __m256i add_products(__m256i part, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(part, w, x); }

INLINE __m256i add_part(__m256i sum, __m256i part) { return _mm256_add_epi32(sum, part); }

}  // namespace

#include "fixed.h"
#include "llama_step.h"

const Fixed fixed_vnni = {prepare_token, multiply_fixed, dequantize_fixed, decode_step};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
