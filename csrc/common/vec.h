// 16 floats at a time in GCC/Clang vector extensions: one AVX-512 register, two AVX2, four SSE or NEON ones.
#pragma once

#include <cstdint>
#include <cstring>

namespace ard {
namespace {

#define ARD_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

ARD_INLINE Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

ARD_INLINE void store_lanes(float* to, const Lanes& lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// Halves down to one register each: of a vector type wider than a register GCC makes copies in memory, of an array of
// registers too (AVX2: 1.4 to 1.9 times the time of adaLN rows).
template <int64_t kSize>
struct VecOf {
  VecOf<kSize / 2> low, high;

  ARD_INLINE VecOf operator+(const VecOf& b) const { return {low + b.low, high + b.high}; }
  ARD_INLINE VecOf operator-(const VecOf& b) const { return {low - b.low, high - b.high}; }
  ARD_INLINE VecOf operator*(const VecOf& b) const { return {low * b.low, high * b.high}; }
  ARD_INLINE VecOf operator-(float b) const { return {low - b, high - b}; }
  ARD_INLINE VecOf operator*(float b) const { return {low * b, high * b}; }
  ARD_INLINE void load(const float* from) { low.load(from), high.load(from + kSize / 2); }
  ARD_INLINE void store(float* to) const { low.store(to), high.store(to + kSize / 2); }
};

template <>
struct VecOf<kLanes> {
  Lanes lanes;

  ARD_INLINE VecOf operator+(const VecOf& b) const { return {lanes + b.lanes}; }
  ARD_INLINE VecOf operator-(const VecOf& b) const { return {lanes - b.lanes}; }
  ARD_INLINE VecOf operator*(const VecOf& b) const { return {lanes * b.lanes}; }
  ARD_INLINE VecOf operator-(float b) const { return {lanes - b}; }
  ARD_INLINE VecOf operator*(float b) const { return {lanes * b}; }
  ARD_INLINE void load(const float* from) { std::memcpy(&lanes, from, sizeof lanes); }
  ARD_INLINE void store(float* to) const { std::memcpy(to, &lanes, sizeof lanes); }
};

constexpr int64_t kVec = 16;
using Vec = VecOf<kVec>;

ARD_INLINE Vec operator*(float a, const Vec& b) { return b * a; }
ARD_INLINE Vec& operator+=(Vec& a, const Vec& b) { return a = a + b; }

ARD_INLINE Vec load_vec(const float* from) {
  Vec v;
  v.load(from);
  return v;
}

ARD_INLINE void store_vec(float* to, const Vec& v) { v.store(to); }

// Sum of the 16 lanes, always in this order.
ARD_INLINE float sum_lanes(const Vec& v) {
  float lane[kVec], half[8], sum = 0;
  store_vec(lane, v);
  for (int i = 0; i < 8; ++i) half[i] = lane[i] + lane[i + 8];
  for (int i = 0; i < 4; ++i) sum += half[i] + half[i + 4];
  return sum;
}

}  // namespace
}  // namespace ard
