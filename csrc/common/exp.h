// e^x of a register's lanes, for CPU kernels that are compiled once per ISA.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace ard {
namespace {

typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

// The larger one, x where either is NaN.
ARD_INLINE Lanes at_least(const Lanes& x, const Lanes& least) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, least, x);  // of a comparison and a choice GCC makes two instructions
#elif defined(__AVX__)
  return _mm256_max_ps(least, x);
#else
  return least > x ? least : x;
#endif
}

// e^x for x up to 88, 0 below -87.7, NaN of NaN: relative error at most 1.3e-7 + 1.4e-8 |x|, without fused
// multiply-adds 3e-7 + 4.5e-8 |x|. Of x / log 2 the whole part goes into the exponent, -127 as the exponent of 0; on
// [-1/2, 1/2] 2^f is a polynomial (degree 6, relative error 2e-9 before rounding).
ARD_INLINE Lanes exp_lanes(const Lanes& x) {
  const Lanes magic = Lanes{} + 12582912.0f;  // 1.5 * 2^23: a sum with it is a whole number
  const Lanes held = at_least(x, Lanes{} - 88.02969f);
  const Lanes shifted = held * 1.44269504088896340736f + magic;
  const Lanes f = held * 1.44269504088896340736f - (shifted - magic);
  Lanes y = Lanes{} + 1.535336050e-4f;
  y = y * f + 1.339887502e-3f;
  y = y * f + 9.618436918e-3f;
  y = y * f + 5.550332367e-2f;
  y = y * f + 2.402264774e-1f;
  y = y * f + 6.931471825e-1f;
  y = y * f + 1.0f;
  const Ints exponent = ((Ints)shifted + (127 - 0x4b400000)) << 23;
  return y * (Lanes)exponent;
}

}  // namespace
}  // namespace ard
