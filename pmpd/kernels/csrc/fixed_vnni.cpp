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

// sum + the products of four neighbours a lane: w bytes 0..255, x -127..127.
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }

}  // namespace

#include "fixed.h"
#include "llama_step.h"

const Fixed fixed_vnni = {prepare_token, multiply_fixed, dequantize_fixed, decode_step};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
