// Vectors over the elements of a row, for CPU kernels that are compiled once per ISA: internal linkage throughout.
#pragma once

#include <cstdint>
#include <cstring>

namespace ard {
namespace {

#define ARD_INLINE inline __attribute__((always_inline))

// As wide as the ISA's registers: GCC takes a shuffle of a wider vector apart, element by element.
typedef float Vec4 __attribute__((vector_size(4 * sizeof(float))));
typedef float Vec8 __attribute__((vector_size(8 * sizeof(float))));
typedef float Vec16 __attribute__((vector_size(16 * sizeof(float))));
#if defined(__AVX512F__)
typedef Vec16 Wide;
#elif defined(__AVX__)
typedef Vec8 Wide;
#else
typedef Vec4 Wide;
#endif
constexpr int64_t kWide = sizeof(Wide) / sizeof(float);

template <class V>
ARD_INLINE V load(const float* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
ARD_INLINE void save(float* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

// body(i, V{}) over a row whose length is a multiple of 8: V is Wide, and 8 floats for what 16 leave.
template <class Body>
ARD_INLINE void each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) body(i, Wide{});
  if (kWide > 8 && i < n) body(i, Vec8{});
}

template <class V>
ARD_INLINE float sum_of_lanes(const V& v) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  float sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += v[i] + v[i + kLanes / 2];
  return sum;
}

// Sum of term(i, V{}) over the row, in four chains that hide the latency of an addition.
template <class Term>
ARD_INLINE float sum_over(int64_t n, Term term) {
  Wide chains[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWide <= n; i += 4 * kWide)
    for (int c = 0; c < 4; ++c) chains[c] += term(i + c * kWide, Wide{});
  for (; i + kWide <= n; i += kWide) chains[0] += term(i, Wide{});
  const float sum = sum_of_lanes((chains[0] + chains[1]) + (chains[2] + chains[3]));
  return kWide > 8 && i < n ? sum + sum_of_lanes(term(i, Vec8{})) : sum;
}

// The two of each pair exchanged.
#if defined(__clang__)
#define ARD_EXCHANGE(V, ...) \
  ARD_INLINE V exchange(const V& v) { return __builtin_shufflevector(v, v, __VA_ARGS__); }
#else
#define ARD_EXCHANGE(V, ...)                                        \
  ARD_INLINE V exchange(const V& v) {                               \
    typedef int32_t Places __attribute__((vector_size(sizeof(V)))); \
    return __builtin_shuffle(v, Places{__VA_ARGS__});               \
  }
#endif
ARD_EXCHANGE(Vec4, 1, 0, 3, 2)
ARD_EXCHANGE(Vec8, 1, 0, 3, 2, 5, 4, 7, 6)
ARD_EXCHANGE(Vec16, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#undef ARD_EXCHANGE

}  // namespace
}  // namespace ard
