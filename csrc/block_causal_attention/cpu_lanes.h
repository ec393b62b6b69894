// What attention on the CPU does to lanes besides products: logarithms, and rows of tensors into lanes and back.
#pragma once

#include "../common/exp.h"
#include "../common/rows.h"
#include "cpu_product.h"

namespace ard {
namespace {

ARD_INLINE Ints load_ints(const int32_t* from) {
  Ints ints;
  std::memcpy(&ints, from, sizeof ints);
  return ints;
}

// Whether a lane is not 0.
ARD_INLINE bool any(const Ints& x) {
  int32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) bits |= x[lane];
  return bits;
}

// log2 of x >= 1 within 2 units in the last place or 1e-7; NaN of NaN, infinity of infinity. x is m 2^n with m from
// sqrt(1/2) on, and log2 m the series of the inverse hyperbolic tangent of (m - 1) / (m + 1).
ARD_INLINE Lanes log2_lanes(const Lanes& x) {
  const Ints bits = (Ints)x, exponent = (bits - 0x3f3504f3) >> 23;
  const Lanes m = (Lanes)(bits - (exponent << 23)), s = (m - 1) / (m + 1), s2 = s * s;
  Lanes y = s2 * (2 * 1.44269504f / 9) + 2 * 1.44269504f / 7;
  y = y * s2 + 2 * 1.44269504f / 5;
  y = y * s2 + 2 * 1.44269504f / 3;
  y = y * s2 + 2 * 1.44269504f;
  const Lanes sum = y * s + __builtin_convertvector(exponent, Lanes);
  return x < __builtin_inff() ? sum : x;
}

// Blocks of 8 x 8 or 4 x 4 numbers are transposed in registers: row i of them comes from rows[i].
#if defined(__AVX__)
typedef __m256 Block;
constexpr int64_t kBlock = 8;

ARD_INLINE void load_transposed(const float* const (&rows)[kBlock], Block (&x)[kBlock]) {
  Block four[kBlock];  // half a row, and beside it that of the row 4 below: so no half has to cross over
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const float* row = rows[i % 4] + i / 4 * 4;
    four[i] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(rows[i % 4 + 4] + i / 4 * 4), 1);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Block low = _mm256_unpacklo_ps(four[i], four[i + 1]), high = _mm256_unpackhi_ps(four[i], four[i + 1]);
    const Block low2 = _mm256_unpacklo_ps(four[i + 2], four[i + 3]);
    const Block high2 = _mm256_unpackhi_ps(four[i + 2], four[i + 3]);
    x[i] = _mm256_shuffle_ps(low, low2, 0x44), x[i + 1] = _mm256_shuffle_ps(low, low2, 0xee);
    x[i + 2] = _mm256_shuffle_ps(high, high2, 0x44), x[i + 3] = _mm256_shuffle_ps(high, high2, 0xee);
  }
}
#else
typedef float Block __attribute__((vector_size(4 * sizeof(float))));
constexpr int64_t kBlock = 4;

#if defined(__clang__)
#define ARD_PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(sizeof(Block))));
#define ARD_PICK(x, y, ...) __builtin_shuffle(x, y, Places{__VA_ARGS__})
#endif

ARD_INLINE void load_transposed(const float* const (&rows)[kBlock], Block (&x)[kBlock]) {
  for (int64_t k = 0; k < kBlock; ++k) std::memcpy(&x[k], rows[k], sizeof(Block));
  const Block ab_low = ARD_PICK(x[0], x[1], 0, 4, 1, 5), ab_high = ARD_PICK(x[0], x[1], 2, 6, 3, 7);
  const Block cd_low = ARD_PICK(x[2], x[3], 0, 4, 1, 5), cd_high = ARD_PICK(x[2], x[3], 2, 6, 3, 7);
  x[0] = ARD_PICK(ab_low, cd_low, 0, 1, 4, 5), x[1] = ARD_PICK(ab_low, cd_low, 2, 3, 6, 7);
  x[2] = ARD_PICK(ab_high, cd_high, 0, 1, 4, 5), x[3] = ARD_PICK(ab_high, cd_high, 2, 3, 6, 7);
}
#undef ARD_PICK
#endif

// to(j)[i] = from(i)[j] * factor(j) for i < rows, j < columns, multiples of kBlock; from and to give rows.
template <class From, class Factor, class To>
ARD_INLINE void transpose(int64_t rows, int64_t columns, From from, Factor factor, To to) {
  for (int64_t i = 0; i < rows; i += kBlock) {
    const float* from_rows[kBlock];
    for (int64_t k = 0; k < kBlock; ++k) from_rows[k] = from(i + k);
    for (int64_t j = 0; j < columns; j += kBlock) {
      Block block[kBlock];
      load_transposed(from_rows, block);
#pragma GCC unroll 8
      for (int64_t k = 0; k < kBlock; ++k) {
        block[k] *= factor(j + k);
        std::memcpy(to(j + k) + i, &block[k], sizeof(Block));
        from_rows[k] += kBlock;
      }
    }
  }
}

}  // namespace
}  // namespace ard
