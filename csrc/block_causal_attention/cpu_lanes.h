// What attention on the CPU does to lanes besides products: 2^x, and rows of tensors into lanes and back.
#pragma once

#include "../common/rows.h"
#include "../common/vec.h"
#include "cpu_product.h"

namespace ard {
namespace {

typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

ARD_INLINE Ints load_ints(const int32_t* from) {
  Ints ints;
  std::memcpy(&ints, from, sizeof ints);
  return ints;
}

// The larger one, x where either is NaN.
ARD_INLINE Lanes at_least(const Lanes& x, const Lanes& least) {
#if defined(__AVX512F__)
  return _mm512_max_ps(least, x);  // of a comparison and a choice GCC makes two instructions
#elif defined(__AVX__)
  return _mm256_max_ps(least, x);
#else
  return least > x ? least : x;
#endif
}

// 2^x for x up to 127, within 1 unit in the last place; 0 below -126.5, NaN of NaN. The whole part of x goes into the
// exponent, -127 as the exponent of 0; on [-1/2, 1/2] 2^x is a polynomial (degree 6, relative error 2e-9 before
// rounding).
ARD_INLINE Lanes exp2_lanes(const Lanes& x) {
  const Lanes magic = Lanes{} + 12582912.0f;  // 1.5 * 2^23: a sum with it is a whole number
  const Lanes held = at_least(x, Lanes{} - 127.0f);
  const Lanes shifted = held + magic;
  const Lanes f = held - (shifted - magic);
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

// The transposed of 4 x 4 numbers.
ARD_INLINE void transpose_four(Four& a, Four& b, Four& c, Four& d) {
#if defined(__clang__)
#define ARD_PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define ARD_PICK(x, y, ...) __builtin_shuffle(x, y, FourInts{__VA_ARGS__})
  typedef int32_t FourInts __attribute__((vector_size(4 * sizeof(int32_t))));
#endif
  const Four ab_low = ARD_PICK(a, b, 0, 4, 1, 5), ab_high = ARD_PICK(a, b, 2, 6, 3, 7);
  const Four cd_low = ARD_PICK(c, d, 0, 4, 1, 5), cd_high = ARD_PICK(c, d, 2, 6, 3, 7);
  a = ARD_PICK(ab_low, cd_low, 0, 1, 4, 5), b = ARD_PICK(ab_low, cd_low, 2, 3, 6, 7);
  c = ARD_PICK(ab_high, cd_high, 0, 1, 4, 5), d = ARD_PICK(ab_high, cd_high, 2, 3, 6, 7);
#undef ARD_PICK
}

// to[j][i] = from[i][j] * factor for i < rows, j < columns, multiples of 4.
inline void transpose(const float* from, int64_t from_step, int64_t rows, int64_t columns, float factor, float* to,
                      int64_t to_step) {
  for (int64_t i = 0; i < rows; i += 4) {
    for (int64_t j = 0; j < columns; j += 4) {
      Four part[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&part[k], from + (i + k) * from_step + j, sizeof(Four));
      transpose_four(part[0], part[1], part[2], part[3]);
      for (int k = 0; k < 4; ++k) {
        part[k] *= factor;
        std::memcpy(to + (j + k) * to_step + i, &part[k], sizeof(Four));
      }
    }
  }
}

}  // namespace
}  // namespace ard
