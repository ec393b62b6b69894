// 16 floats at a time in GCC/Clang vector extensions: one AVX-512 register, two AVX2, four SSE or NEON ones.
#pragma once

#include <cstdint>
#include <cstring>

namespace ard {
namespace {

constexpr int64_t kVec = 16;
typedef float Vec __attribute__((vector_size(kVec * sizeof(float))));

#define ARD_INLINE inline __attribute__((always_inline))

ARD_INLINE Vec load_vec(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

ARD_INLINE void store_vec(float* to, const Vec& v) { std::memcpy(to, &v, sizeof v); }

// Sum of the 16 lanes, always in this order.
ARD_INLINE float sum_lanes(const Vec& v) {
  float half[8], sum = 0;
  for (int i = 0; i < 8; ++i) half[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) sum += half[i] + half[i + 4];
  return sum;
}

}  // namespace
}  // namespace ard
